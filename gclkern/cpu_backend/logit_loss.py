"""The loss of cosines or logits (N, C), each row in one pass.

Forward saves a few numbers for each row and, because the noise takes longer than everything else, the exponentials of the logits with noise. Backward reads
these. Without noise, or where that matrix would be too large, it computes them again, from the cosines and the same noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DTYPES, REDUCTIONS, Logits, address, call
from gclkern.kernels.terms import LossTerms, implements, shapes_of

STATISTICS = 5  # float32 numbers that backward needs of a row
_BLOCK = 512  # classes that share a peak; BLOCK of native/vector.h
_KEPT_BYTES = 2**30  # the exponentials of a larger matrix are computed again
_STRIPS = 16  # of rows, with one partial sum per class; it fixes the order of additions, so it must not depend on the number of threads


def pass_terms(num_rows: int, num_classes: int, terms: LossTerms) -> tuple[Any, ...]:
    """The members of `struct terms`."""
    vectors = (terms.target, terms.target_b, terms.lam, terms.cloud, terms.margin, terms.bias, terms.weight, terms.seed)
    numbers = (terms.scale, terms.gamma, terms.label_smoothing, terms.focal_detach, terms.ignore_index, terms.row_offset, terms.class_offset)
    return num_rows, num_classes, *map(address, vectors), *numbers, REDUCTIONS[terms.reduction], 0.0


def _keeps_exponentials(cosine: Tensor, terms: LossTerms, for_backward: bool) -> bool:
    return for_backward and terms.cloud is not None and 4 * cosine.numel() <= _KEPT_BYTES


def _saved(cosine: Tensor, terms: LossTerms, for_backward: bool) -> list[Tensor]:
    """Buffers for statistics, denominator, exponentials and the peaks of their blocks."""
    num_rows, num_classes = cosine.shape
    keeps = _keeps_exponentials(cosine, terms, for_backward)
    shapes = ((STATISTICS, num_rows), (), *(((num_rows, num_classes), (num_rows, -(-num_classes // _BLOCK))) if keeps else ((0,), (0,))))
    return [cosine.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _losses(cosine: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Buffers for the loss of each row and for the reduced loss."""
    losses = cosine.new_empty(cosine.shape[:1], dtype=torch.float32)
    return losses, losses if terms.reduction == "none" else cosine.new_empty((), dtype=torch.float32)


def _kept(saved: list[Tensor]) -> tuple[int | None, int | None]:
    *_, kept, block_peaks = saved
    return (kept.data_ptr(), block_peaks.data_ptr()) if kept.numel() > 0 else (None, None)


@implements("logit_forward", "cpu")
def logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.logit_loss.logit_forward."""
    *some, for_backward = args
    terms = LossTerms(*some)
    num_rows, num_classes = cosine.shape
    saved = _saved(cosine, terms, for_backward)
    losses, loss = _losses(cosine, terms)
    statistics, denominator, *_ = saved
    arguments = Logits(
        *pass_terms(num_rows, num_classes, terms), cosine.data_ptr(), DTYPES[cosine.dtype], *cosine.stride(), None, *_kept(saved), None, 0, num_classes,
        statistics.data_ptr(), losses.data_ptr(), loss.data_ptr(), denominator.data_ptr(), None, None, 0, None, None, 0, torch.get_num_threads(),
    )  # fmt: skip
    call("logit_forward", arguments)
    return loss, saved


@implements("logit_backward", "cpu")
def logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.logit_loss.logit_backward."""
    *some, bias_grad = args
    terms = LossTerms(*some)
    num_rows, num_classes = cosine.shape
    statistics, denominator, *_ = saved
    grad_loss = grad_loss.to(torch.float32).contiguous()
    grad_cosine = torch.empty((num_rows, num_classes), dtype=cosine.dtype, device="cpu")
    grad_bias = torch.empty(num_classes if bias_grad else 0, dtype=torch.float32, device="cpu")
    strips = min(num_rows, _STRIPS)
    partial_sums = torch.empty((strips, num_classes), dtype=torch.float32, device="cpu") if bias_grad else None
    arguments = Logits(
        *pass_terms(num_rows, num_classes, terms), cosine.data_ptr(), DTYPES[cosine.dtype], *cosine.stride(), None, *_kept(saved), None, 0, num_classes,
        statistics.data_ptr(), None, None, denominator.data_ptr(), grad_loss.data_ptr(), grad_cosine.data_ptr(), 0,
        grad_bias.data_ptr() if bias_grad else None, address(partial_sums), strips, torch.get_num_threads(),
    )  # fmt: skip
    call("logit_backward", arguments)
    return grad_cosine, grad_bias


@shapes_of("logit_forward", "cpu")
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *some, for_backward = args
    terms = LossTerms(*some)
    return _losses(cosine, terms)[1], _saved(cosine, terms, for_backward)


@shapes_of("logit_backward", "cpu")
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    bias = cosine.new_empty(cosine.shape[1] if args[-1] else 0, dtype=torch.float32)
    return torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device), bias
