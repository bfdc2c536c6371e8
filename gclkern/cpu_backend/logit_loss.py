"""The loss of cosines or logits (N, C), each row in one pass.

Forward saves a few numbers for each row and, because the noise takes longer than everything else, the exponentials of the logits with noise. Backward reads
these. Without noise, or where that matrix would be too large, it computes them again, from the cosines and the same noise.

At small sizes a call of torch takes longer than the loops, so what forward leaves for backward is one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DTYPES, NULL, REDUCTIONS, Logits, address, call
from gclkern.kernels.terms import LossTerms, implements, shapes_of

STATISTICS = 5  # float32 numbers that backward needs of a row
_BLOCK = 512  # classes that share a peak; BLOCK of native/vector.h
_KEPT_BYTES = 2**30  # the exponentials of a larger matrix are computed again
_STRIPS = 16  # of rows, with one partial sum per class; it fixes the order of additions, so it must not depend on the number of threads


def pass_terms(num_rows: int, num_classes: int, terms: LossTerms) -> tuple[Any, ...]:
    """The members of `struct terms`."""
    vectors = (terms.target, terms.target_b, terms.lam, terms.cloud, terms.margin, terms.bias, terms.weight, terms.smoothing, terms.seed)
    numbers = (
        terms.scale, terms.gamma, terms.label_smoothing, terms.focal_detach, terms.ignore_index, terms.row_offset, terms.class_offset,
        REDUCTIONS[terms.reduction], terms.angular, terms.difficulty_margin, terms.easy_margin,
    )  # fmt: skip
    return num_rows, num_classes, *[NULL if vector is None else vector.data_ptr() for vector in vectors], *numbers, 0.0


def keeps_exponentials(terms: LossTerms) -> bool:
    """Whether what forward keeps suffices for backward: where angles are added to every class's, label smoothing needs their derivatives apart."""
    return not (terms.turns_classes and terms.smoothed)


def _row_numbers(terms: LossTerms) -> int:
    """Numbers of a row in the workspace: its statistics, and its loss where only the reduced loss is returned."""
    return STATISTICS if terms.reduction == "none" else STATISTICS + 1


def _workspace(cosine: Tensor, terms: LossTerms, for_backward: bool) -> Tensor:
    """Memory for the numbers of rows, a denominator () and, where backward reads them, exponentials (N, C) and the peaks of their blocks."""
    num_rows, num_classes = cosine.shape
    size = _row_numbers(terms) * num_rows + 1
    if for_backward and terms.cloud is not None and keeps_exponentials(terms) and 4 * num_rows * num_classes <= _KEPT_BYTES:
        size += num_rows * (num_classes + -(-num_classes // _BLOCK))
    return torch.empty(size, dtype=torch.float32, device=cosine.device)


def _places(workspace: Tensor, num_rows: int, num_classes: int, terms: LossTerms) -> tuple[int, int, int, int, int]:
    """The addresses of exponentials, peaks, denominator, statistics and losses in a workspace."""
    start = workspace.data_ptr()
    rest = start + 4 * (workspace.numel() - _row_numbers(terms) * num_rows - 1)
    kept, peaks = (start, start + 4 * num_rows * num_classes) if rest > start else (NULL, NULL)
    return kept, peaks, rest, rest + 4, rest + 4 + 4 * STATISTICS * num_rows


def _loss(cosine: Tensor, terms: LossTerms) -> Tensor:
    return torch.empty(cosine.shape[:1] if terms.reduction == "none" else (), dtype=torch.float32, device=cosine.device)


@implements("logit_forward", "cpu")
def logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.logit_loss.logit_forward."""
    *fields, for_backward = args
    terms = LossTerms(*fields)
    num_rows, num_classes = cosine.shape
    loss, workspace = _loss(cosine, terms), _workspace(cosine, terms, for_backward)
    kept, peaks, denominator, statistics, losses = _places(workspace, num_rows, num_classes, terms)
    if terms.reduction == "none":
        losses = loss.data_ptr()
    arguments = Logits.pack(
        *pass_terms(num_rows, num_classes, terms), cosine.data_ptr(), DTYPES[cosine.dtype], *cosine.stride(), NULL, kept, peaks, NULL, 0, num_classes,
        statistics, losses, loss.data_ptr(), denominator, NULL, NULL, 0, NULL, NULL, 0, torch.get_num_threads(),
    )  # fmt: skip
    call("logit_forward", arguments)
    return loss, [workspace]


@implements("logit_backward", "cpu")
def logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.logit_loss.logit_backward."""
    *fields, bias_grad = args
    terms = LossTerms(*fields)
    num_rows, num_classes = cosine.shape
    kept, peaks, denominator, statistics, _ = _places(saved[0], num_rows, num_classes, terms)
    if grad_loss.dtype != torch.float32 or not grad_loss.is_contiguous():
        grad_loss = grad_loss.to(torch.float32).contiguous()
    grad_cosine = torch.empty((num_rows, num_classes), dtype=cosine.dtype, device="cpu")
    grad_bias = torch.empty(num_classes if bias_grad else 0, dtype=torch.float32, device="cpu")
    strips = min(num_rows, _STRIPS)
    partial_sums = torch.empty((strips, num_classes), dtype=torch.float32, device="cpu") if bias_grad else None
    arguments = Logits.pack(
        *pass_terms(num_rows, num_classes, terms), cosine.data_ptr(), DTYPES[cosine.dtype], *cosine.stride(), NULL, kept, peaks, NULL, 0, num_classes,
        statistics, NULL, NULL, denominator, grad_loss.data_ptr(), grad_cosine.data_ptr(), 0, grad_bias.data_ptr() if bias_grad else NULL,
        address(partial_sums), strips, torch.get_num_threads(),
    )  # fmt: skip
    call("logit_backward", arguments)
    return grad_cosine, grad_bias


@shapes_of("logit_forward", "cpu")
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, for_backward = args
    terms = LossTerms(*fields)
    return _loss(cosine, terms), [_workspace(cosine, terms, for_backward)]


@shapes_of("logit_backward", "cpu")
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    bias = cosine.new_empty(cosine.shape[1] if args[-1] else 0, dtype=torch.float32)
    return torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device), bias
