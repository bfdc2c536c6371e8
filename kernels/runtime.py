"""How the kernels run in this process: interpreted on the CPU, on an NVIDIA GPU, or on another GPU."""

from __future__ import annotations

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Device code may use NVIDIA's approximate instructions (inline assembly); elsewhere it takes the portable formulas.
NVIDIA: bool = not INTERPRETED and torch.version.cuda is not None
