"""The noise of gclkern.noise, computed by the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.cpu_backend.library import Noise, call
from gclkern.kernels.terms import implements


@implements("cloud_noise", "cpu")
def cloud_noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    """The same as gclkern.kernels.noise.cloud_noise: (num_rows, num_classes) float32."""
    noise = torch.empty(num_rows, num_classes, dtype=torch.float32, device="cpu")
    call("noise", Noise.pack(num_rows, num_classes, seed.data_ptr(), row_offset, class_offset, noise.data_ptr(), torch.get_num_threads()))
    return noise
