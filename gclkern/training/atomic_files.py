"""Atomic writing of files, and error messages for failed writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gclkern.training.printable import printable


class WriteError(OSError):
    """A file or folder that cannot be written; the message names it, the cause and what to do."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a :class:`WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space on its disk" if full else "choose another place, or make this one writable"
        raise WriteError(f"{printable(str(path))} cannot be written ({error.strerror or error}); {remedy}") from error


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `path` always holds a complete file, the new one or the previous one. A failed write is cleaned up.

    It is written under another name, flushed to disk and renamed. A process that is killed may leave ``<name>.partial``, which the next write replaces.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> replace_file(path, lambda file: file.write(b"one line"))
        >>> path.read_text()
        'one line'
    """
    partial = path.with_name(path.name + ".partial")
    with write_errors(path):
        try:
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # flush the folder too, which stores the new name
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_file` for a small text."""
    replace_file(path, lambda file: file.write(text.encode()))
