"""Output to a terminal, a file, or a pipe that its reader may have closed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback


def echo(text: str) -> None:
    """Print a text. If the reader of a pipe has closed it, as in ``python train.py | head -1``, the run continues silently.

    Characters that the output's encoding does not have are escaped.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
    except BrokenPipeError:
        _silence()


def finish_output() -> None:
    """Flush the output at the end of a run, without the interpreter's error message if the reader has closed the pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()


def save_traceback(error: BaseException) -> str:
    """Write the traceback of an error into a temporary file, and return its name."""
    with tempfile.NamedTemporaryFile("w", prefix="train-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _silence() -> None:
    """Discard all further output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
