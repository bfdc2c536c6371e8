"""The processes of a run, and stopping it."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

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


def _train_and_close(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = Processes("cpu")
    nn.parallel.DistributedDataParallel(nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
    processes.close()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists its threads as Linux does")
def test_closing_ends_the_threads_of_the_group() -> None:
    """One that still holds a tensor when Python shuts down calls std::terminate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_train_and_close, (port,), nprocs=2)
