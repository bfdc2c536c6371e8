"""Shared by the logit and the head operators: logits in place, sums over a row's classes, and the formula of a row's loss and gradient.

A pass over the logits without margin, u_ij = scale * (cos_ij - cloud_j e_ij) + bias_j, computes for each row (`RowSums`), over the classes that are no target:

    peak = max_j u_ij,   rest = sum_j exp(u_ij - peak),   and, with label smoothing, blend = sum over ALL classes of weight_j u_ij.

`row_losses` adds the targets in closed form. With odds = log(sum over a target's other classes) - u_target, (1 - p) / p is exp(odds): the loss is
log1p(exp(odds)), and 1 - p is computed as the sigmoid of the odds, never as 1 minus a probability, so that loss and gradient stay accurate where p is close
to 1. It stores a row's gradient as a few numbers (`RowGradients`):

    dz_ij = exp(u_ij - anchor_i) slope_i - smooth_i weight_j      (j not a target),       dz_ia = grad_a,   dz_ib = grad_b

If an angle is added to those of the targets (`LossTerms.adds_target_angles`), the targets' values are scale * cosine without noise and bias, and grad_a
and grad_b are gradients with respect to them. If an angle is added to that of every class, dz_ij is multiplied by the derivative of u_ij by scale * cosine_ij.

Rows and classes are masked by selection, never by multiplication with 0, so that a NaN stays in its row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern.kernels.terms import ClassShards, LossTerms
from gclkern.torch_backend.angles import TargetLogit, add_angle, target_logit
from gclkern.torch_backend.noise import fill_noise

# Logits of a block, for each thread of a CPU: with their noise 2 MB in float32, so that a block stays in the cache while torch's operators, which give a
# thread at least 32768 elements, pass over it one after the other. On another device large, because there a small operation costs its launch.
_CPU_BLOCK = 2**18
_DEVICE_BLOCK = 2**24
_LARGE = 40.0  # log(1 + exp(x)) is x from here on, in float64 too


class RowGradients(NamedTuple):
    """The gradient of each row's loss."""

    anchor: Tensor  # (N,)
    parts: Tensor  # slope, smooth and the gradient of each target, (2 + targets, N)

    def times(self, factor: Tensor | float) -> RowGradients:
        return RowGradients(self.anchor, self.parts * factor)


def gradient_shapes(num_rows: int, terms: LossTerms) -> tuple[tuple[int, ...], ...]:
    """The shapes of the fields of `RowGradients`."""
    return (num_rows,), (2 + len(row_targets(terms)), num_rows)


def block_rows(num_rows: int, num_classes: int, device: torch.device) -> int:
    """How many of `num_rows` rows over `num_classes` classes make a block."""
    logits = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK
    return min(num_rows, max(1, logits // num_classes))


def row_blocks(num_rows: int, num_classes: int, device: torch.device) -> Iterator[slice]:
    step = block_rows(num_rows, num_classes, device)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def block_scratch(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A workspace for one block."""
    return torch.empty(block_rows(num_rows, num_classes, device) * num_classes, dtype=dtype, device=device)


def noise_scratch(num_rows: int, num_classes: int, terms: LossTerms, device: torch.device) -> Tensor | None:
    return None if terms.cloud is None else block_scratch(num_rows, num_classes, torch.float32, device)


def some_zero(values: Tensor) -> bool:
    """Whether any element is 0 or False: exact on a CPU; always True on a GPU, where reading the answer would synchronise."""
    return values.device.type != "cpu" or not bool(values.all())


def ignored_rows(terms: LossTerms) -> Tensor | None:
    """(N,) bool; None if it is known that no row is ignored."""
    kept = terms.target != terms.ignore_index
    if terms.target_b is not None:
        kept &= terms.target_b != terms.ignore_index
    return ~kept if some_zero(kept) else None


def without(ignored: Tensor | None, values: Tensor) -> Tensor:
    """The values (..., N), 0 in ignored rows."""
    return values if ignored is None else values.masked_fill(ignored, 0.0)


def row_targets(terms: LossTerms) -> list[Tensor]:
    return [terms.target] if terms.target_b is None else [terms.target, terms.target_b]


def add_noise_and_bias_(block: Tensor, terms: LossTerms, rows: slice, classes: slice, scratch: Tensor | None, slopes: Tensor | None = None) -> None:
    """Turns scale * cosine into u, in place. If the noise adds to angles, `slopes` receives the derivatives of u by scale * cosine."""
    if terms.cloud is not None and terms.seed is not None and scratch is not None:
        noise = scratch[: block.numel()].view(block.shape)
        fill_noise(noise, terms.seed, terms.row_offset + rows.start, terms.class_offset + classes.start)
        if terms.angular:
            value, by_cosine, _ = add_angle(block / terms.scale, noise * (math.pi / 2 * terms.cloud[classes]), easy=terms.easy_margin)
            torch.mul(value, terms.scale, out=block)
            if slopes is not None:
                slopes.copy_(by_cosine)
        else:
            block.addcmul_(noise, terms.cloud[classes], value=-terms.scale)
    if terms.bias is not None:
        block.add_(terms.bias[classes])


def _places(labels: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """The labels' columns in a block of `classes`, (rows, 1), and whether the label is in the block."""
    columns = labels.unsqueeze(1) - classes.start
    places = columns.clamp(0, classes.stop - classes.start - 1)
    return places, places == columns


class RowSums:
    """The sums over classes, gathered from blocks of rows and classes; a row's blocks may come in chunks of classes, the first one from class 0."""

    def __init__(self, num_rows: int, terms: LossTerms, dtype: torch.dtype, device: torch.device, *, top1: bool = False) -> None:
        targets = len(row_targets(terms))
        self.terms = terms
        self.peak, self.rest, self.blend, *self.values = torch.empty((3 + targets, num_rows), dtype=dtype, device=device).unbind()
        self.bare = list(torch.empty((targets, num_rows), dtype=dtype, device=device)) if top1 else []  # scale * cosine of the targets
        # the largest scale * cosine of a class that is no target
        self.hardest = torch.empty(num_rows, dtype=dtype, device=device) if terms.difficulty_margin or top1 else None

    def add_bare(self, block: Tensor, rows: slice, classes: slice) -> None:
        """Where angles are added to the targets', and for top-1: what is needed of scale * cosine of a block, before its noise and `add_`."""
        if not self.terms.adds_target_angles and not self.bare:
            return
        first = classes.start == 0
        places = [_places(labels[rows], classes) for labels in row_targets(self.terms)]
        if self.terms.adds_target_angles:
            self._gather(block, places, rows, first, self.values)
        if self.bare:
            self._gather(block, places, rows, first, self.bare)
        if self.hardest is not None:
            others = block.clone()
            for columns, inside in places:
                others.scatter_(1, columns, others.gather(1, columns).masked_fill_(inside, -math.inf))
            largest = others.amax(1)
            self.hardest[rows] = largest if first else torch.maximum(self.hardest[rows], largest)

    @staticmethod
    def _gather(block: Tensor, places: list[tuple[Tensor, Tensor]], rows: slice, first: bool, values: list[Tensor]) -> None:
        for (columns, inside), value in zip(places, values, strict=True):
            found = block.gather(1, columns)  # undefined where the label is in none of the chunks
            value[rows] = (found if first else torch.where(inside, found, value[rows].unsqueeze(1)))[:, 0]

    def add_(self, block: Tensor, rows: slice, classes: slice) -> None:
        """Add the u of a block, and overwrite it with exp(u - peak), 0 at the targets; `peak` is the row's peak so far."""
        first = classes.start == 0
        if self.terms.smoothed:
            weight = self.terms.weight
            blend = block.sum(1) if weight is None else block.mv(weight[classes])
            self.blend[rows] = blend if first else self.blend[rows] + blend
        places = [_places(labels[rows], classes) for labels in row_targets(self.terms)]
        if not self.terms.adds_target_angles:
            self._gather(block, places, rows, first, self.values)
        for columns, inside in places:
            block.scatter_(1, columns, block.gather(1, columns).masked_fill_(inside, -math.inf))
        peak = block.amax(1)
        if not first:
            peak = torch.maximum(peak, self.peak[rows])
        anchor = finite_peak(peak)
        rest = block.sub_(anchor.unsqueeze(1)).exp_().sum(1)
        if not first:
            rest += self.rest[rows] * torch.exp(self.peak[rows] - anchor)
        self.peak[rows], self.rest[rows] = peak, rest

    def merged(self, shards: ClassShards) -> RowSums:
        """The sums over the classes of all ranks."""
        whole = copy.copy(self)
        whole.terms = shards.terms
        blended = self.blend[None] if self.terms.smoothed else None
        hardest = None if self.hardest is None else self.hardest[None]
        peak, rest, blend, hardest, own = shards.merge(self.peak[None], self.rest[None], blended, hardest, [*self.values, *self.bare], 1.0)
        whole.values, whole.bare = own[: len(self.values)], own[len(self.values) :]
        whole.peak, whole.rest = peak[0], rest[0]
        whole.hardest = None if hardest is None else hardest[0]
        if blend is not None:
            whole.blend = blend[0]
        return whole


def finite_peak(peak: Tensor) -> Tensor:
    """The peak, or 0 for a row whose only classes are its targets, because -inf minus -inf would be NaN."""
    return peak.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)


def _weight_sum(terms: LossTerms, num_classes: int) -> Tensor | int:
    return num_classes if terms.weight is None else terms.weight.sum()


class _Target(NamedTuple):
    """One target's contribution to a row, multiplied by its mixup weight. Logits are relative to the row's anchor."""

    loss: Tensor
    grad: Tensor  # dz at the target
    others: Tensor  # the sum of dz over all other classes, without `smooth`
    log_others: Tensor  # dz at another class of logit u is exp(u - log_others) * others - smooth * its weight
    smooth: Tensor | float


def _one_target(
    terms: LossTerms, own: Tensor, other: Tensor | None, log_rest: Tensor, blend: Tensor | None, smoothing: Tensor | float, share: Tensor | None,
    weight: Tensor | None, num_classes: int,
) -> _Target:  # fmt: skip
    """`own` is the target's logit with its margin; `other` is the second target's without margin, -inf if it is the same class."""
    log_others = log_rest if other is None else torch.logaddexp(log_rest, other)
    odds = log_others - own
    loss = F.softplus(odds, threshold=_LARGE)
    missed = torch.sigmoid(odds)
    others = missed
    if weight is not None:
        loss, others = loss * weight, others * weight
    grad: Tensor = -others
    smooth: Tensor | float = 0.0
    if blend is not None:
        kept, smooth = 1 - smoothing, smoothing / num_classes
        weight_sum = _weight_sum(terms, num_classes)
        loss = kept * loss + smooth * (weight_sum * torch.logaddexp(log_others, own) - blend)
        others = kept * others + smooth * weight_sum * missed
        grad = smooth * (weight_sum - (1 if weight is None else weight)) - others
    chain = share
    if terms.gamma > 0:
        loss = loss.clamp_min(0.0)  # a smoothed loss may round below 0
        missed = -torch.expm1(-loss)
        factor = missed**terms.gamma
        chain = factor if share is None else share * factor
        if not terms.focal_detach:
            chain = chain * (1 + terms.gamma * torch.where(missed > 0, loss * torch.exp(-loss) / missed, 1.0))
        loss = loss * factor
    if share is not None:
        loss = loss * share
    if chain is None:
        return _Target(loss, grad, others, log_others, smooth)
    return _Target(loss, chain * grad, chain * others, log_others, chain * smooth)


def _slope(target: _Target) -> Tensor:
    """dz / exp(u) at the classes that are not a target. The clamp only acts if there is no such class: otherwise their sum of exponentials is at least 1."""
    return target.others * torch.exp(-target.log_others).clamp_max_(1.0)


def _blend_of(sums: RowSums, anchor: Tensor, weight: Tensor | None, drop: Tensor | None, num_classes: int) -> Tensor | None:
    """`blend` relative to the anchor, with the margin of one target; None without label smoothing."""
    if not sums.terms.smoothed:
        return None
    blend = sums.blend - _weight_sum(sums.terms, num_classes) * anchor
    if drop is not None:
        blend -= drop if weight is None else weight * drop
    return blend


def _hardest(largest: Tensor, cosines: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
    """The largest cosine of the classes other than each target, of which a second target is one."""
    if len(labels) == 1:
        return [largest]
    same = labels[0] == labels[1]
    return [torch.maximum(largest, other.masked_fill(same, -math.inf)) for other in reversed(cosines)]


def top1_rows(sums: RowSums, num_classes: int, ignored: Tensor | None) -> Tensor:
    """The share of the targets that have the largest cosine (N,): 0 in ignored rows, NaN for a label that is out of range."""
    assert sums.hardest is not None
    targets = row_targets(sums.terms)
    hits = [(own > other).to(own.dtype) for own, other in zip(sums.bare, _hardest(sums.hardest, sums.bare, targets), strict=True)]
    share = hits[0] if sums.terms.lam is None else sums.terms.lam * hits[0] + (1 - sums.terms.lam) * hits[1]
    for target in targets:
        share = share.masked_fill((target < 0) | (target >= num_classes), math.nan)
    return without(ignored, share)


def _target_logits(sums: RowSums, labels: list[Tensor]) -> list[TargetLogit]:
    """The targets' logits where angles are added to them."""
    hardest: list[Tensor | None] = [None] * len(labels)
    if sums.hardest is not None and sums.terms.difficulty_margin:
        hardest = [*_hardest(sums.hardest, sums.values, labels)]
    return [target_logit(value, largest, label, sums.terms) for value, largest, label in zip(sums.values, hardest, labels, strict=True)]


def row_losses(sums: RowSums, num_classes: int, ignored: Tensor | None) -> tuple[Tensor, RowGradients]:
    """The loss of each row (N,), 0 if it is ignored and NaN if a label is out of range, and its gradient."""
    terms = sums.terms
    anchor = finite_peak(sums.peak)
    log_rest = sums.rest.log()
    labels = [target.clamp(0, num_classes - 1) for target in row_targets(terms)]
    # a label that is out of range, or an infinite logit of the target
    bad = [(target != label) | value.isposinf() for target, label, value in zip(row_targets(terms), labels, sums.values, strict=True)]
    weights = [None if terms.weight is None else terms.weight[label] for label in labels]
    target_logits = _target_logits(sums, labels) if terms.adds_target_angles else []
    plain = [logit.plain for logit in target_logits] or sums.values
    values = [(value - anchor).masked_fill_(wrong, math.nan) for value, wrong in zip(plain, bad, strict=True)]
    drops: list[Tensor | None] = [None if terms.margin is None else terms.scale * terms.margin[label] for label in labels]
    if target_logits:
        drops = [logit.plain - logit.own for logit in target_logits]
    owns = [value if drop is None else value - drop for value, drop in zip(values, drops, strict=True)]
    blends = [_blend_of(sums, anchor, weight, drop, num_classes) for weight, drop in zip(weights, drops, strict=True)]
    smoothings = [terms.label_smoothing if terms.smoothing is None else terms.smoothing[label] for label in labels]
    if terms.target_b is None or terms.lam is None:
        a = _one_target(terms, owns[0], None, log_rest, blends[0], smoothings[0], None, weights[0], num_classes)
        loss, slope, smooth, grads = a.loss, _slope(a), a.smooth, [a.grad * target_logits[0].own_slope if target_logits else a.grad]
    else:
        same = labels[0] == labels[1]
        others = [value.masked_fill(same, -math.inf) for value in values]
        a = _one_target(terms, owns[0], others[1], log_rest, blends[0], smoothings[0], terms.lam, weights[0], num_classes)
        b = _one_target(terms, owns[1], others[0], log_rest, blends[1], smoothings[1], 1 - terms.lam, weights[1], num_classes)
        across_a = b.others * torch.exp(others[0] - b.log_others) - (b.smooth if weights[0] is None else b.smooth * weights[0])
        across_b = a.others * torch.exp(others[1] - a.log_others) - (a.smooth if weights[1] is None else a.smooth * weights[1])
        own_a, own_b = a.grad, b.grad
        if target_logits:
            own_a, own_b = own_a * target_logits[0].own_slope, own_b * target_logits[1].own_slope
            across_a, across_b = across_a * target_logits[0].plain_slope, across_b * target_logits[1].plain_slope
        grad_a = own_a + torch.where(same, own_b, across_a)
        grads = [grad_a, torch.where(same, grad_a, own_b + across_b)]
        loss, slope, smooth = a.loss + b.loss, _slope(a) + _slope(b), a.smooth + b.smooth
    parts = without(ignored, torch.stack((slope, smooth if isinstance(smooth, Tensor) else torch.full_like(slope, smooth), *grads)))
    if ignored is not None:
        anchor = anchor.masked_fill(ignored, math.inf)  # exp(u - inf) is 0, however large the logits of the row are
    return without(ignored, loss), RowGradients(anchor, parts)


def gradient_(
    exponentials: Tensor, terms: LossTerms, stats: RowGradients, rows: slice, classes: slice, out: Tensor, slopes: Tensor | None = None
) -> None:  # fmt: skip
    """dz of a block from its exp(u - anchor), times `slopes` if the noise adds to angles; `out` may be the same tensor as the exponentials."""
    slope, smooth, *grads = stats.parts[:, rows].unsqueeze(2).unbind()
    torch.mul(exponentials, slope, out=out)
    if terms.smoothed:
        if terms.weight is None:
            out.sub_(smooth)
        else:
            out.addcmul_(smooth, terms.weight[classes], value=-1)
    if slopes is not None:
        out.mul_(slopes)
    for target, grad in zip(row_targets(terms), grads, strict=True):
        columns, inside = _places(target[rows], classes)
        out.scatter_(1, columns, torch.where(inside, grad, out.gather(1, columns)))


def reduce_rows(losses: Tensor, terms: LossTerms, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss reduced by `terms.reduction`, and its divisor (), which is 1 unless the reduction is "mean"."""
    if terms.reduction == "none":
        return losses, losses.new_ones(())
    total = losses.sum()
    if terms.reduction == "sum":
        return total, losses.new_ones(())
    if terms.weight is None or terms.gamma > 0:
        denominator = losses.new_full((), losses.numel()) if ignored is None else (~ignored).sum(dtype=losses.dtype)
    else:
        last = terms.weight.numel() - 1
        weights = terms.weight[terms.target.clamp(0, last)]
        if terms.target_b is not None and terms.lam is not None:
            weights = terms.lam * weights + (1 - terms.lam) * terms.weight[terms.target_b.clamp(0, last)]
        denominator = without(ignored, weights).sum()
    return total / denominator, denominator


def row_upstream(grad_loss: Tensor, denominator: Tensor, ignored: Tensor | None, terms: LossTerms, dtype: torch.dtype) -> Tensor:
    """The gradient of each row's loss (N,), 0 where it is ignored."""
    return without(ignored, (grad_loss.to(dtype) / denominator).expand(terms.target.shape))
