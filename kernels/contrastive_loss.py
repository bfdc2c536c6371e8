"""The softmax over samples and class prototypes: products whose tiles never leave the registers, as in attention.

    _log_total_kernel   log of a row's denominator, by an online softmax over tiles of keys
    _pull_kernel        backward: sum over keys k of m_ik k with m_ik = rate_i w_ik p_ik + rate_k w_ki p_ki

A cosine x_i . x_k stands in the denominators of i and of k, so that one pass over the keys of i gives the gradient of x_i in both parts, without atomics. The
prototypes are keys in one launch and rows in another. Operands are float32 unit rows; see gclkern.kernels.contrastive_terms for the formula.

Each tile of rows has several programs, which share its keys so that a GPU is full. They store partial results, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contrastive_terms
from .centroids import segment_sums
from .contrastive_terms import Keys
from .products import _precision
from .row_loss import LOG2E
from .runtime import MULTIPROCESSORS, batch_kernel, on_device
from .terms import implements, shapes_of

_ROWS = 64
_COLUMNS = 64
_PULL_TILE = 32  # rows and columns: beside the sums of the rows, a larger tile would spill registers
_DEPTH = 32
RESIDENT = 2  # programs that a multiprocessor of Hopper holds at a time, of each kernel; where all weights are 1 it holds 4


@triton.jit
def _cosines(
    left_ptr, rows, num_rows, right_ptr, columns, num_columns, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of products; places outside repeat the last row or column, so that no load is masked by them."""
    at = tl.arange(0, DEPTH)
    left = left_ptr + (tl.minimum(rows, num_rows - 1).to(tl.int64) * dim)[:, None] + at[None, :]
    right = right_ptr + (tl.minimum(columns, num_columns - 1).to(tl.int64) * dim)[None, :] + at[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dim, DEPTH):
        inside = start + at < dim
        a = tl.load(left + start, mask=inside[None, :], other=0.0)
        b = tl.load(right + start, mask=inside[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION, out_dtype=tl.float32)
    return product


@triton.jit
def _load(ptr, places, present, absent):
    return tl.load(ptr + places, mask=present, other=absent) if ptr is not None else tl.full(places.shape, absent, tl.float32)


@triton.jit
def _label(ptr, places, present):
    """The classes of samples, or of prototypes, which are the places themselves."""
    return tl.load(ptr + places, mask=present, other=-1) if ptr is not None else places.to(tl.int64)


@batch_kernel
def _log_total_kernel(
    left_ptr, right_ptr,  # (N, D) samples, (K, D) keys
    label_ptr, right_label_ptr,  # (N,), (K,) or None for prototypes
    own_ptr,  # (N,) or None where all weights are 1
    other_ptr,  # (K,)
    part_ptr,  # (splits, N) binary logarithm of the sums over each part of the keys
    num_rows, num_columns, dim, scale2, tiles_per_split,
    SELF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    label = _label(label_ptr, rows, in_batch)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    split = tl.program_id(1)
    first = split * tiles_per_split * COLUMNS
    for start in range(first, tl.minimum(first + tiles_per_split * COLUMNS, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        present = columns < num_columns
        logit = scale2 * _cosines(left_ptr, rows, num_rows, right_ptr, columns, num_columns, dim, ROWS, COLUMNS, DEPTH, PRECISION)
        counted = present[None, :] & in_batch[:, None]
        if SELF:
            counted &= rows[:, None] != columns[None, :]
        if own_ptr is not None:
            same = label[:, None] == _label(right_label_ptr, columns, present)[None, :]
            weight = tl.where(same, _load(own_ptr, rows, in_batch, 0.0)[:, None], _load(other_ptr, columns, present, 0.0)[None, :])
            counted &= weight > 0.0
            logit += tl.log2(tl.where(counted, weight, 1.0))
        # NaN stays: its key is in the denominator of every sample
        logit = tl.where(counted, logit, -float("inf"))
        top = tl.maximum(peak, tl.max(logit, axis=1))
        anchor = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(logit - anchor[:, None]), axis=1)
        peak = top
    tl.store(part_ptr + split * num_rows + rows, tl.log2(total) + peak, mask=in_batch)


@batch_kernel
def _pull_kernel(
    left_ptr, right_ptr,  # (N, D) rows whose gradient is computed, (K, D) columns
    label_ptr, right_label_ptr,  # None: prototypes
    own_ptr, right_own_ptr, other_ptr, right_other_ptr,  # (N,), (K,) weights, or None where all are 1
    log_total2_ptr, rate_ptr,  # (N,) None: rows without a denominator of their own
    right_log_total2_ptr, right_rate_ptr,  # (K,) the same of the columns
    part_ptr,  # (splits, N, D) sums over each part of the columns
    num_rows, num_columns, dim, scale2, tiles_per_split,
    SELF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_batch = rows < num_rows
    label = _label(label_ptr, rows, in_batch)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    split = tl.program_id(2)
    first = split * tiles_per_split * COLUMNS
    for start in range(first, tl.minimum(first + tiles_per_split * COLUMNS, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        present = columns < num_columns
        logit = scale2 * _cosines(left_ptr, rows, num_rows, right_ptr, columns, num_columns, dim, ROWS, COLUMNS, DEPTH, PRECISION)
        counted = present[None, :] & in_batch[:, None]
        if SELF:
            counted &= rows[:, None] != columns[None, :]
        if own_ptr is not None or right_own_ptr is not None:
            same = label[:, None] == _label(right_label_ptr, columns, present)[None, :]
        pull = tl.zeros((ROWS, COLUMNS), tl.float32)
        if rate_ptr is not None:
            rate = tl.load(rate_ptr + rows, mask=in_batch, other=0.0)[:, None]
            if own_ptr is not None:
                rate *= tl.where(same, _load(own_ptr, rows, in_batch, 0.0)[:, None], _load(right_other_ptr, columns, present, 0.0)[None, :])
            denominator = tl.load(log_total2_ptr + rows, mask=in_batch, other=0.0)[:, None]
            pull += tl.where(rate == 0.0, 0.0, rate * tl.exp2(logit - denominator))
        if right_rate_ptr is not None:
            rate = tl.load(right_rate_ptr + columns, mask=present, other=0.0)[None, :]
            if right_own_ptr is not None:
                rate *= tl.where(same, _load(right_own_ptr, columns, present, 0.0)[None, :], _load(other_ptr, rows, in_batch, 0.0)[:, None])
            denominator = tl.load(right_log_total2_ptr + columns, mask=present, other=0.0)[None, :]
            pull += tl.where(rate == 0.0, 0.0, rate * tl.exp2(logit - denominator))
        pull = tl.where(counted, pull, 0.0)
        keys = right_ptr + (tl.minimum(columns, num_columns - 1).to(tl.int64) * dim)[:, None] + width[None, :]
        total = tl.dot(pull, tl.load(keys, mask=(width < dim)[None, :], other=0.0), total, input_precision=PRECISION, out_dtype=tl.float32)
    part = part_ptr + ((split * num_rows + rows).to(tl.int64) * dim)[:, None] + width[None, :]
    tl.store(part, total, mask=in_batch[:, None] & (width < dim)[None, :])


def tiles_per_split(programs: int, tiles: int) -> int:
    """Tiles of keys that a program takes, where each of `programs` could take all `tiles`: as few as keep one wave of programs."""
    return triton.cdiv(tiles, max(1, min(tiles, RESIDENT * MULTIPROCESSORS // programs)))


def _log_totals(keys: Keys) -> Tensor:
    num_rows = keys.unit.shape[0]
    row_tiles = triton.cdiv(num_rows, _ROWS)
    sides: list[tuple[Tensor, Tensor | None, Tensor | None]] = [(keys.unit, keys.label, keys.other)] if keys.include_samples else []
    if keys.prototypes is not None:
        sides.append((keys.prototypes, None, keys.prototype_other))
    parts = []
    for right, right_label, other in sides:
        tiles = triton.cdiv(right.shape[0], _COLUMNS)
        share = tiles_per_split(row_tiles, tiles)
        part = torch.empty(triton.cdiv(tiles, share), num_rows, dtype=torch.float32, device=keys.unit.device)
        _log_total_kernel[(row_tiles, part.shape[0])](
            keys.unit, right, keys.label, right_label, keys.own, other, part, num_rows, right.shape[0], keys.unit.shape[1], LOG2E / keys.temperature, share,
            SELF=right is keys.unit, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, PRECISION=_precision(), num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
        parts.append(part)
    return torch.cat(parts).div_(LOG2E).logsumexp(0)


def _pulls(keys: Keys, log_total: Tensor, rate: Tensor) -> tuple[Tensor, Tensor | None]:
    samples = (keys.unit, keys.label, keys.own, keys.other, log_total * LOG2E, rate)
    if keys.prototypes is None:
        return _pull(keys, samples, samples).sum(0), None
    prototypes = (keys.prototypes, None, None, keys.prototype_other, None, None)
    parts = [_pull(keys, samples, samples)] if keys.include_samples else []
    return torch.cat([*parts, _pull(keys, samples, prototypes)]).sum(0), _pull(keys, prototypes, samples).sum(0)


_Side = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # unit rows, labels, own, other, log denominators, rates


def _pull(keys: Keys, left: _Side, right: _Side) -> Tensor:
    """Partial gradients (splits, N, D) of the rows on the left."""
    (rows, label, own, other, log_total2, rate), (columns, right_label, right_own, right_other, right_log_total2, right_rate) = left, right
    num_rows, dim = rows.shape
    width = min(128, max(16, triton.next_power_of_2(dim)))
    grid, tiles = (triton.cdiv(num_rows, _PULL_TILE), triton.cdiv(dim, width)), triton.cdiv(columns.shape[0], _PULL_TILE)
    share = tiles_per_split(grid[0] * grid[1], tiles)
    part = torch.empty(triton.cdiv(tiles, share), num_rows, dim, dtype=torch.float32, device=rows.device)
    _pull_kernel[(*grid, part.shape[0])](
        rows, columns, label, right_label, own, right_own, other, right_other, log_total2, rate, right_log_total2, right_rate, part,
        num_rows, columns.shape[0], dim, LOG2E / keys.temperature, share,
        SELF=rows is columns, ROWS=_PULL_TILE, COLUMNS=_PULL_TILE, DEPTH=_DEPTH, WIDTH=width, PRECISION=_precision(), num_warps=4, num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return part


@implements("contrastive_forward", "triton")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss ((), or (N,) unreduced), and for backward what `contrastive_terms.empty_saved` lists."""
    with on_device(features):
        return contrastive_terms.forward(
            features, prototypes, target, class_counts, temperature, include_samples, include_own_class, reduction, _log_totals, segment_sums
        )


@implements("contrastive_backward", "triton")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and of the prototypes; one that was not requested is empty."""
    with on_device(features):
        return contrastive_terms.backward(
            grad_loss, features, prototypes, class_counts, saved, temperature, include_samples, include_own_class, features_grad, prototypes_grad, _pulls,
            segment_sums,
        )  # fmt: skip


shapes_of("contrastive_forward", "triton")(contrastive_terms.forward_shapes)
shapes_of("contrastive_backward", "triton")(contrastive_terms.backward_shapes)
