"""The loss of a classifier head: features (N, D) against weights (C, D), normalised, GCL's first stage, noise on, with gradients of both.

In training the backbone runs between two uses of the weights, so features and weights rotate beyond the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    BOTH,
    COMPILED_PHASES,
    DTYPES,
    SCALE,
    Case,
    Contestant,
    Inputs,
    Operation,
    Shape,
    compiled,
    draw_labels,
    installed,
    plain_head,
    step_of,
)
from benchmarks.timing import Call
from gclkern.functional import linear_gcl_cross_entropy
from gclkern.options import Plan


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    weight_dtype = torch.float32 if dtype == "autocast" else DTYPES[dtype]
    features = torch.randn(shape.rows, shape.dim, dtype=DTYPES[dtype], device=device).requires_grad_()
    weight = torch.randn(shape.classes, shape.dim, dtype=weight_dtype, device=device).requires_grad_()
    return Inputs(shape, dtype, device, (features, weight), draw_labels(shape, device), shape.class_counts())


def ours(plan: Plan) -> Callable[[Inputs, str], Call]:
    def loss(inputs: Inputs) -> Tensor:
        features, weight = inputs.leaves
        return linear_gcl_cross_entropy(features, weight, inputs.target, inputs.cloud, scale=SCALE, plan=plan)

    return step_of(loss)


def products(inputs: Inputs, phase: str) -> Call:
    """The three matrix products; under autocast of 16-bit copies that are there already, and without writing a float32 gradient."""
    features, weight = (leaf.detach().to(DTYPES[inputs.dtype]) for leaf in inputs.leaves)
    if phase == "forward":
        return lambda: features @ weight.T
    gradient = features @ weight.T
    if phase == "backward":
        return lambda: (gradient @ weight, gradient.T @ features)

    def both() -> tuple[Tensor, Tensor]:
        gradient = features @ weight.T
        return gradient @ weight, gradient.T @ features

    return both


def cosface(inputs: Inputs, phase: str) -> Call:
    from pytorch_metric_learning.losses import CosFaceLoss

    features = inputs.leaves[0]
    loss = CosFaceLoss(inputs.shape.classes, inputs.shape.dim, scale=SCALE).to(inputs.device, inputs.leaves[1].dtype)
    own = Inputs(inputs.shape, inputs.dtype, inputs.device, (features, *loss.parameters()), inputs.target, inputs.class_counts)
    return step_of(lambda own: loss(own.leaves[0], own.target))(own, phase)


def liger(inputs: Inputs, phase: str) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        features, weight = inputs.leaves
        return liger_fused_linear_cross_entropy(features, weight.to(features.dtype), inputs.target)

    return step_of(loss)(inputs, phase)


def linear_cross_entropy(inputs: Inputs) -> Tensor:
    features, weight = inputs.leaves
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(features, weight.to(features.dtype), inputs.target, options=options)


def large(shape: Shape) -> bool:
    """Where it is worth comparing the plans with one another."""
    return shape.classes >= 8142 or shape.name.startswith(("smoke", "sweep"))


def least_bytes(shape: Shape, dtype: str, phase: str) -> float:
    """Both matrices read, in backward their gradients written too."""
    weight_size = 4 if dtype == "autocast" else DTYPES[dtype].itemsize
    size = shape.rows * shape.dim * DTYPES[dtype].itemsize + shape.classes * shape.dim * weight_size
    return float(size * (1 if phase == "forward" else 2))


def least_flops(shape: Shape, dtype: str, phase: str) -> float:
    """Three products, of which one is forward's."""
    return 2.0 * shape.rows * shape.classes * shape.dim * {"forward": 1, "backward": 2, BOTH: 3}[phase]


PLANS = {
    f"gclkern {plan}": Contestant(f'normalisation, noise, loss; all gradients; plan="{plan}"', ours(plan), (BOTH,), shapes=large)
    for plan in ("materialised", "chunked", "recompute")
}
CONTESTANTS = {
    "gclkern": Contestant('normalisation, noise, loss; all gradients; plan="auto"', ours("auto")),
    **PLANS,
    "plain torch": Contestant(
        "the same formula in torch operators, noise by randn",
        step_of(lambda inputs: plain_head(inputs.leaves[0], inputs.leaves[1], inputs.cloud, inputs.target)),
    ),
    "torch.compile": Contestant(
        "plain torch under torch.compile, compilation left out",
        step_of(lambda inputs: compiled(plain_head, inputs)(*inputs.leaves, inputs.cloud, inputs.target)),
        COMPILED_PHASES,
    ),
    "torch linear + cross entropy": Contestant(
        "less: no normalisation, no noise", step_of(lambda inputs: F.cross_entropy(F.linear(*inputs.leaves), inputs.target)), (BOTH,)
    ),
    "bare products": Contestant("floor: the three matrix products in the features' dtype", products),
}
if hasattr(F, "linear_cross_entropy"):
    CONTESTANTS["torch linear_cross_entropy"] = Contestant(
        "less: no normalisation, no noise; chunked, by its own default options", step_of(linear_cross_entropy), (BOTH,)
    )
if installed("liger_kernel") and torch.cuda.is_available():
    CONTESTANTS["Liger fused linear cross entropy"] = Contestant("less: no normalisation, no noise; its forward makes the gradients", liger, (BOTH,))
if installed("pytorch_metric_learning"):
    CONTESTANTS["pytorch-metric-learning CosFace"] = Contestant("less: normalisation and a margin, no noise", cosface, (BOTH,), dtypes=("fp32",))

SWEPT = ("gclkern", "gclkern recompute", "plain torch", "torch linear_cross_entropy", "bare products")
OPERATION = Operation("head", make_inputs, CONTESTANTS, least_bytes=least_bytes, least_flops=least_flops, swept=SWEPT, cold=True)


def test_head(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
