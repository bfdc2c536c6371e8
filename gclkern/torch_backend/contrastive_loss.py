"""The softmax over samples and class prototypes in torch, a tile of cosines at a time.

With unit vectors x_i of the samples and q_c of the prototypes, and the keys k of a batch being samples, prototypes or both,

    loss_i = log sum_{k != i} w_ik exp(x_i . k / T) - mean over the keys p != i of the class y_i of x_i . p / T

where w_ik is `own` of the class where k is of the class y_i, and `other` of the class of k elsewhere: 1 and 1 for SupCon; 1 / (m_c - 1) and 1 / m_c, with m_c
keys of class c, for BCL; `own` is 0 where the denominator leaves out the own class. The mean over positives and its gradient are sums of each class: no matrix
over pairs of samples is needed for them.

A cosine is at most 1, so one exponential, exp((x_i . x_k - 1) / T), serves the denominators of i and of k and both directions of the gradient: the product and
the exponential of each pair of samples are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import SMALLEST_NORM, implements, shapes_of, statistics_dtype
from gclkern.torch_backend.centroids import segment_sums

# Rows and columns of a tile: on a CPU 1 MB in float32, so that it stays in the cache while torch's operators pass over it.
_CPU_TILE = 512
_DEVICE_TILE = 4096
_FLOAT32_RANGE = 80.0  # exp of minus this is a normal float32 number


class _Keys(NamedTuple):
    """What a sample is compared with."""

    unit: Tensor  # (N, D) unit rows of the samples
    prototypes: Tensor | None  # (C, D) unit rows
    label: Tensor  # (N,) int64; C where a label is no class
    own: Tensor | None  # (N,) weight of the keys of a sample's class; None: all weights are 1
    other: Tensor | None  # (N,) weight of a sample as a key of samples of other classes
    prototype_other: Tensor | None  # (C,) the same for a prototype
    include_samples: bool
    temperature: float


def _unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows over their norms, contiguous whatever the strides of `rows`; and the inverse norms, 0 where a row has no direction."""
    rows = rows.to(dtype)
    norm = torch.linalg.vector_norm(rows, dim=1)
    inverse = norm.reciprocal().masked_fill_(norm <= SMALLEST_NORM, 0.0)
    return torch.where((inverse == 0.0)[:, None], 0.0, rows * inverse[:, None]).contiguous(), inverse


def _dense_labels(target: Tensor) -> Tensor:
    """Labels in [0, N) that are equal where those of `target` are, computed without reading the number of classes from a GPU."""
    ordered, order = target.sort()
    place = torch.zeros_like(ordered)
    torch.cumsum(ordered[1:] != ordered[:-1], 0, out=place[1:])
    return torch.empty_like(place).scatter_(0, order, place)


def _padded(values: Tensor) -> Tensor:
    """The values (C,) and a 1, for labels that are no class."""
    return torch.cat((values, values.new_ones(1)))


def _keys(
    unit: Tensor, prototypes: Tensor | None, label: Tensor, class_counts: Tensor | None, include_samples: bool, include_own_class: bool, temperature: float
) -> _Keys:
    own = other = prototype_other = None
    if class_counts is not None:
        counts = class_counts.to(unit.dtype)
        prototype_other = counts.reciprocal()
        other = _padded(prototype_other).index_select(0, label)
        own = _padded((counts - 1).reciprocal()).index_select(0, label).nan_to_num(posinf=0.0)  # infinite for the only key of its class
    elif not include_own_class:
        other = torch.ones_like(unit[:, 0])
        prototype_other = None if prototypes is None else torch.ones_like(prototypes[:, 0])
    if not include_own_class:
        own = torch.zeros_like(unit[:, 0])
    return _Keys(unit, prototypes, label, own, other, prototype_other, include_samples, temperature)


def _tiles(keys: _Keys) -> Iterator[tuple[slice, slice]]:
    """The tiles of pairs of samples on and above the diagonal."""
    rows = list(_spans(keys.unit.shape[0], keys))
    for place, first in enumerate(rows):
        for second in rows[place:]:
            yield first, second


def _spans(extent: int, keys: _Keys) -> Iterator[slice]:
    step = _CPU_TILE if keys.unit.device.type == "cpu" else _DEVICE_TILE
    for start in range(0, extent, step):
        yield slice(start, min(start + step, extent))


def _in_range(keys: _Keys) -> _Keys:
    """The keys in float64 where float32 cannot hold the smallest exponential."""
    if 2.0 / keys.temperature <= _FLOAT32_RANGE or keys.unit.dtype == torch.float64:
        return keys
    return _Keys(*(value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in keys))  # type: ignore[arg-type]


def _exponentials(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    tile = torch.mm(left, right.t())
    return tile.sub_(1.0).div_(temperature).exp_()


def _log_totals(keys: _Keys) -> Tensor:
    dtype = keys.unit.dtype
    keys = _in_range(keys)
    total = torch.zeros_like(keys.unit[:, 0])
    if keys.include_samples:
        for first, second in _tiles(keys):
            tile = _exponentials(keys.unit[first], keys.unit[second], keys.temperature)
            if first == second:
                tile.fill_diagonal_(0.0)
            if keys.own is None or keys.other is None:
                total[first] += tile.sum(1)
                if first != second:
                    total[second] += tile.sum(0)
                continue
            same = keys.label[first, None] == keys.label[None, second]
            own, others = tile.masked_fill(~same, 0.0), tile.masked_fill_(same, 0.0)
            total[first] += others.mv(keys.other[second]).addcmul_(own.sum(1), keys.own[first])
            if first != second:
                total[second] += others.t().mv(keys.other[first]).addcmul_(own.sum(0), keys.own[second])
    if keys.prototypes is not None:
        for rows in _spans(keys.unit.shape[0], keys):
            for classes in _spans(keys.prototypes.shape[0], keys):
                tile = _exponentials(keys.unit[rows], keys.prototypes[classes], keys.temperature)
                if keys.own is None or keys.prototype_other is None:
                    total[rows] += tile.sum(1)
                    continue
                found, columns = _own_prototypes(keys, rows, classes)
                own = torch.where(found, tile.gather(1, columns), 0.0)[:, 0]
                tile.scatter_(1, columns, tile.gather(1, columns).masked_fill_(found, 0.0))
                total[rows] += tile.mv(keys.prototype_other[classes]).addcmul_(own, keys.own[rows])
    return total.log_().add_(1.0 / keys.temperature).to(dtype)


def _own_prototypes(keys: _Keys, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether the prototype of each sample's class is among `classes` (rows, 1), and its column."""
    columns = keys.label[rows, None] - classes.start
    inside = columns.clamp(0, classes.stop - classes.start - 1)
    return inside == columns, inside


def _pulls(keys: _Keys, log_total: Tensor, rate: Tensor) -> tuple[Tensor, Tensor | None]:
    dtype = keys.unit.dtype
    keys = _in_range(keys)
    log_total, rate = log_total.to(keys.unit.dtype), rate.to(keys.unit.dtype)
    rate = torch.where(rate == 0.0, 0.0, rate * torch.exp(1.0 / keys.temperature - log_total))
    grad = torch.zeros_like(keys.unit)
    if keys.include_samples:
        for first, second in _tiles(keys):
            tile = _exponentials(keys.unit[first], keys.unit[second], keys.temperature)
            tile.mul_(_pair_rates(keys, rate, first, second))
            if first == second:
                tile.fill_diagonal_(0.0)
            else:
                grad[second].addmm_(tile.t(), keys.unit[first])
            grad[first].addmm_(tile, keys.unit[second])
    if keys.prototypes is None:
        return grad.to(dtype), None
    grad_prototypes = torch.zeros_like(keys.prototypes)
    for rows in _spans(keys.unit.shape[0], keys):
        for classes in _spans(keys.prototypes.shape[0], keys):
            tile = _exponentials(keys.unit[rows], keys.prototypes[classes], keys.temperature).mul_(rate[rows, None])
            if keys.own is not None and keys.prototype_other is not None:
                found, columns = _own_prototypes(keys, rows, classes)
                own = torch.where(found, tile.gather(1, columns) * keys.own[rows, None], 0.0)
                tile.mul_(keys.prototype_other[classes])
                tile.scatter_(1, columns, torch.where(found, own, tile.gather(1, columns)))
            grad[rows].addmm_(tile, keys.prototypes[classes])
            grad_prototypes[classes].addmm_(tile.t(), keys.unit[rows])
    return grad.to(dtype), grad_prototypes.to(dtype)


def _pair_rates(keys: _Keys, rate: Tensor, first: slice, second: slice) -> Tensor:
    """The factor of each pair's exponential in the gradient: over both samples, the sum of the sample's rate times the weight of the other one as its key."""
    if keys.own is None or keys.other is None:
        return rate[first, None] + rate[None, second]
    others = torch.outer(rate[first], keys.other[second]).addr_(keys.other[first], rate[second])
    own = (rate * keys.own)[first, None] + (rate * keys.own)[None, second]
    return torch.where(keys.label[first, None] == keys.label[None, second], own, others)


def _positives(keys: _Keys, num_classes: int) -> tuple[Tensor, Tensor]:
    """The sum (N, D) and the number (N,) of each sample's positives: the other samples of its class, and its prototype."""
    total, count = torch.zeros_like(keys.unit), torch.zeros_like(keys.unit[:, 0])
    label = keys.label.clamp(max=num_classes - 1)
    if keys.include_samples:
        sums, counts = segment_sums(keys.unit, keys.label, num_classes)
        total += sums.index_select(0, label).sub_(keys.unit)
        count += counts.index_select(0, label) - 1
    if keys.prototypes is not None:
        total += keys.prototypes.index_select(0, label)
        count += 1
    return total, count.masked_fill_(keys.label == num_classes, 0.0)


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of rows from that of their unit rows."""
    return grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse[:, None])


@implements("contrastive_forward", "torch")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss, and for backward what `_empty_saved` lists."""
    dtype = statistics_dtype(features)
    unit, inverse = _unit_rows(features, dtype)
    known = class_counts if prototypes is None else prototypes
    num_classes = features.shape[0] if known is None else known.shape[0]
    label = _dense_labels(target) if known is None else torch.where(target.clamp(0, num_classes - 1) == target, target, num_classes)
    unit_prototypes, inverse_prototypes = (unit.new_empty((0, unit.shape[1])), unit.new_empty(0)) if prototypes is None else _unit_rows(prototypes, dtype)
    keys = _keys(unit, None if prototypes is None else unit_prototypes, label, class_counts, include_samples, include_own_class, temperature)

    log_total = _log_totals(keys)
    positives, count = _positives(keys, num_classes)
    is_anchor = count > 0
    share = count.reciprocal().masked_fill_(~is_anchor, 0.0)
    terms = torch.where(is_anchor, log_total - torch.linalg.vecdot(unit, positives) * (share / temperature), 0.0)
    terms = terms.masked_fill_(label == num_classes, torch.nan)
    anchors = is_anchor.sum(dtype=dtype) if reduction == "mean" else is_anchor.new_ones((), dtype=dtype)
    loss = terms if reduction == "none" else terms.sum() / anchors
    rate = is_anchor.to(dtype) / (temperature * anchors)
    return loss, [unit, inverse, unit_prototypes, inverse_prototypes, log_total, rate, share, label]


@implements("contrastive_backward", "torch")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and the prototypes; one that was not requested is empty."""
    unit, inverse, unit_prototypes, inverse_prototypes, log_total, rate, share, label = saved
    known = class_counts if prototypes is None else prototypes
    num_classes = features.shape[0] if known is None else known.shape[0]
    keys = _keys(unit, None if prototypes is None else unit_prototypes, label, class_counts, include_samples, include_own_class, temperature)
    rate = torch.where(rate == 0.0, 0.0, rate * grad_loss)  # a sample without positives has no gradient, even if the upstream one is NaN
    grad, grad_prototypes = _pulls(keys, log_total, rate)

    # each sample is pulled towards its positives, and they towards it
    pull = (rate * share)[:, None]
    positives, _ = _positives(keys, num_classes)
    grad.addcmul_(positives, pull, value=-1)
    sums, _ = segment_sums(unit * pull, label, num_classes)
    if include_samples:
        grad.sub_(sums.index_select(0, label.clamp(max=num_classes - 1)).sub_(unit * pull).masked_fill_((label == num_classes)[:, None], 0.0))
    empty = features.new_empty(0)
    grad_features = empty
    if features_grad:
        grad_features = _through_norm(grad, unit, inverse).masked_fill_((label == num_classes)[:, None], torch.nan).to(features.dtype)
    if not prototypes_grad or prototypes is None or grad_prototypes is None:
        return grad_features, empty
    return grad_features, _through_norm(grad_prototypes.sub_(sums), unit_prototypes, inverse_prototypes).to(prototypes.dtype)


def _empty_saved(features: Tensor, prototypes: Tensor | None, target: Tensor) -> list[Tensor]:
    """What forward keeps: unit rows and inverse norms of samples and of prototypes, log denominators, rates at an upstream gradient of 1, shares, labels."""
    dtype = statistics_dtype(features)
    num_rows, dim = features.shape
    num_classes = 0 if prototypes is None else prototypes.shape[0]
    shapes = ((num_rows, dim), (num_rows,), (num_classes, dim), (num_classes,), (num_rows,), (num_rows,), (num_rows,))
    return [*(features.new_empty(shape, dtype=dtype) for shape in shapes), target.new_empty(num_rows)]


@shapes_of("contrastive_forward", "torch")
def _forward_shapes(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=statistics_dtype(features))
    return loss, _empty_saved(features, prototypes, target)
