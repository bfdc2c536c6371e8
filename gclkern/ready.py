"""Arguments that are ready: no check of gclkern.validation would refuse them, and the compiled loops take them without a conversion.

A check looks at one argument at a time, to name it in an error. For a small batch on a CPU all checks take longer than the loss itself, so the usual call of
a training loop is recognised here in one pass. A call that is not recognised goes through the checks. Nothing about a tensor is remembered between calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern import cpu_backend
from gclkern.devices import is_in_memory, is_traced, is_transformed
from gclkern.kernels.terms import LossTerms
from gclkern.validation import margin_vector, options_seen_before, resolve_seed

_MATRICES = (torch.float32, torch.bfloat16, torch.float16)


def ready_terms(
    cosine: Any, target: Any, cloud: Any, margin: Any, bias: Any, weight: Any, target_b: Any, lam: Any, label_smoothing: Any, seed: Any, scale: Any,
    gamma: Any, focal_detach: Any, ignore_index: Any, reduction: Any, row_offset: Any, class_offset: Any, angular: Any, difficulty_margin: Any,
    easy_margin: Any, backend: Any,
) -> LossTerms | None:  # fmt: skip
    """The terms of a loss of cosines (N, C) whose arguments are ready, else None. The loops check the values of `target` and `weight`.

    Two targets, and angles, are never ready: their values need a check.
    """
    if is_traced() or torch._C._are_functorch_transforms_active():
        return None
    if not _is_dense(cosine) or not _is_dense(target) or target_b is not None or lam is not None or angular is not False:
        return None
    if difficulty_margin is not False or backend not in ("auto", "cpu") or not cpu_backend.is_available:
        return None
    shape = cosine.shape
    if len(shape) != 2 or cosine.dtype not in _MATRICES or is_transformed(cosine):
        return None
    rows, classes = shape
    if rows == 0 or classes == 0 or target.shape != (rows,) or target.dtype != torch.int64 or not target.is_contiguous():
        return None
    vector = (classes,)
    if cloud is not None and (not _is_vector(cloud, vector) or cloud.requires_grad):
        return None
    if bias is not None and not _is_vector(bias, vector):
        return None
    if weight is not None and (not _is_vector(weight, vector) or weight.requires_grad):
        return None
    if isinstance(margin, Tensor) and (not _is_vector(margin, vector) or margin.requires_grad):
        return None
    try:
        scale, gamma, label_smoothing, ignore_index, row_offset, class_offset, reduction = options_seen_before(
            rows, classes, scale, gamma, label_smoothing, ignore_index, row_offset, class_offset, reduction, focal_detach, False, False, easy_margin
        )
        if margin is not None and not isinstance(margin, Tensor):
            margin = margin_vector(margin, classes, "cosine", cosine, torch.float32)
        seed = None if cloud is None else resolve_seed(seed, cosine.device)
    except (TypeError, ValueError):
        return None
    return LossTerms(
        target, None, None, cloud, margin, bias, weight, seed, scale, gamma, focal_detach, label_smoothing, ignore_index, row_offset, class_offset, reduction
    )


def _is_dense(value: Any) -> bool:
    """Whether the value is a dense tensor in the memory of a CPU."""
    return is_in_memory(value) and value.is_cpu and value.layout == torch.strided and not value.is_nested


def _is_vector(value: Any, shape: tuple[int]) -> bool:
    return _is_dense(value) and value.dtype == torch.float32 and value.shape == shape and value.is_contiguous()
