"""The softmax of each sample over the other samples and class prototypes, the contrast of BCL, with the gradients of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import BOTH, COMPILED_PHASES, DTYPES, SMOKE, Case, Contestant, Inputs, Operation, Shape, compiled, draw_labels, installed, step_of
from benchmarks.timing import Call
from gclkern import BalancedContrastiveLoss

TEMPERATURE = 0.1
SMALL = Shape("digits, two views", 128, 10, 64, 100, 5)
TWO_VIEWS = Shape("CIFAR-100, two views", 512, 100, 128, 500, 5)
LARGE = Shape("ImageNet-LT, large batch", 4096, 1000, 128, 1280, 5)
OURS = BalancedContrastiveLoss(temperature=TEMPERATURE)


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    features, prototypes = (torch.randn(rows, shape.dim, device=device, dtype=DTYPES[dtype]).requires_grad_() for rows in (shape.rows, shape.classes))
    return Inputs(shape, dtype, device, (features, prototypes), draw_labels(shape, device), shape.class_counts())


def vectorised(features: Tensor, prototypes: Tensor, target: Tensor) -> Tensor:
    """The formula over the whole matrix of logits, (N, N + C)."""
    rows, num_classes = features.shape[0], prototypes.shape[0]
    keys = F.normalize(torch.cat((features, prototypes)).float())
    classes = torch.cat((target, torch.arange(num_classes, device=target.device)))
    logits = keys[:rows] @ keys.T / TEMPERATURE
    own = torch.eye(rows, rows + num_classes, dtype=torch.bool, device=target.device)
    same = target[:, None] == classes
    positives = same & ~own
    weight = classes.bincount(minlength=num_classes)[classes] - same.float()
    total = (logits - weight.log()).masked_fill(own, -torch.inf).logsumexp(1)
    return (total - torch.where(positives, logits, 0.0).sum(1) / positives.sum(1)).mean()


def loss_of(function: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda inputs: function(*inputs.leaves, inputs.target)


def supcon(inputs: Inputs, phase: str) -> Call:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(TEMPERATURE)
    own = Inputs(inputs.shape, inputs.dtype, inputs.device, inputs.leaves[:1], inputs.target, inputs.class_counts)
    return step_of(lambda own: loss(own.leaves[0], own.target))(own, phase)


def least_flops(shape: Shape, dtype: str, phase: str) -> float:
    """A product of the samples and the keys in forward; in backward that again and its gradient."""
    return 2.0 * shape.rows * (shape.rows + shape.classes) * shape.dim * {"forward": 1, "backward": 2, BOTH: 3}[phase]


SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (SMALL, TWO_VIEWS, LARGE), "cuda": (LARGE, TWO_VIEWS)}
CONTESTANTS = {
    "gclkern": Contestant("normalisation, loss, gradients of features and prototypes", step_of(loss_of(OURS))),
    "plain torch": Contestant("the same formula over the matrix of logits", step_of(loss_of(vectorised))),
    "torch.compile": Contestant(
        "plain torch under torch.compile, compilation left out",
        step_of(lambda inputs: compiled(vectorised, inputs)(*inputs.leaves, inputs.target)),
        COMPILED_PHASES,
    ),
}
if installed("pytorch_metric_learning"):
    CONTESTANTS["pytorch-metric-learning SupCon"] = Contestant("less: no prototypes, no weights", supcon, (BOTH,), dtypes=("fp32",))
OPERATION = Operation("contrast of samples", make_inputs, CONTESTANTS, dtypes=("fp32", "bf16"), shapes=SHAPE_GRIDS, least_flops=least_flops)


def test_contrastive(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
