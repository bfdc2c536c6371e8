"""The softmax over samples and class prototypes in torch, a tile of cosines at a time.

With unit vectors x_i of the samples and q_c of the prototypes, and the keys k of a batch being samples, prototypes or both,

    loss_i = log sum_{k != i} w_ik exp(x_i . k / T) - mean over the n_i keys p != i of the class y_i of x_i . p / T

where w_ik is 1 for SupCon; for BCL, with m_c keys of class c, 1 / m_c of the class of k, but 1 / (m_c - 1) where k is of the class y_i; and 0 for keys of the
class y_i where the denominator leaves out the own class. So w_ik is the weight of the key, times the sample's `boost` where both are of one class.

A cosine is at most 1, so one exponential, E_ik = exp((x_i . k - 1) / T), serves the denominators of i and of k and both directions of the gradient: the product
and the exponential of each pair of samples are computed once. Where one tile is the whole matrix, as of a batch of a few hundred samples, backward has it from
forward. Of more tiles on a CPU, those without positives are found by the order of the classes, and take half of the operators.

The gradient of x_i . p / T, for a positive p, is its probability minus 1 / n_i: where the positives share nearly all of the probability, nothing but rounding
errors would be left. With E_i the mean of the positives' exponentials, total_i the denominator, and rest_i the part of it that is not of positives, it is

    w_ip (E_ip - E_i) / total_i - rest_i / (n_i total_i)

whose first term is exactly 0 for a single positive. For the same reason the loss of a sample with a single positive is log1p(rest_i / (w_ip E_ip)) + log w_ip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import FLOAT32_TEMPERATURE, SMALLEST_NORM, implements, shapes_of, statistics_dtype

# Rows and columns of a tile: on a CPU 1 MB in float32, so that it stays in the cache while torch's operators pass over it. A matrix of up to twice as much is
# one tile.
_CPU_TILE = 512
_DEVICE_TILE = 4096
_CONSECUTIVE_INTEGERS = 2**24  # up to which float32 has each


class _Keys(NamedTuple):
    """What samples are compared with: the N samples, then the prototypes, K in all."""

    unit: Tensor  # (K, D) unit rows
    group: Tensor  # (K,) a number for each class, in the dtype of `unit`: torch compares floating-point numbers several times faster than integers
    weight: Tensor  # (K,) of a key in the denominators of samples of other classes; empty: 1
    boost: Tensor  # (N,) factor of the weight in the denominators of samples of the same class; empty: 1
    num_samples: int
    include_samples: bool
    in_order: bool  # samples and prototypes are in the order of their classes
    temperature: float


class _Place(NamedTuple):
    """A tile of the matrix of samples and keys. Pairs of samples are in it once: below the diagonal the matrix is that above."""

    rows: slice  # samples
    columns: slice  # keys
    beyond: slice  # the keys of the tile that are not among its rows
    mirrored: slice  # the samples of these, whose rows are below the diagonal
    has_positives: bool  # whether it may have pairs of one class

    def part(self, tile: Tensor, columns: slice) -> Tensor:
        return tile[:, columns.start - self.columns.start : columns.stop - self.columns.start]


def _tile_size(device: torch.device) -> int:
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE


def _whole(device: torch.device, num_samples: int, num_keys: int, include_samples: bool) -> tuple[int, int]:
    """The matrix of samples and keys where it is one tile; else (0, 0)."""
    columns = num_keys if include_samples else num_keys - num_samples
    return (num_samples, columns) if num_samples * columns <= 2 * _tile_size(device) ** 2 else (0, 0)


def _is_sorted(device: torch.device, whole: tuple[int, int]) -> bool:
    """Whether samples are brought into the order of their classes: on a CPU most of several tiles then have no positives, which makes them cheaper."""
    return device.type == "cpu" and whole[0] == 0


def _places(keys: _Keys) -> Iterator[_Place]:
    num_keys, num_samples = keys.unit.shape[0], keys.num_samples
    height, width = _whole(keys.unit.device, num_samples, num_keys, keys.include_samples)
    if height == 0:
        height = width = _tile_size(keys.unit.device)
    for top in range(0, num_samples, height):
        bottom = min(top + height, num_samples)
        for left in range(top if keys.include_samples else num_samples, num_keys, width):
            right = min(left + width, num_keys)
            has_positives = True
            if keys.in_order and not left < num_samples < right:
                first, last, first_key, last_key = keys.group[[top, bottom - 1, left, right - 1]].tolist()
                has_positives = first <= last_key and first_key <= last
            beyond = max(left, bottom)
            mirrored = slice(beyond, max(beyond, min(right, num_samples)))
            yield _Place(slice(top, bottom), slice(left, right), slice(beyond, right), mirrored, has_positives)


def _statistics_dtype(features: Tensor, temperature: float) -> torch.dtype:
    """float64 where float32 cannot hold the smallest exponential."""
    return torch.float64 if temperature < FLOAT32_TEMPERATURE else statistics_dtype(features)


def _unit_rows(features: Tensor, prototypes: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and prototypes over their norms (K, D), contiguous; and the inverse norms (K, 1), 0 for a row without direction, NaN for an infinite norm."""
    rows = (features if prototypes is None else torch.cat((features, prototypes))).to(dtype)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm.isposinf(), math.nan).masked_fill_(norm <= SMALLEST_NORM, 0.0)
    return (rows * inverse).masked_fill_(inverse == 0.0, 0.0).contiguous(), inverse


def _dense_labels(target: Tensor) -> Tensor:
    """Labels in [0, N) that are equal where those of `target` are, computed without reading the number of classes from a GPU."""
    ordered, order = target.sort()
    place = torch.zeros_like(ordered)
    torch.cumsum(ordered[1:] != ordered[:-1], 0, out=place[1:])
    return torch.empty_like(place).scatter_(0, order, place)


def _weights(label: Tensor, num_samples: int, class_counts: Tensor | None, include_own_class: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` and `boost` of _Keys, from the classes of the keys."""
    none = label.new_empty(0, dtype=dtype)
    if class_counts is None:
        return none, none.clone() if include_own_class else label.new_zeros(num_samples, dtype=dtype)
    counts = torch.cat((class_counts.to(dtype), none.new_ones(1))).index_select(0, label)
    of_samples = counts[:num_samples]
    # the only key of its class has none of its own class in its denominator
    boost = torch.where(of_samples > 1, of_samples / (of_samples - 1), 0.0) if include_own_class else torch.zeros_like(of_samples)
    return counts.reciprocal(), boost


def _logits(keys: _Keys, place: _Place) -> Tensor:
    return torch.mm(keys.unit[place.rows], keys.unit[place.columns].t()).sub_(1.0).div_(keys.temperature)


def _exponentials(logits: Tensor, same: Tensor | None, keys: _Keys, place: _Place) -> Tensor:
    """E times the boost of pairs of one class, in place of the logits."""
    tile = _without_self(logits.exp_(), place)
    if same is None or len(keys.boost) == 0:
        return tile
    # exactly 0 at a boost of 0: an exponential of any size may stand beside others in a sum
    return tile.mul_(torch.addcmul(same.new_ones(()), same, keys.boost[place.rows, None] - 1.0))


def _same(keys: _Keys, place: _Place) -> Tensor | None:
    """1 for pairs of one class, else 0; None where there are none. Arithmetic with numbers takes torch on a CPU a quarter of the time of masks of bool."""
    if not place.has_positives:
        return None
    rows, columns = keys.group[place.rows, None], keys.group[place.columns]
    return _without_self(torch.eq(rows, columns, out=rows.new_empty((len(rows), len(columns)))), place)


def _without_self(tile: Tensor, place: _Place) -> Tensor:
    """The tile, set to 0 in place where a sample meets itself."""
    return tile.fill_diagonal_(0.0) if place.columns.start == place.rows.start else tile


def _statistics(keys: _Keys) -> tuple[Tensor, Tensor]:
    """Sums over each sample's keys (4, N): the number of positives, their logits, their exponentials; and the exponentials of the others times their weights.

    With them the exponentials of all pairs (N, K) where they are one tile, else empty.
    """
    sums = keys.unit.new_zeros((4, keys.num_samples))
    kept = keys.unit.new_empty(_whole(keys.unit.device, keys.num_samples, keys.unit.shape[0], keys.include_samples))
    weight = keys.weight if len(keys.weight) > 0 else None
    for place in _places(keys):
        same, logits = _same(keys, place), _logits(keys, place)
        if same is None:
            _add_sums(sums[3], _exponentials(logits, None, keys, place), place, weight)
            continue
        _add_sums(sums[0], same, place)
        _add_sums(sums[1], same * logits, place)
        exponentials = _exponentials(logits, same, keys, place)
        positive = same.mul_(exponentials)
        _add_sums(sums[2], positive, place)
        _add_sums(sums[3], exponentials - positive, place, weight)
        if len(kept) > 0:
            kept = exponentials
    return sums, kept


def _add_sums(totals: Tensor, tile: Tensor, place: _Place, weight: Tensor | None = None) -> None:
    """Adds the sums of the tile's rows to `totals` (N,), and those of the rows that it has below the diagonal."""
    totals[place.rows].add_(tile.sum(1) if weight is None else tile.mv(weight[place.columns]))
    if place.mirrored.start < place.mirrored.stop:
        below = place.part(tile, place.mirrored)
        totals[place.mirrored].add_(below.sum(0) if weight is None else below.t().mv(weight[place.rows]))


def _unit_gradient(keys: _Keys, exponentials: Tensor, rate: Tensor, attraction: Tensor, reference: Tensor) -> Tensor:
    """The gradient of the unit rows (K, D), with the exponentials where forward kept them.

    That of a cosine is, over both samples of a pair, the sum of rate times the weight of the other one as a key times E - reference, the last for positives
    only, minus the attraction of both where they are positives. Both (K,) are 0 for prototypes.
    """
    grad = torch.zeros_like(keys.unit)
    for place in _places(keys):
        same = _same(keys, place)
        tile = exponentials if len(exponentials) > 0 else _exponentials(_logits(keys, place), same, keys, place)
        left, right = rate[place.rows], rate[place.columns]
        if len(keys.weight) == 0:
            factor = left[:, None] + right
        else:
            factor = torch.outer(left, keys.weight[place.columns]).addr_(keys.weight[place.rows], right)
        if same is None:
            pull = factor.mul_(tile)
        else:
            pull = factor.mul_(torch.addcmul(tile, same, reference[place.rows, None], value=-1))
            pull.addcmul_(same, attraction[place.rows, None] + attraction[place.columns], value=-1)
        grad[place.rows].addmm_(pull, keys.unit[place.columns])
        if place.beyond.start < place.beyond.stop:
            grad[place.beyond].addmm_(place.part(pull, place.beyond).t(), keys.unit[place.rows])
    return grad


@implements("contrastive_forward", "torch")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss, and for backward what `_empty_saved` lists."""
    num_samples = features.shape[0]
    known = class_counts if prototypes is None else prototypes
    num_classes = num_samples if known is None else known.shape[0]
    num_keys = num_samples + (0 if prototypes is None else num_classes)
    unknown = None if known is None else target.clamp(0, num_classes - 1) != target
    label = _dense_labels(target) if unknown is None else target.masked_fill(unknown, num_classes)
    order = label.new_empty(0)
    in_order = _is_sorted(features.device, _whole(features.device, num_samples, num_keys, include_samples))
    if in_order:
        label, order = label.sort(stable=True)
        features = features.index_select(0, order)
        unknown = None if unknown is None else unknown.index_select(0, order)
    unit, inverse = _unit_rows(features, prototypes, _statistics_dtype(features, temperature))
    if unknown is not None:
        inverse[:num_samples].masked_fill_(unknown[:, None], torch.nan)  # and so the gradient of these rows
    classes = label if prototypes is None else torch.cat((label, torch.arange(num_classes, device=label.device)))
    weight, boost = _weights(classes, num_samples, class_counts, include_own_class, unit.dtype)
    group = (classes if num_classes <= _CONSECUTIVE_INTEGERS else _dense_labels(classes)).to(unit.dtype)
    keys = _Keys(unit, group, weight, boost, num_samples, include_samples, in_order, temperature)

    (number, logits, own, others), kept = _statistics(keys)
    if unknown is not None:
        number = number.masked_fill(unknown, 0.0)
    is_anchor, is_single, count = number > 0, number == 1, number.clamp(min=1.0)
    own_weight = weight[:num_samples] if len(weight) > 0 else 1.0
    own_part = own * own_weight
    total = own_part + others
    no_keys = total == 0.0  # all keys are positives that the denominator leaves out
    terms = total.log().sub_(logits / count)
    precise = (others / own_part).log1p_()
    if len(weight) > 0:
        precise.add_((own_weight * boost).log_())
    terms = torch.where(is_single & (own_part > others), precise, terms)
    terms = torch.where(is_anchor, terms, 0.0)
    if unknown is not None:
        terms.masked_fill_(unknown, torch.nan)
    anchors = is_anchor.sum(dtype=unit.dtype) if reduction == "mean" else 1.0
    loss = _as_given(terms, order) if reduction == "none" else terms.sum() / anchors

    # One for both samples of a pair, and no larger than the mean of either, whose digits it would take. Of a single positive exactly the exponential.
    mean_own = own / count
    smallest = mean_own.new_full((num_classes + 1,), torch.inf).scatter_reduce_(0, label, mean_own, "amin").index_select(0, label)
    reference = torch.where(is_single, mean_own, smallest)
    rate = total.reciprocal().masked_fill_(no_keys, 0.0)
    attraction = (others / total).masked_fill_(no_keys, 1.0).div_(count)
    attraction.add_((mean_own - reference).mul_(own_weight).mul_(rate))
    rates = unit.new_zeros((2, unit.shape[0]))
    rates[:, :num_samples] = torch.where(is_anchor, torch.stack((rate, attraction)).div_(temperature * anchors), 0.0)
    return loss.to(statistics_dtype(features)), [unit, inverse, group, weight, boost, order, rates, reference, kept]


def _as_given(values: Tensor, order: Tensor) -> Tensor:
    """Values of the samples in the order of the batch."""
    return torch.empty_like(values).index_copy_(0, order, values) if len(order) > 0 else values


@implements("contrastive_backward", "torch")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and the prototypes; one that was not requested is empty."""
    unit, inverse, group, weight, boost, order, rates, reference, kept = saved
    num_samples = features.shape[0]
    upstream = grad_loss
    if upstream.dim() > 0:
        upstream = upstream.index_select(0, order) if len(order) > 0 else upstream
        upstream = torch.cat((upstream, upstream.new_zeros(unit.shape[0] - num_samples)))
    # a sample without positives has no gradient, even if the upstream one is NaN
    rate, attraction = torch.where(rates == 0.0, 0.0, rates * upstream)
    keys = _Keys(unit, group, weight, boost, num_samples, include_samples, len(order) > 0, temperature)
    grad = _unit_gradient(keys, kept, rate, attraction, reference)
    # through the norms
    grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse)
    empty = features.new_empty(0)
    return (
        _as_given(grad[:num_samples].to(features.dtype, copy=True), order) if features_grad else empty,
        grad[num_samples:].to(prototypes.dtype, copy=True) if prototypes_grad and prototypes is not None else empty,
    )


@shapes_of("contrastive_forward", "torch")
def _forward_shapes(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=statistics_dtype(features))
    return loss, _empty_saved(features, prototypes, class_counts is not None, class_counts is not None or not include_own_class, temperature, include_samples)


def _empty_saved(features: Tensor, prototypes: Tensor | None, weighted: bool, boosted: bool, temperature: float, include_samples: bool) -> list[Tensor]:
    """What forward keeps: of _Keys the unit rows, their inverse norms, groups, weights and boosts; the order of the samples, if it is not that of the batch;
    rates and attractions at an upstream gradient of 1, the references, and the exponentials, as _unit_gradient takes them."""
    num_samples, dim = features.shape
    num_keys = num_samples + (0 if prototypes is None else prototypes.shape[0])
    whole = _whole(features.device, num_samples, num_keys, include_samples)
    unit = features.new_empty((num_keys, dim), dtype=_statistics_dtype(features, temperature))
    order = features.new_empty(num_samples if _is_sorted(features.device, whole) else 0, dtype=torch.int64)
    of_keys = [(num_keys, 1), (num_keys,), (num_keys if weighted else 0,), (num_samples if boosted else 0,)]
    return [unit, *map(unit.new_empty, of_keys), order, *map(unit.new_empty, [(2, num_keys), (num_samples,), whole])]
