"""The matrix products of a classifier head, fused with the operations on each tile while it is in registers.

Unit features x = f / |f| (N, D) are multiplied with raw weights w (C, D); a column of logits is scaled by 1 / |w_j| after the product. Backward uses
G_ij = dL/dcosine_ij / |w_j|, for which

    df_i = (sum_j G_ij w_j - q_i x_i) / |f_i|,  q_i = sum_j G_ij |w_j| cosine_ij
    dw_j =  sum_i G_ij x_i - r_j w_j / |w_j|,   r_j = sum_i G_ij cosine_ij

so the backward of both normalisations is an epilogue, and no normalised copy of the weights exists. With a whole row of G @ w, q_i is
<sum_j G_ij w_j, x_i>; a row of G.T @ x is split over many tiles, so r_j is summed where G is computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .logit_loss import (
    Statistics,
    accumulate_hardest,
    accumulate_tile,
    add_noise_and_bias,
    empty_lanes,
    finish_gradient_tile,
    load_class_term,
    load_class_terms,
    load_row_gradient,
    load_seed,
    padded_columns,
    row_targets,
    store_lanes,
    sums_over_rows,
    tile_gradient,
)
from .row_loss import LOG2E
from .runtime import INTERPRETED, MULTIPROCESSORS, NVIDIA, VECTOR_BYTES, batch_kernel
from .terms import SMALLEST_NORM, LossTerms

WIDE_COLUMNS = 256  # fewest columns of a product that fill a wide tile


class Tile(NamedTuple):
    """Tile shape, warps and pipeline stages of a product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, columns: int, device: torch.device) -> Tile:
    """The tile of a product with `columns` columns. A depth of 128 bytes is one swizzled row of shared memory.

    A tile of 128 x 128 needs more L2 bandwidth than there is: 32 KiB per step of 512 tensor core clocks. A tile of 128 x 256 needs 25% less per operation, but
    128 accumulators per thread and 144 KiB of shared memory, which require Hopper.
    """
    if dtype.itemsize != 2:
        return Tile(64, 64, 32, 8, 3)
    return Tile(128, 256, 64, 8, 3) if columns >= WIDE_COLUMNS and runtime.is_hopper(device) else Tile(128, 128, 64, 8, 3)


def fused_tile_of(dtype: torch.dtype, *, angular: bool = False) -> Tile:
    """The tile of the fused kernels, with half the rows, because the noise of a tile needs as many registers as its product; angles need some more."""
    if dtype.itemsize != 2:
        return Tile(64, 32, 32, 8, 3)
    return Tile(64, 64 if angular else 128, 64, 8, 3)


def _precision() -> str:
    # torch.get_float32_matmul_precision raises if tf32 was chosen by this newer setting, which also reflects the older settings
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def tile_of_program(program, fast_tiles):
    """The slow and the fast tile of a program: programs that run at the same time share the slow operand, which should be the larger one.

    Both are on one axis of the grid, because the others are limited to 65535.
    """
    return program // fast_tiles, program % fast_tiles


@triton.jit
def _inverse(norm, zero_norm):
    """1 / norm; 0 where the norm counts as 0, NaN where it is NaN or overflows float32."""
    return tl.where(norm <= zero_norm, 0.0, tl.where(norm < float("inf"), 1.0 / norm, float("nan")))


@batch_kernel
def _unit_rows_kernel(
    x_ptr, stride_n, stride_d, copy_ptr, copy_stride, inverse_norm_ptr, row_scale_ptr, target_ptr, target_b_ptr, num_rows, dim, ignore_index, zero_norm,
    UNIT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Inverse norms of rows, and a copy of the rows; each is optional.

    With UNIT the copied rows are divided by their norms, if norms are computed, and are 0 if they are ignored or their norm counts as 0.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if inverse_norm_ptr is not None:
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, dim, DEPTH):
            at = start + tl.arange(0, DEPTH)
            inside = in_batch[:, None] & (at < dim)[None, :]
            x = tl.load(x_ptr + (rows * stride_n)[:, None] + (at.to(tl.int64) * stride_d)[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        norm = tl.sqrt(squares)
        factor = _inverse(norm, zero_norm)
    if target_ptr is not None:
        ignored = tl.load(target_ptr + rows, mask=in_batch, other=0) == ignore_index
        if target_b_ptr is not None:
            ignored |= tl.load(target_b_ptr + rows, mask=in_batch, other=0) == ignore_index
        factor = tl.where(ignored, 0.0, factor)
    if inverse_norm_ptr is not None:
        tl.store(inverse_norm_ptr + rows, factor, mask=in_batch)
    if copy_ptr is not None:
        for start in range(0, copy_stride, DEPTH):
            at = start + tl.arange(0, DEPTH)
            inside = in_batch[:, None] & (at < dim)[None, :]
            x = tl.load(x_ptr + (rows * stride_n)[:, None] + (at.to(tl.int64) * stride_d)[None, :], mask=inside, other=0.0).to(tl.float32)
            if row_scale_ptr is not None:
                x *= tl.load(row_scale_ptr + rows, mask=in_batch, other=0.0)[:, None]
            if UNIT:
                x = tl.where(factor[:, None] == 0.0, 0.0, x * factor[:, None])  # 0 even if the row holds NaN
            wanted = in_batch[:, None] & (at < copy_stride)[None, :]  # the padding of the last vector is 0
            tl.store(copy_ptr + (rows * copy_stride)[:, None] + at[None, :], x.to(copy_ptr.dtype.element_ty), mask=wanted)


@batch_kernel
def _target_cosine_kernel(
    x_ptr, stride_n, stride_d, weight_ptr, weight_stride_c, weight_stride_d, target_ptr, inverse_norm_x_ptr, cosine_ptr,
    num_classes, dim, zero_norm, NORMALIZE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + row)
    if (label >= 0) & (label < num_classes):
        product = tl.zeros((DEPTH,), tl.float32)
        squares = tl.zeros((DEPTH,), tl.float32)
        for start in range(0, dim, DEPTH):
            at = (start + tl.arange(0, DEPTH)).to(tl.int64)
            x = tl.load(x_ptr + row * stride_n + at * stride_d, mask=at < dim, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + label * weight_stride_c + at * weight_stride_d, mask=at < dim, other=0.0).to(tl.float32)
            product += x * weight
            squares += weight * weight
        cosine = tl.sum(product)
        if NORMALIZE:
            norm = tl.sqrt(tl.sum(squares))
            cosine *= tl.load(inverse_norm_x_ptr + row) * _inverse(norm, zero_norm)
        tl.store(cosine_ptr + row, cosine)
    else:
        tl.store(cosine_ptr + row, 0.0)


@triton.jit
def _product_tile(
    x_ptr, x_vectors, rows, weight_ptr, weight_vectors, classes, dim, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[rows] @ weight[classes].T in float32; rows and classes must exist. WHOLE: dim is a multiple of DEPTH."""
    at = tl.arange(0, DEPTH)
    x_tile = x_ptr + (rows * x_vectors * VECTOR)[:, None] + at[None, :]
    weight_tile = weight_ptr + (classes * weight_vectors * VECTOR)[None, :] + at[:, None]
    dim = tl.cdiv(dim, VECTOR) * VECTOR  # the padding of a row's last vector is 0
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dim, DEPTH):
        if WHOLE:
            x = tl.load(x_tile)
            weight = tl.load(weight_tile)
        else:
            x = tl.load(x_tile, mask=(start + at < dim)[None, :], other=0.0)
            weight = tl.load(weight_tile, mask=(start + at < dim)[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        product = tl.dot(x, weight, product, input_precision=PRECISION, out_dtype=tl.float32)
        x_tile += DEPTH
        weight_tile += DEPTH
    return product


@triton.jit
def _cosine_tile(
    x_ptr, x_vectors, rows, num_rows, weight_ptr, weight_vectors, inverse_norm_ptr, classes, num_classes, present, dim, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines of a tile (plain products without norms); places outside the matrix repeat its last row or class, so that no load is masked."""
    product = _product_tile(
        x_ptr, x_vectors, tl.minimum(rows, num_rows - 1), weight_ptr, weight_vectors, tl.minimum(tl.maximum(classes, 0), num_classes - 1).to(tl.int64), dim,
        VECTOR, ROWS, COLUMNS, DEPTH, WHOLE, UPCAST, PRECISION,
    )  # fmt: skip
    inverse_norm = load_class_term(inverse_norm_ptr, classes, present, 1.0)
    if inverse_norm_ptr is not None:
        product *= inverse_norm[None, :]
    return product, inverse_norm


@batch_kernel
def _cosine_kernel(
    x_ptr, x_vectors, weight_ptr, weight_vectors, inverse_norm_ptr, out_ptr, out_stride, writable, num_rows, num_classes, dim,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    class_tile, row_tile = tile_of_program(tl.program_id(0), tl.cdiv(num_rows, ROWS))
    rows = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    classes = class_tile * COLUMNS + tl.arange(0, COLUMNS)
    cosine, _ = _cosine_tile(
        x_ptr, x_vectors, rows, num_rows, weight_ptr, weight_vectors, inverse_norm_ptr, classes, num_classes, classes < num_classes, dim,
        VECTOR, ROWS, COLUMNS, DEPTH, WHOLE, UPCAST, PRECISION,
    )  # fmt: skip
    out = out_ptr + (rows * out_stride)[:, None] + classes[None, :]
    tl.store(out, cosine.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & (classes < writable)[None, :])


@batch_kernel
def _fused_stats_kernel(
    x_ptr, x_vectors, weight_ptr, weight_vectors, inverse_norm_ptr,
    target_ptr, target_b_ptr, cloud_ptr, bias_ptr, class_weight_ptr, seed_ptr, peak_ptr, rest_ptr, blend_ptr, hardest_ptr,
    num_rows, num_classes, dim, tiles_per_split, row_offset, first_group, shift, target_shift, scale2, inverse_scale,
    RESUME: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of logits that stay in registers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    in_batch = rows < num_rows
    target, target_b = row_targets(target_ptr, target_b_ptr, rows, in_batch, target_shift)
    seed = load_seed(seed_ptr)
    peak, rest, blend, hardest = empty_lanes(ROWS, COLUMNS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_classes + shift, COLUMNS))
    for tile in range(first, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        classes = columns - shift
        present = (classes >= 0) & (classes < num_classes)
        cosine, _ = _cosine_tile(
            x_ptr, x_vectors, rows, num_rows, weight_ptr, weight_vectors, inverse_norm_ptr, classes, num_classes, present, dim, VECTOR,
            ROWS, COLUMNS, DEPTH, WHOLE, UPCAST, PRECISION,
        )  # fmt: skip
        cloud, bias, class_weight = load_class_terms(cloud_ptr, bias_ptr, class_weight_ptr, classes, present)
        if hardest_ptr is not None:
            hardest = accumulate_hardest(hardest, cosine, columns, present, target, target_b, True, target_b_ptr is not None)
        v, _ = add_noise_and_bias(
            cosine, rows + row_offset, first_group + tile * (COLUMNS // 8), seed, cloud, bias, inverse_scale,
            cloud_ptr is not None, bias_ptr is not None, ANGULAR, EASY, COLUMNS // 8, NVIDIA,
        )  # fmt: skip
        peak, rest, blend = accumulate_tile(
            peak, rest, blend, v, columns, present, class_weight, target, target_b, scale2, True, target_b_ptr is not None, blend_ptr is not None
        )  # fmt: skip
    at = split.to(tl.int64) * num_rows + rows
    store_lanes(peak_ptr, rest_ptr, blend_ptr, hardest_ptr, at, in_batch, peak, rest, blend, hardest, scale2, RESUME)


@batch_kernel
def _fused_gradient_kernel(
    x_ptr, x_vectors, weight_ptr, weight_vectors, inverse_norm_ptr, out_ptr, out_stride, writable,
    target_ptr, target_b_ptr, cloud_ptr, bias_ptr, class_weight_ptr, seed_ptr, stats_ptr, grad_loss_ptr, denominator_ptr,
    class_sum_ptr, bias_sum_ptr,  # (row tiles, C)
    num_rows, num_classes, dim, row_offset, first_group, shift, target_shift, scale, scale2, inverse_scale,
    SMOOTH: tl.constexpr, PER_ROW: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The gradient of logits that stay in registers."""
    row_tile = tl.program_id(0)
    tile = tl.program_id(1)
    rows = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    classes = columns - shift
    present = (classes >= 0) & (classes < num_classes)
    cosine, inverse_norm = _cosine_tile(
        x_ptr, x_vectors, rows, num_rows, weight_ptr, weight_vectors, inverse_norm_ptr, classes, num_classes, present, dim,
        VECTOR, ROWS, COLUMNS, DEPTH, WHOLE, UPCAST, PRECISION,
    )  # fmt: skip
    cloud, bias, class_weight = load_class_terms(cloud_ptr, bias_ptr, class_weight_ptr, classes, present)
    target, target_b = row_targets(target_ptr, target_b_ptr, rows, in_batch, target_shift)
    _, offset, grad_a, grad_b, smooth, factor = load_row_gradient(
        stats_ptr, grad_loss_ptr, num_rows, rows, in_batch, scale / tl.load(denominator_ptr), target_b_ptr is not None, SMOOTH, PER_ROW
    )
    v, by_cosine = add_noise_and_bias(
        cosine, rows + row_offset, first_group + tile * (COLUMNS // 8), load_seed(seed_ptr), cloud, bias, inverse_scale,
        cloud_ptr is not None, bias_ptr is not None, ANGULAR, EASY, COLUMNS // 8, NVIDIA,
    )  # fmt: skip
    dz = tile_gradient(
        v, by_cosine, columns, class_weight, target, target_b, offset, grad_a, grad_b, smooth, scale2, target_b_ptr is not None, SMOOTH, ANGULAR
    )  # fmt: skip
    gradient, class_term, bias_term = finish_gradient_tile(
        dz, cosine, factor, present, inverse_norm, inverse_scale, True, inverse_norm_ptr is not None, bias_sum_ptr is not None, out_ptr.dtype.element_ty,
        NVIDIA,
    )  # fmt: skip
    out = out_ptr + (rows * out_stride)[:, None] + classes[None, :]
    tl.store(out, gradient, mask=in_batch[:, None] & ((classes >= 0) & (classes < writable))[None, :])
    at = row_tile.to(tl.int64) * num_classes + classes
    if inverse_norm_ptr is not None:
        tl.store(class_sum_ptr + at, tl.sum(class_term, axis=0), mask=present)
    if bias_sum_ptr is not None:
        tl.store(bias_sum_ptr + at, tl.sum(bias_term, axis=0), mask=present)


@batch_kernel
def _feature_gradient_kernel(
    gradient_ptr, gradient_stride, weight_ptr, weight_vectors, partial_ptr, partial_stride,  # partial (splits, N, D)
    num_rows, num_classes, dim, depth_per_split,
    RESUME: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial G @ w over a split of the classes; with RESUME it is added to the result of earlier classes. WHOLE: dim is a multiple of COLUMNS."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    inside = (rows < num_rows)[:, None] & (columns < tl.cdiv(dim, 4) * 4)[None, :]  # up to the last vector of float32
    out = partial_ptr + (split.to(tl.int64) * num_rows + rows)[:, None] * (partial_stride // 4 * 4) + columns[None, :]
    dim = tl.cdiv(dim, VECTOR) * VECTOR
    if RESUME:
        total = tl.load(out, mask=inside, other=0.0)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = split * depth_per_split
    readable_rows = tl.minimum(rows, num_rows - 1)
    # the gradient's padding up to a multiple of DEPTH is 0, so a class beyond the last adds 0 times the last one's weights
    for start in range(first, tl.minimum(first + depth_per_split, num_classes), DEPTH):
        classes = start + tl.arange(0, DEPTH)
        gradient = tl.load(gradient_ptr + (readable_rows * gradient_stride)[:, None] + classes[None, :])
        weight_tile = weight_ptr + (tl.minimum(classes, num_classes - 1).to(tl.int64) * weight_vectors * VECTOR)[:, None] + columns[None, :]
        weight = tl.load(weight_tile) if WHOLE else tl.load(weight_tile, mask=(columns < dim)[None, :], other=0.0)
        if UPCAST:
            gradient = gradient.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(gradient, weight.to(gradient.dtype), total, input_precision=PRECISION, out_dtype=tl.float32)
    tl.store(out, total, mask=inside)


@batch_kernel
def _finish_features_kernel(
    gradient_ptr, gradient_stride, unit_ptr, unit_stride, inverse_norm_ptr, out_ptr, dim, DEPTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    along = 0.0
    inverse_norm = 1.0
    if inverse_norm_ptr is not None:
        inverse_norm = tl.load(inverse_norm_ptr + row)
        product = tl.zeros((DEPTH,), tl.float32)
        for start in range(0, dim, DEPTH):
            at = start + tl.arange(0, DEPTH)
            total = tl.load(gradient_ptr + row * gradient_stride + at, mask=at < dim, other=0.0)
            product += total * tl.load(unit_ptr + row * unit_stride + at, mask=at < dim, other=0.0).to(tl.float32)
        along = tl.sum(product)
    for start in range(0, dim, DEPTH):
        at = start + tl.arange(0, DEPTH)
        total = tl.load(gradient_ptr + row * gradient_stride + at, mask=at < dim, other=0.0)
        if inverse_norm_ptr is not None:
            unit = tl.load(unit_ptr + row * unit_stride + at, mask=at < dim, other=0.0).to(tl.float32)
            # a row without a direction has gradient 0
            total = tl.where(inverse_norm == 0.0, 0.0, (total - along * unit) * inverse_norm)
        tl.store(out_ptr + row * dim + at, total.to(out_ptr.dtype.element_ty), mask=at < dim)


@batch_kernel
def _weight_gradient_kernel(
    gradient_ptr, gradient_stride, x_ptr, x_vectors, weight_ptr, weight_units, weight_stride_d, class_sum_ptr, inverse_norm_ptr, row_scale_ptr, out_ptr,
    num_rows, num_classes, dim_units, splits,
    SPLITS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G.T @ x minus its component along each class's weights. WHOLE: dim is a multiple of COLUMNS."""
    dim = dim_units * UNIT  # so that the compiler knows the alignment of rows
    whole_dim = tl.cdiv(dim, VECTOR) * VECTOR
    column_tiles = tl.cdiv(dim, COLUMNS)
    class_tile, column_tile = tile_of_program(tl.program_id(0), column_tiles)  # so that a tile of the large gradient is read for all columns at once
    classes = class_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, DEPTH):
        rows = (start + tl.arange(0, DEPTH)).to(tl.int64)
        in_batch = (rows < num_rows)[:, None]
        # classes beyond the last are the gradient's padding
        gradient = tl.load(gradient_ptr + (rows * gradient_stride)[:, None] + classes[None, :], mask=in_batch, other=0.0)
        x_tile = x_ptr + (rows * x_vectors * VECTOR)[:, None] + columns[None, :]
        x = tl.load(x_tile, mask=in_batch if WHOLE else in_batch & (columns < whole_dim)[None, :], other=0.0)
        if UPCAST:
            gradient = gradient.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(gradient), x.to(gradient.dtype), total, input_precision=PRECISION, out_dtype=tl.float32)
    inside = (classes < num_classes)[:, None] & (columns < dim)[None, :]
    place = classes.to(tl.int64)
    if inverse_norm_ptr is not None:
        inverse_norm = tl.load(inverse_norm_ptr + classes, mask=classes < num_classes, other=0.0)
        parts = tl.zeros((SPLITS, ROWS), tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            part = class_sum_ptr + (split.to(tl.int64) * num_classes)[:, None] + classes[None, :]
            parts += tl.load(part, mask=(split < splits)[:, None] & (classes < num_classes)[None, :], other=0.0)
        along = tl.sum(parts, axis=0) * inverse_norm
        address = (place * weight_units * WEIGHT_UNIT)[:, None] + (columns.to(tl.int64) * weight_stride_d)[None, :]
        weight = tl.load(weight_ptr + address, mask=inside, other=0.0).to(tl.float32)
        row_scale = load_class_term(row_scale_ptr, classes, classes < num_classes, 1.0)[:, None]
        total = tl.where((inverse_norm == 0.0)[:, None], 0.0, (total - along[:, None] * (weight * row_scale)) * row_scale)
    tl.store(out_ptr + (place * dim)[:, None] + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def _rows_pass(
    x: Tensor, copy: Tensor | None, inverse_norm: Tensor | None, row_scale: Tensor | None = None, terms: LossTerms | None = None, *, unit: bool = False
) -> None:
    num_rows, dim = x.shape
    depth = min(triton.next_power_of_2(dim), 1024)
    elements = 4096 if _is_aligned(x) else 2048  # of a program: fewer where loads are narrow, because each needs its own address
    rows = min(max(elements // depth, 1), 16)
    _unit_rows_kernel[(triton.cdiv(num_rows, rows),)](
        x, x.stride(0), x.stride(1), copy, 0 if copy is None else copy.stride(0), inverse_norm, row_scale,
        terms and terms.target, terms and terms.target_b, num_rows, dim, terms.ignore_index if terms else 0, SMALLEST_NORM,
        UNIT=unit, ROWS=rows, DEPTH=depth, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def vector_of(dtype: torch.dtype) -> int:
    """Number of elements of the widest load."""
    return VECTOR_BYTES // dtype.itemsize


def aligned_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer (..., D) whose rows are padded to whole vectors."""
    *leading, dim = shape
    vector = vector_of(dtype)
    return torch.empty((*leading, triton.cdiv(dim, vector) * vector), dtype=dtype, device=device)[..., :dim]


def whole_vectors(rows: Tensor) -> Tensor:
    """The rows of `aligned_rows` including their padding, which is 0 in the copies that this module makes."""
    return rows.as_strided((rows.shape[0], rows.stride(0)), rows.stride())


def _is_aligned(rows: Tensor) -> bool:
    """Whether the products can read these rows without a copy."""
    size = rows.element_size()
    return (
        rows.stride(1) == 1 and rows.stride(0) * size % VECTOR_BYTES == 0 and rows.shape[1] * size % VECTOR_BYTES == 0 and rows.data_ptr() % VECTOR_BYTES == 0
    )


def unit_features(features: Tensor, terms: LossTerms, *, normalize: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Features for the products, of unit length with `normalize`, and their inverse norms (N,).

    Rows that are ignored or have no direction are 0, so that nothing they hold, not even NaN, enters the products.
    """
    unit = aligned_rows(*features.shape, dtype=dtype or features.dtype, device=features.device)
    inverse_norm = torch.empty(features.shape[0], dtype=torch.float32, device=features.device) if normalize else None
    _rows_pass(features, unit, inverse_norm, terms=terms, unit=True)
    return unit, inverse_norm


def scales_rows(linear_weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy of the weights in `dtype` scales its rows by powers of two: small rows would underflow in float16, and powers of two are exact."""
    return dtype == torch.float16 and linear_weight.dtype != dtype


def weight_rows(linear_weight: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None, inverse_norm: Tensor | None = None) -> Tensor:
    """Weights for the products, with aligned rows: the tensor itself where possible. `inverse_norm` (C,) receives their inverse norms in the same pass."""
    copied = linear_weight.dtype != dtype or not _is_aligned(linear_weight)
    rows = aligned_rows(*linear_weight.shape, dtype=dtype, device=linear_weight.device) if copied else linear_weight
    if copied or inverse_norm is not None:
        _rows_pass(linear_weight, rows if copied else None, inverse_norm, row_scale)
    return rows


def normalised_weight_rows(linear_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """`weight_rows`, their inverse norms (C,) after scaling, and the scales (C,) that bring each norm between 1 and 2, or None if rows are not scaled."""
    inverse_norm = torch.empty(linear_weight.shape[0], dtype=torch.float32, device=linear_weight.device)
    if not scales_rows(linear_weight, dtype):
        return weight_rows(linear_weight, dtype, inverse_norm=inverse_norm), inverse_norm, None
    _rows_pass(linear_weight, None, inverse_norm)
    row_scale = torch.where(inverse_norm > 0, inverse_norm.log2().floor().exp2(), 1.0)
    return weight_rows(linear_weight, dtype, row_scale), inverse_norm / row_scale, row_scale


def unit_weights(linear_weight: Tensor, dtype: torch.dtype, inverse_norm: Tensor) -> Tensor:
    """Weights of unit length, with aligned rows; `inverse_norm` (C,) receives the inverse norms of the weights."""
    unit = aligned_rows(*linear_weight.shape, dtype=dtype, device=linear_weight.device)
    _rows_pass(linear_weight, unit, inverse_norm, unit=True)
    return unit


def target_cosine(features: Tensor, linear_weight: Tensor, target: Tensor, inverse_norm: Tensor | None) -> Tensor:
    """The cosine of each sample and its target (N,), from the raw rows in float32, because a rounded cosine would be visible in the loss near p = 1."""
    num_rows, dim = features.shape
    cosine = torch.empty(num_rows, dtype=torch.float32, device=features.device)
    _target_cosine_kernel[(num_rows,)](
        features, features.stride(0), features.stride(1), linear_weight, linear_weight.stride(0), linear_weight.stride(1), target, inverse_norm, cosine,
        linear_weight.shape[0], dim, SMALLEST_NORM, NORMALIZE=inverse_norm is not None, DEPTH=min(triton.next_power_of_2(dim), 1024), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return cosine


def cosine_product(x: Tensor, weight: Tensor, inverse_norm: Tensor | None, out: Tensor) -> None:
    """out = x @ weight.T, each column times the inverse norm of its class. `out` has padded rows; the padding is written too."""
    (num_rows, dim), num_classes = x.shape, weight.shape[0]
    tile = tile_of(x.dtype, num_classes, x.device)
    vector = vector_of(x.dtype)
    _cosine_kernel[(triton.cdiv(num_rows, tile.rows) * triton.cdiv(padded_columns(num_classes), tile.columns),)](
        x, x.stride(0) // vector, weight, weight.stride(0) // vector, inverse_norm, out, out.stride(0), padded_columns(num_classes), num_rows, num_classes, dim,
        VECTOR=vector, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=dim % tile.depth == 0, UPCAST=INTERPRETED, PRECISION=_precision(),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def fused_stats(
    x: Tensor, weight: Tensor, inverse_norm: Tensor | None, terms: LossTerms, first_class: int, statistics: Statistics, *, resume: bool,
) -> None:  # fmt: skip
    """`row_stats` of cosines that are never stored."""
    (num_rows, dim), num_classes = x.shape, weight.shape[0]
    tile, vector = fused_tile_of(x.dtype, angular=terms.adds_class_angles), vector_of(x.dtype)
    peak, rest, blend, hardest = statistics
    splits = peak.shape[0]
    shift = terms.class_offset % 8
    _fused_stats_kernel[(triton.cdiv(num_rows, tile.rows), splits)](
        x, x.stride(0) // vector, weight, weight.stride(0) // vector, inverse_norm,
        terms.target, terms.target_b, terms.cloud, terms.bias, terms.weight, terms.seed, peak, rest, blend, hardest,
        num_rows, num_classes, dim, triton.cdiv(triton.cdiv(num_classes + shift, tile.columns), splits), terms.row_offset, terms.class_offset // 8, shift,
        shift - first_class, terms.scale * LOG2E, 1.0 / terms.scale,
        RESUME=resume, ANGULAR=terms.adds_class_angles, EASY=terms.easy_margin, VECTOR=vector, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        WHOLE=dim % tile.depth == 0, UPCAST=INTERPRETED, PRECISION=_precision(), NVIDIA=NVIDIA, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def fused_gradient(
    x: Tensor, weight: Tensor, inverse_norm: Tensor | None, grad_loss: Tensor, stats: Tensor, denominator: Tensor, terms: LossTerms, first_class: int,
    out: Tensor, *, bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`cosine_gradient` of cosines that are never stored."""
    (num_rows, dim), num_classes = x.shape, weight.shape[0]
    tile, vector = fused_tile_of(x.dtype), vector_of(x.dtype)
    shift = terms.class_offset % 8
    row_tiles, class_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(padded_columns(num_classes) + shift, tile.columns)
    class_sum, bias_sum = sums_over_rows(row_tiles, num_classes, x.device, norms=inverse_norm is not None, bias_grad=bias_grad)
    _fused_gradient_kernel[(row_tiles, class_tiles)](
        x, x.stride(0) // vector, weight, weight.stride(0) // vector, inverse_norm, out, out.stride(0), padded_columns(num_classes),
        terms.target, terms.target_b, terms.cloud, terms.bias, terms.weight, terms.seed, stats, grad_loss, denominator, class_sum, bias_sum,
        num_rows, num_classes, dim, terms.row_offset, terms.class_offset // 8, shift, shift - first_class, terms.scale, terms.scale * LOG2E, 1.0 / terms.scale,
        SMOOTH=terms.smoothed, PER_ROW=terms.reduction == "none", ANGULAR=terms.adds_class_angles, EASY=terms.easy_margin,
        VECTOR=vector, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        WHOLE=dim % tile.depth == 0, UPCAST=INTERPRETED, PRECISION=_precision(), NVIDIA=NVIDIA, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return class_sum, None if bias_sum is None else bias_sum.sum(0)


def uses_cublas(gradient: torch.dtype, weight: torch.dtype, device: torch.device) -> bool:
    """Whether the features' gradient is computed by the vendor's matrix product instead of ours.

    It is a plain product of long depth, which cuBLAS computes at its full rate, so cuBLAS is used on NVIDIA GPUs. The other two products have an epilogue that
    saves more than our slower product costs while there are few samples: cosines scale their columns, where cuBLAS needs a scaled copy of the weights; the
    weights' gradient includes the backward of the norms, where cuBLAS writes (C, D) in float32, to be read once more. With many samples all three are cuBLAS's,
    see `exponentials_pay` in head.py.
    """
    return NVIDIA and device.type == "cuda" and gradient == weight


def feature_gradient_parts(num_rows: int, dim: int, gradient: torch.dtype, weight: torch.dtype, device: torch.device) -> Tensor:
    """A buffer (splits, N, D) for partial gradients of the features, with as many splits of the classes as fill a large GPU's multiprocessors."""
    tile = tile_of(gradient, dim, device)
    resident = 1 if tile.columns >= WIDE_COLUMNS else 2
    tiles = max(triton.cdiv(num_rows, tile.rows) * triton.cdiv(dim, tile.columns), 1)
    splits = 1 if uses_cublas(gradient, weight, device) else max(1, min(16, resident * MULTIPROCESSORS // tiles))
    return aligned_rows(splits, num_rows, dim, dtype=torch.float32, device=device)


def add_feature_gradient(gradient: Tensor, weight: Tensor, partial: Tensor, *, resume: bool) -> None:
    """partial (splits, N, D) = gradient @ weight, or += with `resume`; each split covers its part of the classes."""
    num_classes, dim = weight.shape
    splits, num_rows, _ = partial.shape
    if uses_cublas(gradient.dtype, weight.dtype, gradient.device):
        product = library_product(gradient, weight)
        if resume:
            partial[0] += product
        else:
            partial[0] = product
        return
    tile, vector = tile_of(gradient.dtype, dim, gradient.device), vector_of(weight.dtype)
    depth = triton.cdiv(triton.cdiv(num_classes, tile.depth), splits) * tile.depth
    _feature_gradient_kernel[(triton.cdiv(num_rows, tile.rows), triton.cdiv(dim, tile.columns), splits)](
        gradient, gradient.stride(0), weight, weight.stride(0) // vector, partial, partial.stride(1), num_rows, num_classes, dim, depth,
        RESUME=resume, VECTOR=vector, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=dim % tile.columns == 0, UPCAST=INTERPRETED,
        PRECISION=_precision(), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def library_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b by the vendor's library: `out`, of the matrices' dtype, or else in float32."""
    if out is not None:
        return torch.mm(a, b, out=out)
    if a.dtype.itemsize != 2:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def finish_feature_gradient(partial: Tensor, unit: Tensor, inverse_norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the splits, with the backward of the normalisation applied."""
    splits, num_rows, dim = partial.shape
    gradient = partial[0] if splits == 1 else partial.sum(0)
    out = torch.empty((num_rows, dim), dtype=dtype, device=partial.device)
    _finish_features_kernel[(num_rows,)](
        gradient, gradient.stride(0), unit, unit.stride(0), inverse_norm, out, dim,
        DEPTH=min(triton.next_power_of_2(dim), 1024), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def weight_gradient(
    gradient: Tensor, x: Tensor, linear_weight: Tensor, class_sum: Tensor | None, inverse_norm: Tensor | None, row_scale: Tensor | None, out: Tensor
) -> None:
    """out (C, D) = gradient.T @ x with the backward of the weights' normalisation applied; `class_sum` (splits, C) sums to its r."""
    (num_rows, dim), num_classes = x.shape, linear_weight.shape[0]
    # With float32 weights there are not enough registers for a wide tile, and with the addresses of unaligned rows not even for a square one.
    wide = out.dtype.itemsize == 2 and triton.cdiv(num_classes, 128) * triton.cdiv(dim, 256) >= MULTIPROCESSORS  # and fewer would leave some idle
    tile = tile_of(gradient.dtype, dim if wide else 0, x.device) if _is_aligned(out) else fused_tile_of(gradient.dtype)
    vector = vector_of(x.dtype)
    unit, weight_unit = math.gcd(dim, 16), math.gcd(linear_weight.stride(0), 16)
    _weight_gradient_kernel[(triton.cdiv(num_classes, tile.rows) * triton.cdiv(dim, tile.columns),)](
        gradient, gradient.stride(0), x, x.stride(0) // vector, linear_weight, linear_weight.stride(0) // weight_unit, linear_weight.stride(1), class_sum,
        inverse_norm, row_scale, out, num_rows, num_classes, dim // unit, 0 if class_sum is None else class_sum.shape[0],
        SPLITS=16, VECTOR=vector, UNIT=unit, WEIGHT_UNIT=weight_unit, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=dim % tile.columns == 0,
        UPCAST=INTERPRETED, PRECISION=_precision(), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
