"""The loss of a classifier head that keeps exponentials of its logits in place of cosines, so that backward is two plain products.

A cosine is at most 1, so for one constant anchor no exp(s (v_ij - anchor)) overflows. Forward computes the cosines by the vendor's product, and one pass
writes, in their place and rounded to bfloat16,

    E_ij = exp(s (v_ij - anchor)) / |w_j|,   and at a target the value for which r_i E_iy is its gradient,

because then the gradient that enters the products is G_ij = dL/dcosine_ij / |w_j| = r_i E_ij, with one factor for each sample, known once its row is summed.
Backward draws no noise and writes nothing of size (N, C):

    df_i = r_i (E w)_i, and the backward of its norm,      dw = E.T (r x), and the backward of its norms, a panel of classes at a time.

The sum of a row adds exponentials in float32, before they are rounded, and leaves its targets out, so the loss and a target's gradient are as accurate as in
row_loss.py. E is rounded where the other plans round G, so the products have the same error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import products
from .logit_loss import (
    MOST_SPLITS,
    ROW_ALIGNMENT,
    STATS_COLUMNS,
    accumulate_hardest,
    add_noise_and_bias,
    empty_rows,
    empty_statistics,
    load_class_term,
    load_seed,
    padded_columns,
    round_tile,
    row_targets,
)
from .products import (
    aligned_rows,
    finish_feature_gradient,
    target_cosine,
    unit_features,
    unit_weights,
    weight_rows,
    whole_vectors,
)
from .row_loss import LOG2E, row_losses
from .runtime import MULTIPROCESSORS, NVIDIA, batch_kernel
from .terms import ClassShards, LossTerms

# The largest exponential is 2 to this power: far enough from the ends of bfloat16's range, 2^-126 and 2^127, for norms of weights to divide it and for all
# logits of a scale up to LARGEST_SCALE. v is -2 or more where clouds are 1 or less.
TOP_EXPONENT = 40.0
LARGEST_SCALE = 40.0
SMALLEST_EXPONENT = -126.0  # a row whose factor is below two to this power has gradient 0
RESIDENT = 6  # programs of the exponentials that a multiprocessor holds at a time
LARGEST_DIM = 8192  # a row of the weights' gradient is held in registers
# Of a panel of unit weights, or of the weights' gradient in float32: it stays in the cache between the product and the pass over it.
PANEL_BYTES = 2**24


def serves(terms: LossTerms, dim: int) -> bool:
    """Whether this loss of 16-bit, normalised features can be computed here: a logit's gradient is a multiple of its exponential, which is in range.

    Not on AMD GPUs, where some versions of torch have no product of 16-bit matrices in float32.
    """
    linear = terms.bias is None and not terms.smoothed and not terms.adds_class_angles and not terms.difficulty_margin
    return linear and terms.scale <= LARGEST_SCALE and terms.class_offset % 8 == 0 and dim <= LARGEST_DIM and torch.version.hip is None


def _anchor2(scale: float) -> float:
    """The anchor's logit in powers of two."""
    return scale * LOG2E - TOP_EXPONENT


@triton.jit
def _exponential_tile(
    rest, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, exponential_ptr, stride_vectors, cloud_ptr, inverse_norm_ptr, seed,
    num_classes, padded, row_offset, first_group, scale2, anchor2,
    MASKED: tl.constexpr, TWO: tl.constexpr, HARDEST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    classes = tile * COLUMNS + tl.arange(0, COLUMNS)
    present = classes >= 0
    writable = in_batch[:, None]
    if MASKED:
        present = classes < num_classes
        writable = writable & (classes < padded)[None, :]
    cloud = load_class_term(cloud_ptr, classes, present, 0.0)
    inverse_norm = load_class_term(inverse_norm_ptr, classes, present, 0.0)
    at = (rows * stride_vectors * VECTOR)[:, None] + classes[None, :]
    if MASKED:
        cosine = tl.load(cosine_ptr + at, mask=(classes < padded)[None, :], other=0.0).to(tl.float32)
    else:
        cosine = tl.load(cosine_ptr + at).to(tl.float32)
    if HARDEST:
        hardest = accumulate_hardest(hardest, cosine, classes, present, target, target_b, MASKED, TWO)
    v, _ = add_noise_and_bias(
        cosine,
        rows + row_offset,
        first_group + tile * (COLUMNS // 8),
        seed,
        cloud,
        cloud,
        1.0,
        cloud_ptr is not None,
        False,
        False,
        False,
        COLUMNS // 8,
        NVIDIA,
    )
    exponential = tl.exp2(scale2 * v - anchor2)
    stored, _ = round_tile(exponential * inverse_norm[None, :], exponential_ptr.dtype.element_ty, NVIDIA)
    tl.store(exponential_ptr + at, stored, mask=writable)
    outside = classes[None, :] == target[:, None]
    if TWO:
        outside |= classes[None, :] == target_b[:, None]
    if MASKED:
        outside |= ~present[None, :]
    return rest + tl.sum(tl.where(outside, 0.0, exponential).reshape(ROWS, COLUMNS // 8, 8), axis=2), hardest


@batch_kernel
def _exponentials_kernel(
    cosine_ptr, exponential_ptr, stride_vectors, padded,  # (N, padded C), the same memory twice
    target_ptr, target_b_ptr, cloud_ptr, seed_ptr, inverse_norm_ptr, peak_ptr, rest_ptr, hardest_ptr,  # (splits, N)
    num_rows, num_classes, tiles_per_split, row_offset, first_group, scale2, anchor2, anchor,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Exponentials in place of cosines, and the softmax statistics of row_loss.py."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    in_batch = rows < num_rows
    if ROWS == 1:
        in_batch = rows == rows  # there is no program beyond the batch: stores need no mask
    target, target_b = row_targets(target_ptr, target_b_ptr, rows, in_batch, 0)
    seed = load_seed(seed_ptr)
    rows = tl.minimum(rows, num_rows - 1)  # so that no load needs a mask
    rest = tl.zeros((ROWS, COLUMNS // 8), tl.float32)  # for every lane of 8 neighbouring classes: threads exchange no values in the loop
    hardest = tl.full((ROWS, COLUMNS // 8), -float("inf"), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_classes, COLUMNS))
    whole = tl.maximum(first, tl.minimum(last, num_classes // COLUMNS))
    for tile in range(first, whole):
        rest, hardest = _exponential_tile(
            rest, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, exponential_ptr, stride_vectors, cloud_ptr, inverse_norm_ptr, seed,
            num_classes, padded, row_offset, first_group, scale2, anchor2, False, target_b_ptr is not None, hardest_ptr is not None,
            VECTOR, ROWS, COLUMNS, NVIDIA,
        )  # fmt: skip
    for tile in range(whole, last):
        rest, hardest = _exponential_tile(
            rest, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, exponential_ptr, stride_vectors, cloud_ptr, inverse_norm_ptr, seed,
            num_classes, padded, row_offset, first_group, scale2, anchor2, True, target_b_ptr is not None, hardest_ptr is not None,
            VECTOR, ROWS, COLUMNS, NVIDIA,
        )  # fmt: skip
    total = tl.sum(rest, axis=1)
    at = split.to(tl.int64) * num_rows + rows
    tl.store(peak_ptr + at, tl.where(total == 0.0, -float("inf"), anchor), mask=in_batch)
    tl.store(rest_ptr + at, total, mask=in_batch)
    if hardest_ptr is not None:
        tl.store(hardest_ptr + at, tl.max(hardest, axis=1), mask=in_batch)


@triton.jit
def _store_target(
    exponential_ptr, row_start, label_ptr, inverse_norm_ptr, stats_ptr, rows, in_batch, num_classes, shift, SMALLEST: tl.constexpr
):  # fmt: skip
    label = tl.load(label_ptr + rows, mask=in_batch, other=-1)
    present = in_batch & (label >= 0) & (label < num_classes)
    value = tl.load(stats_ptr + rows, mask=in_batch, other=0.0) * tl.load(inverse_norm_ptr + label, mask=present, other=0.0)
    value = tl.where(shift > -SMALLEST, 0.0, value * tl.exp2(shift))
    tl.store(exponential_ptr + row_start + label, value.to(exponential_ptr.dtype.element_ty), mask=present)


@batch_kernel
def _targets_kernel(
    exponential_ptr, stride, inverse_norm_ptr, target_ptr, target_b_ptr, stats_ptr, num_rows, num_classes, anchor2,
    SMALLEST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store at each target its gradient divided by the row's factor."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    shift = tl.load(stats_ptr + rows, mask=in_batch, other=0.0) - anchor2
    row_start = rows * stride
    _store_target(exponential_ptr, row_start, target_ptr, inverse_norm_ptr, stats_ptr + num_rows, rows, in_batch, num_classes, shift, SMALLEST)
    if target_b_ptr is not None:
        _store_target(exponential_ptr, row_start, target_b_ptr, inverse_norm_ptr, stats_ptr + num_rows * 2, rows, in_batch, num_classes, shift, SMALLEST)


@batch_kernel
def _scaled_features_kernel(
    unit_ptr, unit_stride, inverse_norm_ptr, stats_ptr, grad_loss_ptr, denominator_ptr, factor_ptr, out_ptr, out_stride, dim, scale, anchor2,
    PER_ROW: tl.constexpr, SMALLEST: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """r_i x_i of each row, and r_i / |f_i|."""
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(stats_ptr + row) - anchor2
    upstream = tl.load(grad_loss_ptr + row) if PER_ROW else tl.load(grad_loss_ptr)
    factor = tl.where(shift > -SMALLEST, 0.0, tl.exp2(-shift) * (upstream * (scale / tl.load(denominator_ptr))))  # shift is infinite if the row is ignored
    tl.store(factor_ptr + row, factor * tl.load(inverse_norm_ptr + row))
    for start in range(0, out_stride, DEPTH):
        at = start + tl.arange(0, DEPTH)
        x = tl.load(unit_ptr + row * unit_stride + at, mask=at < dim, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + at, (factor * x).to(out_ptr.dtype.element_ty), mask=at < out_stride)


@batch_kernel
def _finish_weights_kernel(
    gradient_ptr, gradient_stride, weight_ptr, stride_c, stride_d, inverse_norm_ptr, out_ptr, num_classes, dim, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """The backward of the norms of some classes' weights: g - <g, w> w / |w|^2, where g holds 1 / |w| already."""
    classes = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = classes < num_classes
    inverse_norm = tl.load(inverse_norm_ptr + classes, mask=inside, other=0.0)
    at = tl.arange(0, DEPTH)
    wanted = inside[:, None] & (at < dim)[None, :]
    gradient = tl.load(gradient_ptr + (classes * gradient_stride)[:, None] + at[None, :], mask=wanted, other=0.0)
    weight = tl.load(weight_ptr + (classes * stride_c)[:, None] + (at.to(tl.int64) * stride_d)[None, :], mask=wanted, other=0.0).to(tl.float32)
    unit = weight * inverse_norm[:, None]
    gradient -= tl.sum(gradient * unit, axis=1)[:, None] * unit
    gradient = tl.where((inverse_norm == 0.0)[:, None], 0.0, gradient)
    tl.store(out_ptr + (classes * dim)[:, None] + at[None, :], gradient.to(out_ptr.dtype.element_ty), mask=wanted)


def run_forward(features: Tensor, linear_weight: Tensor, terms: LossTerms, shards: ClassShards | None, top1: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """`head.run_forward` of normalised rows. In place of the cosines the exponentials are kept, and the unit features are float16."""
    num_rows, num_classes = features.shape[0], linear_weight.shape[0]
    unit, inverse_norm = unit_features(features, terms, normalize=True, dtype=torch.float16)
    assert inverse_norm is not None
    own = target_cosine(features, linear_weight, terms.target, inverse_norm)
    own_b = None if terms.target_b is None else target_cosine(features, linear_weight, terms.target_b, inverse_norm)
    inverse_norm_weight = torch.empty(num_classes, dtype=torch.float32, device=features.device)
    cosine = empty_rows(num_rows, num_classes, torch.float16, features.device)
    for part in _panels(num_classes, features.shape[1], 2):
        weight = unit_weights(linear_weight[part], torch.float16, inverse_norm_weight[part])
        products.library_product(whole_vectors(unit), whole_vectors(weight).T, cosine[:, part])
    rows, columns = _tile_shape(num_classes)
    splits = _splits(triton.cdiv(num_rows, rows), triton.cdiv(num_classes, columns))
    peak, rest, blend, hardest = empty_statistics(splits, num_rows, terms, features.device, top1=top1 is not None)
    exponential = _exponentials(cosine, terms, inverse_norm_weight, peak, rest, hardest)
    anchor2, local = _anchor2(terms.scale), terms
    if shards is not None:
        peak, rest, blend, hardest, owns = shards.merge(peak, rest, blend, hardest, [own] if own_b is None else [own, own_b], terms.scale)
        own, own_b = owns[0], None if own_b is None else owns[1]
        num_classes, terms = shards.num_classes, shards.terms
    loss, stats, denominator = row_losses(own, own_b, peak, rest, blend, hardest, num_classes, terms, top1)
    _targets_kernel[(triton.cdiv(num_rows, 128),)](
        exponential, exponential.stride(0), inverse_norm_weight, local.target, local.target_b, stats, num_rows, linear_weight.shape[0], anchor2,
        SMALLEST=SMALLEST_EXPONENT, ROWS=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, [stats, denominator, unit, inverse_norm, inverse_norm_weight, features.new_empty(0, dtype=torch.float32), exponential]


def _tile_shape(num_classes: int) -> tuple[int, int]:
    columns = min(STATS_COLUMNS, max(triton.next_power_of_2(num_classes), 16))
    return min(STATS_COLUMNS // columns, 16), columns


@functools.lru_cache(1024)
def _splits(row_tiles: int, class_tiles: int) -> int:
    """The number of parts of the classes for which the last wave of programs is nearly full."""

    def time(splits: int) -> tuple[int, int]:
        # in class tiles of a program, whose start and end cost about one more; among equals the fewest programs
        return triton.cdiv(row_tiles * splits, MULTIPROCESSORS * RESIDENT) * (triton.cdiv(class_tiles, splits) + 1), splits

    return min(range(1, min(class_tiles, MOST_SPLITS) + 1), key=time)


def _exponentials(cosine: Tensor, terms: LossTerms, inverse_norm: Tensor, peak: Tensor, rest: Tensor, hardest: Tensor | None) -> Tensor:
    num_rows, num_classes = cosine.shape
    exponential = cosine.view(torch.bfloat16)
    rows, columns = _tile_shape(num_classes)
    splits, anchor2, vector = peak.shape[0], _anchor2(terms.scale), 8
    _exponentials_kernel[(triton.cdiv(num_rows, rows), splits)](
        cosine, exponential, cosine.stride(0) // vector, padded_columns(num_classes),
        terms.target, terms.target_b, terms.cloud, terms.seed, inverse_norm, peak, rest, hardest,
        num_rows, num_classes, triton.cdiv(triton.cdiv(num_classes, columns), splits), terms.row_offset, terms.class_offset // 8,
        terms.scale * LOG2E, anchor2, anchor2 / (terms.scale * LOG2E),
        VECTOR=vector, ROWS=rows, COLUMNS=columns, NVIDIA=NVIDIA, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return exponential


def run_backward(
    grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], terms: LossTerms, features_grad: bool, weight_grad: bool,
    shards: ClassShards | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`head.run_backward` for `run_forward`."""
    stats, denominator, unit, inverse_norm, inverse_norm_weight, _, exponential = saved
    num_rows, dim = features.shape
    factor = torch.empty_like(inverse_norm)
    scaled = aligned_rows(num_rows, dim, dtype=torch.bfloat16, device=features.device)
    _scaled_features_kernel[(num_rows,)](
        unit, unit.stride(0), inverse_norm, stats, grad_loss.contiguous(), denominator, factor, scaled, scaled.stride(0), dim, terms.scale,
        _anchor2(terms.scale), PER_ROW=terms.reduction == "none", SMALLEST=SMALLEST_EXPONENT, DEPTH=min(triton.next_power_of_2(dim), 1024), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    empty = features.new_empty(0)
    grad_features, summed = empty, None
    if features_grad:
        partial = products.library_product(exponential, weight_rows(linear_weight, torch.bfloat16))[None]
        grad_features = finish_feature_gradient(partial, unit, factor, features.dtype if shards is None else torch.float32)
        if shards is not None:
            summed = shards.scatter(grad_features)  # the ranks' gradients are summed while those of the weights are computed
    grad_weight = torch.empty_like(linear_weight if weight_grad else linear_weight[:0], memory_format=torch.contiguous_format)
    if weight_grad:
        _weight_gradient(exponential, scaled, linear_weight, inverse_norm_weight, grad_weight)
    if summed is not None:
        grad_features = summed().to(features.dtype)
    return grad_features, grad_weight, features.new_empty(0, dtype=torch.float32)


def _panels(num_classes: int, dim: int, itemsize: int) -> Iterator[slice]:
    """Parts of the classes whose rows of `dim` elements are a panel."""
    size = max(PANEL_BYTES // (itemsize * dim) // ROW_ALIGNMENT, 1) * ROW_ALIGNMENT
    for start in range(0, num_classes, size):
        yield slice(start, min(start + size, num_classes))


def _weight_gradient(exponential: Tensor, scaled: Tensor, linear_weight: Tensor, inverse_norm: Tensor, out: Tensor) -> None:
    num_classes, dim = linear_weight.shape
    depth = triton.next_power_of_2(dim)
    rows = max(2048 // depth, 1)
    for part in _panels(num_classes, dim, 4):
        gradient = products.library_product(exponential[:, part].T, scaled)
        weight = linear_weight[part]
        _finish_weights_kernel[(triton.cdiv(weight.shape[0], rows),)](
            gradient, gradient.stride(0), weight, weight.stride(0), weight.stride(1), inverse_norm[part], out[part], weight.shape[0], dim,
            ROWS=rows, DEPTH=depth, num_warps=max(4, depth // 512), enable_fp_fusion=True,
        )  # fmt: skip
