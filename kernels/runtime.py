"""How the kernels run in this process: interpreted on the CPU, on an NVIDIA GPU, or on another GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Device code may use NVIDIA's approximate instructions (inline assembly); elsewhere it takes the portable formulas.
NVIDIA: bool = not INTERPRETED and torch.version.cuda is not None
# Grids are sized for a GPU of this many multiprocessors, an H100's or H200's; on another GPU their last wave may be less full.
MULTIPROCESSORS = 132

# Triton compiles a kernel again for integers that are 1 or multiples of 16, and for pointers of another alignment, unless the arguments are excluded by name.
# These change with the number of rows, with the offset of a batch or a shard, or with an address, and no address whose alignment matters depends on them.
PLACES = (
    "row_offset", "class_offset", "first_group", "target_shift", "num_columns", "parts", "first_part", "splits", "tiles_per_split", "row_tiles_per_split",
    "row_blocks", "stats_stride",
)  # fmt: skip
LOOSE_POINTERS = ("target_ptr", "right_target_ptr", "target_b_ptr", "lam_ptr", "seed_ptr", "grad_loss_ptr", "peak_ptr", "rest_ptr", "blend_ptr", "hardest_ptr")
# `triton.jit` for a kernel that every batch launches: smaller last batches, and micro-batches at other offsets, compile nothing.
batch_kernel = triton.jit(do_not_specialize=("num_rows", *PLACES), do_not_specialize_on_alignment=LOOSE_POINTERS)

VECTOR_BYTES = 16  # of the widest load; rows that start at multiples of it are read by such loads


def _let_numpy_index() -> None:
    """Triton before 3.8 interprets the bounds of a loop by `int` of an array of one element, which NumPy refuses from 2.5 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    _let_numpy_index()


def is_hopper(device: torch.device) -> bool:
    """Whether the device has the registers, shared memory and warp-group products of compute capability 9.0."""
    return device.type == "cuda" and NVIDIA and torch.cuda.get_device_capability(device)[0] == 9


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context whose launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
