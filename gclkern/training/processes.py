"""The processes of a run: their ranks, their collective calls, and requests to stop."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

_ALARM = getattr(signal, "SIGALRM", None)  # Windows has none


class Processes:
    """This process among those that ``torchrun`` started; a single process without it."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("`device=cuda`: torch sees no CUDA device here; leave it out to run on the CPU")
            if local >= torch.cuda.device_count():
                found = torch.cuda.device_count()
                raise ValueError(f"process {local} of this machine has no GPU of its own, torch sees {found}; start torchrun with --nproc-per-node {found}")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # Imported before there is a group, because its functions take the present group as a default argument, and DistributedDataParallel imports it.
            # Closing a group that is still referenced leaves threads of gloo running; one that holds a tensor while Python shuts down aborts the process.
            importlib.import_module("torch.distributed.nn")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @classmethod
    def single(cls, device: torch.device) -> Processes:
        """A single process, even under torchrun."""
        processes = object.__new__(cls)
        processes.world, processes.rank, processes.device = 1, 0, device
        return processes

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """Rows (ceil(total / world), ...) of every rank, of which rank r holds r, r + world, ...; in their order (total, ...)."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a collective call."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def close(self) -> None:
        """Leave the process group at the end of a successful run; a collective call.

        Not called after an error: with NCCL it would wait for the other processes, which wait for this one, and the error would not show until a timeout.
        """
        if self.world > 1:
            dist.destroy_process_group()


class StopRequests:
    """True once Ctrl-C or SIGTERM has asked the run to stop: it then finishes its step, writes a checkpoint and exits.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun, so signals within one second count as one. A later signal interrupts at once.
    So does an alarm if the step does not end within `patience` seconds, because it may be waiting for another process.
    """

    def __init__(self, patience: float = 10.0) -> None:
        self.patience = patience
        self.times: list[float] = []

    def __bool__(self) -> bool:
        return bool(self.times)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.times.append(time.monotonic())
        if number == _ALARM or self.times[-1] - self.times[0] > 1.0:
            raise KeyboardInterrupt
        self._set_alarm(self.patience)

    def accept(self) -> None:
        """Cancel the alarm: the step has ended, and writing the checkpoint has no time limit."""
        self._set_alarm(0.0)

    def _set_alarm(self, seconds: float) -> None:
        if _ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def stop_requests(patience: float = 10.0) -> Iterator[StopRequests]:
    """Handle the signals that ask to stop, see :class:`StopRequests`."""
    requests = StopRequests(patience)
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if _ALARM is None else [_ALARM])]
    before = {number: signal.signal(number, requests.note) for number in numbers}
    try:
        yield requests
    finally:
        requests.accept()
        for number, handler in before.items():
            signal.signal(number, handler)
