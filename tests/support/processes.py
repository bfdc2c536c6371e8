"""train.py, and functions on several ranks, in processes of their own: forks of a server that has everything imported, so that each starts in milliseconds."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]

# What runs and ranks import, the slowest of it in the middle of their work. A module that is not installed is left out.
PRELOADED = [
    "train", "hypothesis", "sklearn.datasets", "tests.support.crash_points", "torch._dynamo", "torch.distributed.nn", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.tensorboard", "triton",
]  # fmt: skip


@functools.cache
def _server() -> ForkServerContext:
    """Python's server of forks, started with one thread: a fork of a process with more of them may wait forever for one that it does not have."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _call(environment: dict[str, str], output: str, errors: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*arguments)


class Run:
    """A call `function(*arguments)` in a process of one thread for each rank, which finds its rank and the others as under torchrun."""

    def __init__(self, function: Callable[..., None], *arguments: Any, ranks: int = 1) -> None:
        self.output, self.errors = (tempfile.NamedTemporaryFile("r", prefix="run-") for _ in range(2))  # noqa: SIM115 (open as long as the run)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(ranks)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        self.processes = []
        for rank in map(str, range(ranks)):
            own = environment | ({"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {})
            process = _server().Process(target=_call, args=(own, self.output.name, self.errors.name, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, seconds: float) -> None:
        """So long, or until a process ends."""
        connection.wait([process.sentinel for process in self.processes], seconds)

    def kill(self) -> bool:
        """Kill all processes; whether one was still running."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def kill_after_checkpoint(self, folder: Path, seconds: float = 0.0, finished: str | None = None) -> None:
        """Kill all processes so many seconds after the first checkpoint of the run in `folder`, or after the first one since its phase `finished`."""

        def is_written() -> bool:
            last, before = folder / "last.pt", folder / f"{finished}.pt"
            return last.exists() and (finished is None or (before.exists() and last.stat().st_mtime_ns > before.stat().st_mtime_ns))

        until = time.monotonic() + 120
        while not is_written() and self.is_running and time.monotonic() < until:
            time.sleep(0.01)
        self.wait(seconds)
        self.kill()
        assert is_written(), self.errors.read()

    def finish(self) -> str:
        """What the processes print; all must end well, and one that does not ends the others."""
        until, running = time.monotonic() + 240, {process.sentinel: process for process in self.processes}
        while running and (ended := connection.wait(list(running), until - time.monotonic())):
            for sentinel in ended:
                process = running.pop(sentinel)  # type: ignore[call-overload]
                process.join()
            if any(process.exitcode for process in self.processes):
                break
        in_time = not running
        self.kill()
        output, errors = self.output.read(), self.errors.read()
        assert in_time and not any(process.exitcode for process in self.processes), f"{[process.exitcode for process in self.processes]}\n{output}{errors}"
        return output


def train_here(*arguments: object) -> None:
    """train.py in this process."""
    sys.argv = ["train.py", *map(str, arguments)]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def start_train(*arguments: object, ranks: int = 1) -> Run:
    return Run(train_here, *map(str, arguments), ranks=ranks)


def train(*arguments: object, ranks: int = 1) -> str:
    """What train.py prints when it ends well."""
    return start_train(*arguments, ranks=ranks).finish()


def _enter(function: Callable[..., None], *arguments: Any) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    function(dist.get_rank(), dist.get_world_size(), *arguments)
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, world, *arguments)` in `world` new processes that share a gloo process group on the CPU."""
    Run(_enter, function, *arguments, ranks=world).finish()
