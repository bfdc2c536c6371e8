"""Stopping a run."""

from __future__ import annotations

import os
import signal
import time

import pytest

from gclkern.engine import stop_requests


def test_one_interrupt_that_arrives_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on the Ctrl-C that its processes have from the terminal already; only a later one gives up the checkpoint."""
    before = signal.getsignal(signal.SIGINT)
    now = time.monotonic()
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(stop) == 2
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
