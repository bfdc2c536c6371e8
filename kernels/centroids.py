"""Sums of the rows of each class, (M, D) -> (C, D), reading every row once and adding in a fixed order.

Labels are sorted (stably, on the device), so a class is a run of row numbers. Runs are cut into pieces of a fixed length: a long-tailed data set then
costs no more than a balanced one, and the order of additions depends on nothing but the labels. A class of one piece is summed in place, which is
most of them; the pieces of the others go to a small buffer and are added by a second kernel. Bytes: the features once, the sums once, and at most
2 * M / piece * D for the partial sums, which is under 2% at the piece length of a large problem.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import on_device
from .terms import implements

_ROWS = 8  # gathered at once; with 256 columns a program keeps 8 KiB of float32 in flight
_COLUMNS = 256


@triton.jit
def _piece_kernel(
    features_ptr, stride_m, stride_d,  # (M, D)
    order_ptr,  # (M,) row numbers, sorted by label
    begin_ptr,  # (C + 1,) where each class starts in `order`
    pieces_end_ptr,  # (C,) number of pieces up to and including each class
    partials_end_ptr,  # (C,) the same over classes of several pieces
    piece_class_ptr,  # (pieces,) C for pieces that do not exist
    sums_ptr, partial_ptr, num_classes, dim, piece_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    label = tl.load(piece_class_ptr + piece)
    if label >= num_classes:
        return
    begin = tl.load(begin_ptr + label)
    end = tl.load(begin_ptr + label + 1)
    pieces = (end - begin + piece_rows - 1) // piece_rows
    index = piece - (tl.load(pieces_end_ptr + label) - pieces)
    first = begin + index * piece_rows
    last = tl.minimum(first + piece_rows, end)
    lanes = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < dim
    column_ptr = features_ptr + columns.to(tl.int64)[None, :] * stride_d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows = tl.load(order_ptr + first + lanes, mask=first + lanes < last, other=0)
    for start in tl.range(first, last, ROWS):
        present = start + lanes < last
        values = tl.load(column_ptr + (rows * stride_m)[:, None], mask=present[:, None] & within[None, :], other=0.0)
        rows = tl.load(order_ptr + start + ROWS + lanes, mask=start + ROWS + lanes < last, other=0)
        total += values.to(tl.float32)
    total = tl.sum(total, axis=0)
    if pieces == 1:
        tl.store(sums_ptr + label * dim + columns, total, mask=within)
    else:
        row = tl.load(partials_end_ptr + label) - pieces + index
        tl.store(partial_ptr + row * dim + columns, total, mask=within)


@triton.jit
def _combine_kernel(begin_ptr, partials_end_ptr, partial_ptr, sums_ptr, dim, piece_rows, COLUMNS: tl.constexpr):
    label = tl.program_id(0).to(tl.int64)
    pieces = (tl.load(begin_ptr + label + 1) - tl.load(begin_ptr + label) + piece_rows - 1) // piece_rows
    if pieces == 1:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < dim
    end = tl.load(partials_end_ptr + label)
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in tl.range(end - pieces, end):
        total += tl.load(partial_ptr + row * dim + columns, mask=within, other=0.0)
    tl.store(sums_ptr + label * dim + columns, total, mask=within)


def _piece_rows(num_rows: int, column_tiles: int) -> int:
    """Rows of a piece: about a thousand programs where the data suffice, between 32 and 256 rows each."""
    return min(256, max(32, triton.next_power_of_2(num_rows * column_tiles // 1024)))


def _label_dtype(num_classes: int) -> torch.dtype:
    """A type for labels up to C, which is no class: two bytes, where they suffice, save most passes of the radix sort."""
    return torch.int16 if num_classes < 2**15 - 1 else torch.int64


@implements("segment_sums", "triton")
def segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums (C, D) float32 and counts (C,) int64 of the rows of each class. Rows whose label is out of range are left out."""
    num_rows, dim = features.shape
    device = features.device
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(dim)))
    column_tiles = triton.cdiv(dim, columns)
    piece_rows = _piece_rows(num_rows, column_tiles)
    with on_device(features):
        label_type = _label_dtype(num_classes)
        label = torch.where((target >= 0) & (target < num_classes), target, num_classes).to(label_type)
        in_order, order = label.sort(stable=True)
        begin = torch.searchsorted(in_order, torch.arange(num_classes + 1, dtype=label_type, device=device))
        counts = begin.diff()
        pieces = (counts + (piece_rows - 1)).div(piece_rows, rounding_mode="floor")
        pieces_end = pieces.cumsum(0)
        partials_end = torch.where(pieces > 1, pieces, 0).cumsum(0)
        bound = num_rows // piece_rows + min(num_rows, num_classes)
        piece_class = torch.searchsorted(pieces_end, torch.arange(bound, device=device), right=True)
        sums = torch.empty((num_classes, dim), dtype=torch.float32, device=device)
        # a class of several pieces has more rows than one piece holds, so twice the rows bound its pieces
        partial = torch.empty((2 * num_rows // piece_rows, dim), dtype=torch.float32, device=device)
        _piece_kernel[(bound, column_tiles)](
            features, *features.stride(), order, begin, pieces_end, partials_end, piece_class, sums, partial, num_classes, dim, piece_rows,
            ROWS=_ROWS, COLUMNS=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _combine_kernel[(num_classes, column_tiles)](
            begin, partials_end, partial, sums, dim, piece_rows, COLUMNS=columns, num_warps=1, enable_fp_fusion=True
        )  # fmt: skip
    return sums, counts
