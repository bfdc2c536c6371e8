"""The loss of cosines (N, C) that are in memory: one pass for the softmax statistics, one for the gradient.

A logit is s * v with v = cosine - cloud * noise + bias / s: dividing the bias once for each class saves a multiplication for each logit. Both passes
compute the same noise, a pure function of seed, row and class, so only the cosines are kept between them.

Bytes: forward reads N * C elements, backward reads and writes them. Most operations are those of the noise (see philox.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .angles import HALF_PI, add_angle
from .philox import noise_tile
from .row_loss import LOG2E, ROW_STATS, row_losses
from .runtime import LOOSE_POINTERS, MULTIPROCESSORS, NVIDIA, PLACES, batch_kernel, on_device
from .terms import LossTerms, implements, shapes_of

# Rows of buffers that we allocate start at multiples of this many elements, so that for any C every access is 16 bytes wide and no tile of a product
# crosses the end of its row.
ROW_ALIGNMENT = 128
STATS_COLUMNS = 2048  # logits that a program of the statistics holds at a time: 16 for each of its 128 threads
GRADIENT_COLUMNS = 512
# Programs of the gradient that a multiprocessor holds at a time, by their registers: those that also sum over samples need 128.
GRADIENT_RESIDENT, SUMMING_GRADIENT_RESIDENT = 8, 4
MOST_SPLITS = 64  # of the gradient's rows
PROGRAMS = 1024  # of the statistics: enough to fill a large GPU several times; a small batch splits its classes to get there


def padded_columns(num_classes: int) -> int:
    return triton.cdiv(num_classes, ROW_ALIGNMENT) * ROW_ALIGNMENT


@triton.jit
def load_class_term(ptr, classes, present, absent: tl.constexpr):
    """A per-class vector at `classes`; filled with `absent` if the loss has none."""
    if ptr is not None:
        value = tl.load(ptr + classes, mask=present, other=0.0)
    else:
        value = tl.full(classes.shape, absent, tl.float32)
    return value


@triton.jit
def load_class_terms(cloud_ptr, bias_ptr, weight_ptr, classes, present):
    """Cloud, bias and weight of `classes`."""
    cloud = load_class_term(cloud_ptr, classes, present, 0.0)
    bias = load_class_term(bias_ptr, classes, present, 0.0)
    weight = load_class_term(weight_ptr, classes, present, 1.0)
    return cloud, bias, weight


@triton.jit
def load_seed(seed_ptr):
    """The seed of the noise; 0 without noise. Load it before a loop, because the compiler cannot know that the loop's stores do not change it."""
    seed = tl.zeros((), tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def add_noise_and_bias(
    cosine, rows, first_group, seed, cloud, bias, inverse_scale, NOISE: tl.constexpr, BIAS: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr,
    GROUPS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """v = cosine - cloud * noise + bias / s of a tile whose first class opens noise group `first_group`; ANGULAR noise adds to the angle.

    The second result is the derivative of v by the cosine; undefined where it is 1.
    """
    by_cosine = cosine
    if NOISE:
        noise = noise_tile(seed, rows, first_group, GROUPS, NVIDIA)
        if ANGULAR:
            cosine, by_cosine, _ = add_angle(cosine, (cloud * HALF_PI)[None, :] * noise, EASY, NVIDIA)
        else:
            cosine -= cloud[None, :] * noise
    if BIAS:
        cosine += (bias * inverse_scale)[None, :]
    return cosine, by_cosine


@triton.jit
def row_targets(target_ptr, target_b_ptr, rows, in_batch, shift):
    """Both targets of each row, as columns of the tile grid, in which class 0 of this call is column `shift`; without a second target, the first one twice."""
    # compared in 32 bits: an out-of-range label may wrap around into the grid, but row_loss.py overrides the result of its row
    target = (tl.load(target_ptr + rows, mask=in_batch, other=-1) + shift).to(tl.int32)
    target_b = target
    if target_b_ptr is not None:
        target_b = (tl.load(target_b_ptr + rows, mask=in_batch, other=-1) + shift).to(tl.int32)
    return target, target_b


@triton.jit
def empty_lanes(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Initial running statistics peak, rest, blend and hardest, one of each for every lane: 8 neighbouring columns of a tile, which one thread holds.

    Lanes are combined only after the last class, so threads exchange no values in the loop over classes. (It still has barriers where class vectors reach their
    threads through shared memory.)
    """
    peak = tl.full((ROWS, COLUMNS // 8), -float("inf"), tl.float32)
    rest = tl.zeros((ROWS, COLUMNS // 8), tl.float32)
    return peak, rest, rest, peak


@triton.jit
def accumulate_hardest(hardest, cosine, columns, present, target, target_b, MASKED: tl.constexpr, TWO: tl.constexpr):
    """Add the bare cosines of a tile to the running maximum of its lanes."""
    ROWS: tl.constexpr = cosine.shape[0]
    outside = columns[None, :] == target[:, None]
    if TWO:
        outside |= columns[None, :] == target_b[:, None]
    if MASKED:
        outside |= ~present[None, :]
    others = tl.where(outside, -float("inf"), cosine).reshape(ROWS, cosine.shape[1] // 8, 8)
    return tl.maximum(hardest, tl.max(others, axis=2))


@triton.jit
def accumulate_tile(
    peak, rest, blend, v, columns, present, weight, target, target_b, scale2, MASKED: tl.constexpr, TWO: tl.constexpr, BLEND: tl.constexpr
):  # fmt: skip
    """Add a tile of v to the running statistics of its lanes; see row_loss.py."""
    ROWS: tl.constexpr = v.shape[0]
    LANES: tl.constexpr = v.shape[1] // 8
    if BLEND:
        weighted = v * weight[None, :]
        if MASKED:
            weighted = tl.where(present[None, :], weighted, 0.0)
        blend += tl.sum(weighted.reshape(ROWS, LANES, 8), axis=2)
    outside = columns[None, :] == target[:, None]
    if TWO:
        outside |= columns[None, :] == target_b[:, None]
    if MASKED:
        outside |= ~present[None, :]
    v = tl.where(outside, -float("inf"), v).reshape(ROWS, LANES, 8)
    top = tl.maximum(peak, tl.max(v, axis=2))
    anchor = scale2 * tl.where(top == -float("inf"), 0.0, top)  # a lane with only targets so far adds nothing
    rest = rest * tl.exp2(scale2 * peak - anchor) + tl.sum(tl.exp2(scale2 * v - anchor[:, :, None]), axis=2)
    return top, rest, blend


@triton.jit
def store_lanes(peak_ptr, rest_ptr, blend_ptr, hardest_ptr, at, in_batch, peak, rest, blend, hardest, scale2, RESUME: tl.constexpr):
    """Combine a row's lanes, and with RESUME the stored statistics of earlier classes, and store the row's statistics."""
    top = tl.max(peak, axis=1)
    before = top
    if RESUME:
        before = tl.load(peak_ptr + at, mask=in_batch, other=-float("inf"))
        top = tl.maximum(top, before)
    anchor = scale2 * tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(rest * tl.exp2(scale2 * peak - anchor[:, None]), axis=1)
    blended = tl.sum(blend, axis=1)
    if RESUME:
        total += tl.load(rest_ptr + at, mask=in_batch, other=0.0) * tl.exp2(scale2 * before - anchor)
        if blend_ptr is not None:
            blended += tl.load(blend_ptr + at, mask=in_batch, other=0.0)
    tl.store(peak_ptr + at, top, mask=in_batch)
    tl.store(rest_ptr + at, total, mask=in_batch)
    if blend_ptr is not None:
        tl.store(blend_ptr + at, blended, mask=in_batch)
    if hardest_ptr is not None:
        largest = tl.max(hardest, axis=1)
        if RESUME:
            largest = tl.maximum(largest, tl.load(hardest_ptr + at, mask=in_batch, other=-float("inf")))
        tl.store(hardest_ptr + at, largest, mask=in_batch)


@triton.jit
def tile_gradient(
    v, by_cosine, columns, weight, target, target_b, offset, grad_a, grad_b, smooth, scale2, TWO: tl.constexpr, SMOOTH: tl.constexpr, ANGULAR: tl.constexpr
):  # fmt: skip
    """dz of a tile of v for a unit upstream gradient, see row_loss.py; if the noise adds to angles, times the derivative of v by the cosine."""
    dz = tl.exp2(scale2 * v - offset[:, None])
    if SMOOTH:
        dz -= smooth[:, None] * weight[None, :]
    if ANGULAR:
        dz *= by_cosine
    dz = tl.where(columns[None, :] == target[:, None], grad_a[:, None], dz)
    if TWO:
        dz = tl.where(columns[None, :] == target_b[:, None], grad_b[:, None], dz)
    return dz


# Rounds two numbers to bfloat16 by one instruction, and returns the rounded values in float32 too. Written in Triton, the compiler would use a slow instruction
# for each number.
_ROUND_PAIR = tl.constexpr(
    """{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $4, $3;
    mov.b32 $0, pair;
    shl.b32 $1, pair, 16;
    and.b32 $2, pair, 0xffff0000;
    }"""
)


@triton.jit
def round_tile(value, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """`value` rounded to DTYPE, and the rounded value in float32."""
    if NVIDIA and DTYPE == tl.bfloat16:  # noqa: SIM300 (DTYPE is the variable)
        stored, kept = tl.inline_asm_elementwise(_ROUND_PAIR, "=r,=r,=r,r,r", [value], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2)
    else:
        stored = value.to(DTYPE)
        kept = stored.to(tl.float32)
    return stored, kept


@triton.jit
def finish_gradient_tile(
    dz, cosine, factor, present, inverse_norm, inverse_scale, MASKED: tl.constexpr, NORMS: tl.constexpr, BIAS_GRAD: tl.constexpr, DTYPE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """The rounded gradient that enters the products, and the terms that the backward of the norms and of the bias sums over samples.

    With NORMS the gradient is dL/dcosine_ij / |w_j|: then both products use raw weights and unit features. Terms that were not requested are undefined.
    """
    if MASKED:
        dz = tl.where(present[None, :], dz, 0.0)
    gradient = dz * factor[:, None]
    class_term = cosine
    bias_term = cosine
    if NORMS:
        # sum the same rounded gradient that enters the products, so that the projection removes exactly its component along the weights
        gradient, rounded = round_tile(gradient * inverse_norm[None, :], DTYPE, NVIDIA)
        class_term = rounded * cosine
    else:
        gradient = gradient.to(DTYPE)
    if BIAS_GRAD:
        bias_term = dz * (factor * inverse_scale)[:, None]
    return gradient, class_term, bias_term


@triton.jit
def load_row_gradient(
    stats_ptr, grad_loss_ptr, num_rows, rows, in_batch, slope, TWO: tl.constexpr, SMOOTH: tl.constexpr, PER_ROW: tl.constexpr
):  # fmt: skip
    """Whether the row has a gradient, its statistics, and the factor upstream * slope, where slope is s / denominator."""
    offset = tl.load(stats_ptr + rows, mask=in_batch, other=float("inf"))
    grad_a = tl.load(stats_ptr + num_rows + rows, mask=in_batch, other=0.0)
    grad_b = grad_a
    if TWO:
        grad_b = tl.load(stats_ptr + num_rows * 2 + rows, mask=in_batch, other=0.0)
    smooth = grad_a
    if SMOOTH:
        smooth = tl.load(stats_ptr + num_rows * 3 + rows, mask=in_batch, other=0.0)
    if PER_ROW:
        upstream = tl.load(grad_loss_ptr + rows, mask=in_batch, other=0.0)
    else:
        upstream = tl.load(grad_loss_ptr)
    kept = in_batch & (offset != float("inf"))
    return kept, offset, grad_a, grad_b, smooth, tl.where(kept, upstream * slope, 0.0)


@triton.jit
def _load_pair(pairs, taken, first_class, readable, PLACE: tl.constexpr, MASKED: tl.constexpr):
    """Two cosines in one word for each row and lane: those of the lane's classes 2 * PLACE and 2 * PLACE + 1."""
    lanes = tl.arange(0, pairs.shape[1])
    wanted = taken[:, None]
    if MASKED:
        wanted = wanted & (first_class + lanes * 8 + 2 * PLACE < readable)[None, :]
    return tl.load(pairs + PLACE, mask=wanted, other=0)


@triton.jit
def _load_pairs(row_ptr, taken, first_class, readable, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Cosines of rows that are only aligned to two elements, as for C = 8142, so that each thread still holds 8 neighbours.

    A plain load would give each thread one aligned pair, so the noise, which a thread computes for 8 classes, would have to go through shared memory. Four
    loads of a pair, joined in the same order as the noise, keep both in registers.
    """
    word: tl.constexpr = tl.uint64 if row_ptr.dtype.element_ty == tl.float32 else tl.uint32
    pairs = (row_ptr + first_class).to(tl.pointer_type(word), bitcast=True)[:, None] + tl.arange(0, COLUMNS // 8)[None, :] * 4
    even = tl.join(_load_pair(pairs, taken, first_class, readable, 0, MASKED), _load_pair(pairs, taken, first_class, readable, 2, MASKED))
    odd = tl.join(_load_pair(pairs, taken, first_class, readable, 1, MASKED), _load_pair(pairs, taken, first_class, readable, 3, MASKED))
    return tl.join(even, odd)


@triton.jit
def _load_cosines(
    cosine_ptr, stride_n_units, stride_c, rows, taken, classes, first_class, readable, MASKED: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    CONTIGUOUS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """A tile of cosines as stored in memory, for `_unpack_cosines`; 0 in rows that are not `taken` and beyond the readable classes."""
    row_ptr = cosine_ptr + rows * stride_n_units * STRIDE_UNIT
    wanted = taken[:, None]
    if MASKED:
        wanted = wanted & ((classes >= 0) & (classes < readable))[None, :]
    if PAIRED:
        loaded = _load_pairs(row_ptr, taken, first_class, readable, classes.shape[0], MASKED)
    elif CONTIGUOUS:
        loaded = tl.load(row_ptr[:, None] + classes[None, :], mask=wanted, other=0.0)
    else:
        loaded = tl.load(row_ptr[:, None] + classes.to(tl.int64)[None, :] * stride_c, mask=wanted, other=0.0)
    return loaded


@triton.jit
def _unpack_cosines(loaded, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """The cosines (rows, classes) of `_load_cosines` in float32."""
    if PAIRED:
        if dtype == tl.float32:
            low = loaded.to(tl.uint32).to(tl.float32, bitcast=True)
            high = (loaded >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        elif dtype == tl.bfloat16:
            low = (loaded << 16).to(tl.float32, bitcast=True)
            high = (loaded & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = (loaded & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
            high = (loaded >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        cosine = tl.join(low, high).reshape(loaded.shape[0], loaded.shape[1] * 8)
    else:
        cosine = loaded.to(tl.float32)
    return cosine


@triton.jit
def _stats_tile(
    peak, rest, blend, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, stride_n_units, stride_c, readable,
    cloud_ptr, bias_ptr, weight_ptr, seed, num_classes, row_offset, first_group, shift, scale2, inverse_scale,
    MASKED: tl.constexpr, TWO: tl.constexpr, BLEND: tl.constexpr, HARDEST: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, PAIRED: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)  # of the grid of noise groups, which begins `shift` classes before the first
    if MASKED:
        classes = columns - shift
        present = (classes >= 0) & (classes < num_classes)
    else:
        classes = columns
        present = columns >= 0
    cloud, bias, weight = load_class_terms(cloud_ptr, bias_ptr, weight_ptr, classes, present)
    loaded = _load_cosines(
        cosine_ptr, stride_n_units, stride_c, rows, in_batch, classes, tile * COLUMNS, readable, MASKED, STRIDE_UNIT, CONTIGUOUS, PAIRED
    )  # fmt: skip
    cosine = _unpack_cosines(loaded, cosine_ptr.dtype.element_ty, PAIRED)
    if HARDEST:
        hardest = accumulate_hardest(hardest, cosine, columns, present, target, target_b, MASKED, TWO)
    v, _ = add_noise_and_bias(
        cosine, rows + row_offset, first_group + tile * (COLUMNS // 8), seed, cloud, bias, inverse_scale,
        cloud_ptr is not None, bias_ptr is not None, ANGULAR, EASY, COLUMNS // 8, NVIDIA,
    )  # fmt: skip
    peak, rest, blend = accumulate_tile(peak, rest, blend, v, columns, present, weight, target, target_b, scale2, MASKED, TWO, BLEND)
    return peak, rest, blend, hardest


@batch_kernel
def _row_stats_kernel(
    cosine_ptr, stride_n_units, stride_c, readable,  # (N, C); columns below `readable` exist in memory
    target_ptr, target_b_ptr, cloud_ptr, bias_ptr, weight_ptr, seed_ptr,
    peak_ptr, rest_ptr, blend_ptr, hardest_ptr,  # (splits, N)
    num_rows, num_classes, tiles_per_split, row_offset, first_group, shift, target_shift, scale2, inverse_scale,
    RESUME: tl.constexpr, ALIGNED: tl.constexpr, STRIDE_UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, PAIRED: tl.constexpr, ANGULAR: tl.constexpr,
    EASY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    in_batch = rows < num_rows
    target, target_b = row_targets(target_ptr, target_b_ptr, rows, in_batch, target_shift)
    seed = load_seed(seed_ptr)
    peak, rest, blend, hardest = empty_lanes(ROWS, COLUMNS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_classes + shift, COLUMNS))
    whole = first
    if ALIGNED:
        # whole tiles without a mask: a mask with a C that is not a multiple of 16 would make every load narrow
        whole = tl.maximum(first, tl.minimum(last, num_classes // COLUMNS))
        for tile in range(first, whole):
            peak, rest, blend, hardest = _stats_tile(
                peak, rest, blend, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, stride_n_units, stride_c, readable,
                cloud_ptr, bias_ptr, weight_ptr, seed, num_classes, row_offset, first_group, shift, scale2, inverse_scale,
                False, target_b_ptr is not None, blend_ptr is not None, hardest_ptr is not None, ANGULAR, EASY,
                STRIDE_UNIT, CONTIGUOUS, PAIRED, COLUMNS, NVIDIA,
            )  # fmt: skip
    for tile in range(whole, last):
        peak, rest, blend, hardest = _stats_tile(
            peak, rest, blend, hardest, tile, rows, in_batch, target, target_b, cosine_ptr, stride_n_units, stride_c, readable,
            cloud_ptr, bias_ptr, weight_ptr, seed, num_classes, row_offset, first_group, shift, scale2, inverse_scale,
            True, target_b_ptr is not None, blend_ptr is not None, hardest_ptr is not None, ANGULAR, EASY, STRIDE_UNIT, CONTIGUOUS, PAIRED, COLUMNS, NVIDIA,
        )  # fmt: skip
    at = split.to(tl.int64) * num_rows + rows
    store_lanes(peak_ptr, rest_ptr, blend_ptr, hardest_ptr, at, in_batch, peak, rest, blend, hardest, scale2, RESUME)


@triton.jit
def _gradient_tile(
    tile, split, cosine_ptr, stride_n_units, stride_c, readable, out_ptr, out_stride, writable,
    target_ptr, target_b_ptr, cloud_ptr, bias_ptr, weight_ptr, seed_ptr, stats_ptr, grad_loss_ptr, denominator_ptr,
    inverse_norm_ptr, class_sum_ptr, bias_sum_ptr,
    num_rows, num_classes, row_tiles_per_split, row_offset, first_group, shift, target_shift, scale, scale2, inverse_scale,
    MASKED: tl.constexpr, SMOOTH: tl.constexpr, PER_ROW: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    CONTIGUOUS: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    classes = columns
    present = columns >= 0
    if MASKED:
        classes = columns - shift
        present = (classes >= 0) & (classes < num_classes)
    cloud, bias, weight = load_class_terms(cloud_ptr, bias_ptr, weight_ptr, classes, present)
    inverse_norm = load_class_term(inverse_norm_ptr, classes, present, 1.0)
    # reduced over rows after the loop, because a reduction inside would need a barrier
    class_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = split * row_tiles_per_split
    last = tl.minimum(first + row_tiles_per_split, tl.cdiv(num_rows, ROWS))
    seed = load_seed(seed_ptr)
    slope = scale / tl.load(denominator_ptr)
    for row_tile in range(first, last):
        rows = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_batch = rows < num_rows
        # loaded before it is known whether the row has a gradient, so that no load waits for another one
        loaded = _load_cosines(
            cosine_ptr, stride_n_units, stride_c, rows, in_batch, classes, tile * COLUMNS, readable, MASKED, STRIDE_UNIT, CONTIGUOUS, PAIRED
        )  # fmt: skip
        target, target_b = row_targets(target_ptr, target_b_ptr, rows, in_batch, target_shift)
        kept, offset, grad_a, grad_b, smooth, factor = load_row_gradient(
            stats_ptr, grad_loss_ptr, num_rows, rows, in_batch, slope, target_b_ptr is not None, SMOOTH, PER_ROW
        )
        cosine = tl.where(kept[:, None], _unpack_cosines(loaded, cosine_ptr.dtype.element_ty, PAIRED), 0.0)  # a row without a gradient may hold NaN
        v, by_cosine = add_noise_and_bias(
            cosine, rows + row_offset, first_group + tile * (COLUMNS // 8), seed, cloud, bias, inverse_scale,
            cloud_ptr is not None, bias_ptr is not None, ANGULAR, EASY, COLUMNS // 8, NVIDIA,
        )  # fmt: skip
        dz = tile_gradient(
            v, by_cosine, columns, weight, target, target_b, offset, grad_a, grad_b, smooth, scale2, target_b_ptr is not None, SMOOTH, ANGULAR
        )  # fmt: skip
        gradient, class_term, bias_term = finish_gradient_tile(
            dz, cosine, factor, present, inverse_norm, inverse_scale, MASKED, inverse_norm_ptr is not None, bias_sum_ptr is not None, out_ptr.dtype.element_ty,
            NVIDIA,
        )  # fmt: skip
        out = (out_ptr + rows * out_stride)[:, None] + classes[None, :]
        if MASKED:
            tl.store(out, gradient, mask=in_batch[:, None] & ((classes >= 0) & (classes < writable))[None, :])
        else:
            tl.store(out, gradient, mask=in_batch[:, None])
        if bias_sum_ptr is not None:
            bias_sum += bias_term
        if inverse_norm_ptr is not None:
            class_sum += class_term
    at = split.to(tl.int64) * num_classes + classes
    if inverse_norm_ptr is not None:
        tl.store(class_sum_ptr + at, tl.sum(class_sum, axis=0), mask=present)
    if bias_sum_ptr is not None:
        tl.store(bias_sum_ptr + at, tl.sum(bias_sum, axis=0), mask=present)


# Specialised by the number of rows: without a mask that may end inside a tile it needs fewer registers, and spills none. A last batch that is smaller
# compiles it once more.
@triton.jit(do_not_specialize=PLACES, do_not_specialize_on_alignment=LOOSE_POINTERS)
def _gradient_kernel(
    cosine_ptr, stride_n_units, stride_c, readable,  # (N, C)
    out_ptr, out_stride, writable,  # (N, padded C)
    target_ptr, target_b_ptr, cloud_ptr, bias_ptr, weight_ptr, seed_ptr, stats_ptr, grad_loss_ptr, denominator_ptr,
    inverse_norm_ptr,  # (C,) of the classifier's rows, or None
    class_sum_ptr,  # (row splits, C) partial sums of G * cosine over samples, or None
    bias_sum_ptr,  # (row splits, C) partial sums of dz over samples, or None
    num_rows, num_classes, row_tiles_per_split, row_offset, first_group, shift, target_shift, scale, scale2, inverse_scale,
    ALIGNED: tl.constexpr, SMOOTH: tl.constexpr, PER_ROW: tl.constexpr, ANGULAR: tl.constexpr, EASY: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    CONTIGUOUS: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if ALIGNED and (tile + 1) * COLUMNS <= num_classes:
        _gradient_tile(
            tile, split, cosine_ptr, stride_n_units, stride_c, readable, out_ptr, out_stride, writable,
            target_ptr, target_b_ptr, cloud_ptr, bias_ptr, weight_ptr, seed_ptr, stats_ptr, grad_loss_ptr, denominator_ptr,
            inverse_norm_ptr, class_sum_ptr, bias_sum_ptr,
            num_rows, num_classes, row_tiles_per_split, row_offset, first_group, shift, target_shift, scale, scale2, inverse_scale,
            False, SMOOTH, PER_ROW, ANGULAR, EASY, STRIDE_UNIT, CONTIGUOUS, PAIRED, ROWS, COLUMNS, NVIDIA,
        )  # fmt: skip
    else:
        _gradient_tile(
            tile, split, cosine_ptr, stride_n_units, stride_c, readable, out_ptr, out_stride, writable,
            target_ptr, target_b_ptr, cloud_ptr, bias_ptr, weight_ptr, seed_ptr, stats_ptr, grad_loss_ptr, denominator_ptr,
            inverse_norm_ptr, class_sum_ptr, bias_sum_ptr,
            num_rows, num_classes, row_tiles_per_split, row_offset, first_group, shift, target_shift, scale, scale2, inverse_scale,
            True, SMOOTH, PER_ROW, ANGULAR, EASY, STRIDE_UNIT, CONTIGUOUS, PAIRED, ROWS, COLUMNS, NVIDIA,
        )  # fmt: skip


class Statistics(NamedTuple):
    """Softmax statistics (splits, N) of each row, see row_loss.py."""

    peak: Tensor
    rest: Tensor
    blend: Tensor | None  # with label smoothing
    hardest: Tensor | None  # with a difficulty margin or top-1


class Layout(NamedTuple):
    """Position of a call's classes in the grid of noise groups, and memory layout of its rows."""

    first_group: int
    shift: int  # columns of the first group that belong to classes before this call's
    stride_units: int
    stride_unit: int
    paired: bool  # rows are only aligned to two elements


def layout_of(cosine: Tensor, class_offset: int) -> Layout:
    """The row stride is passed as a multiple of its largest power of two (up to 16), so that the compiler knows the alignment of loads, even for C = 8142."""
    unit = math.gcd(cosine.stride(0), 16) if cosine.stride(0) else 16
    address, size = cosine.data_ptr(), cosine.element_size()
    aligned_to_pairs = address % (2 * size) == 0 and unit >= 2
    aligned_to_loads = address % 16 == 0 and unit * size >= 16
    paired = aligned_to_pairs and not aligned_to_loads and cosine.stride(1) == 1 and cosine.shape[1] % 2 == 0 and class_offset % 8 == 0
    return Layout(class_offset // 8, class_offset % 8, cosine.stride(0) // unit, unit, bool(paired))


def empty_rows(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer (N, C) whose rows are padded to ROW_ALIGNMENT elements."""
    return torch.empty((num_rows, padded_columns(num_classes)), dtype=dtype, device=device)[:, :num_classes]


def is_padded(rows: Tensor) -> bool:
    """Whether the padding of `empty_rows` is there: a copy of a saved buffer, such as a hook of autograd makes, may end with its last class."""
    end = rows.storage_offset() + rows.shape[0] * rows.stride(0)
    return bool(rows.stride(0) % ROW_ALIGNMENT == 0 and end * rows.element_size() <= rows.untyped_storage().nbytes())


def _stats_tile_shape(num_classes: int, shift: int) -> tuple[int, int]:
    columns = min(STATS_COLUMNS, max(triton.next_power_of_2(num_classes + shift), 16))
    return min(STATS_COLUMNS // columns, 16), columns


def stats_splits(num_rows: int, num_classes: int) -> int:
    """The number of parts of the classes that `row_stats` processes in parallel."""
    rows, columns = _stats_tile_shape(num_classes, 0)
    return max(1, min(triton.cdiv(num_classes, columns), PROGRAMS // triton.cdiv(num_rows, rows)))


def row_stats(
    cosine: Tensor,  # (N, C) of this call's classes
    terms: LossTerms,  # per-class vectors of this call's classes; class_offset is the global index of its first class
    first_class: int,  # the target of this call's first class
    statistics: Statistics,
    *,
    resume: bool,  # the statistics already hold other classes
    padded: bool,  # the rows are padded, and the padding may be read
) -> None:
    """Add the classes of `cosine` to the softmax statistics that `row_losses` reads."""
    num_rows, num_classes = cosine.shape
    layout = layout_of(cosine, terms.class_offset)
    peak, rest, blend, hardest = statistics
    rows, columns = _stats_tile_shape(num_classes, layout.shift)
    splits = peak.shape[0]
    tiles = triton.cdiv(triton.cdiv(num_classes + layout.shift, columns), splits)
    _row_stats_kernel[(triton.cdiv(num_rows, rows), splits)](
        cosine, layout.stride_units, cosine.stride(1), padded_columns(num_classes) if padded else num_classes,
        terms.target, terms.target_b, terms.cloud, terms.bias, terms.weight, terms.seed, peak, rest, blend, hardest,
        num_rows, num_classes, tiles, terms.row_offset, layout.first_group, layout.shift, layout.shift - first_class,
        terms.scale * LOG2E, 1.0 / terms.scale,
        RESUME=resume, ALIGNED=layout.shift == 0, STRIDE_UNIT=layout.stride_unit, CONTIGUOUS=cosine.stride(1) == 1,
        PAIRED=layout.paired, ANGULAR=terms.adds_class_angles, EASY=terms.easy_margin, ROWS=rows, COLUMNS=columns, NVIDIA=NVIDIA, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def sums_over_rows(splits: int, num_classes: int, device: torch.device, *, norms: bool, bias_grad: bool) -> tuple[Tensor | None, Tensor | None]:
    """Buffers (splits, C) for parts of the sums over samples that the backward of the norms and of the bias needs."""
    return tuple(torch.empty((splits, num_classes), dtype=torch.float32, device=device) if wanted else None for wanted in (norms, bias_grad))  # type: ignore[return-value]


@functools.lru_cache(1024)
def gradient_splits(class_tiles: int, row_tiles: int, *, summing: bool) -> int:
    """The number of parts of the row tiles for which the last wave of programs is nearly full; `summing` programs each store partial sums over samples."""
    slots = MULTIPROCESSORS * (SUMMING_GRADIENT_RESIDENT if summing else GRADIENT_RESIDENT)

    def time(splits: int) -> tuple[int, int]:
        # in row tiles of a program, whose start and end cost about one more; among equals the fewest programs
        return triton.cdiv(class_tiles * splits, slots) * (triton.cdiv(row_tiles, splits) + 1), splits

    return min(range(1, min(row_tiles, MOST_SPLITS) + 1), key=time)


def cosine_gradient(
    cosine: Tensor,  # (N, C) of this call's classes
    grad_loss: Tensor,  # () or (N,)
    stats: Tensor,
    denominator: Tensor,
    terms: LossTerms,
    first_class: int,
    out: Tensor,  # (N, C), rows padded to ROW_ALIGNMENT
    *,
    inverse_norm: Tensor | None,
    bias_grad: bool,
    padded: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Write dL/dcosine (times the inverse norm of the class's weights, where given) to `out`.

    Returns parts of the sum of gradient * cosine over samples (splits, C), where norms are given, and the gradient of the bias (C,).
    """
    num_rows, num_classes = cosine.shape
    layout = layout_of(cosine, terms.class_offset)
    columns = min(GRADIENT_COLUMNS, max(triton.next_power_of_2(num_classes + layout.shift), 16))
    rows = min(2048 // columns, 16)
    class_tiles = triton.cdiv(padded_columns(num_classes) + layout.shift, columns)  # the padding is written too, as zeros
    row_tiles = triton.cdiv(num_rows, rows)
    splits = gradient_splits(class_tiles, row_tiles, summing=bias_grad or inverse_norm is not None)
    class_sum, bias_sum = sums_over_rows(splits, num_classes, cosine.device, norms=inverse_norm is not None, bias_grad=bias_grad)
    _gradient_kernel[(class_tiles, splits)](
        cosine, layout.stride_units, cosine.stride(1), padded_columns(num_classes) if padded else num_classes,
        out, out.stride(0), padded_columns(num_classes),
        terms.target, terms.target_b, terms.cloud, terms.bias, terms.weight, terms.seed, stats, grad_loss.contiguous(), denominator,
        inverse_norm, class_sum, bias_sum,
        num_rows, num_classes, triton.cdiv(row_tiles, splits), terms.row_offset, layout.first_group, layout.shift, layout.shift - first_class,
        terms.scale, terms.scale * LOG2E, 1.0 / terms.scale,
        ALIGNED=layout.shift == 0, SMOOTH=terms.smoothed, PER_ROW=terms.reduction == "none", STRIDE_UNIT=layout.stride_unit,
        CONTIGUOUS=cosine.stride(1) == 1, PAIRED=layout.paired, ANGULAR=terms.adds_class_angles, EASY=terms.easy_margin, ROWS=rows, COLUMNS=columns,
        NVIDIA=NVIDIA, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return class_sum, None if bias_sum is None else bias_sum.sum(0)


def empty_statistics(splits: int, num_rows: int, terms: LossTerms, device: torch.device, *, top1: bool = False) -> Statistics:
    """Buffers for the statistics that these terms need."""
    wanted = (True, True, terms.smoothed, terms.difficulty_margin or top1)
    parts = iter(torch.empty((sum(wanted), splits, num_rows), dtype=torch.float32, device=device))
    return Statistics(*(next(parts) if want else None for want in wanted))  # type: ignore[arg-type]


@implements("logit_forward", "triton")
def logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss ((), or (N,) unreduced), and for backward: row statistics (4, N), denominator of the mean ()."""
    *fields, _ = args
    terms = LossTerms(*fields)
    with on_device(cosine):
        statistics = empty_statistics(stats_splits(cosine.shape[0], cosine.shape[1]), cosine.shape[0], terms, cosine.device)
        row_stats(cosine, terms, 0, statistics, resume=False, padded=False)
        loss, stats, denominator = row_losses(cosine, cosine, *statistics, cosine.shape[1], terms)
        return loss, [stats, denominator]


@shapes_of("logit_forward", "triton")
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, _ = args
    num_rows = cosine.shape[0]
    loss = cosine.new_empty((num_rows,) if LossTerms(*fields).reduction == "none" else (), dtype=torch.float32)
    return loss, [cosine.new_empty((ROW_STATS, num_rows), dtype=torch.float32), cosine.new_empty((), dtype=torch.float32)]


@implements("logit_backward", "triton")
def logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the cosines, rows padded to ROW_ALIGNMENT elements, and of the bias (empty unless requested)."""
    *fields, bias_grad = args
    terms = LossTerms(*fields)
    stats, denominator = saved
    with on_device(cosine):
        out = empty_rows(cosine.shape[0], cosine.shape[1], cosine.dtype, cosine.device)
        grad_bias = cosine_gradient(cosine, grad_loss, stats, denominator, terms, 0, out, inverse_norm=None, bias_grad=bias_grad, padded=False)[1]
        return out, cosine.new_empty(0, dtype=torch.float32) if grad_bias is None else grad_bias


@shapes_of("logit_backward", "triton")
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(cosine.shape[0], cosine.shape[1], cosine.dtype, cosine.device), cosine.new_empty(cosine.shape[1] if args[-1] else 0, dtype=torch.float32)
