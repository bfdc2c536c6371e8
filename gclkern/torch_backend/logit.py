"""The loss of cosines or logits (N, C) in torch.

Forward keeps five numbers a row and, because the noise takes longer than all the rest, the exponentials of disturbed logits. Backward passes over these or,
without noise or where such a matrix would be too large, over the cosines again, with the same noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.kernels.terms import LOSS_TERMS_SCHEMA, LossTerms, refuse_second_derivative
from gclkern.torch_backend.rows import (
    ROW_STATS,
    RowGradients,
    RowSums,
    block_scratch,
    disturb_,
    finish_rows,
    gradient_,
    kept_rows,
    noise_scratch,
    reduce_rows,
    row_blocks,
    row_upstream,
    some_are_ignored,
    statistics_dtype,
)

_KEPT_BYTES = 2**30  # the exponentials of a larger matrix are made again


def _keeps_exponentials(cosine: Tensor, terms: LossTerms, for_backward: bool) -> bool:
    return for_backward and terms.cloud is not None and cosine.numel() * statistics_dtype(cosine).itemsize <= _KEPT_BYTES


def _load_scaled_(block: Tensor, cosine: Tensor, scale: float) -> None:
    """block = scale * cosine, in the block's precision."""
    block.copy_(cosine)
    if scale != 1.0:
        block.mul_(scale)


def _logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *some, for_backward = args
    terms = LossTerms(*some)
    num_rows, num_classes = cosine.shape
    dtype, device = statistics_dtype(cosine), cosine.device
    classes = slice(0, num_classes)
    sums = RowSums(num_rows, terms, dtype, device)
    kept = torch.empty((num_rows, num_classes) if _keeps_exponentials(cosine, terms, for_backward) else 0, dtype=dtype, device=device)
    logits = None if kept.numel() > 0 else block_scratch(num_rows, num_classes, dtype, device)
    noise = noise_scratch(num_rows, num_classes, terms, device)
    for rows in row_blocks(num_rows, num_classes, device):
        block = kept[rows] if logits is None else logits[: (rows.stop - rows.start) * num_classes].view(-1, num_classes)
        _load_scaled_(block, cosine[rows], terms.scale)
        disturb_(block, terms, rows, classes, noise)
        sums.add_(block, rows, classes)
    losses, stats = finish_rows(sums, num_classes)
    loss, denominator = reduce_rows(losses, terms)
    return loss, [torch.stack(stats), denominator, kept]


def _logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    *some, bias_grad = args
    terms = LossTerms(*some)
    row_stats, denominator, kept = saved
    num_rows, num_classes = cosine.shape
    dtype, device = statistics_dtype(cosine), cosine.device
    classes = slice(0, num_classes)
    # gradients of the cosines: the bias, which is not scaled, takes the scale out again
    stats = RowGradients(*row_stats).times(row_upstream(grad_loss, denominator, terms, dtype) * terms.scale)
    grad_cosine = torch.empty((num_rows, num_classes), dtype=cosine.dtype, device=device)
    grad_bias = torch.zeros(num_classes if bias_grad else 0, dtype=dtype, device=device)
    ignored = ~kept_rows(terms).unsqueeze(1) if some_are_ignored(terms) else None
    logits = None if cosine.dtype == dtype else block_scratch(num_rows, num_classes, dtype, device)
    noise = None if kept.numel() > 0 else noise_scratch(num_rows, num_classes, terms, device)
    for rows in row_blocks(num_rows, num_classes, device):
        block = grad_cosine[rows] if logits is None else logits[: (rows.stop - rows.start) * num_classes].view(-1, num_classes)
        if kept.numel() > 0:
            block.copy_(kept[rows])
        else:
            _load_scaled_(block, cosine[rows], terms.scale)
            disturb_(block, terms, rows, classes, noise)
            block.sub_(stats.anchor[rows].unsqueeze(1)).exp_()
        gradient_(block, terms, stats, rows, classes)
        if ignored is not None:
            block.masked_fill_(ignored[rows], 0.0)
        if bias_grad:
            grad_bias += block.sum(0)
        if logits is not None:
            grad_cosine[rows] = block
    return grad_cosine, grad_bias.div_(terms.scale)


logit_forward = torch.library.custom_op(
    "gclkern::torch_logit_forward",
    _logit_forward,
    mutates_args=(),
    schema=f"(Tensor cosine, {LOSS_TERMS_SCHEMA}, bool for_backward) -> (Tensor, Tensor[])",
)
logit_backward = torch.library.custom_op(
    "gclkern::torch_logit_backward",
    _logit_backward,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor cosine, Tensor[] saved, {LOSS_TERMS_SCHEMA}, bool bias_grad) -> (Tensor, Tensor)",
)


@logit_forward.register_fake
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *some, for_backward = args
    terms = LossTerms(*some)
    num_rows, dtype = cosine.shape[0], statistics_dtype(cosine)
    loss = cosine.new_empty((num_rows,) if terms.reduction == "none" else (), dtype=dtype)
    kept = cosine.new_empty(cosine.shape if _keeps_exponentials(cosine, terms, for_backward) else (0,), dtype=dtype)
    return loss, [cosine.new_empty((ROW_STATS, num_rows), dtype=dtype), cosine.new_empty((), dtype=dtype), kept]


@logit_backward.register_fake
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    bias = cosine.new_empty((cosine.shape[1] if args[-1] else 0,), dtype=statistics_dtype(cosine))
    return torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device), bias


logit_backward.register_autograd(refuse_second_derivative)
