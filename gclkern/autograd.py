"""The autograd Functions between the functional API and the operators. They choose no numbers: they save, call and hand back.

That there is no second derivative is said by the backward operators themselves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gclkern.backend import autocast_is_on
from gclkern.kernels.terms import LossTerms

# LossTerms opens with its tensors: those travel through save_for_backward, the plain values through the context.
TENSOR_TERMS = LossTerms._fields.index("scale")


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For operators, which compute in the dtypes that they are given. To ask whether autocast is on costs less than to turn it off where it is not."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else nullcontext()


def _operator(name: str, backend: str) -> Any:
    return getattr(torch.ops.gclkern, name if backend == "triton" else f"torch_{name}")


def terms_of(ctx: Any, saved: tuple[Any, ...]) -> LossTerms:
    """The terms of a Function's forward, from what it has saved."""
    return LossTerms(*saved[-TENSOR_TERMS:], *ctx.plain_terms)


def term_gradients(grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a Function's backward returns for its terms."""
    return tuple(grad_bias if field == "bias" else None for field in LossTerms._fields)


class LogitLoss(torch.autograd.Function):
    """The loss of logits or cosines (N, C)."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, for_backward: bool, backend: str, *terms: Any) -> Tensor:
        with without_autocast(cosine.device.type):
            loss, saved = _operator("logit_forward", backend)(cosine, *terms, for_backward)
        ctx.save_for_backward(cosine, *saved, *terms[:TENSOR_TERMS])
        ctx.plain_terms = terms[TENSOR_TERMS:]
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        cosine, *saved = tensors[:-TENSOR_TERMS]
        terms = terms_of(ctx, tensors)
        bias_grad = ctx.needs_input_grad[3 + LossTerms._fields.index("bias")]
        with without_autocast(cosine.device.type):
            grad_cosine, grad_bias = _operator("logit_backward", ctx.backend)(grad_loss, cosine, saved, *terms, bias_grad)
        return (grad_cosine, None, None, *term_gradients(grad_bias if bias_grad else None))


class HeadLoss(torch.autograd.Function):
    """The loss of a classifier head: features (N, D) against one weight row for each class (C, D)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, linear_weight: Tensor, normalize: bool, plan: str, for_backward: bool, backend: str, *terms: Any) -> Tensor:
        with without_autocast(features.device.type):
            loss, saved = _operator("head_forward", backend)(features, linear_weight, *terms, normalize, plan, for_backward)
        ctx.save_for_backward(features, linear_weight, *saved, *terms[:TENSOR_TERMS])
        ctx.plain_terms = terms[TENSOR_TERMS:]
        ctx.normalize, ctx.plan, ctx.backend = normalize, plan, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        features, linear_weight, *saved = tensors[:-TENSOR_TERMS]
        terms = terms_of(ctx, tensors)
        wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[6 + LossTerms._fields.index("bias")])
        with without_autocast(features.device.type):
            grads = _operator("head_backward", ctx.backend)(grad_loss, features, linear_weight, saved, *terms, ctx.normalize, ctx.plan, *wanted)
        grad_features, grad_weight, grad_bias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return (grad_features, grad_weight, None, None, None, None, *term_gradients(grad_bias))
