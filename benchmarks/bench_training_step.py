"""A whole training step: network, head, loss, gradients and SGD with momentum. What a faster head changes for a user.

CIFAR-100 trains ResNet-32 on 32 x 32 images, iNaturalist torchvision's ResNet-50 on 224 x 224, where torchvision is installed; under autocast.
A CPU trains a smaller network on fewer samples.
The time of a step is that of a training loop, with the host's time to launch kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    CIFAR,
    INATURALIST,
    NOISE_MUL,
    SCALE,
    SMOKE,
    Case,
    Contestant,
    Inputs,
    Operation,
    Shape,
    draw_labels,
    installed,
    plain_head,
)
from benchmarks.timing import Call
from gclkern import CosineLinear, LinearGCLLoss
from gclkern.training.backbones import build_backbone

Head = Callable[[Inputs, Tensor, Tensor], Tensor]  # from features (N, D) and weight (C, D), the loss


CIFAR_SMALL = replace(CIFAR, name="CIFAR-100, 32 samples", rows=32)  # for a CPU
NETWORKS = {SMOKE: "small-cnn", CIFAR: "resnet32", CIFAR_SMALL: "small-cnn", INATURALIST: "resnet50"}


@dataclass(frozen=True)
class StepInputs(Inputs):
    images: Tensor


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> StepInputs:
    side = {SMOKE: 8, INATURALIST: 224}.get(shape, 32)
    images = torch.randn(shape.rows, 3, side, side, device=device)
    return StepInputs(shape, dtype, device, (), draw_labels(shape, device), shape.class_counts(), images)


def step(make_head: Callable[[Inputs], Head]) -> Callable[[StepInputs, str], Call]:
    def prepare(inputs: StepInputs, phase: str) -> Call:
        torch.manual_seed(0)
        model = build_backbone(NETWORKS[inputs.shape]).to(inputs.device)
        classifier = CosineLinear(int(model.feature_dim), inputs.shape.classes, device=inputs.device)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD([*model.parameters(), *classifier.parameters()], lr=0.01, momentum=0.9, weight_decay=5e-4)
        head = make_head(inputs)

        def run() -> None:
            with inputs.autocast():
                loss = head(inputs, model(inputs.images), classifier.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    return prepare


def ours(inputs: Inputs) -> Head:
    criterion = LinearGCLLoss(inputs.class_counts, noise_mul=NOISE_MUL, scale=SCALE).to(inputs.device)
    return lambda inputs, features, weight: criterion(features, weight, inputs.target)


def plain(inputs: Inputs) -> Head:
    return lambda inputs, features, weight: plain_head(features, weight, inputs.cloud, inputs.target)


def cross_entropy(inputs: Inputs) -> Head:
    return lambda inputs, features, weight: F.cross_entropy(F.linear(features, weight), inputs.target)


CONTESTANTS = {
    "gclkern": Contestant("network, fused head and loss, all gradients, SGD", step(ours)),
    "plain torch": Contestant("network, the same head and loss in torch operators, all gradients, SGD", step(plain)),
    "torch cross entropy": Contestant("less: a head without normalisation and noise", step(cross_entropy)),
}
DTYPES = ("autocast" if torch.cuda.is_available() else "fp32",)
SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (CIFAR_SMALL,), "cuda": (CIFAR, *((INATURALIST,) if installed("torchvision") else ()))}
OPERATION = Operation("training step", make_inputs, CONTESTANTS, phases=("step",), dtypes=DTYPES, shapes=SHAPE_GRIDS, graph=False)


def test_training_step(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
