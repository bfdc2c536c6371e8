"""The peak of memory during a call.

peak_bytes      of a process, as the operating system sees it: tensors, the workspaces of the matrix library, everything
allocated_peak  of tensors, as torch's allocators count them
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

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


def allocated_peak(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that the call holds at its peak beyond those that existed before, what it returns included.

    As torch's allocators count them: exact and repeatable, but without what a matrix library or a thread pool keeps for itself.
    """
    gc.collect()
    if device.type == "cuda":
        function()  # the matrix library's workspace for this stream comes from the same allocator and stays: it is no part of the call
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    # the events themselves: a trace written to a file and read again takes ten times as long
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [(event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(changes, key=lambda change: change[0])), initial=0))
