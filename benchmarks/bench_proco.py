"""ProCo's loss of a batch's features around given distributions of the classes, with the gradient of the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import SMOKE, Case, Contestant, Inputs, Operation, Shape, draw_labels, step_of
from gclkern import ProCoLoss

TEMPERATURE = 0.1
INATURALIST = Shape("iNaturalist", 128, 8142, 128, 1000, 2, "counts_inat18.txt")


@dataclass(frozen=True)
class ProCoInputs(Inputs):
    """`leaves` are the features (N, D)."""

    criterion: ProCoLoss


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> ProCoInputs:
    criterion = ProCoLoss(shape.class_counts(), shape.dim, temperature=TEMPERATURE).to(device)
    means = torch.randn(shape.classes, shape.dim, device=device)
    for _ in range(4):
        criterion(means + 0.5 * torch.randn_like(means), torch.arange(shape.classes, device=device))
    target = draw_labels(shape, device)
    features = (means[target] + 0.5 * torch.randn(shape.rows, shape.dim, device=device)).requires_grad_()
    return ProCoInputs(shape, dtype, device, (features,), target, shape.class_counts(), criterion.eval())


def log_mean_exponential(concentration: Tensor, dim: int) -> Tensor:
    """F(k) = log I_v(k) - v log k up to a constant, by the series of gclkern.losses.proco."""
    order = dim / 2 - 1
    root = (order**2 + concentration.square()).sqrt()
    share = order / root
    return root - order * (order + root).log() - 0.5 * root.log() + torch.log1p(share * (3 - 5 * share.square()) / (24 * order))


def pair_by_pair(inputs: ProCoInputs) -> Tensor:
    """As the released code organises it: the parameter of each sample and class as a vector, (N, C, D)."""
    directions, concentration = inputs.criterion.distributions()
    unit, dim = F.normalize(inputs.leaves[0]), inputs.shape.dim
    pairs = torch.linalg.vector_norm(concentration[:, None] * directions + unit[:, None] / TEMPERATURE, dim=2)
    logits = log_mean_exponential(pairs, dim) - log_mean_exponential(concentration, dim)
    return F.cross_entropy(logits + inputs.criterion.bias, inputs.target)


SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (INATURALIST,), "cuda": (INATURALIST,)}
CONTESTANTS = {
    "gclkern": Contestant(
        "normalisation, distributions, loss; gradient of the features", step_of(lambda inputs: inputs.criterion(*inputs.leaves, inputs.target))
    ),
    "plain torch": Contestant("the same with a vector for each sample and class", step_of(pair_by_pair)),
}
OPERATION = Operation("ProCo", make_inputs, CONTESTANTS, dtypes=("fp32",), shapes=SHAPE_GRIDS)


def test_proco(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
