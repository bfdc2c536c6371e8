"""Which rank holds which classes, and the agreement of all ranks on one call.

Every rank holds a contiguous range of classes; the ranges follow each other in the order of the ranks. A call is made by all ranks together. Before any large
tensor travels, they exchange a few numbers that describe it: sizes, dtypes, options. So ranks that were started with different settings all stop with the same
message, instead of waiting for each other or adding up numbers that do not belong together. On a GPU reading those numbers would make the host wait for the
device in every step, so there they are exchanged when a rank meets a call of another shape or with other options, and remembered.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gclkern.counts import check_int
from gclkern.distributed.ranks import Ranks, ShardError
from gclkern.validation import DTYPES

_FIELDS = ("rows of features", "columns of features", "classes", "columns of linear_weight", "dtype of features", "dtype of linear_weight", "options")
_SHARED = ("rows of features", "columns of features", "columns of linear_weight", "dtype of features", "dtype of linear_weight", "options")
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], Shards]] = WeakKeyDictionary()


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
    """Classes of each rank: ceil(C / world) of them but for the last ranks, as `torch.chunk` and a DTensor's ``Shard(0)`` deal out rows.

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


def agree(ranks: Ranks, features: torch.Tensor, linear_weight: torch.Tensor, options: object, problem: Exception | None) -> Shards:
    """The classes of all ranks, after a check that they make the same call; a collective call.

    `problem` is what this rank found wrong with its own arguments: it is raised here, and the other ranks stop, too.
    """
    if ranks.world == 1:
        if problem is not None:
            raise problem
        return Shards(0, (linear_weight.shape[0],))
    digest = int.from_bytes(hashlib.blake2b(repr(options).encode(), digest_size=8).digest(), "little", signed=True)
    numbers = (0,) * len(_FIELDS)
    if problem is None:
        dtypes = (DTYPES.index(features.dtype), DTYPES.index(linear_weight.dtype))
        numbers = (*features.shape, linear_weight.shape[0], linear_weight.shape[1], *dtypes, digest)
    assert ranks.group is not None
    known = _known.setdefault(ranks.group, {})
    if problem is None and features.device.type != "cpu" and numbers in known:
        return known[numbers]
    mine = torch.tensor([int(problem is None), *numbers], dtype=torch.int64, device=features.device)
    table = ranks.gather_rows(mine, "comparing the arguments of all ranks").view(ranks.world, -1).tolist()
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
    known[numbers] = shards
    return shards
