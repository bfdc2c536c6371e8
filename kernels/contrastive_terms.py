"""The softmax over samples and class prototypes in torch, without the sums over keys.

With unit vectors x_i of the samples and q_c of the prototypes, and the keys k of a batch being samples, prototypes or both,

    loss_i = log sum_{k != i} w_ik exp(x_i . k / T) - mean over the keys p != i of the class y_i of x_i . p / T

where w_ik is `own` of the class where k is of the class y_i, and `other` of the class of k elsewhere: 1 and 1 for SupCon; 1 / (m_c - 1) and 1 / m_c, with m_c
keys of class c, for BCL; `own` is 0 where the denominator leaves out the own class. The mean over positives and its gradient are sums of each class: no matrix
over pairs of samples is needed for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .terms import SMALLEST_NORM, statistics_dtype


class Keys(NamedTuple):
    """What a sample is compared with."""

    unit: Tensor  # (N, D) unit rows of the samples
    prototypes: Tensor | None  # (C, D) unit rows
    label: Tensor  # (N,) int64; C where a label is no class
    own: Tensor | None  # (N,) weight of the keys of a sample's class; None: all weights are 1
    other: Tensor | None  # (N,) weight of a sample as a key of samples of other classes
    prototype_other: Tensor | None  # (C,) the same for a prototype
    include_samples: bool
    temperature: float


LogTotals = Callable[[Keys], Tensor]  # log of each sample's denominator (N,)
# The gradients of the unit rows of samples (N, D) and of prototypes (C, D), from the denominators and the rates (N,) of the samples: a cosine's gradient is the
# sample's rate times the probability.
Pulls = Callable[[Keys, Tensor, Tensor], tuple[Tensor, Tensor | None]]
SegmentSums = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows over their norms, contiguous, as the kernels read them, whatever the strides of `rows`; and the inverse norms, 0 where a row has no direction."""
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
) -> Keys:
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
    return Keys(unit, prototypes, label, own, other, prototype_other, include_samples, temperature)


def empty_saved(features: Tensor, prototypes: Tensor | None, target: Tensor) -> list[Tensor]:
    """What forward keeps: unit rows and inverse norms of samples and of prototypes, log denominators, rates at an upstream gradient of 1, shares, labels."""
    dtype = statistics_dtype(features)
    num_rows, dim = features.shape
    num_classes = 0 if prototypes is None else prototypes.shape[0]
    shapes = ((num_rows, dim), (num_rows,), (num_classes, dim), (num_classes,), (num_rows,), (num_rows,), (num_rows,))
    return [*(features.new_empty(shape, dtype=dtype) for shape in shapes), target.new_empty(num_rows)]


def forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str, log_totals: LogTotals, segment_sums: SegmentSums,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss, and for backward what `empty_saved` lists."""
    dtype = statistics_dtype(features)
    unit, inverse = _unit_rows(features, dtype)
    known = class_counts if prototypes is None else prototypes
    num_classes = features.shape[0] if known is None else known.shape[0]
    label = _dense_labels(target) if known is None else torch.where(target.clamp(0, num_classes - 1) == target, target, num_classes)
    unit_prototypes, inverse_prototypes = (unit.new_empty((0, unit.shape[1])), unit.new_empty(0)) if prototypes is None else _unit_rows(prototypes, dtype)
    keys = _keys(unit, None if prototypes is None else unit_prototypes, label, class_counts, include_samples, include_own_class, temperature)

    log_total = log_totals(keys)
    positives, count = _positives(keys, num_classes, segment_sums)
    is_anchor = count > 0
    share = count.reciprocal().masked_fill_(~is_anchor, 0.0)
    terms = torch.where(is_anchor, log_total - torch.linalg.vecdot(unit, positives) * (share / temperature), 0.0)
    terms = terms.masked_fill_(label == num_classes, torch.nan)
    anchors = is_anchor.sum(dtype=dtype) if reduction == "mean" else is_anchor.new_ones((), dtype=dtype)
    loss = terms if reduction == "none" else terms.sum() / anchors
    rate = is_anchor.to(dtype) / (temperature * anchors)
    return loss, [unit, inverse, unit_prototypes, inverse_prototypes, log_total, rate, share, label]


def _positives(keys: Keys, num_classes: int, segment_sums: SegmentSums) -> tuple[Tensor, Tensor]:
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


def backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool, pulls: Pulls, segment_sums: SegmentSums,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and the prototypes; one that was not requested is empty."""
    unit, inverse, unit_prototypes, inverse_prototypes, log_total, rate, share, label = saved
    known = class_counts if prototypes is None else prototypes
    num_classes = features.shape[0] if known is None else known.shape[0]
    keys = _keys(unit, None if prototypes is None else unit_prototypes, label, class_counts, include_samples, include_own_class, temperature)
    rate = torch.where(rate == 0.0, 0.0, rate * grad_loss)  # a sample without positives has no gradient, even if the upstream one is NaN
    grad, grad_prototypes = pulls(keys, log_total, rate)

    # each sample is pulled towards its positives, and they towards it
    pull = (rate * share)[:, None]
    positives, _ = _positives(keys, num_classes, segment_sums)
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


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of rows from that of their unit rows."""
    return grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse[:, None])


def forward_shapes(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=statistics_dtype(features))
    return loss, empty_saved(features, prototypes, target)


def backward_shapes(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_features = features.new_empty(tuple(features.shape) if features_grad else (0,))
    if not prototypes_grad or prototypes is None:
        return grad_features, features.new_empty(0)
    return grad_features, prototypes.new_empty(tuple(prototypes.shape))
