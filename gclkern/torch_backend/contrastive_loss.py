"""The softmax over samples and class prototypes in torch, a tile of cosines at a time.

With unit vectors x_i of the samples and q_c of the prototypes, and the keys k of a batch being samples, prototypes or both,

    loss_i = log sum_{k != i} w_ik exp(x_i . k / T) - mean over the keys p != i of the class y_i of x_i . p / T

where w_ik is `own` of the class where k is of the class y_i, and `other` of the class of k elsewhere: 1 and 1 for SupCon; 1 / (m_c - 1) and 1 / m_c, with m_c
keys of class c, for BCL; `own` is 0 where the denominator leaves out the own class. The mean over positives and its gradient are sums of each class: no matrix
over pairs of samples is needed for them.

A cosine is at most 1, so one exponential, exp((x_i . x_k - 1) / T), serves the denominators of i and of k and both directions of the gradient: the product and
the exponential of each pair of samples are computed once. Where one tile is the whole matrix, as of a batch of a few hundred samples, backward has it from
forward.
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
_CONSECUTIVE_INTEGERS = 2**24  # up to which float32 has each


class _Keys(NamedTuple):
    """What a sample is compared with."""

    unit: Tensor  # (N, D) unit rows of the samples
    prototypes: Tensor | None  # (C, D) unit rows
    label: Tensor  # (N,) int64; C where a label is no class
    group: Tensor | None  # (N,) a number for each label, in the dtype of `unit`; None: all weights are 1
    own: Tensor | None  # (N,) weight of the keys of a sample's class
    other: Tensor | None  # (N,) weight of a sample as a key of samples of other classes
    prototype_other: Tensor | None  # (C,) the same for a prototype
    include_samples: bool
    temperature: float


_Weights = tuple[Tensor, Tensor, Tensor]  # `group`, `own` and `other` of _Keys


def _unit_rows(features: Tensor, prototypes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features and prototypes over their norms (N + C, D), contiguous; and the inverse norms (N + C, 1), 0 where a row has no direction."""
    rows = (features if prototypes is None else torch.cat((features, prototypes))).to(statistics_dtype(features))
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm <= SMALLEST_NORM, 0.0)
    return (rows * inverse).masked_fill_(inverse == 0.0, 0.0).contiguous(), inverse


def _dense_labels(target: Tensor) -> Tensor:
    """Labels in [0, N) that are equal where those of `target` are, computed without reading the number of classes from a GPU."""
    ordered, order = target.sort()
    place = torch.zeros_like(ordered)
    torch.cumsum(ordered[1:] != ordered[:-1], 0, out=place[1:])
    return torch.empty_like(place).scatter_(0, order, place)


def _weights(label: Tensor, class_counts: Tensor | None, num_classes: int, include_own_class: bool, dtype: torch.dtype) -> _Weights:
    """All of them empty where all weights are 1."""
    if class_counts is None and include_own_class:
        empty = label.new_empty(0, dtype=dtype)
        return empty, empty.clone(), empty.clone()
    group = (label if num_classes <= _CONSECUTIVE_INTEGERS else _dense_labels(label)).to(dtype)
    if class_counts is None:
        return group, torch.zeros_like(group), torch.ones_like(group)
    counts = torch.cat((class_counts.to(dtype), group.new_ones(1))).index_select(0, label)
    # infinite for the only key of its class
    own = (counts - 1).reciprocal_().nan_to_num_(posinf=0.0) if include_own_class else torch.zeros_like(group)
    return group, own, counts.reciprocal_()


def _keys(
    unit: Tensor, label: Tensor, weights: _Weights, class_counts: Tensor | None, has_prototypes: bool, include_samples: bool, temperature: float
) -> _Keys:
    num_rows = label.shape[0]
    prototypes = unit[num_rows:] if has_prototypes else None
    if len(weights[0]) == 0:
        return _Keys(unit[:num_rows], prototypes, label, None, None, None, None, include_samples, temperature)
    others = None
    if prototypes is not None:
        others = torch.ones_like(prototypes[:, 0]) if class_counts is None else class_counts.to(unit.dtype).reciprocal()
    return _Keys(unit[:num_rows], prototypes, label, *weights, others, include_samples, temperature)


def _tiles(keys: _Keys) -> Iterator[tuple[slice, slice]]:
    """The tiles of pairs of samples on and above the diagonal."""
    rows = list(_spans(keys.unit.shape[0], keys))
    for place, first in enumerate(rows):
        for second in rows[place:]:
            yield first, second


def _tile_size(device: torch.device) -> int:
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE


def _spans(extent: int, keys: _Keys) -> Iterator[slice]:
    step = _tile_size(keys.unit.device)
    for start in range(0, extent, step):
        yield slice(start, min(start + step, extent))


def _exponential_dtype(dtype: torch.dtype, temperature: float) -> torch.dtype:
    """float64 where float32 cannot hold the smallest exponential."""
    return torch.float64 if 2.0 / temperature > _FLOAT32_RANGE else dtype


def _with_dtype(keys: _Keys, dtype: torch.dtype) -> _Keys:
    if keys.unit.dtype == dtype:
        return keys
    return _Keys(*(value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in keys))  # type: ignore[arg-type]


def _exponentials(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    tile = torch.mm(left, right.t())
    return tile.sub_(1.0).div_(temperature).exp_()


def _of_samples(keys: _Keys, first: slice, second: slice) -> Tensor:
    """The exponentials of a tile of pairs of samples, 0 of a sample with itself."""
    tile = _exponentials(keys.unit[first], keys.unit[second], keys.temperature)
    return tile.fill_diagonal_(0.0) if first == second else tile


def _kept(keys: _Keys) -> tuple[Tensor, Tensor]:
    """The exponentials of samples with samples (N, N) and with prototypes (N, C) where they are one tile; else empty."""
    samples, classes = _kept_shapes(keys.unit, keys.prototypes, keys.include_samples)
    rows = slice(0, keys.unit.shape[0])
    of_samples = _of_samples(keys, rows, rows) if samples[0] else keys.unit.new_empty(samples)
    if keys.prototypes is None or not classes[0]:
        return of_samples, keys.unit.new_empty(classes)
    return of_samples, _exponentials(keys.unit, keys.prototypes, keys.temperature)


def _kept_shapes(rows: Tensor, prototypes: Tensor | None, include_samples: bool) -> list[tuple[int, int]]:
    num_rows, limit = rows.shape[0], _tile_size(rows.device)
    columns = (num_rows if include_samples else 0, 0 if prototypes is None else prototypes.shape[0])
    return [(num_rows, number) if 0 < number <= limit and num_rows <= limit else (0, 0) for number in columns]


def _log_totals(keys: _Keys, of_samples: Tensor, of_prototypes: Tensor) -> Tensor:
    """The logarithm of each sample's denominator (N,), with what `_kept` returns."""
    total = torch.zeros_like(keys.unit[:, 0])
    if keys.include_samples:
        for first, second in _tiles(keys):
            tile = of_samples if len(of_samples) else _of_samples(keys, first, second)
            if keys.group is None or keys.own is None or keys.other is None:
                total[first].add_(tile.sum(1))
                if first != second:
                    total[second].add_(tile.sum(0))
                continue
            same = _same(keys.group[first], keys.group[second])
            excess = keys.own - keys.other
            total[first].add_(torch.addcmul(keys.other[None, second], same, excess[first, None]).mul_(tile).sum(1))
            if first != second:
                total[second].add_(torch.addcmul(keys.other[first, None], same, excess[None, second]).mul_(tile).sum(0))
    if keys.prototypes is not None:
        for rows in _spans(keys.unit.shape[0], keys):
            for classes in _spans(keys.prototypes.shape[0], keys):
                tile = of_prototypes if len(of_prototypes) else _exponentials(keys.unit[rows], keys.prototypes[classes], keys.temperature)
                if keys.own is None or keys.prototype_other is None:
                    total[rows].add_(tile.sum(1))
                    continue
                found, columns = _own_prototypes(keys, rows, classes)
                own = torch.where(found, tile.gather(1, columns), 0.0)
                others = tile.scatter(1, columns, tile.gather(1, columns).masked_fill_(found, 0.0))
                total[rows].add_(others.mv(keys.prototype_other[classes]).addcmul_(own[:, 0], keys.own[rows]))
    return total.log_().add_(1.0 / keys.temperature)


def _same(rows: Tensor, columns: Tensor) -> Tensor:
    """1 where groups are equal, else 0: arithmetic with these numbers takes torch on a CPU a quarter of the time that masks of bool take."""
    return torch.eq(rows[:, None], columns, out=rows.new_empty((len(rows), len(columns))))


def _own_prototypes(keys: _Keys, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether the prototype of each sample's class is among `classes` (rows, 1), and its column."""
    columns = keys.label[rows, None] - classes.start
    inside = columns.clamp(0, classes.stop - classes.start - 1)
    return inside == columns, inside


def _pulls(keys: _Keys, of_samples: Tensor, of_prototypes: Tensor, log_total: Tensor, rate: Tensor) -> Tensor:
    """The gradient of the unit rows of samples and prototypes (N + C, D) through the denominators, with what `_kept` returned.

    The gradient of a cosine is the sample's rate times the probability of the key.
    """
    log_total, rate = log_total.to(keys.unit.dtype), rate.to(keys.unit.dtype)
    rate = torch.where(rate == 0.0, 0.0, rate * torch.exp(1.0 / keys.temperature - log_total))
    num_rows, dim = keys.unit.shape
    all_grads = keys.unit.new_zeros((num_rows + (0 if keys.prototypes is None else keys.prototypes.shape[0]), dim))
    grad, grad_prototypes = all_grads[:num_rows], all_grads[num_rows:]
    if keys.include_samples:
        for first, second in _tiles(keys):
            tile = of_samples if len(of_samples) else _of_samples(keys, first, second)
            pull = _pair_rates(keys, rate, first, second).mul_(tile)
            grad[first].addmm_(pull, keys.unit[second])
            if first != second:
                grad[second].addmm_(pull.t(), keys.unit[first])
    if keys.prototypes is not None:
        for rows in _spans(num_rows, keys):
            for classes in _spans(keys.prototypes.shape[0], keys):
                tile = of_prototypes if len(of_prototypes) else _exponentials(keys.unit[rows], keys.prototypes[classes], keys.temperature)
                pull = tile * rate[rows, None]
                if keys.own is not None and keys.prototype_other is not None:
                    found, columns = _own_prototypes(keys, rows, classes)
                    own = torch.where(found, pull.gather(1, columns) * keys.own[rows, None], 0.0)
                    pull.mul_(keys.prototype_other[classes])
                    pull.scatter_(1, columns, torch.where(found, own, pull.gather(1, columns)))
                grad[rows].addmm_(pull, keys.prototypes[classes])
                grad_prototypes[classes].addmm_(pull.t(), keys.unit[rows])
    return all_grads


def _pair_rates(keys: _Keys, rate: Tensor, first: slice, second: slice) -> Tensor:
    """The factor of each pair's exponential in the gradient: over both samples, the sum of the sample's rate times the weight of the other one as its key."""
    if keys.group is None or keys.own is None or keys.other is None:
        return rate[first, None] + rate[None, second]
    rates = torch.outer(rate[first], keys.other[second]).addr_(keys.other[first], rate[second])
    same, own = _same(keys.group[first], keys.group[second]), rate * keys.own
    rates.addcmul_(same, rates, value=-1)  # exactly 0, to which exponentials of any size may add
    return rates.addcmul_(same, own[first, None] + own[None, second])


def _positives(keys: _Keys, num_classes: int) -> tuple[Tensor, Tensor]:
    """The sum (N, D) and the number (N,) of each sample's positives: the other samples of its class, and its prototype."""
    label = keys.label.clamp(max=num_classes - 1)
    if not keys.include_samples:
        assert keys.prototypes is not None
        return keys.prototypes.index_select(0, label), (keys.label < num_classes).to(keys.unit.dtype)
    sums, counts = segment_sums(keys.unit, keys.label, num_classes)
    if keys.prototypes is None:
        counts -= 1
    else:
        sums += keys.prototypes
    count = counts.index_select(0, label).masked_fill_(keys.label == num_classes, 0)
    return sums.index_select(0, label).sub_(keys.unit), count.to(keys.unit.dtype)


@implements("contrastive_forward", "torch")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss, and for backward what `_empty_saved` lists."""
    known = class_counts if prototypes is None else prototypes
    num_classes = features.shape[0] if known is None else known.shape[0]
    label = _dense_labels(target) if known is None else target.masked_fill(target.clamp(0, num_classes - 1) != target, num_classes)
    unit, inverse = _unit_rows(features, prototypes)
    dtype = unit.dtype
    weights = _weights(label, class_counts, num_classes, include_own_class, dtype)
    keys = _keys(unit, label, weights, class_counts, prototypes is not None, include_samples, temperature)

    in_range = _with_dtype(keys, _exponential_dtype(dtype, temperature))
    kept = _kept(in_range)
    log_total = _log_totals(in_range, *kept).to(dtype)
    positives, count = _positives(keys, num_classes)
    is_anchor = count > 0
    share = is_anchor / count.clamp_(min=1.0)
    terms = torch.where(is_anchor, log_total - torch.linalg.vecdot(keys.unit, positives) * (share / temperature), 0.0)
    terms.masked_fill_(label == num_classes, torch.nan)
    anchors = is_anchor.sum(dtype=dtype) if reduction == "mean" else terms.new_ones(())
    loss = terms if reduction == "none" else terms.sum() / anchors
    rate = is_anchor / (temperature * anchors)
    return loss, [unit, inverse, label, *weights, log_total, rate, share, positives, *kept]


@implements("contrastive_backward", "torch")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and the prototypes; one that was not requested is empty."""
    unit, inverse, label, group, own, other, log_total, rate, share, positives, kept_samples, kept_prototypes = saved
    num_rows = label.shape[0]
    known = class_counts if prototypes is None else prototypes
    num_classes = num_rows if known is None else known.shape[0]
    keys = _keys(unit, label, (group, own, other), class_counts, prototypes is not None, include_samples, temperature)
    rate = torch.where(rate == 0.0, 0.0, rate * grad_loss)  # a sample without positives has no gradient, even if the upstream one is NaN
    in_range = _with_dtype(keys, _exponential_dtype(unit.dtype, temperature))
    grad = _pulls(in_range, kept_samples, kept_prototypes, log_total, rate).to(unit.dtype)
    of_samples, of_prototypes = grad[:num_rows], grad[num_rows:]

    # each sample is pulled towards its positives, and they towards it
    no_class = (label == num_classes)[:, None]
    pull = (rate * share)[:, None]
    of_samples.addcmul_(positives, pull, value=-1)
    pull = keys.unit * pull
    sums, _ = segment_sums(pull, label, num_classes)
    if include_samples:
        of_samples.sub_(sums.index_select(0, label.clamp(max=num_classes - 1)).sub_(pull).masked_fill_(no_class, 0.0))
    if prototypes is not None:
        of_prototypes.sub_(sums)
    # through the norms
    grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse)
    of_samples.masked_fill_(no_class, torch.nan)
    empty = features.new_empty(0)
    return (
        of_samples.to(features.dtype, copy=True) if features_grad else empty,
        of_prototypes.to(prototypes.dtype, copy=True) if prototypes_grad and prototypes is not None else empty,
    )


@shapes_of("contrastive_forward", "torch")
def _forward_shapes(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=statistics_dtype(features))
    return loss, _empty_saved(features, prototypes, target, class_counts is not None or not include_own_class, temperature, include_samples)


def _empty_saved(features: Tensor, prototypes: Tensor | None, target: Tensor, weighted: bool, temperature: float, include_samples: bool) -> list[Tensor]:
    """What forward keeps: unit rows and inverse norms of samples and prototypes; labels; what `_weights` returns; of each sample the logarithm of the
    denominator, the rate at an upstream gradient of 1, the share of a positive and the sum of positives; what `_kept` returns."""
    dtype = statistics_dtype(features)
    num_rows, dim = features.shape
    num_keys = num_rows + (0 if prototypes is None else prototypes.shape[0])
    units, samples = [(num_keys, dim), (num_keys, 1)], [*[(num_rows if weighted else 0,)] * 3, *[(num_rows,)] * 3, (num_rows, dim)]
    of_units, of_samples = ([features.new_empty(shape, dtype=dtype) for shape in shapes] for shapes in (units, samples))
    kept = (features.new_empty(shape, dtype=_exponential_dtype(dtype, temperature)) for shape in _kept_shapes(features, prototypes, include_samples))
    return [*of_units, target.new_empty(num_rows), *of_samples, *kept]
