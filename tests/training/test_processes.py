"""The processes of a run, and stopping it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from gclkern.training.processes import Processes, stop_requests


def test_one_interrupt_that_arrives_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on the Ctrl-C that its processes have from the terminal already; only a later one gives up the checkpoint."""
    before = signal.getsignal(signal.SIGINT)
    now = time.monotonic()
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert len(stop.times) == 2
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own, torch sees 2; start torchrun with --nproc-per-node 2"):
        Processes("auto")


def test_a_step_that_does_not_end_is_interrupted() -> None:
    """It may wait for a batch that never comes: a signal that were only noted would not end the run."""
    with stop_requests(patience=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(30)


def test_a_checkpoint_may_take_its_time() -> None:
    with stop_requests(patience=0.2) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.accept()
        time.sleep(0.4)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
