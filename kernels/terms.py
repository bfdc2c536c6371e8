"""What a loss is made of, as one value that every operator takes.

`LossTerms` is the argument list that the operators of every backend share. It is a named tuple, so that `operator(cosine, *terms)` passes it and
`LossTerms(*args)` restores it, and its schema below is what `torch.library` registers: one signature, written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class LossTerms(NamedTuple):
    """Everything beside the logits that decides the loss. The functional layer has validated it: operators trust it."""

    target: Tensor  # (N,) int64
    target_b: Tensor | None  # (N,) int64, the second target of mixup
    lam: Tensor | None  # (N,) float32, the share of `target`; there exactly when target_b is
    cloud: Tensor | None  # (C,) float32
    margin: Tensor | None  # (C,) float32
    bias: Tensor | None  # (C,) float32
    weight: Tensor | None  # (C,) float32
    seed: Tensor | None  # () int64; there exactly when cloud is
    scale: float
    gamma: float
    focal_detach: bool
    label_smoothing: float
    ignore_index: int
    row_offset: int
    class_offset: int
    reduction: str  # "mean", "sum" or "none"


LOSS_TERMS_SCHEMA = (
    "Tensor target, Tensor? target_b, Tensor? lam, Tensor? cloud, Tensor? margin, Tensor? bias, Tensor? weight, Tensor? seed, "
    "float scale, float gamma, bool focal_detach, float label_smoothing, int ignore_index, SymInt row_offset, SymInt class_offset, str reduction"
)


class ClassShards(Protocol):
    """The classes of other ranks, for a head that holds only some: what a walk over its own classes needs of theirs."""

    terms: LossTerms  # of all classes; the walk's own have the labels and the class vectors of the classes it holds
    num_classes: int  # of all ranks

    def merge(
        self,
        peak: Tensor,  # (splits, N)
        rest: Tensor,  # (splits, N), sums of exp(factor * (logit - peak))
        blend: Tensor | None,  # (splits, N)
        own: list[Tensor],  # (N,) of each target: what its owner found, anything elsewhere
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """The statistics (1, N) of all ranks' classes, and the targets' values from their owners."""
        ...

    def scatter(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Start to add up all ranks' gradients of the features (N, D); the result, when called, is the sum's rows of this rank."""
        ...


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of every backward operator: without one, a gradient penalty would silently lose its gradient."""
    raise RuntimeError("the losses of gclkern have no second derivative: double backward through them is not supported")
