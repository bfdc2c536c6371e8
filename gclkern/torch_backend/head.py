"""The loss of a classifier head in torch: features (N, D) against one weight row for each class (C, D), without a normalised copy of the weights.

With unit vectors f_hat and w_hat and G = dL/dcos, normalisation and its backward are applied to the products:

    cos_ij = <f_hat_i, w_j> / |w_j|
    df_i = (p_i - <p_i, f_hat_i> f_hat_i) / |f_i|,          p_i = sum_j (G_ij / |w_j|) w_j
    dw_j = p_j - <p_j, w_j> w_j / |w_j|^2,                  p_j = sum_i (G_ij / |w_j|) f_hat_i

so both gradient products use the same matrix, G over the norms of the classes. <p_j, w_j> = sum_i G_ij cos_ij takes one pass over (N, C) instead of two over
(C, D). It needs the cosines after G has overwritten them, so a second matrix keeps them. The upstream gradient, scalar or one for each row, scales the rows of
f_hat and of df.

A plan sets how many classes' cosines exist at a time:
    materialised   all classes; forward turns the (N, C) matrix into G over the norms in place and keeps it, so that backward is two products
    chunked        as many classes as make a matrix of _CHUNK_BYTES; backward computes the cosines again: four products
    recompute      the same with a matrix of _PANEL_BYTES, whatever the number of classes
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gclkern.kernels.terms import SMALLEST_NORM, ClassShards, LossTerms, implements, shapes_of, statistics_dtype
from gclkern.torch_backend.rows import (
    RowGradients,
    RowSums,
    add_noise_and_bias_,
    finite_peak,
    gradient_,
    gradient_shapes,
    ignored_rows,
    noise_scratch,
    reduce_rows,
    row_blocks,
    row_losses,
    row_upstream,
    some_zero,
    top1_rows,
    without,
)

_CHUNK_BYTES = 16 * 2**20  # of cosines, twice in backward: far above what a product needs to run at full speed
_PANEL_BYTES = 2 * 2**20  # of cosines, twice in backward: fits the cache, and is small beside the other tensors
_MIN_CLASSES = 64  # narrower products are inefficient
_WEIGHT_BYTES = 8 * 2**20  # of weight rows for a chunk of the weight gradient: the chunk and its gradient stay in the third-level cache

# Replaces 1 / |w_j| where the norm counts as 0: it makes cosines smaller than 1e-32, and unlike 0, the bias gradient can be divided by it.
_NO_DIRECTION = 1e-20


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _chunk_classes(plan: str, num_rows: int, num_classes: int, dtype: torch.dtype) -> int:
    """How many classes' cosines exist at a time."""
    if plan == "materialised":
        return num_classes
    size = _CHUNK_BYTES if plan == "chunked" else _PANEL_BYTES
    return min(num_classes, max(_MIN_CLASSES, size // (num_rows * dtype.itemsize)))


def _product_classes(linear_weight: Tensor, dtype: torch.dtype) -> int:
    return max(_MIN_CLASSES, _WEIGHT_BYTES // (linear_weight.shape[1] * dtype.itemsize))


def _inverse_norms(matrix: Tensor, no_direction: float) -> Tensor:
    """1 / |row|; `no_direction` where the norm counts as 0, NaN where it is not finite."""
    norm = torch.linalg.vector_norm(matrix, dim=1)
    return norm.reciprocal().masked_fill_(norm.isposinf(), math.nan).masked_fill_(norm <= SMALLEST_NORM, no_direction)


def _feature_inverse(features: Tensor, ignored: Tensor | None, normalize: bool) -> Tensor:
    """1 / |f_i| (N,); 0 for rows that are ignored or whose norm counts as 0."""
    inverse = _inverse_norms(features, 0.0) if normalize else torch.ones(features.shape[0], dtype=features.dtype, device=features.device)
    return without(ignored, inverse)


def _times_rows(matrix: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows times their factor; 0 where the factor is 0, even if the row holds NaN."""
    product = torch.mul(matrix, factor.unsqueeze(1), out=out)
    return product.masked_fill_((factor == 0).unsqueeze(1), 0.0) if some_zero(factor) else product


def _matrix(panel: Tensor, num_rows: int, num_classes: int) -> Tensor:
    """The first elements of a flat panel as a contiguous matrix."""
    return panel[: num_rows * num_classes].view(num_rows, num_classes)


class _Head:
    """The cosines of one call, chunk of classes by chunk."""

    def __init__(self, features: Tensor, linear_weight: Tensor, terms: LossTerms, normalize: bool, plan: str) -> None:
        self.num_rows, self.num_classes = features.shape[0], linear_weight.shape[0]
        self.dtype, self.device = statistics_dtype(features), features.device
        self.features = features.to(self.dtype)
        self.linear_weight = linear_weight
        self.terms = terms
        self.normalize = normalize
        self.width = _chunk_classes(plan, self.num_rows, self.num_classes, self.dtype)
        self.product_classes = min(self.width, _product_classes(linear_weight, self.dtype))

    @functools.cached_property
    def noise(self) -> Tensor | None:
        return noise_scratch(self.num_rows, self.width, self.terms, self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def weight_rows(self, classes: slice) -> Tensor:
        """Rows of the weight in the precision of the products, without a copy where possible."""
        return self.linear_weight[classes].to(self.dtype)

    def chunks(self) -> Iterator[slice]:
        return _spans(0, self.num_classes, self.width)

    def multiply(self, unit: Tensor, chunk: slice, out: Tensor, inverse: Tensor, find_norms: bool) -> None:
        """out = <f_hat_i, w_j> for a chunk of classes. 16-bit weights pass through float32 a few rows at a time; `inverse` receives 1 / |w_j|."""
        whole = self.linear_weight.dtype == self.dtype
        for classes in _spans(chunk.start, chunk.stop, self.width if whole else self.product_classes):
            rows = self.weight_rows(classes)
            if find_norms:
                inverse[classes] = _inverse_norms(rows, _NO_DIRECTION)
            torch.mm(unit, rows.t(), out=out[:, classes.start - chunk.start : classes.stop - chunk.start])

    def blocks(self, matrix: Tensor, chunk: slice, inverse: Tensor, raw: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Turn the products of a chunk into scale * cosine in place, and yield one block of rows at a time; `raw` receives a copy of the products."""
        scale = inverse[chunk] * self.terms.scale if self.normalize else self.terms.scale
        for rows in row_blocks(self.num_rows, matrix.shape[1], self.device):
            block = matrix[rows]
            if raw is not None:
                raw[rows] = block
            if isinstance(scale, Tensor) or scale != 1.0:
                block.mul_(scale)
            yield rows, block


class _WeightGradient:
    """dw = p - <p, w> w / |w|^2 for a few rows of the weight at a time."""

    def __init__(self, head: _Head, unit: Tensor, inverse: Tensor) -> None:
        self.head = head
        self.unit = unit  # f_hat times the upstream gradient
        self.inverse = inverse
        self.grad = torch.empty(head.linear_weight.shape, dtype=head.linear_weight.dtype, device=head.device)
        self.cast = None if self.grad.dtype == head.dtype else head.empty(head.product_classes, self.grad.shape[1])
        self.directed = inverse != _NO_DIRECTION
        self.some_flat = head.normalize and some_zero(self.directed)

    def add(self, gradient: Tensor, rows: Tensor, classes: slice, along: Tensor | None) -> None:
        """`gradient` (N, classes) is G over the norms, `rows` are the weight's, `along` is <p, w>."""
        product = self.grad[classes] if self.cast is None else self.cast[: rows.shape[0]]
        torch.mm(gradient.t(), self.unit, out=product)
        if along is not None:
            product.addcmul_(rows, (along * self.inverse[classes].square()).unsqueeze(1), value=-1)
            if self.some_flat:
                product.masked_fill_(~self.directed[classes].unsqueeze(1), 0.0)
        if self.cast is not None:
            self.grad[classes] = product


def _project_rows_(products: Tensor, features: Tensor, inverse: Tensor, upstream: Tensor, normalize: bool) -> None:
    """p becomes df = (p - <p, f_hat> f_hat) / |f| times the upstream gradient, in place."""
    if normalize:
        unit = _times_rows(features, inverse)
        products.addcmul_(unit, torch.linalg.vecdot(products, unit).unsqueeze(1), value=-1)
    _times_rows(products, inverse * upstream, out=products)


def _along(kept: Tensor, grad_loss: Tensor, upstream: Tensor) -> Tensor:
    """<p, w> of all classes, from G times the products: summed over the samples already, or (N, C) if each sample has its own upstream gradient."""
    if kept.dim() == 2:
        return torch.mv(kept.t(), upstream)
    return torch.where(kept == 0, 0.0, kept * grad_loss)  # if all samples are ignored, the mean's gradient is NaN but must not reach any of them


def _gradient_again(head: _Head, matrix: Tensor, chunk: slice, inverse: Tensor, stats: RowGradients, upstream: Tensor) -> Tensor | None:
    """The products of a chunk become G over the norms, in place. Returns <p, w> of its classes, where they are normalised."""
    raw = torch.empty_like(matrix) if head.normalize else None
    slope_buffer = torch.empty_like(matrix) if head.terms.adds_class_angles else None
    for rows, block in head.blocks(matrix, chunk, inverse, raw):
        slopes = None if slope_buffer is None else slope_buffer[rows]
        add_noise_and_bias_(block, head.terms, rows, chunk, head.noise, slopes)
        block.sub_(stats.anchor[rows].unsqueeze(1)).exp_()
        gradient_(block, head.terms, stats, rows, chunk, block, slopes)
        if raw is not None:
            block.mul_(inverse[chunk])
            raw[rows].mul_(block)
    return None if raw is None else torch.mv(raw.t(), upstream)


def run_forward(
    features: Tensor, linear_weight: Tensor, terms: LossTerms, normalize: bool, plan: str, for_backward: bool, shards: ClassShards | None = None,
    top1: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss and what backward needs, followed by top-1 (N,) if asked for; `shards` are the classes that other ranks hold."""
    head = _Head(features, linear_weight, terms, normalize, plan)
    ignored = ignored_rows(terms)
    feature_inverse = _feature_inverse(head.features, ignored, normalize)
    unit = _times_rows(head.features, feature_inverse)
    class_inverse = head.empty(head.num_classes if normalize else 0)
    sums = RowSums(head.num_rows, terms, head.dtype, head.device, top1=top1)
    panel = head.empty(head.num_rows * head.width)
    materialised = for_backward and plan == "materialised"
    raw = head.empty(head.num_rows, head.num_classes) if normalize and materialised else None
    slope_buffer = head.empty(head.num_rows, head.num_classes) if terms.adds_class_angles and materialised else None
    for chunk in head.chunks():
        matrix = _matrix(panel, head.num_rows, chunk.stop - chunk.start)
        head.multiply(unit, chunk, matrix, class_inverse, normalize)
        for rows, block in head.blocks(matrix, chunk, class_inverse, raw):
            sums.add_bare(block, rows, chunk)
            add_noise_and_bias_(block, terms, rows, chunk, head.noise, None if slope_buffer is None else slope_buffer[rows])
            sums.add_(block, rows, chunk)
    local_peak = sums.peak
    if shards is not None:
        sums = sums.merged(shards)
    num_classes = head.num_classes if shards is None else shards.num_classes
    losses, stats = row_losses(sums, num_classes, ignored)
    loss, denominator = reduce_rows(losses, sums.terms, ignored)
    found = [top1_rows(sums, num_classes, ignored)] if top1 else []
    if not for_backward:
        return loss, found
    if not materialised:
        return loss, [feature_inverse, class_inverse, denominator, *stats, *found]
    stats = stats.times(terms.scale)
    if shards is not None:  # the panel holds exponentials relative to the peaks of this rank's classes
        stats.parts[0] *= torch.exp(finite_peak(local_peak) - finite_peak(sums.peak))
    gradient = panel.view(head.num_rows, head.num_classes)
    everything = slice(0, head.num_classes)
    for rows in row_blocks(head.num_rows, head.num_classes, head.device):
        block = gradient[rows]
        gradient_(block, terms, stats, rows, everything, block, None if slope_buffer is None else slope_buffer[rows])
        if raw is not None:
            raw[rows].mul_(block.mul_(class_inverse))
    along = head.empty(0)
    if raw is not None:
        along = raw if terms.reduction == "none" else raw.sum(0)
    return loss, [feature_inverse, class_inverse, denominator, gradient, along, *found]


def run_backward(
    grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], terms: LossTerms, normalize: bool, plan: str,
    features_grad: bool, weight_grad: bool, bias_grad: bool, shards: ClassShards | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the features, the weights and the bias; those not requested are empty."""
    head = _Head(features, linear_weight, terms, normalize, plan)
    # `kept` is the gradient and `along`, or the fields of RowGradients, from which they are computed again
    feature_inverse, class_inverse, denominator, *kept = saved
    upstream = row_upstream(grad_loss, denominator, ignored_rows(terms), terms, head.dtype)
    materialised = plan == "materialised"
    unit = head.features if materialised else _times_rows(head.features, feature_inverse)
    products = head.empty(*features.shape) if features_grad else head.empty(0)
    weights = _WeightGradient(head, _times_rows(head.features, feature_inverse * upstream), class_inverse) if weight_grad else None
    grad_bias = head.empty(head.num_classes if bias_grad else 0)

    along: Tensor | None = None  # <p, w> of the classes of a chunk, from the products rather than from p: a pass over (N, C), not over (C, D)
    panel = kept[0].view(-1) if materialised else head.empty(head.num_rows * head.width)
    for chunk in head.chunks():
        matrix = _matrix(panel, head.num_rows, chunk.stop - chunk.start)
        if not materialised:
            head.multiply(unit, chunk, matrix, class_inverse, False)
            along = _gradient_again(head, matrix, chunk, class_inverse, RowGradients(*kept).times(terms.scale), upstream)
        elif normalize:
            along = _along(kept[1], grad_loss / denominator, upstream)
        if bias_grad:
            torch.mv(matrix.t(), upstream, out=grad_bias[chunk])
        for classes in _spans(chunk.start, chunk.stop, head.product_classes):
            rows = head.weight_rows(classes)
            gradient = matrix[:, classes.start - chunk.start : classes.stop - chunk.start]
            if features_grad:
                products.addmm_(gradient, rows, beta=0 if classes.start == 0 else 1)
            if weights is not None:
                weights.add(gradient, rows, classes, None if along is None else along[classes.start - chunk.start : classes.stop - chunk.start])
    grad_weight = linear_weight.new_empty(0) if weights is None else weights.grad
    if bias_grad:
        grad_bias.div_(class_inverse * terms.scale if normalize else terms.scale)
    if features_grad:
        del weights, unit  # frees memory for what follows
        _project_rows_(products, head.features, feature_inverse, upstream, normalize)
        if shards is not None:
            products = shards.scatter(products)()
    return products.to(features.dtype), grad_weight, grad_bias


@implements("head_forward", "torch")
def head_forward(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, normalize, plan, for_backward, top1 = args
    return run_forward(features, linear_weight, LossTerms(*fields), normalize, plan, for_backward, top1=top1)


@implements("head_backward", "torch")
def head_backward(grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, normalize, plan, features_grad, weight_grad, bias_grad = args
    return run_backward(grad_loss, features, linear_weight, saved, LossTerms(*fields), normalize, plan, features_grad, weight_grad, bias_grad)


@shapes_of("head_forward", "torch")
def _(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, normalize, plan, for_backward, top1 = args
    terms = LossTerms(*fields)
    num_rows, num_classes, dtype = features.shape[0], linear_weight.shape[0], statistics_dtype(features)
    loss = features.new_empty((num_rows,) if terms.reduction == "none" else (), dtype=dtype)
    found = [features.new_empty(num_rows, dtype=dtype)] if top1 else []
    if not for_backward:
        return loss, found
    kept = gradient_shapes(num_rows, terms)
    if plan == "materialised":
        along = (num_rows, num_classes) if terms.reduction == "none" else (num_classes,)
        kept = ((num_rows, num_classes), along if normalize else (0,))
    return loss, [features.new_empty(shape, dtype=dtype) for shape in ((num_rows,), (num_classes if normalize else 0,), (), *kept)] + found
