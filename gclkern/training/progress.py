"""The progress of a phase of training, and when it is saved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gclkern.training.processes import Processes, StopRequests


@dataclass
class Progress:
    """The part of a phase's state that is not in its network or optimizer."""

    total: Tensor  # () float64: sum of this process's losses over the steps of the epoch
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    best: float = -1.0  # best accuracy on the held-out part so far
    centroids: dict[str, Tensor] = field(default_factory=dict)  # of DRO-LT and OLTR: "centroids" and "counts" by class, as they were computed last

    @classmethod
    def start(cls, device: torch.device) -> Progress:
        return cls(torch.zeros((), dtype=torch.float64, device=device))

    def next_epoch(self) -> None:
        self.total.zero_()
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """For a checkpoint; a collective call."""
        total = float(processes.mean(self.total.clone()))
        return {"total": total, "epoch": self.epoch, "step": self.step, "best": self.best, "centroids": self.centroids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.fill_(state["total"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.centroids = {name: value.to(self.total.device) for name, value in state["centroids"].items()}


class CheckpointTimer:
    """Decides for all processes together when a checkpoint is due: `seconds` after the last one, or when a signal has asked any of them to stop."""

    def __init__(self, processes: Processes, requests: StopRequests, seconds: float) -> None:
        self.processes, self.requests, self.seconds = processes, requests, seconds
        self.stopping = False
        self._last = time.monotonic()

    def due(self, *, phase_ends: bool = False) -> bool:
        """Whether to write a checkpoint now; afterwards `stopping` says whether to stop. A collective call."""
        self.stopping = self.processes.any(bool(self.requests))
        if self.stopping:
            self.requests.accept()
        due = self.stopping or self.processes.any(phase_ends or time.monotonic() - self._last >= self.seconds)
        if due:
            self._last = time.monotonic()
        return due
