"""Sums of feature rows by class, each in double precision and in the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DTYPES, Segments, call
from gclkern.kernels.terms import implements


@implements("segment_sums", "cpu")
def segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.centroids.segment_sums."""
    rows, dim = features.shape
    target = target.contiguous()
    sums = torch.empty((num_classes, dim), dtype=torch.float32, device="cpu")
    order, starts, counts = (target.new_empty(size) for size in (rows, num_classes + 1, num_classes))
    tensors = (target, order, starts, sums, counts)
    call(
        "segment_sums",
        Segments.pack(
            rows, num_classes, dim, features.data_ptr(), DTYPES[features.dtype], *features.stride(), *(tensor.data_ptr() for tensor in tensors),
            torch.get_num_threads(),
        ),
    )  # fmt: skip
    return sums, counts
