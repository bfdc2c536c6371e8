"""Arguments that are ready: no check of gclkern.validation would refuse them, and the compiled loops take them without a conversion.

A check looks at one argument at a time, to name it in an error. For a small batch on a CPU all checks take longer than the loss itself, so the usual call of
a training loop is recognised here in one pass. A call that is not recognised goes through the checks. Nothing about a tensor is remembered between calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern import cpu_backend
from gclkern.devices import is_ordinary, is_traced
from gclkern.kernels.terms import LossTerms
from gclkern.validation import margin_vector, options_seen_before, resolve_seed

_MATRICES = (torch.float32, torch.bfloat16, torch.float16)


def ready_rows(matrix: Any, target: Any) -> bool:
    """Whether a matrix and one label for each of its rows are ready. The loops check the values of the labels."""
    if is_traced() or torch._C._are_functorch_transforms_active() or not cpu_backend.is_available or not is_ordinary(matrix) or not is_ordinary(target):
        return False
    shape = matrix.shape
    if len(shape) != 2 or matrix.numel() == 0 or matrix.dtype not in _MATRICES:
        return False
    return target.shape == shape[:1] and target.dtype == torch.int64 and target.is_contiguous()


def ready_terms(
    cosine: Any, target: Any, cloud: Any, margin: Any, bias: Any, weight: Any, target_b: Any, lam: Any, label_smoothing: Any, seed: Any, scale: Any,
    gamma: Any, focal_detach: Any, ignore_index: Any, reduction: Any, row_offset: Any, class_offset: Any, angular: Any, difficulty_margin: Any,
    easy_margin: Any, backend: Any,
) -> LossTerms | None:  # fmt: skip
    """The terms of a loss of cosines (N, C) whose arguments are ready, else None. The loops check the values of tensors.

    Two targets, and angles, are never ready: their values need a check.
    """
    if not ready_rows(cosine, target) or target_b is not None or lam is not None:
        return None
    if angular is not False or difficulty_margin is not False or backend not in ("auto", "cpu"):
        return None
    rows, classes = cosine.shape
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


def _is_vector(value: Any, shape: tuple[int]) -> bool:
    return is_ordinary(value) and value.dtype == torch.float32 and value.shape == shape and value.is_contiguous()
