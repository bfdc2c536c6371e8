"""Kernels on which the ahead-of-time compiler proves itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sum_of_exponentials(values, sums, stride, columns, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns - BLOCK + 1, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        if MASKED:
            x = tl.load(values + row * stride + offsets, mask=offsets < columns, other=0.0)
        else:
            x = tl.load(values + row * stride + offsets)
        total += tl.exp2(x)
    tl.store(sums + row, tl.sum(total))


@triton.jit
def transpose(values, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    offsets = rows[:, None] * BLOCK + rows[None, :]
    tl.store(values + offsets, tl.trans(tl.load(values + offsets)))
