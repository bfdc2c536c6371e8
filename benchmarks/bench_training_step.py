"""A whole training step: network, head, loss, gradients and SGD with momentum. What a faster head changes for a user.

CIFAR-100 trains a small residual network on 32 x 32 images, iNaturalist torchvision's ResNet-50 on 224 x 224, where torchvision is installed.
Launches count: a step is timed as a training loop runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

Head = Callable[[Inputs, Tensor, Tensor], Tensor]  # from features (N, D) and weight (C, D), the loss


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = images + self.layers(images)
        return output


def network(shape: Shape) -> nn.Module:
    if shape not in (SMOKE, CIFAR):
        from torchvision.models import resnet50

        model: nn.Module = resnet50(weights=None)
        model.fc = nn.Identity()  # type: ignore[assignment]
        return model
    stages: list[nn.Module] = [nn.Conv2d(3, shape.dim, 3, padding=1, bias=False)]
    for _ in range(3):
        stages += [*(Block(shape.dim) for _ in range(1 if shape is SMOKE else 3)), nn.AvgPool2d(2)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class StepInputs(Inputs):
    images: Tensor


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> StepInputs:
    side = {SMOKE: 8, CIFAR: 32}.get(shape, 224)
    images = torch.randn(shape.rows, 3, side, side, device=device)
    return StepInputs(shape, dtype, device, (), draw_labels(shape, device), shape.class_counts(), images)


def step(make_head: Callable[[Inputs], Head]) -> Callable[[StepInputs, str], Call]:
    def prepare(inputs: StepInputs, phase: str) -> Call:
        torch.manual_seed(0)
        model, classifier = network(inputs.shape).to(inputs.device), CosineLinear(inputs.shape.dim, inputs.shape.classes, device=inputs.device)
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
SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (CIFAR,), "cuda": (CIFAR, *((INATURALIST,) if installed("torchvision") else ()))}
OPERATION = Operation("training step", make_inputs, CONTESTANTS, phases=("step",), dtypes=("autocast",), shapes=SHAPE_GRIDS, graph=False)


def test_training_step(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
