"""The loss of cosines or logits (N, C) in torch.

Forward saves a few numbers for each row and, because the noise takes longer than everything else, the exponentials of the logits with noise. Backward reads
these. Without noise, or where that matrix would be too large, it computes them again, from the cosines and the same noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.kernels.terms import LossTerms, implements, shapes_of, statistics_dtype
from gclkern.torch_backend.rows import (
    RowGradients,
    RowSums,
    add_noise_and_bias_,
    block_scratch,
    gradient_,
    gradient_shapes,
    ignored_rows,
    noise_scratch,
    reduce_rows,
    row_blocks,
    row_losses,
    row_upstream,
)

_KEPT_BYTES = 2**30  # the exponentials of a larger matrix are computed again


def _keeps_exponentials(cosine: Tensor, terms: LossTerms, for_backward: bool) -> bool:
    # if the noise adds to angles, backward needs it for the derivatives, too
    return for_backward and terms.cloud is not None and not terms.angular and cosine.numel() * statistics_dtype(cosine).itemsize <= _KEPT_BYTES


def _load_scaled_(block: Tensor, cosine: Tensor, scale: float) -> None:
    """block = scale * cosine, in the block's precision."""
    if cosine.dtype == block.dtype:
        torch.mul(cosine, scale, out=block)
    else:
        block.copy_(cosine).mul_(scale)


@implements("logit_forward", "torch")
def logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, for_backward = args
    terms = LossTerms(*fields)
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
        sums.add_bare(block, rows, classes)
        add_noise_and_bias_(block, terms, rows, classes, noise)
        sums.add_(block, rows, classes)
    ignored = ignored_rows(terms)
    losses, stats = row_losses(sums, num_classes, ignored)
    loss, denominator = reduce_rows(losses, terms, ignored)
    return loss, [*stats, denominator, kept]


@implements("logit_backward", "torch")
def logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    *fields, bias_grad = args
    terms = LossTerms(*fields)
    anchor, parts, denominator, kept = saved
    num_rows, num_classes = cosine.shape
    dtype, device = statistics_dtype(cosine), cosine.device
    classes = slice(0, num_classes)
    # gradients of the cosines include the scale, which the gradient of the bias is divided by at the end
    ignored = ignored_rows(terms)
    stats = RowGradients(anchor, parts).times(row_upstream(grad_loss, denominator, ignored, terms, dtype) * terms.scale)
    grad_cosine = torch.empty((num_rows, num_classes), dtype=cosine.dtype, device=device)
    grad_bias = torch.zeros(num_classes, dtype=dtype, device=device) if bias_grad else cosine.new_empty(0, dtype=dtype)
    logits = None if cosine.dtype == dtype else block_scratch(num_rows, num_classes, dtype, device)
    noise = None if kept.numel() > 0 else noise_scratch(num_rows, num_classes, terms, device)
    slope_buffer = block_scratch(num_rows, num_classes, dtype, device) if terms.adds_class_angles else None
    for rows in row_blocks(num_rows, num_classes, device):
        block = grad_cosine[rows] if logits is None else logits[: (rows.stop - rows.start) * num_classes].view(-1, num_classes)
        exponentials = block
        slopes = None if slope_buffer is None else slope_buffer[: block.numel()].view(block.shape)
        if kept.numel() > 0:
            exponentials = kept[rows]
        else:
            _load_scaled_(block, cosine[rows], terms.scale)
            add_noise_and_bias_(block, terms, rows, classes, noise, slopes)
            block.sub_(stats.anchor[rows].unsqueeze(1)).exp_()
        gradient_(exponentials, terms, stats, rows, classes, block, slopes)
        if ignored is not None:
            block.masked_fill_(ignored[rows].unsqueeze(1), 0.0)
        if bias_grad:
            grad_bias += block.sum(0)
        if logits is not None:
            grad_cosine[rows] = block
    return grad_cosine, grad_bias.div_(terms.scale) if bias_grad else grad_bias


@shapes_of("logit_forward", "torch")
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, for_backward = args
    terms = LossTerms(*fields)
    num_rows, dtype = cosine.shape[0], statistics_dtype(cosine)
    loss = cosine.new_empty((num_rows,) if terms.reduction == "none" else (), dtype=dtype)
    kept = cosine.new_empty(cosine.shape if _keeps_exponentials(cosine, terms, for_backward) else (0,), dtype=dtype)
    return loss, [*(cosine.new_empty(shape, dtype=dtype) for shape in (*gradient_shapes(num_rows, terms), ())), kept]


@shapes_of("logit_backward", "torch")
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    bias = cosine.new_empty((cosine.shape[1] if args[-1] else 0,), dtype=statistics_dtype(cosine))
    return torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device), bias
