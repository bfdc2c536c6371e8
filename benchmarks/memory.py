"""The peak of a process's memory, as the operating system sees it: tensors, the workspaces of the matrix library, everything."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc/self")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_PROC / 'status'} has no {field}")
    return int(found[1]) * 1024


def peak_bytes(function: Callable[[], object]) -> int:
    """By how much the resident set of this process exceeds, at its peak during the call, what it was before. Linux only.

    Pages that the process had before and reuses are not seen: call it in a fresh process, for one call. What the function needs only once, such as the
    library's threads, is best warmed up with small shapes.
    """
    gc.collect()
    (_PROC / "clear_refs").write_text("5")  # the peak so far becomes the present size
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before
