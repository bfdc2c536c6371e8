"""The loss of a classifier head, combined from products, statistics and gradients for one chunk of classes after the other.

Plans differ in the cosines that they store:

    materialised   one chunk of all classes; its cosines (N, C) are kept for backward    3 products
    chunked        the cosines of one chunk, computed again in backward                  4 products
    recompute      none: cosines stay in registers                                       4 products

At large sizes "materialised" keeps exponentials in place of cosines (exponentials.py), which leaves only products to backward.

Backward writes the gradient of one chunk at a time, rounded for the products, into a panel: in the last two plans it has PANEL_ELEMENTS elements whatever C is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import exponentials
from .logit_loss import ROW_ALIGNMENT, Statistics, cosine_gradient, empty_rows, empty_statistics, is_padded, row_stats, stats_splits
from .products import (
    add_feature_gradient,
    aligned_rows,
    cosine_product,
    feature_gradient_parts,
    finish_feature_gradient,
    fused_gradient,
    fused_stats,
    normalised_weight_rows,
    scales_rows,
    target_cosine,
    unit_features,
    weight_gradient,
    weight_rows,
)
from .row_loss import ROW_STATS, row_losses
from .runtime import on_device
from .terms import ClassShards, LossTerms, implements, shapes_of

# A panel of 16-bit logits this large (32 MB) stays in the cache of a large GPU between the kernel that writes it and the products that read it.
PANEL_ELEMENTS = 2**24
FUSED_SPLITS = 8  # of a chunk's classes in the fused statistics: tiles have many rows, so splitting only by rows would leave a GPU idle


def chunk_size(plan: str, num_rows: int, num_classes: int) -> int:
    if plan == "materialised":
        return num_classes
    # at most 2**20 classes, because the second axis of a grid is limited
    return min(num_classes, max(min(PANEL_ELEMENTS // num_rows, 2**20) // ROW_ALIGNMENT, 1) * ROW_ALIGNMENT)


def exponentials_pay(num_rows: int, num_classes: int, dim: int) -> bool:
    """Whether it is faster to store exponentials, by the model of benchmarks/predict_times.py.

    They save the gradient's pass over (N, C), and the products are the vendor's, which are faster than ours; they cost passes over (C, D).
    """
    return num_rows >= 512 + dim // 4 and num_rows * num_classes >= 2**22


def stores_exponentials(features: Tensor, num_classes: int, terms: LossTerms, normalize: bool, plan: str) -> bool:
    """Whether the buffer of the plan holds exponentials in place of cosines (exponentials.py), which a bias, label smoothing or a large scale rule out."""
    possible = plan == "materialised" and normalize and features.dtype.itemsize == 2 and exponentials.serves(terms, features.shape[1])
    return possible and exponentials_pay(features.shape[0], num_classes, features.shape[1])


def _cosine_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    # |cosine| <= 1: float16 keeps three bits more of it than bfloat16; a plain product could overflow float16
    return torch.float16 if features.dtype.itemsize == 2 and normalize else torch.float32


def _gradient_dtype(features: Tensor) -> torch.dtype:
    # the gradients of a million classes would underflow in float16
    return torch.bfloat16 if features.dtype.itemsize == 2 else torch.float32


def _chunks(terms: LossTerms, num_classes: int, size: int) -> Iterator[tuple[slice, LossTerms]]:
    for start in range(0, num_classes, size):
        part = slice(start, min(start + size, num_classes))
        cloud, margin, bias, weight = (None if value is None else value[part] for value in (terms.cloud, terms.margin, terms.bias, terms.weight))
        yield part, terms._replace(cloud=cloud, margin=margin, bias=bias, weight=weight, class_offset=terms.class_offset + start)


def run_forward(
    features: Tensor, linear_weight: Tensor, terms: LossTerms, normalize: bool, plan: str, shards: ClassShards | None = None, top1: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and for backward: row statistics, denominator, unit features, inverse norms of features and weights, row scales, cosines ("materialised").

    `shards` are the classes that other ranks hold; `top1` (N,) receives the share of the targets that have the largest cosine.
    """
    num_rows, num_classes = features.shape[0], linear_weight.shape[0]
    with on_device(features):
        if stores_exponentials(features, num_classes, terms, normalize, plan):
            return exponentials.run_forward(features, linear_weight, terms, shards, top1)
        unit, inverse_norm = unit_features(features, terms, normalize=normalize)
        own = target_cosine(features, linear_weight, terms.target, inverse_norm)
        own_b = None if terms.target_b is None else target_cosine(features, linear_weight, terms.target_b, inverse_norm)
        size = chunk_size(plan, num_rows, num_classes)
        fused = plan == "recompute"
        splits = FUSED_SPLITS if fused else stats_splits(num_rows, size)
        statistics = empty_statistics(splits, num_rows, terms, features.device, top1=top1 is not None)
        cosine = features.new_empty(0) if fused else empty_rows(num_rows, size, _cosine_dtype(features, normalize), features.device)
        inverse_norm_weight = features.new_empty(num_classes if normalize else 0, dtype=torch.float32)
        row_scale = features.new_empty(num_classes if normalize and scales_rows(linear_weight, features.dtype) else 0, dtype=torch.float32)
        for part, chunk in _chunks(terms, num_classes, size):
            inverse = None
            if normalize:
                weight, inverse, scale = normalised_weight_rows(linear_weight[part], features.dtype)
                inverse_norm_weight[part] = inverse
                if scale is not None:
                    row_scale[part] = scale
            else:
                weight = weight_rows(linear_weight[part], features.dtype)
            resume = part.start > 0
            if fused:
                fused_stats(unit, weight, inverse, chunk, part.start, statistics, resume=resume)
            else:
                here = cosine[:, : part.stop - part.start]
                cosine_product(unit, weight, inverse, here)
                row_stats(here, chunk, part.start, statistics, resume=resume, padded=True)
        if shards is not None:
            peak, rest, blend, hardest, owns = shards.merge(*statistics, [own] if own_b is None else [own, own_b], terms.scale)
            statistics = Statistics(peak, rest, blend, hardest)
            own, own_b = owns[0], None if own_b is None else owns[1]
            num_classes, terms = shards.num_classes, shards.terms
        loss, stats, denominator = row_losses(own, own_b, *statistics, num_classes, terms, top1)
        kept_cosine = cosine if plan == "materialised" else features.new_empty(0)
        kept_norm = features.new_empty(0, dtype=torch.float32) if inverse_norm is None else inverse_norm
        return loss, [stats, denominator, unit, kept_norm, inverse_norm_weight, row_scale, kept_cosine]


@implements("head_forward", "triton")
def head_forward(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and what backward needs, followed by top-1 (N,) if asked for: the share of the targets that have the largest cosine."""
    *fields, normalize, plan, _, top1 = args
    found = torch.empty(features.shape[0], dtype=torch.float32, device=features.device) if top1 else None
    loss, saved = run_forward(features, linear_weight, LossTerms(*fields), normalize, plan, top1=found)
    return loss, saved if found is None else [*saved, found]


@shapes_of("head_forward", "triton")
def _(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, normalize, plan, _, top1 = args
    terms = LossTerms(*fields)
    (num_rows, dim), num_classes = features.shape, linear_weight.shape[0]

    def empty(*shape: int) -> Tensor:
        return features.new_empty(shape, dtype=torch.float32)

    exponential = stores_exponentials(features, num_classes, terms, normalize, plan)
    stored = torch.bfloat16 if exponential else _cosine_dtype(features, normalize)
    cosine = empty_rows(num_rows, num_classes, stored, features.device) if plan == "materialised" else features.new_empty(0)
    return empty(*((num_rows,) if terms.reduction == "none" else ())), [
        empty(ROW_STATS, num_rows),
        empty(),
        aligned_rows(num_rows, dim, dtype=torch.float16 if exponential else features.dtype, device=features.device),
        empty(num_rows if normalize else 0),
        empty(num_classes if normalize else 0),
        empty(num_classes if normalize and scales_rows(linear_weight, features.dtype) and not exponential else 0),
        cosine,
        *([empty(num_rows)] if top1 else []),
    ]


def run_backward(
    grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], terms: LossTerms, normalize: bool, plan: str,
    features_grad: bool, weight_grad: bool, bias_grad: bool, shards: ClassShards | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the features, the weights and the bias; those not requested are empty."""
    (num_rows, dim), num_classes = features.shape, linear_weight.shape[0]
    stats, denominator, unit, inverse_norm, inverse_norm_weight, row_scale, cosine = saved
    with on_device(features):
        if stores_exponentials(features, num_classes, terms, normalize, plan):
            return exponentials.run_backward(grad_loss, features, linear_weight, saved, terms, features_grad, weight_grad, shards)
        grad_loss = grad_loss.contiguous()
        size = chunk_size(plan, num_rows, num_classes)
        gradient = empty_rows(num_rows, size, _gradient_dtype(features), features.device)
        if plan == "chunked":
            cosine = empty_rows(num_rows, size, _cosine_dtype(features, normalize), features.device)
        grad_weight = torch.empty((num_classes, dim) if weight_grad else 0, dtype=linear_weight.dtype, device=features.device)
        grad_bias = features.new_empty(num_classes if bias_grad else 0, dtype=torch.float32)
        partial = feature_gradient_parts(num_rows if features_grad else 0, dim, gradient.dtype, features.dtype, features.device)
        summed: Callable[[], Tensor] | None = None
        for part, chunk in _chunks(terms, num_classes, size):
            scale = row_scale[part] if row_scale.numel() > 0 else None
            weight = weight_rows(linear_weight[part], features.dtype, scale)
            inverse = inverse_norm_weight[part] if normalize else None
            here = gradient[:, : part.stop - part.start]
            if plan == "recompute":
                sums = fused_gradient(unit, weight, inverse, grad_loss, stats, denominator, chunk, part.start, here, bias_grad=bias_grad)
            else:
                logits = cosine[:, : part.stop - part.start]
                if plan == "chunked":
                    cosine_product(unit, weight, inverse, logits)
                sums = cosine_gradient(
                    logits, grad_loss, stats, denominator, chunk, part.start, here, inverse_norm=inverse, bias_grad=bias_grad, padded=is_padded(logits)
                )
            class_sum, bias_sum = sums
            if bias_sum is not None:
                grad_bias[part] = bias_sum
            if features_grad:
                add_feature_gradient(here, weight, partial, resume=part.start > 0)
                if shards is not None and part.stop == num_classes:
                    # the ranks' gradients are summed while the last chunk's weight gradient is computed
                    found = finish_feature_gradient(partial, unit, inverse_norm if normalize else None, torch.float32)
                    summed = shards.scatter(found)
            if weight_grad:
                weight_gradient(here, unit, linear_weight[part], class_sum, inverse, scale, grad_weight[part])
        grad_features = features.new_empty(0)
        if summed is not None:
            grad_features = summed().to(features.dtype)
        elif features_grad:
            grad_features = finish_feature_gradient(partial, unit, inverse_norm if normalize else None, features.dtype)
        return grad_features, grad_weight, grad_bias


@implements("head_backward", "triton")
def head_backward(grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, normalize, plan, features_grad, weight_grad, bias_grad = args
    return run_backward(grad_loss, features, linear_weight, saved, LossTerms(*fields), normalize, plan, features_grad, weight_grad, bias_grad)
