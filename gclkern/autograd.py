"""The autograd Functions between the functional API and the operators.

They contain no arithmetic: they save tensors, call the operator and return its gradients. The backward operators raise an error when a second derivative is
asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern import ready
from gclkern.cpu_backend.logit_loss import gradient_times
from gclkern.devices import is_ordinary, is_traced, refuse_transforms, saved_tensors_are_freed
from gclkern.dispatch import call_operator
from gclkern.kernels.terms import LossTerms

# save_for_backward saves the tensors among the terms; the other values become an attribute of the context.
_TENSORS = [place for place, name in enumerate(LossTerms._fields) if "Tensor" in str(LossTerms.__annotations__[name])]
_OTHERS = [place for place in range(len(LossTerms._fields)) if place not in _TENSORS]
_ORDER = [(_TENSORS + _OTHERS).index(place) for place in range(len(LossTerms._fields))]


def save_terms(ctx: Any, tensors: tuple[Tensor | None, ...], terms: LossTerms) -> None:
    """Saves a Function's tensors and its terms for backward."""
    ctx.save_for_backward(*tensors, *[terms[place] for place in _TENSORS])
    ctx.other_terms = [terms[place] for place in _OTHERS]


def saved_terms(ctx: Any) -> tuple[tuple[Tensor, ...], LossTerms]:
    """The tensors and the terms that `save_terms` saved."""
    tensors = ctx.saved_tensors
    values = [*tensors[-len(_TENSORS) :], *ctx.other_terms]
    return tensors[: -len(_TENSORS)], LossTerms(*[values[place] for place in _ORDER])


# `bias` is an argument of its own beside `terms`, because autograd does not track tensors within a tuple.


class LogitLoss(torch.autograd.Function):
    """The loss of logits or cosines (N, C)."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, bias: Tensor | None, terms: LossTerms, for_backward: bool, backend: str) -> Tensor:
        if bias is not None:
            terms = terms._replace(bias=bias)
        loss, saved = call_operator("logit_forward", backend, cosine, *terms, for_backward)
        save_terms(ctx, (cosine, *saved), terms)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the gradient of the loss", grad_loss)
        (cosine, *saved), terms = saved_terms(ctx)
        bias_grad = ctx.needs_input_grad[1]
        grad_cosine, grad_bias = call_operator("logit_backward", ctx.backend, grad_loss, cosine, saved, *terms, bias_grad)
        return grad_cosine, grad_bias if bias_grad else None, None, None, None


class LogitLossInOnePass(torch.autograd.Function):
    """LogitLoss by the CPU's functions, called directly: the loss, and the gradient that was made with it."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, bias: Tensor | None, scale: float, made: tuple[Tensor, Tensor]) -> Tensor:
        loss, gradient = made
        ctx.save_for_backward(cosine, gradient)
        ctx.bias, ctx.scale = bias, scale
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        cosine, made = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[1]
        if not (bias_grad or torch.compiler.is_dynamo_compiling()) and cosine.dtype == torch.float32 and ready.is_usual_backward(grad_loss):
            return made, None, None, None
        if torch.is_grad_enabled() or is_traced() or not is_ordinary(grad_loss):  # a second derivative, which the operator refuses, or a tracer
            refuse_transforms("the gradient of the loss", grad_loss)
            # of the terms it uses the scale, and that the bias may require a second derivative; `made` stands for the target
            terms = LossTerms(made, None, None, None, None, ctx.bias, None, None, ctx.scale, 0.0, True, 0.0, -100, 0, 0, "mean")
            grad_cosine, grad_bias = call_operator("logit_backward", "cpu", grad_loss, cosine, [made], *terms, bias_grad)
            return grad_cosine, grad_bias if bias_grad else None, None, None
        return *gradient_times(made, grad_loss, cosine.dtype, ctx.scale, bias_grad, overwrite=saved_tensors_are_freed()), None, None


class HeadLoss(torch.autograd.Function):
    """The loss of a classifier head: features (N, D) against one weight row for each class (C, D)."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, linear_weight: Tensor, bias: Tensor | None, terms: LossTerms, normalize: bool, plan: str, for_backward: bool,
        backend: str, with_top1: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if bias is not None:
            terms = terms._replace(bias=bias)
        loss, saved = call_operator("head_forward", backend, features, linear_weight, *terms, normalize, plan, for_backward, with_top1)
        kept = saved[:-1] if with_top1 else saved
        save_terms(ctx, (features, linear_weight, *kept), terms)
        ctx.normalize, ctx.plan, ctx.backend = normalize, plan, backend
        if not with_top1:
            return loss
        ctx.mark_non_differentiable(saved[-1])
        return loss, saved[-1]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the gradient of the loss", grad_loss)
        (features, linear_weight, *saved), terms = saved_terms(ctx)
        wanted = ctx.needs_input_grad[:3]
        grads = call_operator("head_backward", ctx.backend, grad_loss, features, linear_weight, saved, *terms, ctx.normalize, ctx.plan, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 6


class DROLTBound(torch.autograd.Function):
    """The DRO-LT bound of features (N, D) around the centroids of their classes (C, D)."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, epsilon: Tensor, target: Tensor, centroids: Tensor, class_weight: Tensor | None,
        temperature: float, reduction: str, backend: str,
    ) -> Tensor:  # fmt: skip
        loss, saved = call_operator("dro_lt_forward", backend, features, target, centroids, epsilon, class_weight, temperature, reduction)
        ctx.save_for_backward(features, epsilon, target, centroids, *saved)
        ctx.temperature, ctx.reduction, ctx.backend = temperature, reduction, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the gradient of the loss", grad_loss)
        features, epsilon, target, centroids, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        grads = call_operator("dro_lt_backward", ctx.backend, grad_loss, features, target, centroids, epsilon, saved, ctx.temperature, ctx.reduction, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 6


class SupervisedContrast(torch.autograd.Function):
    """The softmax of features (N, D) over samples and class prototypes (C, D)."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
        include_own_class: bool, reduction: str, backend: str,
    ) -> Tensor:  # fmt: skip
        options = (temperature, include_samples, include_own_class)
        loss, saved = call_operator("contrastive_forward", backend, features, prototypes, target, class_counts, *options, reduction)
        ctx.save_for_backward(features, prototypes, class_counts, *saved)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the gradient of the loss", grad_loss)
        features, prototypes, class_counts, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        grads = call_operator("contrastive_backward", ctx.backend, grad_loss, features, prototypes, class_counts, saved, *ctx.options, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 7


class VMFContrast(torch.autograd.Function):
    """The contrast of cosines (N, C) with von Mises-Fisher distributions."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, concentration: Tensor, order: float, temperature: float, backend: str) -> Tensor:
        ctx.save_for_backward(cosine, concentration)
        ctx.options, ctx.backend = (order, temperature), backend
        contrast: Tensor = call_operator("vmf_forward", backend, cosine, concentration, order, temperature)
        return contrast

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the gradient of the contrast", grad)
        cosine, concentration = ctx.saved_tensors
        return call_operator("vmf_backward", ctx.backend, grad, cosine, concentration, *ctx.options), None, None, None, None
