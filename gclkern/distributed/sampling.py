"""Sampling of classes: a step trains the classes of its samples and a share of the others, as in PartialFC.

An, Deng et al., "Killing two birds with one stone: efficient and robust training of face recognition CNNs by Partial FC", CVPR 2022: memory and
time of the head grow with the number of classes, but most negative classes of a sample contribute the same; a tenth of them is enough.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gclkern.distributed.ranks import Ranks
from gclkern.distributed.shards import Shards
from gclkern.torch_backend.noise import philox_words

_NO_SAMPLE = -1  # the row of the noise stream that the draw of classes uses; no sample has this row


def draw_sizes(shards: Shards, rate: float, num_labels: int) -> tuple[int, ...]:
    """How many classes each rank draws: its share, or the number of labels of the step if that is more."""
    return tuple(max(math.ceil(rate * size), min(num_labels, size)) for size in shards.sizes)


def draw_classes(ranks: Ranks, shards: Shards, labels: list[Tensor], rate: float, seed: Tensor) -> tuple[Tensor, Shards]:
    """The classes of a step (K,), in ascending order, the same on every rank, and how many of them each rank holds; a collective call.

    `labels` are those of all ranks' samples, whose classes are always included. Each rank draws the others at random, as a pure function of the seed and the
    class, so a repeated step draws the same classes. Nothing waits for the GPU.
    """
    mine = shards.mine
    held = mine.stop - mine.start
    sizes = draw_sizes(shards, rate, sum(target.numel() for target in labels))
    groups = torch.arange(mine.start // 4, (mine.stop + 3) // 4, device=seed.device)
    words = philox_words(seed, torch.full((1,), _NO_SAMPLE, device=seed.device), groups).flatten()[mine.start % 4 :][:held]
    # with the class in the lower bits, no two keys are equal
    keys = (words.to(torch.int64) << 30) + torch.arange(held, device=seed.device)
    wanted = torch.zeros(held + 1, dtype=torch.bool, device=seed.device)  # the last entry is for labels of other ranks
    for target in labels:
        here = (target >= mine.start) & (target < mine.stop)
        wanted[torch.where(here, target - mine.start, held)] = True
    keys = keys.masked_fill_(wanted[:held], 2**62)
    drawn = keys.topk(sizes[shards.rank], sorted=False).indices.sort().values + mine.start
    return ranks.gather_parts(drawn, sizes, "gathering the sampled classes"), Shards(shards.rank, sizes)


def places_of(labels: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """The index of each label among the drawn classes; -1 for `ignore_index`, and an index beyond the last for a label that is not among them."""
    places = torch.searchsorted(classes, labels).clamp_max(classes.numel() - 1)
    return torch.where(classes[places] == labels, places, classes.numel()).masked_fill(labels == ignore_index, -1)


class TakeRows(torch.autograd.Function):
    """Rows of a matrix, with a sparse gradient that holds only these rows."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:  # rows: ascending, each once
        ctx.save_for_backward(rows)
        ctx.shape = matrix.shape
        return matrix[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(rows[None], grad, ctx.shape, is_coalesced=True, check_invariants=False), None
