"""The server whose forks run train.py and ranks for other tests."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import PRELOADED, Run


def _describe(expected: list[str]) -> None:
    threads = list(Path("/proc/self/task").iterdir()) if Path("/proc/self/task").is_dir() else [None]
    print(len(threads), [name for name in expected if name not in sys.modules])  # noqa: T201


def test_a_fork_has_everything_imported_and_one_thread() -> None:
    """One that the server had would be missing, and whoever waits for it would wait forever."""
    installed = [name for name in PRELOADED if importlib.util.find_spec(name.partition(".")[0])]
    assert Run(_describe, installed).finish() == "1 []\n"


def _fail(seconds: float) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 has had enough")
    time.sleep(seconds)


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(AssertionError, match=r"\[-9, 1\]\n(.*\n)*.*rank 1 has had enough"):
        Run(_fail, 60.0, ranks=2).finish()
