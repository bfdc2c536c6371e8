"""The loss of cosines or logits (N, C) and its gradient, in one pass.

Where a gradient is wanted, forward makes it, for an upstream gradient of 1: a row is then still in the cache, and its noise and exponentials are computed
once. That takes the memory of the gradient alone, which backward multiplies by the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DONE, DTYPES, NO_MEMORY, NULL, REDUCTIONS, Logits, Product, address, call
from gclkern.kernels.terms import LossTerms, implements, shapes_of

STATISTICS = 5  # float32 numbers from which a row's gradient is made
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")  # `empty_like` takes less time than `empty`
_STRIPS = 16  # of rows, with one partial sum per class; it fixes the order of additions, so it must not depend on the number of threads


def pass_terms(num_rows: int, num_classes: int, terms: LossTerms) -> tuple[Any, ...]:
    """The members of `struct terms`."""
    (
        target, target_b, lam, cloud, margin, bias, weight, seed, scale, gamma, focal_detach, label_smoothing, ignore_index, row_offset, class_offset,
        reduction, smoothing, angular, difficulty_margin, easy_margin,
    ) = terms  # fmt: skip
    return (
        num_rows, num_classes, target.data_ptr(), NULL if target_b is None else target_b.data_ptr(), NULL if lam is None else lam.data_ptr(),
        NULL if cloud is None else cloud.data_ptr(), NULL if margin is None else margin.data_ptr(), NULL if bias is None else bias.data_ptr(),
        NULL if weight is None else weight.data_ptr(), NULL if smoothing is None else smoothing.data_ptr(), NULL if seed is None else seed.data_ptr(),
        scale, gamma, label_smoothing, focal_detach, ignore_index, row_offset, class_offset, REDUCTIONS[reduction], angular, difficulty_margin, easy_margin,
        0.0, 1.0,
    )  # fmt: skip


def keeps_exponentials(terms: LossTerms) -> bool:
    """Whether a gradient can be made of exponentials: where angles are added to every class's, label smoothing needs their derivatives apart."""
    return not (terms.adds_class_angles and terms.smoothed)


def loss_and_gradient(cosine: Tensor, terms: LossTerms, for_backward: bool) -> tuple[Tensor, Tensor | None, bool]:
    """The loss, the float32 gradient of the cosines for an upstream gradient of 1 where there will be a backward, and whether all values are valid."""
    num_rows, num_classes = cosine.shape
    loss = cosine.new_empty(num_rows, dtype=torch.float32) if terms.reduction == "none" else torch.empty_like(_SCALAR)
    gradient = torch.empty_like(cosine, dtype=torch.float32, memory_format=torch.contiguous_format) if for_backward else None
    place = NULL if gradient is None else gradient.data_ptr()
    arguments = Logits.pack(
        *pass_terms(num_rows, num_classes, terms), cosine.data_ptr(), DTYPES[cosine.dtype], *cosine.stride(), NULL,
        place if keeps_exponentials(terms) else NULL, NULL, NULL, 0, num_classes, NULL, NULL, NULL, loss.data_ptr(), place, 0, torch.get_num_threads(),
    )  # fmt: skip
    result = call("logit_loss", arguments)
    if result == NO_MEMORY:
        raise MemoryError(f"no memory for the statistics of {num_rows} rows of {num_classes} classes")
    return loss, gradient, result == DONE


def gradient_times(made: Tensor, grad_loss: Tensor, dtype: torch.dtype, scale: float, bias_grad: bool, overwrite: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of the cosines and of the bias for an upstream gradient () or (N,), from that for 1; with `overwrite`, in its place where it fits."""
    num_rows, num_classes = made.shape
    in_place = overwrite and dtype == torch.float32
    if in_place and not bias_grad and grad_loss.dim() == 0 and float(grad_loss) == 1.0:
        return made, None
    if grad_loss.dtype != torch.float32 or not grad_loss.is_contiguous():
        grad_loss = grad_loss.to(torch.float32).contiguous()
    gradient = made if in_place else torch.empty((num_rows, num_classes), dtype=dtype, device="cpu")
    grad_bias = torch.empty(num_classes, dtype=torch.float32, device="cpu") if bias_grad else None
    strips = min(num_rows, _STRIPS)
    partial_sums = torch.empty((strips, num_classes), dtype=torch.float32, device="cpu") if bias_grad else None
    arguments = Product.pack(
        num_rows, num_classes, made.data_ptr(), grad_loss.data_ptr(), grad_loss.dim(), gradient.data_ptr(), DTYPES[dtype], scale, address(grad_bias),
        address(partial_sums), strips, torch.get_num_threads(),
    )  # fmt: skip
    call("gradient_times", arguments)
    return gradient, grad_bias


@implements("logit_forward", "cpu")
def logit_forward(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.logit_loss.logit_forward."""
    loss, gradient, _ = loss_and_gradient(cosine, LossTerms(*args[:-1]), args[-1])
    return loss, [] if gradient is None else [gradient]


@implements("logit_backward", "cpu")
def logit_backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.logit_loss.logit_backward."""
    gradient, grad_bias = gradient_times(saved[0], grad_loss, cosine.dtype, LossTerms(*args[:-1]).scale, args[-1], overwrite=False)
    return gradient, torch.empty(0, dtype=torch.float32, device="cpu") if grad_bias is None else grad_bias


@shapes_of("logit_forward", "cpu")
def _(cosine: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    loss = cosine.new_empty(cosine.shape[0] if LossTerms(*args[:-1]).reduction == "none" else (), dtype=torch.float32)
    return loss, [torch.empty(cosine.shape, dtype=torch.float32, device=cosine.device)] if args[-1] else []


@shapes_of("logit_backward", "cpu")
def _(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    bias = cosine.new_empty(cosine.shape[1] if args[-1] else 0, dtype=torch.float32)
    return torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device), bias
