"""Which rank holds which classes, the check that all ranks make the same call, and the state dict of modules whose classes are spread over ranks.

Every rank holds a contiguous range of classes, in the order of the ranks. All ranks make a call together, and first exchange a few numbers that describe it:
sizes, dtypes, options. So ranks that were started with different settings all raise an error, instead of waiting for each other or adding unrelated numbers. On
a GPU, reading these numbers would make the host wait for the device in every step. So a rank reads them only in the first call with a given shape and options;
after that the device compares them, and the loss is NaN if ranks do not agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gclkern.distributed.ranks import Ranks, ShardError
from gclkern.validation import DTYPES, check_int

_FIELDS = ("rows of features", "columns of features", "classes", "columns of the weight", "dtype of features", "dtype of the weight", "options", "row_offset")
_SHARED = tuple(name for name in _FIELDS if name != "classes")
# For each group, the calls that its ranks have agreed on before: the shards and, on the device, the numbers that describe every rank's call.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], tuple[Shards, Tensor]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Shards:
    """The classes of every rank."""

    rank: int
    sizes: tuple[int, ...]  # classes of each rank

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    @property
    def mine(self) -> slice:
        """The classes of this rank."""
        first = sum(self.sizes[: self.rank])
        return slice(first, first + self.sizes[self.rank])


def even_sizes(num_classes: int, world: int) -> tuple[int, ...]:
    """Classes of each rank: ceil(C / world), fewer on the last ranks, as `torch.chunk` and a DTensor's ``Shard(0)`` split rows.

    Raises:
        ValueError: a rank is left without classes.

    Example:
        >>> even_sizes(10, 4)
        (3, 3, 3, 1)
    """
    check_int("num_classes", num_classes, 1)
    size = -(-num_classes // world)
    sizes = tuple(max(0, min(size, num_classes - size * rank)) for rank in range(world))
    if 0 in sizes:
        raise ValueError(f"num_classes: {num_classes} classes in parts of {size} leave rank {sizes.index(0)} of {world} without any; use fewer ranks")
    return sizes


def agreed_form(value: object) -> object:
    """The part of an argument that ranks must agree on: for a tensor everything except its values."""
    return (tuple(value.shape), value.dtype, value.device.type, value.requires_grad) if isinstance(value, Tensor) else value


def host_waits(device: torch.device) -> bool:
    """Whether reading a tensor's values makes the host wait for the device."""
    return device.type != "cpu"


def agree(ranks: Ranks, features: Tensor, rows: Tensor, options: object, problem: Exception | None, *, row_offset: int = 0) -> tuple[Shards, Tensor | None]:
    """Check that all ranks make the same call, and return the classes of all ranks; a collective call.

    If the check ran on the device, the second value is its result: a tensor of 1, or NaN if ranks do not agree. Otherwise it is None.

    `rows` are those of this rank's classes. `problem` is an error in this rank's own arguments: it is raised here, and the other ranks raise a ShardError.
    """
    if ranks.world == 1:
        if problem is not None:
            raise problem
        return Shards(0, (rows.shape[0],)), None
    digest = int.from_bytes(hashlib.blake2b(repr(options).encode(), digest_size=8).digest(), "little", signed=True)
    numbers = (0,) * len(_FIELDS)
    if problem is None:
        numbers = (*features.shape, *rows.shape, DTYPES.index(features.dtype), DTYPES.index(rows.dtype), digest, row_offset)
    assert ranks.group is not None
    known = _known.setdefault(ranks.group, {})
    key = numbers[:-1]  # without row_offset, which may change in every step
    purpose = "comparing the arguments of all ranks"
    if problem is None and host_waits(features.device) and key in known:
        shards, agreed = known[key]
        # no copy from the host, which a CUDA graph cannot contain
        mine = torch.cat([agreed[ranks.rank], torch.full((1,), row_offset, device=features.device)])
        found = ranks.gather_rows(mine, purpose).view(ranks.world, -1)
        same = (found[:, :-1] == agreed).all() & (found[:, -1] == row_offset).all()
        return shards, torch.where(same, 1.0, torch.nan)
    mine = torch.tensor([int(problem is None), *numbers], dtype=torch.int64, device=features.device)
    calls = ranks.gather_rows(mine, purpose).view(ranks.world, -1)
    table = calls.tolist()
    if problem is not None:
        raise problem
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ShardError(f"rank {refused[0]} of {ranks.world} refused its arguments, so this call ends on all ranks; see the message of that rank")
    columns = dict(zip(_FIELDS, zip(*(row[1:] for row in table), strict=True), strict=True))
    for name in _SHARED:
        values = columns[name]
        if len(set(values)) > 1:
            shown = [str(DTYPES[value]) for value in values] if name.startswith("dtype") else list(values)
            detail = (
                "they differ, or some ranks need gradients that others do not" if name == "options" else f"they are {shown} on ranks 0 to {ranks.world - 1}"
            )
            raise ShardError(f"the ranks do not agree on the {name}: {detail}; call with the same on every rank")
    shards = Shards(ranks.rank, tuple(columns["classes"]))
    if host_waits(features.device):  # not for calls on a CPU: a group with both gloo and nccl may make the same call on a GPU
        known[key] = shards, calls[:, :-1].clone()
    return shards, None


class ShardedModule(nn.Module):
    """A module whose classes are spread over ranks. Its state dict holds DTensors over all classes, (C, ...).

    Every parameter and every tensor of its state has one value or row for each class of this rank.
    """

    ranks: Ranks
    shards: Shards

    def as_dtensor(self, rows: Tensor) -> Tensor:
        """Values or rows of this rank's classes, (classes of this rank, ...), as a DTensor over all classes, (C, ...); unchanged in one process."""
        if self.ranks.world == 1:
            return rows
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        assert self.ranks.group is not None
        mesh = DeviceMesh.from_group(self.ranks.group, rows.device.type)
        shape = torch.Size((self.shards.num_classes, *rows.shape[1:]))
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())

    def _own_rows(self, rows: Any) -> Tensor:
        """This rank's rows of an entry of a state dict: a DTensor over all classes, a tensor of all classes, or these rows themselves."""
        if hasattr(rows, "to_local"):
            return rows.to_local()
        return rows[self.shards.mine] if rows.shape[0] == self.shards.num_classes else rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._change(destination, prefix, self.as_dtensor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._change(state_dict, prefix, self._own_rows)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _change(self, state: dict[str, Any], prefix: str, change: Callable[[Any], Tensor]) -> None:
        for name in (*self._parameters, *getattr(self, "_state_names", ())):
            if prefix + name in state:
                state[prefix + name] = change(state[prefix + name])
