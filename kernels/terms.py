"""What the operators of all backends share: the terms of a loss as one value, and the schema of every operator.

`LossTerms` is the argument list that the operators of the losses have in common. It is a named tuple, so that `operator(cosine, *terms)` passes it and
`LossTerms(*args)` restores it.

Each entry of `SCHEMAS` is one operation and defines three operators: `gclkern::<name>`, of the Triton kernels, `gclkern::torch_<name>`, of plain torch, and
`gclkern::cpu_<name>`, of the compiled loops for a CPU.
The modules of each backend register their functions with `implements` and `shapes_of`. `torch.library.custom_op` would do the same, but its first call
imports torch's compiler (about 900 modules, 160 MB), and each of its calls costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class LossTerms(NamedTuple):
    """Everything that determines the loss, apart from the logits. The functional layer has validated it; operators do not check it again."""

    target: Tensor  # (N,) int64
    target_b: Tensor | None  # (N,) int64, the second target of mixup
    lam: Tensor | None  # (N,) float32, the share of `target`; None exactly when target_b is
    cloud: Tensor | None  # (C,) float32
    margin: Tensor | None  # (C,) float32
    bias: Tensor | None  # (C,) float32
    weight: Tensor | None  # (C,) float32
    seed: Tensor | None  # () int64; None exactly when cloud is
    scale: float
    gamma: float
    focal_detach: bool
    label_smoothing: float
    ignore_index: int
    row_offset: int
    class_offset: int
    reduction: str  # "mean", "sum" or "none"
    smoothing: Tensor | None = None  # (C,) float32, gathered at each target; replaces label_smoothing
    angular: bool = False  # cloud and margin add to the angle instead of being subtracted from the cosine
    difficulty_margin: bool = False  # the margin adds to the angle, and is larger for a sample that the cosines alone do not classify correctly
    easy_margin: bool = False  # angles are only added where the cosine is positive

    @property
    def smoothed(self) -> bool:
        """Whether some of a target's weight is spread over all classes."""
        return self.smoothing is not None or self.label_smoothing > 0.0

    @property
    def adds_class_angles(self) -> bool:
        """Whether an angle is added to that of every class, so that no logit is linear in its cosine."""
        return self.angular and self.cloud is not None

    @property
    def adds_target_angles(self) -> bool:
        """Whether an angle is added at least to those of the targets."""
        return self.angular or self.difficulty_margin


SMALLEST_SINE_SQUARED = 1e-6  # of an angle to which another one is added: at 0 the derivative by the cosine would be infinite
SMALLEST_NORM = 1e-12  # a row of this norm or less has no direction: its cosines and its gradient are 0

FLOAT32_TEMPERATURE = 0.025  # of a contrast: above, float32 holds the smallest exponential, exp(-2 / temperature)


def statistics_dtype(matrix: Tensor) -> torch.dtype:
    """The dtype of reductions, softmax statistics and losses: float32, or float64 for a float64 matrix."""
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


_TERMS = (
    "Tensor target, Tensor? target_b, Tensor? lam, Tensor? cloud, Tensor? margin, Tensor? bias, Tensor? weight, Tensor? seed, "
    "float scale, float gamma, bool focal_detach, float label_smoothing, int ignore_index, SymInt row_offset, SymInt class_offset, str reduction, "
    "Tensor? smoothing, bool angular, bool difficulty_margin, bool easy_margin"
)
SCHEMAS = {
    "cloud_noise": "(Tensor seed, SymInt num_rows, SymInt num_classes, SymInt row_offset, SymInt class_offset) -> Tensor",
    "segment_sums": "(Tensor features, Tensor target, SymInt num_classes) -> (Tensor, Tensor)",
    "logit_forward": f"(Tensor cosine, {_TERMS}, bool for_backward) -> (Tensor, Tensor[])",
    "logit_backward": f"(Tensor grad_loss, Tensor cosine, Tensor[] saved, {_TERMS}, bool bias_grad) -> (Tensor, Tensor)",
    "head_forward": f"(Tensor features, Tensor linear_weight, {_TERMS}, bool normalize, str plan, bool for_backward, bool top1) -> (Tensor, Tensor[])",
    "head_backward": (
        f"(Tensor grad_loss, Tensor features, Tensor linear_weight, Tensor[] saved, {_TERMS}, bool normalize, str plan, "
        "bool features_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)"
    ),
    "dro_lt_forward": (
        "(Tensor features, Tensor target, Tensor centroids, Tensor epsilon, Tensor? class_weight, float temperature, str reduction) -> (Tensor, Tensor[])"
    ),
    "dro_lt_backward": (
        "(Tensor grad_loss, Tensor features, Tensor target, Tensor centroids, Tensor epsilon, Tensor[] saved, float temperature, str reduction, "
        "bool features_grad, bool epsilon_grad) -> (Tensor, Tensor)"
    ),
    "contrastive_forward": (
        "(Tensor features, Tensor? prototypes, Tensor target, Tensor? class_counts, float temperature, bool include_samples, bool include_own_class, "
        "str reduction) -> (Tensor, Tensor[])"
    ),
    "contrastive_backward": (
        "(Tensor grad_loss, Tensor features, Tensor? prototypes, Tensor? class_counts, Tensor[] saved, float temperature, bool include_samples, "
        "bool include_own_class, bool features_grad, bool prototypes_grad) -> (Tensor, Tensor)"
    ),
    "vmf_forward": "(Tensor cosine, Tensor concentration, float order, float temperature) -> Tensor",
    "vmf_backward": "(Tensor grad, Tensor cosine, Tensor concentration, float order, float temperature) -> Tensor",
}
PREFIXES = {"triton": "", "torch": "torch_", "cpu": "cpu_"}  # of an operator's name, by backend

FUNCTIONS: dict[str, Callable[..., Any]] = {}  # the function behind each operator, by the operator's name

NAMESPACE = __name__.partition(".")[0]  # so that a second copy of the package under another name has its own operators
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def implements(name: str, backend: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the operator of `backend` for the operation `name`."""

    def register(function: Function) -> Function:
        FUNCTIONS[PREFIXES[backend] + name] = function
        _LIBRARY.impl(PREFIXES[backend] + name, function, "CompositeExplicitAutograd")
        return function

    return register


def shapes_of(name: str, *backends: str) -> Callable[[Function], Function]:
    """Registers the decorated function for tensors without values (fake and meta tensors): it returns empty outputs of the right shapes and dtypes."""

    def register(function: Function) -> Function:
        for backend in backends:
            torch.library.register_fake(f"{NAMESPACE}::{PREFIXES[backend]}{name}", function, lib=_LIBRARY)
        return function

    return register


def _refuse_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the operators of gclkern have no gradient of their own; call the functions of gclkern.functional, which have one")


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the losses of gclkern have no second derivative: double backward through them is not supported")


def _define_operators() -> None:
    for name, schema in SCHEMAS.items():
        for prefix in PREFIXES.values():
            _LIBRARY.define(prefix + name + schema, tags=torch.Tag.pt2_compliant_tag)
            # without a formula, a gradient penalty would silently lose its gradient
            refuse = _refuse_second_derivative if name.endswith("_backward") else _refuse_derivative
            torch.library.register_autograd(f"{NAMESPACE}::{prefix}{name}", refuse, lib=_LIBRARY)


_define_operators()


# The operations whose outputs are the same on every backend; the others keep different tensors for backward, or pad their rows.
@shapes_of("cloud_noise", *PREFIXES)
def _(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    return seed.new_empty((num_rows, num_classes), dtype=torch.float32)


@shapes_of("segment_sums", *PREFIXES)
def _(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return features.new_empty((num_classes, features.shape[1]), dtype=statistics_dtype(features)), target.new_empty(num_classes)


@shapes_of("head_backward", *PREFIXES)
def _(grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    features_grad, weight_grad, bias_grad = args[-3:]
    grad_features = torch.empty(features.shape if features_grad else (0,), dtype=features.dtype, device=features.device)
    grad_weight = torch.empty(linear_weight.shape if weight_grad else (0,), dtype=linear_weight.dtype, device=linear_weight.device)
    return grad_features, grad_weight, features.new_empty(linear_weight.shape[0] if bias_grad else 0, dtype=statistics_dtype(features))


@shapes_of("dro_lt_backward", *PREFIXES)
def _(
    grad_loss: Tensor, features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, saved: list[Tensor],
    temperature: float, reduction: str, features_grad: bool, epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_features = features.new_empty(tuple(features.shape) if features_grad else (0,))
    return grad_features, epsilon.new_empty(tuple(epsilon.shape) if epsilon_grad else (0,))


@shapes_of("contrastive_backward", *PREFIXES)
def _(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_features = features.new_empty(tuple(features.shape) if features_grad else (0,))
    if not prototypes_grad or prototypes is None:
        return grad_features, features.new_empty(0)
    return grad_features, prototypes.new_empty(tuple(prototypes.shape))


@shapes_of("vmf_forward", *PREFIXES)
def _(cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    return cosine.new_empty(tuple(cosine.shape))


@shapes_of("vmf_backward", *PREFIXES)
def _(grad: Tensor, cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    return cosine.new_empty(tuple(cosine.shape))


class ClassShards(Protocol):
    """How a head that holds only some of the classes combines its results with those of the ranks that hold the others."""

    terms: LossTerms  # of all classes; the operator itself is given the terms of the classes that it holds
    num_classes: int  # of all ranks

    def merge(
        self,
        peak: Tensor,  # (splits, N)
        rest: Tensor,  # (splits, N), sums of exp(factor * (logit - peak))
        blend: Tensor | None,  # (splits, N)
        hardest: Tensor | None,  # (splits, N)
        own: list[Tensor],  # (N,) of each target, or some for each in the order of the targets: values on the rank that holds its class, else undefined
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """The statistics (1, N) of all ranks' classes, and the targets' values on every rank."""
        ...

    def scatter(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Start summing the gradients of the features (N, D) over all ranks. Calling the result waits, and returns this rank's rows of the sum."""
        ...
