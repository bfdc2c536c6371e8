"""The softmax over samples and class prototypes in torch, a tile of cosines at a time.

A cosine is at most 1, so one exponential, exp((x_i . x_k - 1) / T), serves the denominators of i and of k and both directions of the gradient: the product and
the exponential of each pair of samples are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gclkern.kernels import contrastive_terms as shared
from gclkern.kernels.contrastive_terms import Keys
from gclkern.kernels.terms import implements, shapes_of
from gclkern.torch_backend.centroids import segment_sums

# Rows and columns of a tile: on a CPU 1 MB in float32, so that it stays in the cache while torch's operators pass over it.
_CPU_TILE = 512
_DEVICE_TILE = 4096
_FLOAT32_RANGE = 80.0  # exp of minus this is a normal float32 number


def _tiles(keys: Keys) -> Iterator[tuple[slice, slice]]:
    """The tiles of pairs of samples on and above the diagonal."""
    rows = list(_spans(keys.unit.shape[0], keys))
    for place, first in enumerate(rows):
        for second in rows[place:]:
            yield first, second


def _spans(extent: int, keys: Keys) -> Iterator[slice]:
    step = _CPU_TILE if keys.unit.device.type == "cpu" else _DEVICE_TILE
    for start in range(0, extent, step):
        yield slice(start, min(start + step, extent))


def _in_range(keys: Keys) -> Keys:
    """The keys in float64 where float32 cannot hold the smallest exponential."""
    if 2.0 / keys.temperature <= _FLOAT32_RANGE or keys.unit.dtype == torch.float64:
        return keys
    return Keys(*(value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in keys))  # type: ignore[arg-type]


def _exponentials(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    tile = torch.mm(left, right.t())
    return tile.sub_(1.0).div_(temperature).exp_()


def _log_totals(keys: Keys) -> Tensor:
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


def _own_prototypes(keys: Keys, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether the prototype of each sample's class is among `classes` (rows, 1), and its column."""
    columns = keys.label[rows, None] - classes.start
    inside = columns.clamp(0, classes.stop - classes.start - 1)
    return inside == columns, inside


def _pulls(keys: Keys, log_total: Tensor, rate: Tensor) -> tuple[Tensor, Tensor | None]:
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


def _pair_rates(keys: Keys, rate: Tensor, first: slice, second: slice) -> Tensor:
    """The factor of each pair's exponential in the gradient: over both samples, the sum of the sample's rate times the weight of the other one as its key."""
    if keys.own is None or keys.other is None:
        return rate[first, None] + rate[None, second]
    others = torch.outer(rate[first], keys.other[second]).addr_(keys.other[first], rate[second])
    own = (rate * keys.own)[first, None] + (rate * keys.own)[None, second]
    return torch.where(keys.label[first, None] == keys.label[None, second], own, others)


@implements("contrastive_forward", "torch")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The same as gclkern.kernels.contrastive_loss.contrastive_forward."""
    return shared.forward(features, prototypes, target, class_counts, temperature, include_samples, include_own_class, reduction, _log_totals, segment_sums)


@implements("contrastive_backward", "torch")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as gclkern.kernels.contrastive_loss.contrastive_backward."""
    return shared.backward(
        grad_loss, features, prototypes, class_counts, saved, temperature, include_samples, include_own_class, features_grad, prototypes_grad, _pulls,
        segment_sums,
    )  # fmt: skip


shapes_of("contrastive_forward", "torch")(shared.forward_shapes)
shapes_of("contrastive_backward", "torch")(shared.backward_shapes)
