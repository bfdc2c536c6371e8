"""The softmax over samples and class prototypes: products whose tiles never leave the registers, as in attention.

With unit vectors x_i of the samples, the keys k of a batch being samples, prototypes or both, the weights w of gclkern.torch_backend.contrastive_loss, and p_ik
the probability of key k in the softmax of sample i,

    loss_i = log sum_{k != i} w_ik exp(x_i . k / T) - mean over the keys p != i of the class y_i of x_i . p / T

    _halves_kernel       unit rows as float16 halves, inverse norms, logarithms of the weights
    _denominator_kernel  each row's denominator, positives and other keys apart, by an online softmax over tiles of keys; the sum of its positives' cosines
    _losses_kernel       the loss, from these
    _rates_kernel        backward: the factor of each row
    _pull_kernel         sum over keys k of m_ik k with m_ik = rate_i p_ik + rate_k p_ki - (for positives) (rate_i / positives of i + rate_k / positives of k)
    _rows_kernel         the gradient of rows from that of their unit rows

Of a row with a single positive p, p_ip - 1 would lose its digits where p_ip is close to 1: _losses_kernel leaves -(the others' part) / total in its place, and
the loss is log1p(the others' part / that of p) plus the logarithm of its weight.

A cosine x_i . x_k stands in the losses of i and of k, so that one pass over the keys of i gives the whole gradient of x_i, without atomics. The prototypes are
keys in one launch and rows in another. Each tile of rows has several programs, which share its keys so that a GPU is full. They store partial results, added in
a fixed order.

A number of float32 is the sum of two of float16, its high and low half, to 22 bits, and the tensor cores multiply these: high . high + high . low + low . high
has the error of a float32 product. Numbers are scaled by 2^12, so that low halves are far from the smallest number of float16. Where torch lets float32
products run in tf32, whose numbers have 11 bits as float16's do, high . high is all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .products import _inverse, _precision
from .row_loss import LOG2E, log1p
from .runtime import MULTIPROCESSORS, NVIDIA, batch_kernel, on_device
from .terms import SMALLEST_NORM, implements, shapes_of

# Rows and columns of a tile on Hopper, which multiplies from shared memory. Elsewhere the rows are in registers, of which larger tiles would spill some.
_HOPPER_TILE = (64, 64)
_DENOMINATOR_TILE = (64, 32)
_PULL_TILE = (32, 32) if NVIDIA else (64, 32)
_DEPTH = 128  # elements of a row that a tile has at most
_SCALE = 2.0**12
_UNSCALE = 2.0**-24  # of a product of two scaled numbers
_NO_LABEL = tl.constexpr(1 - 2**63)
_WHOLE_ROWS = 16  # of a program that reads rows from end to end
# Rows of a program of _rows_kernel, and partial results that it reads at a time. Few prototypes have many results each. The choice does not depend on the
# batch, so that no batch compiles a kernel of its own.
_SUMMED_OF_SAMPLES, _SUMMED_OF_PROTOTYPES = (4, 8), (1, 32)
_PARTS, _LANES = 8, 1024  # the same of the single program of _losses_kernel
_RATES = 2048  # rows of a program of _rates_kernel
RESIDENT = 2  # programs of _denominator_kernel and _pull_kernel that a multiprocessor of Hopper holds at a time


@triton.jit
def _label(ptr, places, present):
    """The classes of samples, _NO_LABEL outside; or of prototypes, which are the places themselves."""
    return tl.load(ptr + places, mask=present, other=_NO_LABEL) if ptr is not None else places.to(tl.int64)


@batch_kernel
def _halves_kernel(
    row_ptr, stride_row, stride_element,  # (N, D)
    target_ptr,  # (N,) or None for prototypes, whose classes are their places
    count_ptr,  # (C,) or None where all weights are 1
    high_ptr, low_ptr,  # (N, width)
    inverse_ptr,  # (N,) 0 where a row has no direction
    label_ptr,  # (N,) a copy of the classes, for backward; None for prototypes
    own_ptr, other_ptr,  # (N,) binary logarithms of the weights; `own_ptr` is None for prototypes
    num_rows, num_classes, dim, width, smallest_norm, scale, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    at = tl.arange(0, DEPTH)
    place = row_ptr + (rows.to(tl.int64) * stride_row)[:, None]
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dim, DEPTH):
        inside = in_batch[:, None] & (start + at < dim)[None, :]
        value = tl.load(place + ((start + at).to(tl.int64) * stride_element)[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(value * value, axis=1)
    inverse = _inverse(tl.sqrt(square), smallest_norm)
    tl.store(inverse_ptr + rows, inverse, mask=in_batch)
    for start in range(0, width, DEPTH):
        inside = in_batch[:, None] & (start + at < dim)[None, :]
        value = tl.load(place + ((start + at).to(tl.int64) * stride_element)[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where((inverse == 0.0)[:, None], 0.0, value * inverse[:, None]) * scale
        high = value.to(tl.float16)
        to = (rows.to(tl.int64) * width)[:, None] + (start + at)[None, :]
        kept = in_batch[:, None] & (start + at < width)[None, :]
        tl.store(high_ptr + to, high, mask=kept)
        tl.store(low_ptr + to, (value - high.to(tl.float32)).to(tl.float16), mask=kept)
    label = _label(target_ptr, rows, in_batch)
    if label_ptr is not None:
        tl.store(label_ptr + rows, label - (label == _NO_LABEL), mask=in_batch)
    if count_ptr is not None:
        known = in_batch & (label >= 0) & (label < num_classes)
        count = tl.load(count_ptr + label, mask=known, other=1.0).to(tl.float32)
        tl.store(other_ptr + rows, tl.where(known, -tl.log2(count), 0.0), mask=in_batch)
        if own_ptr is not None:
            others = tl.where(known, count - 1.0, 1.0)
            # the only key of its class has none of its own class in its denominator
            tl.store(own_ptr + rows, tl.where(others <= 0.0, -float("inf"), -tl.log2(tl.where(others <= 0.0, 1.0, others))), mask=in_batch)


@triton.jit
def _keys(ptr, places, number, start, width, DEPTH: tl.constexpr):
    """A tile of rows, 0 outside."""
    at = start + tl.arange(0, DEPTH)
    return tl.load(ptr + (places.to(tl.int64) * width)[:, None] + at[None, :], mask=(places < number)[:, None] & (at < width)[None, :], other=0.0)


@triton.jit
def _product(high, low, right_high, right_low, total):
    """Plus high . high, and where there are low halves the products with them."""
    if low is not None:
        total = tl.dot(low, right_high, total, out_dtype=tl.float32)
        total = tl.dot(high, right_low, total, out_dtype=tl.float32)
    return tl.dot(high, right_high, total, out_dtype=tl.float32)


@batch_kernel
def _denominator_kernel(
    high_ptr, low_ptr,  # (N, width) samples; `low_ptr` is None where high halves suffice
    right_high_ptr, right_low_ptr,  # (K, width) keys
    label_ptr, right_label_ptr,  # (N,), (K,) or None for prototypes
    own_ptr,  # (N,) or None where all weights are 1
    other_ptr,  # (K,)
    part_ptr,  # (5, parts, N), of a part of the keys: the largest logit; over its exponential the sums of positives and of others; cosines, number of positives
    num_rows, num_columns, width, scale2, unscale, first_part, parts, tiles_per_split,
    SELF: tl.constexpr, INCLUDE_OWN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    label = _label(label_ptr, rows, in_batch)
    if own_ptr is not None:
        own = tl.load(own_ptr + rows, mask=in_batch, other=0.0)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    own_sum = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    pulled = tl.zeros((ROWS,), tl.float32)
    number = tl.zeros((ROWS,), tl.float32)
    left_low = None
    if WHOLE:
        left_high = _keys(high_ptr, rows, num_rows, 0, width, DEPTH)
        if low_ptr is not None:
            left_low = _keys(low_ptr, rows, num_rows, 0, width, DEPTH)
    split = tl.program_id(1)
    first = split * tiles_per_split * COLUMNS
    for start in range(first, tl.minimum(first + tiles_per_split * COLUMNS, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        present = columns < num_columns
        cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
        right_low = None
        if WHOLE:
            right_high = tl.trans(_keys(right_high_ptr, columns, num_columns, 0, width, DEPTH))
            if low_ptr is not None:
                right_low = tl.trans(_keys(right_low_ptr, columns, num_columns, 0, width, DEPTH))
            cosine = _product(left_high, left_low, right_high, right_low, cosine)
        else:
            for depth in range(0, width, DEPTH):
                left_high = _keys(high_ptr, rows, num_rows, depth, width, DEPTH)
                right_high = tl.trans(_keys(right_high_ptr, columns, num_columns, depth, width, DEPTH))
                if low_ptr is not None:
                    left_low = _keys(low_ptr, rows, num_rows, depth, width, DEPTH)
                    right_low = tl.trans(_keys(right_low_ptr, columns, num_columns, depth, width, DEPTH))
                cosine = _product(left_high, left_low, right_high, right_low, cosine)
        # NaN stays: its key is in the denominator of every sample
        logit = cosine * scale2 + tl.where(present, 0.0, -float("inf"))[None, :]
        positive = label[:, None] == _label(right_label_ptr, columns, present)[None, :]
        if own_ptr is not None:
            logit += tl.where(positive, own[:, None], tl.load(other_ptr + columns, mask=present, other=0.0)[None, :])
        if not INCLUDE_OWN:
            logit = tl.where(positive, -float("inf"), logit)
        if SELF:
            others = rows[:, None] != columns[None, :]
            logit = tl.where(others, logit, -float("inf"))
            positive = positive & others
        pulled += tl.sum(tl.where(positive, cosine, 0.0), axis=1)
        # 1, written so that Triton adds it where the threads have their cosines, instead of a second time elsewhere
        number += tl.sum(tl.where(positive, 1.0 + tl.minimum(tl.abs(cosine), 0.0), 0.0), axis=1)
        top = tl.maximum(peak, tl.max(logit, axis=1))
        anchor = tl.where(top == -float("inf"), 0.0, top)
        before = tl.exp2(peak - anchor)
        exponential = tl.exp2(logit - anchor[:, None])
        own_sum = own_sum * before + tl.sum(tl.where(positive, exponential, 0.0), axis=1)
        rest = rest * before + tl.sum(tl.where(positive, 0.0, exponential), axis=1)
        peak = top
    place = part_ptr + (first_part + split) * num_rows + rows
    size = parts.to(tl.int64) * num_rows
    tl.store(place, peak, mask=in_batch)
    tl.store(place + size, own_sum, mask=in_batch)
    tl.store(place + 2 * size, rest, mask=in_batch)
    tl.store(place + 3 * size, pulled * unscale, mask=in_batch)
    tl.store(place + 4 * size, number, mask=in_batch)


@batch_kernel
def _losses_kernel(
    part_ptr,  # (5, parts, N), of _denominator_kernel
    label_ptr,  # (N,)
    own_ptr,  # (N,) or None where all weights are 1
    loss_ptr,  # () or (N,)
    peak_ptr,  # (N,) the row's largest logit, which backward subtracts
    shift_ptr,  # (N,) what it adds to the logits of positives instead; -inf where their probabilities are not needed
    inverse_ptr,  # (N,) 1 / the sum of exponentials
    share_ptr,  # (N,) what backward subtracts for each positive, at a rate of 1
    anchors_ptr,  # () what the losses are divided by
    num_rows, num_classes, parts, inverse_temperature, ln2,
    LIMITED: tl.constexpr, REDUCTION: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    size = parts.to(tl.int64) * num_rows
    losses = tl.zeros((LANES,), tl.float32)
    anchors = tl.zeros((LANES,), tl.float32)
    for start in range(0, num_rows, LANES):
        rows = start + tl.arange(0, LANES)
        in_batch = rows < num_rows
        peak = tl.full((LANES,), -float("inf"), tl.float32)
        own_sum = tl.zeros((LANES,), tl.float32)
        rest = tl.zeros((LANES,), tl.float32)
        pulled = tl.zeros((LANES,), tl.float32)
        number = tl.zeros((LANES,), tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            read = (part < parts)[:, None] & in_batch[None, :]
            place = part_ptr + (part.to(tl.int64) * num_rows)[:, None] + rows[None, :]
            peaks = tl.load(place, mask=read, other=-float("inf"))
            top = tl.maximum(peak, tl.max(peaks, axis=0))
            anchor = tl.where(top == -float("inf"), 0.0, top)
            before = tl.exp2(peak - anchor)
            factor = tl.exp2(peaks - anchor[None, :])
            own_sum = own_sum * before + tl.sum(tl.load(place + size, mask=read, other=0.0) * factor, axis=0)
            rest = rest * before + tl.sum(tl.load(place + 2 * size, mask=read, other=0.0) * factor, axis=0)
            pulled += tl.sum(tl.load(place + 3 * size, mask=read, other=0.0), axis=0)
            number += tl.sum(tl.load(place + 4 * size, mask=read, other=0.0), axis=0)
            peak = top
        label = tl.load(label_ptr + rows, mask=in_batch, other=0)
        known = (label >= 0) & (label < num_classes) if LIMITED else in_batch
        number = tl.where(known, number, 0.0)
        total = own_sum + rest
        own = tl.zeros((LANES,), tl.float32)
        if own_ptr is not None:
            own = tl.load(own_ptr + rows, mask=in_batch, other=0.0)
        single = number == 1.0
        # the difference of two logarithms would have no digits left where the only positive has nearly all of the probability
        likely = own_sum > rest
        precise = log1p(rest / tl.where(likely, own_sum, 1.0)) + own * ln2
        loss = tl.where(single & likely, precise, (tl.log2(total) + peak) * ln2 - pulled / number * inverse_temperature)
        loss = tl.where(known | (rows >= num_rows), tl.where(number == 0.0, 0.0, loss), float("nan"))
        # a row without keys has no probabilities: exp2(-inf) in backward
        empty = total == 0.0
        tl.store(peak_ptr + rows, tl.where(empty, float("inf"), peak), mask=in_batch)
        tl.store(shift_ptr + rows, tl.where(single | (own_sum == 0.0), -float("inf"), own - peak), mask=in_batch)
        tl.store(inverse_ptr + rows, tl.where(empty, 0.0, 1.0 / total), mask=in_batch)
        share = tl.where(single & (total != 0.0), rest / total, 1.0 / number)
        tl.store(share_ptr + rows, tl.where(number == 0.0, 0.0, share), mask=in_batch)
        if REDUCTION == "none":
            tl.store(loss_ptr + rows, loss, mask=in_batch)
        losses += tl.where(in_batch, loss, 0.0)
        anchors += tl.where(number > 0.0, 1.0, 0.0)
    divisor = tl.sum(anchors, axis=0) if REDUCTION == "mean" else 1.0
    tl.store(anchors_ptr, divisor)
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.sum(losses, axis=0) / divisor)


@batch_kernel
def _rates_kernel(
    grad_loss_ptr,  # () or (N,)
    inverse_ptr, share_ptr, anchors_ptr,  # of _losses_kernel
    rate_ptr, attraction_ptr,  # (N,) factors of a row's exponentials and of its positives, over the largest rate, times `scale`
    largest_ptr,  # () the largest rate
    num_rows, inverse_temperature, scale, ROW_GRADIENTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    factor = inverse_temperature / tl.load(anchors_ptr)
    if ROW_GRADIENTS:  # a single program
        top = tl.zeros((LANES,), tl.float32)
        for start in range(0, num_rows, LANES):
            rows = start + tl.arange(0, LANES)
            has = tl.load(share_ptr + rows, mask=rows < num_rows, other=0.0) > 0.0
            size = tl.abs(tl.load(grad_loss_ptr + rows, mask=has, other=0.0).to(tl.float32) * factor)
            top = tl.maximum(top, tl.where(size < float("inf"), size, 0.0))
        largest = tl.max(top, axis=0)
    else:
        largest = tl.abs(tl.load(grad_loss_ptr).to(tl.float32) * factor)
        largest = tl.where(largest < float("inf"), largest, 0.0)
    largest = tl.where(largest == 0.0, 1.0, largest)
    first = tl.program_id(0) * LANES
    if first == 0:
        tl.store(largest_ptr, largest)
    for start in range(first, num_rows if ROW_GRADIENTS else tl.minimum(first + LANES, num_rows), LANES):
        rows = start + tl.arange(0, LANES)
        share = tl.load(share_ptr + rows, mask=rows < num_rows, other=0.0)
        # a sample without positives has no gradient, even if the upstream one is NaN
        upstream = tl.load(grad_loss_ptr + (rows if ROW_GRADIENTS else rows * 0), mask=share > 0.0, other=0.0)
        rate = upstream.to(tl.float32) * factor / largest * scale
        tl.store(rate_ptr + rows, rate * tl.load(inverse_ptr + rows, mask=rows < num_rows, other=0.0), mask=rows < num_rows)
        tl.store(attraction_ptr + rows, rate * share, mask=rows < num_rows)


@batch_kernel
def _pull_kernel(
    high_ptr, low_ptr,  # (N, width) rows whose gradient is computed; `low_ptr` is None where high halves suffice
    right_high_ptr, right_low_ptr,  # (K, width) columns
    label_ptr, right_label_ptr,  # (N,), (K,); None: prototypes
    other_ptr, right_other_ptr,  # (N,), (K,) logarithms of the weights, or None where all are 1
    peak_ptr, shift_ptr, rate_ptr, attraction_ptr,  # (N,); None: rows without a loss of their own
    right_peak_ptr, right_shift_ptr, right_rate_ptr, right_attraction_ptr,  # (K,) the same of the columns
    part_ptr,  # (parts, N, width) sums over each part of the columns
    num_rows, num_columns, width, scale2, first_part, tiles_per_split,
    SELF: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1) * DEPTH
    in_batch = rows < num_rows
    label = _label(label_ptr, rows, in_batch)
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + rows, mask=in_batch, other=0.0)
        attraction = tl.load(attraction_ptr + rows, mask=in_batch, other=0.0)
        peak = tl.load(peak_ptr + rows, mask=in_batch, other=0.0)
        shift = tl.load(shift_ptr + rows, mask=in_batch, other=0.0)
    if right_rate_ptr is not None and other_ptr is not None:
        other = tl.load(other_ptr + rows, mask=in_batch, other=0.0)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    left_low = None
    if WHOLE:
        left_high = _keys(high_ptr, rows, num_rows, 0, width, DEPTH)
        if low_ptr is not None:
            left_low = _keys(low_ptr, rows, num_rows, 0, width, DEPTH)
    split = tl.program_id(2)
    first = split * tiles_per_split * COLUMNS
    for start in range(first, tl.minimum(first + tiles_per_split * COLUMNS, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        present = columns < num_columns
        cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
        right_low = None
        transposed_low = None
        if WHOLE:
            right_high = _keys(right_high_ptr, columns, num_columns, 0, width, DEPTH)
            if low_ptr is not None:
                right_low = _keys(right_low_ptr, columns, num_columns, 0, width, DEPTH)
                transposed_low = tl.trans(right_low)
            cosine = _product(left_high, left_low, tl.trans(right_high), transposed_low, cosine)
        else:
            for depth in range(0, width, DEPTH):
                left_high = _keys(high_ptr, rows, num_rows, depth, width, DEPTH)
                right_high = _keys(right_high_ptr, columns, num_columns, depth, width, DEPTH)
                if low_ptr is not None:
                    left_low = _keys(low_ptr, rows, num_rows, depth, width, DEPTH)
                    transposed_low = tl.trans(_keys(right_low_ptr, columns, num_columns, depth, width, DEPTH))
                cosine = _product(left_high, left_low, tl.trans(right_high), transposed_low, cosine)
            right_high = _keys(right_high_ptr, columns, num_columns, chunk, width, DEPTH)
            if low_ptr is not None:
                right_low = _keys(right_low_ptr, columns, num_columns, chunk, width, DEPTH)
        positive = label[:, None] == _label(right_label_ptr, columns, present)[None, :]
        pull = tl.zeros((ROWS, COLUMNS), tl.float32)
        attractions = tl.zeros((ROWS, COLUMNS), tl.float32)
        if rate_ptr is not None:
            weight = tl.zeros((COLUMNS,), tl.float32)
            if right_other_ptr is not None:
                weight = tl.load(right_other_ptr + columns, mask=present, other=0.0)
            weight = tl.where(present, weight, -float("inf"))
            pull += rate[:, None] * tl.exp2(cosine * scale2 + tl.where(positive, shift[:, None], weight[None, :] - peak[:, None]))
            attractions += attraction[:, None]
        if right_rate_ptr is not None:
            right_peak = tl.load(right_peak_ptr + columns, mask=present, other=float("inf"))
            right_shift = tl.load(right_shift_ptr + columns, mask=present, other=0.0)
            if other_ptr is not None:
                weighted = other[:, None] - right_peak[None, :]
            else:
                weighted = -right_peak[None, :]
            pull += tl.load(right_rate_ptr + columns, mask=present, other=0.0)[None, :] * tl.exp2(
                cosine * scale2 + tl.where(positive, right_shift[None, :], weighted)
            )
            attractions += tl.load(right_attraction_ptr + columns, mask=present, other=0.0)[None, :]
        pull -= tl.where(positive, attractions, 0.0)
        if SELF:
            pull = tl.where(rows[:, None] != columns[None, :], pull, 0.0)
        high = pull.to(tl.float16)
        low = None
        if low_ptr is not None:
            low = (pull - high.to(tl.float32)).to(tl.float16)
        total = _product(high, low, right_high, right_low, total)
    at = chunk + tl.arange(0, DEPTH)
    part = part_ptr + (((first_part + split).to(tl.int64) * num_rows + rows) * width)[:, None] + at[None, :]
    tl.store(part, total, mask=in_batch[:, None] & (at < width)[None, :])


@batch_kernel
def _rows_kernel(
    part_ptr,  # (parts, N, width) of _pull_kernel
    row_ptr, stride_row, stride_element,  # (N, D)
    label_ptr,  # (N,) or None for prototypes
    inverse_ptr,  # (N,)
    largest_ptr,  # ()
    grad_ptr,  # (N, D)
    num_rows, num_classes, parts, dim, width, unscale,
    LIMITED: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    inverse = tl.load(inverse_ptr + rows, mask=in_batch, other=0.0)[:, None]
    factor = tl.load(largest_ptr) * unscale * inverse
    if LIMITED:
        label = tl.load(label_ptr + rows, mask=in_batch, other=0)
        factor = tl.where(((label >= 0) & (label < num_classes))[:, None], factor, float("nan"))
    place = row_ptr + (rows.to(tl.int64) * stride_row)[:, None]
    out = grad_ptr + (rows.to(tl.int64) * dim)[:, None]
    at = tl.arange(0, DEPTH)
    if WHOLE:
        inside = in_batch[:, None] & (at < dim)[None, :]
        unit = tl.load(place + (at.to(tl.int64) * stride_element)[None, :], mask=inside, other=0.0).to(tl.float32) * inverse
        pull = _added(part_ptr, parts, rows, num_rows, at, width, ROWS, DEPTH, PARTS)
        grad = (pull - tl.sum(unit * pull, axis=1)[:, None] * unit) * factor
        tl.store(out + at[None, :], tl.where(inverse == 0.0, 0.0, grad), mask=inside)
    else:
        radial = tl.zeros((ROWS,), tl.float32)
        for start in range(0, dim, DEPTH):
            inside = in_batch[:, None] & (start + at < dim)[None, :]
            unit = tl.load(place + ((start + at).to(tl.int64) * stride_element)[None, :], mask=inside, other=0.0).to(tl.float32) * inverse
            radial += tl.sum(unit * _added(part_ptr, parts, rows, num_rows, start + at, width, ROWS, DEPTH, PARTS), axis=1)
        for start in range(0, dim, DEPTH):
            inside = in_batch[:, None] & (start + at < dim)[None, :]
            unit = tl.load(place + ((start + at).to(tl.int64) * stride_element)[None, :], mask=inside, other=0.0).to(tl.float32) * inverse
            grad = (_added(part_ptr, parts, rows, num_rows, start + at, width, ROWS, DEPTH, PARTS) - radial[:, None] * unit) * factor
            tl.store(out + (start + at)[None, :], tl.where(inverse == 0.0, 0.0, grad), mask=inside)


@triton.jit
def _added(part_ptr, parts, rows, num_rows, at, width, ROWS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the parts, PARTS of which are read at a time."""
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    inside = (rows < num_rows)[None, :, None] & (at < width)[None, None, :]
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        place = part_ptr + ((part.to(tl.int64)[:, None] * num_rows + rows[None, :]) * width)[:, :, None] + at[None, None, :]
        total += tl.sum(tl.load(place, mask=(part < parts)[:, None, None] & inside, other=0.0), axis=0)
    return total


class _Side(NamedTuple):
    """Samples or prototypes, as rows or as keys."""

    high: Tensor  # (N, width) float16
    low: Tensor  # (N, width) float16
    inverse: Tensor  # (N,)
    label: Tensor | None  # (N,); None: prototypes
    other: Tensor | None  # (N,) logarithms of the weights as keys of samples of other classes; None: all weights are 1


class _Rates(NamedTuple):
    """Of the samples in backward, (N,) each."""

    peak: Tensor
    shift: Tensor
    rate: Tensor
    attraction: Tensor


def tiles_per_split(programs: int, tiles: int) -> int:
    """Tiles of keys that a program takes, where each of `programs` could take all `tiles`: as few as keep one wave of programs."""
    return triton.cdiv(tiles, max(1, min(tiles, RESIDENT * MULTIPROCESSORS // programs)))


def _width(dim: int) -> int:
    """Elements of a row of halves: a multiple of 16, so that the widest loads read it."""
    return triton.cdiv(dim, 16) * 16


def _depth(width: int) -> int:
    """64 halves are the 128 bytes over which the tensor cores' layout in shared memory spreads a row."""
    return 64 if width <= 64 else _DEPTH


def _side(rows: Tensor, target: Tensor | None, class_counts: Tensor | None, num_classes: int) -> tuple[_Side, Tensor | None]:
    """The rows, and of weighted samples the logarithms of the weights of keys of their own class (N,)."""
    num_rows, dim = rows.shape
    width = _width(dim)
    high, low = (rows.new_empty((num_rows, width), dtype=torch.float16) for _ in range(2))
    inverse = rows.new_empty(num_rows, dtype=torch.float32)
    label = None if target is None else torch.empty_like(target)
    own = None if class_counts is None or target is None else torch.empty_like(inverse)
    other = None if class_counts is None else torch.empty_like(inverse)
    _halves_kernel[(triton.cdiv(num_rows, _WHOLE_ROWS),)](
        rows, *rows.stride(), target, class_counts, high, low, inverse, label, own, other, num_rows, num_classes, dim, width, SMALLEST_NORM, _SCALE,
        ROWS=_WHOLE_ROWS, DEPTH=_depth(width), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return _Side(high, low, inverse, label, other), own


def _tiles(rows: Tensor, columns: Tensor, tile: tuple[int, int], chunks: int) -> tuple[int, int, int]:
    """Tiles of rows, each of which has `chunks` of elements; parts of the columns; tiles in a part."""
    row_tiles, tiles = triton.cdiv(rows.shape[0], tile[0]), triton.cdiv(columns.shape[0], tile[1])
    share = tiles_per_split(row_tiles * chunks, tiles)
    return row_tiles, triton.cdiv(tiles, share), share


def _low(side: _Side) -> Tensor | None:
    return None if _precision() == "tf32" else side.low


def _losses(
    samples: _Side, own: Tensor | None, sides: list[_Side], num_classes: int | None, temperature: float, include_own_class: bool, reduction: str
) -> tuple[Tensor, ...]:
    """The loss, and for backward what _losses_kernel writes."""
    num_rows, width = samples.high.shape
    tile = _HOPPER_TILE if runtime.is_hopper(samples.high.device) else _DENOMINATOR_TILE
    tiles = [_tiles(samples.high, side.high, tile, 1) for side in sides]
    parts = sum(count for _, count, _ in tiles)
    part = torch.empty(5, parts, num_rows, dtype=torch.float32, device=samples.high.device)
    depth, first = _depth(width), 0
    for side, (row_tiles, count, share) in zip(sides, tiles, strict=True):
        _denominator_kernel[(row_tiles, count)](
            samples.high, _low(samples), side.high, _low(side), samples.label, side.label, own, side.other, part,
            num_rows, side.high.shape[0], width, LOG2E / temperature * _UNSCALE, _UNSCALE, first, parts, share,
            SELF=side is samples, INCLUDE_OWN=include_own_class, WHOLE=width <= depth, ROWS=tile[0], COLUMNS=tile[1], DEPTH=depth, num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
        first += count
    loss = part.new_empty((num_rows,) if reduction == "none" else ())
    for_backward = [*(part.new_empty(num_rows) for _ in range(4)), part.new_empty(())]
    _losses_kernel[(1,)](
        part, samples.label, own, loss, *for_backward, num_rows, num_classes or 0, parts, 1.0 / temperature, 1.0 / LOG2E,
        LIMITED=num_classes is not None, REDUCTION=reduction, PARTS=_PARTS, LANES=_LANES, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, *for_backward


def _gradient(
    rows: Tensor, left: _Side, rights: list[_Side], samples: _Side, rates: _Rates, largest: Tensor, temperature: float, num_classes: int | None
) -> Tensor:
    """The gradient of `rows`, the samples or the prototypes, in their type."""
    num_rows, width = left.high.shape
    depth, first = _depth(width), 0
    tile = _HOPPER_TILE if runtime.is_hopper(rows.device) else _PULL_TILE
    chunks = triton.cdiv(width, depth)
    tiles = [_tiles(left.high, right.high, tile, chunks) for right in rights]
    parts = sum(count for _, count, _ in tiles)
    part = torch.empty(parts, num_rows, width, dtype=torch.float32, device=rows.device)
    for right, (row_tiles, count, share) in zip(rights, tiles, strict=True):
        of_left, of_right = (rates if side is samples else (None,) * 4 for side in (left, right))
        _pull_kernel[(row_tiles, chunks, count)](
            left.high, _low(left), right.high, _low(right), left.label, right.label, left.other, right.other, *of_left, *of_right, part,
            num_rows, right.high.shape[0], width, LOG2E / temperature * _UNSCALE, first, share,
            SELF=left is right, WHOLE=width <= depth, ROWS=tile[0], COLUMNS=tile[1], DEPTH=depth, num_warps=4,
            num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
        first += count
    grad = torch.empty_like(rows, memory_format=torch.contiguous_format)
    rows_at_once, parts_at_once = _SUMMED_OF_SAMPLES if left is samples else _SUMMED_OF_PROTOTYPES
    _rows_kernel[(triton.cdiv(num_rows, rows_at_once),)](
        part, rows, *rows.stride(), left.label, left.inverse, largest, grad, num_rows, num_classes or 0, parts, rows.shape[1], width, _UNSCALE,
        LIMITED=left is samples and num_classes is not None, WHOLE=width <= depth,
        PARTS=parts_at_once, ROWS=rows_at_once, DEPTH=depth, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return grad


def _rights(samples: _Side, prototypes: _Side | None, include_samples: bool) -> list[_Side]:
    """The keys of the samples."""
    return [*([samples] if include_samples else []), *([] if prototypes is None else [prototypes])]


def _num_classes(prototypes: Tensor | None, class_counts: Tensor | None) -> int | None:
    known = class_counts if prototypes is None else prototypes
    return None if known is None else known.shape[0]


def _empty_saved(features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None) -> list[Tensor]:
    """What forward keeps: _Side of the samples and of the prototypes, without what is None; and what _losses_kernel leaves for backward."""
    num_rows, width = features.shape[0], _width(features.shape[1])
    classes = 0 if prototypes is None else prototypes.shape[0]
    weighted, weighted_classes = (0, 0) if class_counts is None else (num_rows, classes)

    def halves(rows: int) -> list[Tensor]:
        return [features.new_empty((rows, width), dtype=torch.float16) for _ in range(2)]

    def vectors(*lengths: int) -> list[Tensor]:
        return [features.new_empty(length, dtype=torch.float32) for length in lengths]

    samples = [*halves(num_rows), *vectors(num_rows), target.new_empty(num_rows), *vectors(weighted)]
    kept = [*vectors(num_rows, num_rows, num_rows, num_rows), features.new_empty((), dtype=torch.float32)]
    return [*samples, *halves(classes), *vectors(classes, weighted_classes), *kept]


@implements("contrastive_forward", "triton")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss ((), or (N,) unreduced), and for backward what `_empty_saved` lists."""
    num_classes = _num_classes(prototypes, class_counts)
    counts = None if class_counts is None else class_counts.contiguous()
    with on_device(features):
        samples, own = _side(features, target.contiguous(), counts, num_classes or 0)
        keys = None if prototypes is None else _side(prototypes, None, counts, num_classes or 0)[0]
        loss, *kept = _losses(samples, own, _rights(samples, keys, include_samples), num_classes, temperature, include_own_class, reduction)

    def present(value: Tensor | None) -> Tensor:
        return features.new_empty(0, dtype=torch.float32) if value is None else value

    halves = [features.new_empty((0, samples.high.shape[1]), dtype=torch.float16) for _ in range(2)] if keys is None else [keys.high, keys.low]
    others = (None, None) if keys is None else (keys.inverse, keys.other)
    return loss, [*map(present, samples), *halves, *map(present, others), *kept]


@implements("contrastive_backward", "triton")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and of the prototypes; one that was not requested is empty."""
    high, low, inverse, label, other, key_high, key_low, key_inverse, key_other, peak, shift, inverse_total, share, anchors = saved
    weighted = class_counts is not None
    samples = _Side(high, low, inverse, label, other if weighted else None)
    keys = None if prototypes is None else _Side(key_high, key_low, key_inverse, None, key_other if weighted else None)
    num_classes = _num_classes(prototypes, class_counts)
    grad_features, grad_prototypes = features.new_empty(0), features.new_empty(0)
    with on_device(features):
        rate, attraction = torch.empty_like(share), torch.empty_like(share)
        largest = torch.empty_like(anchors)
        row_gradients = grad_loss.ndim > 0
        _rates_kernel[(1 if row_gradients else triton.cdiv(len(label), _RATES),)](
            grad_loss.contiguous(), inverse_total, share, anchors, rate, attraction, largest, len(label), 1.0 / temperature, _SCALE,
            ROW_GRADIENTS=row_gradients, LANES=_RATES, num_warps=16, enable_fp_fusion=True,
        )  # fmt: skip
        rates = _Rates(peak, shift, rate, attraction)
        if features_grad:
            grad_features = _gradient(features, samples, _rights(samples, keys, include_samples), samples, rates, largest, temperature, num_classes)
        if prototypes_grad and prototypes is not None and keys is not None:
            grad_prototypes = _gradient(prototypes, keys, [samples], samples, rates, largest, temperature, num_classes)
    return grad_features, grad_prototypes


@shapes_of("contrastive_forward", "triton")
def _forward_shapes(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    return loss, _empty_saved(features, prototypes, target, class_counts)
