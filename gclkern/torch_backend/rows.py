"""What the logit and the head operators share: logits in place, sums over a row's classes, and the formula of a row's loss and gradient.

A walk over the undisturbed logits u_ij = scale * (cos_ij - cloud_j e_ij) + bias_j leaves for each row (`RowSums`), over the classes that are NOT its targets,

    peak = max_j u_ij,   rest = sum_j exp(u_ij - peak),   and, with label smoothing, blend = sum over ALL classes of weight_j u_ij.

`finish_rows` adds the targets in closed form. What is left beside a target is a sum of its own, never 1 minus a probability, so that loss and gradient keep
their digits where the target's probability is close to 1. Of a row's gradient it leaves five numbers (`RowGradients`):

    dz_ij = exp(u_ij - anchor_i) slope_i - smooth_i weight_j      (j not a target),       dz_ia = grad_a,   dz_ib = grad_b

Rows are kept apart by selection, never by multiplication with 0, so that a NaN stays in its row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import ClassShards, LossTerms
from gclkern.noise import fill_noise

# Logits of a block, for each thread of a CPU: with their noise 2 MB in float32, so that a block stays in the cache while torch's operators, which give a
# thread at least 32768 elements, pass over it one after the other. On another device large, because there a small operation costs its launch.
_CPU_BLOCK = 2**18
_DEVICE_BLOCK = 2**24


class RowGradients(NamedTuple):
    """The gradient of each row's loss, (N,) each."""

    anchor: Tensor
    slope: Tensor
    grad_a: Tensor
    grad_b: Tensor
    smooth: Tensor

    def times(self, factor: Tensor | float) -> RowGradients:
        return RowGradients(self.anchor, self.slope * factor, self.grad_a * factor, self.grad_b * factor, self.smooth * factor)


ROW_STATS = len(RowGradients._fields)


def statistics_dtype(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def block_rows(num_rows: int, num_classes: int, device: torch.device) -> int:
    """How many of `num_rows` rows over `num_classes` classes make a block."""
    logits = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK
    return min(num_rows, max(1, logits // num_classes))


def row_blocks(num_rows: int, num_classes: int, device: torch.device) -> Iterator[slice]:
    step = block_rows(num_rows, num_classes, device)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def block_scratch(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a block."""
    return torch.empty(block_rows(num_rows, num_classes, device) * num_classes, dtype=dtype, device=device)


def noise_scratch(num_rows: int, num_classes: int, terms: LossTerms, device: torch.device) -> Tensor | None:
    return None if terms.cloud is None else block_scratch(num_rows, num_classes, torch.float32, device)


def some_are_ignored(terms: LossTerms) -> bool:
    """Whether rows may be ignored: exact on a CPU, else the careful answer, because the exact one would synchronise."""
    return terms.target.device.type != "cpu" or not bool(kept_rows(terms).all())


def kept_rows(terms: LossTerms) -> Tensor:
    """(N,) bool: the rows that are not ignored."""
    kept = terms.target != terms.ignore_index
    return kept if terms.target_b is None else kept & (terms.target_b != terms.ignore_index)


def row_targets(terms: LossTerms) -> list[Tensor]:
    return [terms.target] if terms.target_b is None else [terms.target, terms.target_b]


def disturb_(block: Tensor, terms: LossTerms, rows: slice, classes: slice, scratch: Tensor | None) -> None:
    """scale * cos becomes u, in place."""
    if terms.cloud is not None and terms.seed is not None and scratch is not None:
        noise = scratch[: block.numel()].view(block.shape)
        fill_noise(noise, terms.seed, terms.row_offset + rows.start, terms.class_offset + classes.start)
        block.addcmul_(noise, terms.cloud[classes], value=-terms.scale)
    if terms.bias is not None:
        block.add_(terms.bias[classes])


def _places(labels: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """The labels' columns in a block of `classes`, (rows, 1), and whether they are there."""
    columns = (labels - classes.start).unsqueeze(1)
    width = classes.stop - classes.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


class RowSums:
    """The sums over classes, gathered from blocks of rows and classes; a row's blocks may come in any number of chunks of classes."""

    def __init__(self, num_rows: int, terms: LossTerms, dtype: torch.dtype, device: torch.device) -> None:
        self.terms = terms
        self.peak = torch.full((num_rows,), -math.inf, dtype=dtype, device=device)
        self.rest = torch.zeros(num_rows, dtype=dtype, device=device)
        self.blend = torch.zeros(num_rows, dtype=dtype, device=device)
        # NaN stays where a label is out of range
        self.values = [torch.full((num_rows,), math.nan, dtype=dtype, device=device) for _ in row_targets(terms)]

    def add_(self, block: Tensor, rows: slice, classes: slice) -> None:
        """Take in the u of a block, which is left as exp(u - peak), and 0 at the targets. `peak` is the row's so far."""
        if self.terms.label_smoothing > 0:
            weight = self.terms.weight
            self.blend[rows] += block.sum(1) if weight is None else block.mv(weight[classes])
        places = [_places(labels[rows], classes) for labels in row_targets(self.terms)]
        for (columns, inside), value in zip(places, self.values, strict=True):
            value[rows] = torch.where(inside[:, 0], block.gather(1, columns)[:, 0], value[rows])
        for columns, inside in places:
            block.scatter_(1, columns, block.gather(1, columns).masked_fill_(inside, -math.inf))
        before = self.peak[rows]
        peak = torch.maximum(before, block.amax(1))
        anchor = finite_peak(peak)
        block.sub_(anchor.unsqueeze(1)).exp_()
        self.rest[rows] = self.rest[rows] * torch.exp(before - anchor) + block.sum(1)
        self.peak[rows] = peak

    def merged(self, shards: ClassShards) -> RowSums:
        """The sums over the classes of all ranks."""
        whole = copy.copy(self)
        whole.terms = shards.terms
        blended = self.blend[None] if self.terms.label_smoothing > 0 else None
        peak, rest, blend, own = shards.merge(self.peak[None], self.rest[None], blended, self.values, 1.0)
        whole.peak, whole.rest = peak[0], rest[0]
        if blend is not None:
            whole.blend = blend[0]
        known = [(labels >= 0) & (labels < shards.num_classes) for labels in row_targets(shards.terms)]
        whole.values = [value.masked_fill(~there, math.nan) for value, there in zip(own, known, strict=True)]
        return whole


def finite_peak(peak: Tensor) -> Tensor:
    """The peak, or 0 for a row without a class beside its targets: -inf minus -inf is NaN."""
    return peak.masked_fill(peak == -math.inf, 0.0)


class _Target(NamedTuple):
    """One target's part of a row, with its share."""

    loss: Tensor
    grad: Tensor  # dz at the target
    slope: Tensor  # dz at any other class of logit u is exp(u - top) * slope - smooth * its weight
    top: Tensor
    smooth: Tensor | float


def _one_target(sums: RowSums, own: Tensor, other: Tensor | None, blend: Tensor, share: Tensor | None, weight: Tensor | None, num_classes: int) -> _Target:
    """`own` is the target's logit with its margin; `other` the second target's without, -inf where that is the same class."""
    terms = sums.terms
    top = torch.maximum(sums.peak, own) if other is None else torch.maximum(torch.maximum(sums.peak, own), other)
    around = sums.rest * torch.exp(finite_peak(sums.peak) - top)
    if other is not None:
        around = around + torch.exp(other - top)
    target = torch.exp(own - top)
    total = around + target
    log_total = total.log()
    loss = torch.where(around <= target, torch.log1p(around / target), log_total + (top - own))
    mass = torch.ones_like(loss) if weight is None else weight
    loss = loss * mass
    smooth: Tensor | float = 0.0
    spread: Tensor | float = 0.0
    if terms.label_smoothing > 0:
        class_share = terms.label_smoothing / num_classes
        weight_sum = num_classes if terms.weight is None else terms.weight.sum()
        spread = class_share * (weight_sum - mass)
        loss = (1 - terms.label_smoothing) * loss + class_share * (weight_sum * (top + log_total) - blend)
        mass = (1 - terms.label_smoothing) * mass + class_share * weight_sum
        smooth = class_share
    chain = torch.ones_like(loss) if share is None else share
    if terms.gamma > 0:
        loss = loss.clamp_min(0.0)  # a smoothed loss may round below 0
        missed = -torch.expm1(-loss)
        factor = missed**terms.gamma
        chain = chain * factor
        if not terms.focal_detach:
            chain = chain * (1 + terms.gamma * torch.where(missed > 0, loss * torch.exp(-loss) / missed, 1.0))
        loss = loss * factor
    if share is not None:
        loss = loss * share
    return _Target(loss, chain * (spread - mass * (around / total)), chain * (mass / total), top, chain * smooth)


def finish_rows(sums: RowSums, num_classes: int) -> tuple[Tensor, RowGradients]:
    """The loss of each row (N,), 0 where it is ignored and NaN where a label is no class, and its gradient."""
    terms = sums.terms
    labels = [target.clamp(0, num_classes - 1) for target in row_targets(terms)]
    weights = [None if terms.weight is None else terms.weight[label] for label in labels]
    drops = [torch.zeros_like(sums.peak) if terms.margin is None else terms.scale * terms.margin[label] for label in labels]
    owns = [value - drop for value, drop in zip(sums.values, drops, strict=True)]
    blends = [sums.blend - (drop if weight is None else weight * drop) for weight, drop in zip(weights, drops, strict=True)]
    anchor = finite_peak(sums.peak)
    if terms.target_b is None or terms.lam is None:
        a = _one_target(sums, owns[0], None, blends[0], None, weights[0], num_classes)
        slope, grad_a, grad_b, smooth = a.slope * torch.exp(anchor - a.top), a.grad, torch.zeros_like(a.grad), torch.zeros_like(a.grad) + a.smooth
        loss = a.loss
    else:
        same = labels[0] == labels[1]
        others = [value.masked_fill(same, -math.inf) for value in sums.values]
        a = _one_target(sums, owns[0], others[1], blends[0], terms.lam, weights[0], num_classes)
        b = _one_target(sums, owns[1], others[0], blends[1], 1 - terms.lam, weights[1], num_classes)
        slope = a.slope * torch.exp(anchor - a.top) + b.slope * torch.exp(anchor - b.top)
        across_a = b.slope * torch.exp(others[0] - b.top) - (b.smooth if weights[0] is None else b.smooth * weights[0])
        across_b = a.slope * torch.exp(others[1] - a.top) - (a.smooth if weights[1] is None else a.smooth * weights[1])
        grad_a = a.grad + torch.where(same, b.grad, across_a)
        grad_b = torch.where(same, grad_a, b.grad + across_b)
        smooth = torch.zeros_like(slope) + a.smooth + b.smooth
        loss = a.loss + b.loss
    ignored = ~kept_rows(terms)
    slope, grad_a, grad_b, smooth = (part.masked_fill(ignored, 0.0) for part in (slope, grad_a, grad_b, smooth))
    # exp(u - inf) is 0 in an ignored row, however large its logits are
    return loss.masked_fill(ignored, 0.0), RowGradients(anchor.masked_fill(ignored, math.inf), slope, grad_a, grad_b, smooth)


def gradient_(block: Tensor, terms: LossTerms, stats: RowGradients, rows: slice, classes: slice) -> None:
    """exp(u - anchor) of a block becomes dz, in place."""
    block.mul_(stats.slope[rows].unsqueeze(1))
    if terms.label_smoothing > 0:
        smooth = stats.smooth[rows].unsqueeze(1)
        if terms.weight is None:
            block.sub_(smooth)
        else:
            block.addcmul_(smooth, terms.weight[classes], value=-1)
    for target, grad in zip(row_targets(terms), (stats.grad_a, stats.grad_b), strict=False):
        columns, inside = _places(target[rows], classes)
        block.scatter_(1, columns, torch.where(inside, grad[rows].unsqueeze(1), block.gather(1, columns)))


def reduce_rows(losses: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The loss as `terms.reduction` wants it, and the number that it was divided by (): 1 unless that is "mean"."""
    if terms.reduction == "none":
        return losses, losses.new_ones(())
    total = losses.sum()
    if terms.reduction == "sum":
        return total, losses.new_ones(())
    kept = kept_rows(terms)
    if terms.weight is None or terms.gamma > 0:
        denominator = kept.sum(dtype=losses.dtype)
    else:
        last = terms.weight.numel() - 1
        weights = terms.weight[terms.target.clamp(0, last)]
        if terms.target_b is not None and terms.lam is not None:
            weights = terms.lam * weights + (1 - terms.lam) * terms.weight[terms.target_b.clamp(0, last)]
        denominator = weights.masked_fill(~kept, 0.0).sum()
    return total / denominator, denominator


def row_upstream(grad_loss: Tensor, denominator: Tensor, terms: LossTerms, dtype: torch.dtype) -> Tensor:
    """The gradient of each row's loss (N,), 0 where it is ignored."""
    return (grad_loss.to(dtype) / denominator).expand(terms.target.shape).masked_fill(~kept_rows(terms), 0.0)
