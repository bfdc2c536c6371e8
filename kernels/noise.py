"""The noise stream as a matrix: the draws that a loss makes inside its kernels, stored.

Bytes: writes 4 for each draw and reads nothing, so the card's store bandwidth is the bound; about 10 instructions for each draw stay below it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import noise_tile
from .runtime import NVIDIA, batch_kernel, on_device
from .terms import implements

_ROWS = 4
_GROUPS = 64  # of 8 classes


@batch_kernel
def cloud_noise_kernel(
    noise_ptr,  # [num_rows, num_classes] float32
    seed_ptr,  # int64
    num_rows,
    num_classes,
    row_offset,
    first_group,
    shift,  # how many classes of the first group come before the first column
    row_blocks,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    # One axis holds both blocks, because the other axes of a grid end at 65535.
    block = tl.program_id(0)
    rows = (block % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = (block // row_blocks).to(tl.int64) * GROUPS
    noise = noise_tile(tl.load(seed_ptr), rows + row_offset, group + first_group, GROUPS, NVIDIA)
    columns = group * 8 - shift + tl.arange(0, GROUPS * 8)
    wanted = (rows[:, None] < num_rows) & ((columns >= 0) & (columns < num_classes))[None, :]
    tl.store(noise_ptr + rows[:, None] * num_classes + columns[None, :], noise, mask=wanted)


@implements("cloud_noise", "triton")
def cloud_noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    """The draws of rows row_offset... and classes class_offset..., (num_rows, num_classes) float32, on the device of `seed` (0-dim int64)."""
    noise = torch.empty(num_rows, num_classes, dtype=torch.float32, device=seed.device)
    row_blocks = triton.cdiv(num_rows, _ROWS)
    first_group, shift = divmod(class_offset, 8)
    class_blocks = triton.cdiv(shift + num_classes, _GROUPS * 8)
    with on_device(seed):
        cloud_noise_kernel[(row_blocks * class_blocks,)](
            noise, seed, num_rows, num_classes, row_offset, first_group, shift, row_blocks,
            ROWS=_ROWS, GROUPS=_GROUPS, NVIDIA=NVIDIA, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return noise
