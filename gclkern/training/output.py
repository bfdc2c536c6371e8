"""Text for the terminal, a file or a pipe whose reader may be gone."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback


def say(text: str) -> None:
    """Print a text. A reader that has seen enough, as in ``python train.py | head -1``, does not end the run.

    Letters that the output's encoding lacks, as in names of folders, are written as escapes.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
    except BrokenPipeError:
        _silence()


def finish_output() -> None:
    """Flush the output, as the interpreter does at its end, where it would complain of a reader that is gone."""
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
    """Send what is still to come nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
