"""Sums of feature rows by class in torch, bitwise repeatable on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.kernels.terms import implements, statistics_dtype

# Elements that are converted to the dtype of the sums at a time. On a CPU all blocks use one buffer of 8 MB: new memory would cost more than the sums.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**22


def is_on_cpu(tensor: Tensor) -> bool:
    """A function, so that tests can take the other path on a CPU."""
    return tensor.device.type == "cpu"


@implements("segment_sums", "torch")
def segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.centroids.segment_sums; sums are float64 for float64 features."""
    dim = features.shape[1]
    dtype = statistics_dtype(features)
    # rows whose label is out of range go to an extra class, which is dropped at the end
    label = target.masked_fill(target.clamp(0, num_classes - 1) != target, num_classes)
    sums = torch.zeros((num_classes + 1, dim), dtype=torch.float64, device=features.device)
    on_cpu = is_on_cpu(features)
    step = max(1, (_CPU_BLOCK if on_cpu else _DEVICE_BLOCK) // dim)
    workspace = torch.empty((min(step, features.shape[0]), dim), dtype=torch.float64, device=features.device)
    for rows, labels in zip(features.split(step), label.split(step), strict=True):
        block = workspace[: rows.shape[0]].copy_(rows)
        if on_cpu:
            sums.index_add_(0, labels, block)
        else:
            # on a GPU the order of index_add_'s additions is not fixed; index_put_ sorts first
            sums.index_put_((labels,), block, accumulate=True)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=features.device).scatter_add_(0, label, torch.ones_like(label))
    return sums[:num_classes].to(dtype, copy=True), counts[:num_classes].clone()
