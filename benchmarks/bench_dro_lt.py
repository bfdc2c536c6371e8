"""The DRO-LT bound of a batch's features around given class centroids, with the gradients of the features and of a learned epsilon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import (
    BOTH,
    CIFAR,
    COMPILED_PHASES,
    DTYPES,
    IMAGENET,
    INATURALIST,
    SMOKE,
    TORCH_BACKEND,
    Case,
    Contestant,
    Inputs,
    Operation,
    Shape,
    compiled,
    draw_labels,
    on_a_cpu,
    step_of,
)
from gclkern.functional import dro_lt_loss
from gclkern.options import Backend


@dataclass(frozen=True)
class DROInputs(Inputs):
    """`leaves` are features (N, D) and epsilon (C,)."""

    centroids: Tensor  # (C, D)


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> DROInputs:
    centroids = torch.randn(shape.classes, shape.dim, device=device)
    target = draw_labels(shape, device)
    features = (centroids[target] + 0.5 * torch.randn(shape.rows, shape.dim, device=device)).to(DTYPES[dtype]).requires_grad_()
    epsilon = torch.full((shape.classes,), 0.5, device=device, requires_grad=True)
    return DROInputs(shape, dtype, device, (features, epsilon), target, shape.class_counts(), centroids)


def vectorised(features: Tensor, epsilon: Tensor, centroids: Tensor, target: Tensor) -> Tensor:
    """The formula without a loop: every sample is a row around its own class's centroid, weighted by one over its class's samples in the batch."""
    own = target[:, None] == target
    distance = torch.cdist(centroids[target], features.float(), compute_mode="donot_use_mm_for_euclid_dist")
    logits = -(distance + 2.0 * epsilon[target][:, None] * own)
    share = 1.0 / own.sum(1)
    return (share * (logits.logsumexp(1) - logits.diagonal())).sum() / share.sum()


def class_by_class(features: Tensor, epsilon: Tensor, centroids: Tensor, target: Tensor) -> Tensor:
    """The formula as the released code organises it: a Python loop over the batch's classes, a mask for each, the logarithm of a plain sum."""
    losses = []
    for label in target.unique().tolist():
        own = target == label
        logits = -((features.float() - centroids[label]).norm(dim=1) + 2.0 * epsilon[label] * own)
        total = logits.exp().sum().log()
        losses.append(torch.stack([total - logit for logit in logits[own]]).mean())
    return torch.stack(losses).mean()


def loss_of(function: Callable[..., Tensor]) -> Callable[[DROInputs], Tensor]:
    return lambda inputs: function(*inputs.leaves, inputs.centroids, inputs.target)


def loss_compiled(inputs: DROInputs) -> Tensor:
    return compiled(vectorised, inputs)(*inputs.leaves, inputs.centroids, inputs.target)


def ours(backend: Backend) -> Callable[[DROInputs], Tensor]:
    return lambda inputs: dro_lt_loss(inputs.leaves[0], inputs.target, inputs.centroids, inputs.leaves[1], backend=backend)


def least_bytes(shape: Shape, dtype: str, phase: str) -> float:
    """Features and the batch's centroids read, the features' gradient written."""
    size = shape.rows * shape.dim * DTYPES[dtype].itemsize
    return float(size * (1 if phase == "forward" else 2) + min(shape.rows, shape.classes) * shape.dim * 4)


SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (CIFAR, IMAGENET), "cuda": (INATURALIST, IMAGENET, CIFAR)}
CONTESTANTS = {
    "gclkern": Contestant("loss; gradients of features and epsilon", step_of(ours("auto"))),
    **on_a_cpu({TORCH_BACKEND: Contestant('the same, backend="torch"', step_of(ours("torch")))}),
    "plain torch": Contestant("the same formula, vectorised", step_of(loss_of(vectorised))),
    "torch.compile": Contestant(
        "plain torch under torch.compile, compilation left out",
        step_of(loss_compiled),
        COMPILED_PHASES,
    ),
    "as released": Contestant(
        "the same formula, class by class in a Python loop that reads labels from the device; less: centroids are given, the release finds them in every batch",
        step_of(loss_of(class_by_class)),
        (BOTH,),
        shapes=lambda shape: shape is not IMAGENET or torch.cuda.is_available(),  # its graph takes gigabytes
    ),
}
OPERATION = Operation("DRO-LT bound", make_inputs, CONTESTANTS, dtypes=("fp32", "bf16"), shapes=SHAPE_GRIDS, least_bytes=least_bytes, cold=True)


def test_dro_lt(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
