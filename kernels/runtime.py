"""How the kernels run in this process: interpreted on the CPU, on an NVIDIA GPU, or on another GPU."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Device code may use NVIDIA's approximate instructions (inline assembly); elsewhere it takes the portable formulas.
NVIDIA: bool = not INTERPRETED and torch.version.cuda is not None


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches inside go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
