"""The running statistics of a network, which move once a step, however many parts and processes a step is split into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gclkern.training.processes import Processes


class RunningStatistics:
    """Moves the buffers of a network that a forward pass moves, such as the running means of batch normalisation.

    In a step each part, on each process, moves them from where they were before the step. :meth:`end_step` then moves them by the mean of these moves. So all
    processes have the same, and one process that accumulates N parts has what N processes have.

        statistics.begin_step()
        for part in parts:
            ...                      # a forward pass
            statistics.end_part()
        statistics.end_step()
    """

    def __init__(self, network: nn.Module, processes: Processes, parts: int) -> None:
        self._processes, self._parts = processes, parts
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._idle = not self._buffers or processes.world * parts == 1  # the move of the only part is that of the step

    def begin_step(self) -> None:
        if self._idle:
            return
        self._before = self._read()
        self._moves = torch.zeros_like(self._before)

    def end_part(self) -> None:
        """Note the move of a forward pass and undo it."""
        if self._idle:
            return
        after = self._read()
        self._moves += torch.where(after == self._before, 0.0, after - self._before)  # a buffer may hold infinity, as some masks do
        self._write(self._before)

    def end_step(self) -> None:
        """A collective call."""
        if self._idle:
            return
        self._write(self._before + self._processes.mean(self._moves / self._parts))

    def _read(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        for buffer, value in zip(self._buffers, values.split([buffer.numel() for buffer in self._buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))
