"""The collective calls of the sharded head. Errors name the call that failed.

Nothing is retried, and no call waits longer than the timeout of the process group (``init_process_group(timeout=...)``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_untraced: dict[str, Callable[..., Any]] = {}


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, excluded from torch.compile. Wrapped on first use, because `torch.compiler.disable` imports the compiler."""
    if function.__name__ not in _untraced:
        _untraced[function.__name__] = torch.compiler.disable(function)
    return _untraced[function.__name__]


class ShardError(RuntimeError):
    """The ranks of a process group do not agree on a call, or one of them has died; the message names the difference or the call."""


class Ranks:
    """The ranks of a process group, including this process; only this process if torch.distributed is not initialised.

    Args:
        group: a process group; None is the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        if self.alone and group is not None:
            raise ValueError("group is given but torch.distributed is not initialised; call torch.distributed.init_process_group first, or leave group out")
        self.group = group if group is not None or self.alone else dist.group.WORLD
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.world = 1 if self.alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks; pass a group that it belongs to")

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a copy of a module has the same ranks

    @contextmanager
    def _naming(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ShardError(
                f"rank {self.rank} of {self.world} failed while {purpose}: {error}. Another rank has died, left early or made another call; "
                "see its output, and start all ranks again from the last checkpoint"
            ) from error

    def gather_rows(self, rows: Tensor, purpose: str) -> Tensor:
        """Rows (n, ...) of every rank, n equal on each: (world * n, ...) in the order of the ranks."""
        if self.world == 1:
            return rows
        out = rows.new_empty((self.world * rows.shape[0], *rows.shape[1:]))
        with self._naming(purpose):
            dist.all_gather_into_tensor(out, rows.contiguous(), group=self.group)
        return out

    def gather_parts(self, part: Tensor, sizes: tuple[int, ...], purpose: str) -> Tensor:
        """Parts (sizes[r], ...) of every rank r, one after the other: (sum of sizes, ...)."""
        if self.world == 1:
            return part
        longest = max(sizes)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: part.shape[0]] = part
        rows = self.gather_rows(padded, purpose).view(self.world, longest, *part.shape[1:])
        return torch.cat([rows[rank, :size] for rank, size in enumerate(sizes)])

    def sum_(self, values: Tensor, purpose: str) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            with self._naming(purpose):
                dist.all_reduce(values, group=self.group)
        return values

    def max_(self, values: Tensor, purpose: str) -> Tensor:
        """The maximum over all ranks, in place."""
        if self.world > 1:
            with self._naming(purpose):
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def broadcast_(self, value: Tensor, purpose: str) -> Tensor:
        """The first rank's value on every rank, in place."""
        if self.world > 1:
            with self._naming(purpose):
                dist.broadcast(value, group=self.group, group_src=0)
        return value

    def start_scatter(self, rows: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Start a reduce-scatter of rows (world * n, ...). Calling the result waits for it and returns this rank's n rows of the sum."""
        if self.world == 1:
            return lambda: rows
        out = rows.new_empty((rows.shape[0] // self.world, *rows.shape[1:]))
        with self._naming(purpose):
            work = dist.reduce_scatter_tensor(out, rows, group=self.group, async_op=True)
            assert work is not None  # it is asynchronous

        def finish() -> Tensor:
            with self._naming(purpose):
                work.wait()
            return out

        return finish
