"""What every loss and classifier keeps to: memory over pairs of samples, classes and dimensions, and no number read from a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gclkern
from benchmarks.memory import allocated_peak
from gclkern.training.heads import CalibratedClassifier, NearestClassMean, ScaledClassifier
from tests import test_laws_of_modules as laws

SIZE = 256  # of a batch, of the classes and of the features: a tensor over three of them is 256 times one over two
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "CosineLinear": lambda: gclkern.CosineLinear(SIZE, SIZE),
    "TDEClassifier": lambda: gclkern.TDEClassifier(SIZE, SIZE),
    "MetaEmbeddingClassifier": lambda: gclkern.MetaEmbeddingClassifier(SIZE, SIZE),
    "ScaledClassifier": lambda: ScaledClassifier(SIZE, SIZE, normalize=False, bias=True),
    "CalibratedClassifier": lambda: CalibratedClassifier(SIZE, SIZE, normalize=True),
    "NearestClassMean": lambda: NearestClassMean(SIZE, SIZE),
}
NAMES = [*laws.LOSSES, *CLASSIFIERS]


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "DIM", SIZE)


def step_of(name: str, device: str) -> Callable[[], object]:
    """Forward in training mode and backward to everything that has a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features, classes = (torch.randn(SIZE, SIZE) / SIZE for _ in range(2))
    features, classes = features.to(device).requires_grad_(), classes.to(device)
    if name in CLASSIFIERS:
        classifier = CLASSIFIERS[name]().to(device)
        trained = [features, *classifier.parameters()]
        return lambda: torch.autograd.grad(classifier(features).square().sum(), trained, allow_unused=True)
    kind, build = laws.LOSSES[name]
    criterion: Any = build([5 + place for place in range(SIZE)], "mean").to(device)
    inputs = [features, (torch.arange(SIZE) // 2).to(device)]
    if kind in ("head", "prototypes", "points"):
        inputs.insert(2 if kind == "points" else 1, classes.requires_grad_(name != "DROLTLoss"))
    noise = {"seed": torch.zeros((), dtype=torch.int64, device=device)} if name in laws.NOISY else {}

    leaves = [tensor for tensor in (*inputs, *criterion.parameters()) if tensor.requires_grad]
    return lambda: torch.autograd.grad(criterion(*inputs, **noise), leaves)


@pytest.mark.parametrize("loops", [pytest.param(True, marks=pytest.mark.compiled), False])
def test_no_tensor_over_three_of_samples_classes_and_dimensions(loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold at most as much as 32 float64 matrices over two; a float16 tensor over three alone would be twice as much."""
    if not loops:
        monkeypatch.setattr("gclkern.cpu_backend.is_available", False)
    limit = 32 * 8 * SIZE**2
    assert 2 * limit <= 2 * SIZE**3
    steps, cpu = {name: step_of(name, "cpu") for name in NAMES}, torch.device("cpu")
    if allocated_peak(lambda: [step() and None for step in steps.values()], cpu) > limit:  # one profile of all, because each takes its time
        peaks = {name: allocated_peak(step, cpu) for name, step in steps.items()}
        assert not {name: peak / limit for name, peak in peaks.items() if peak > limit}


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_read(name: str) -> None:
    """Tensors of the device "meta" have none, so whatever passes does not make the host wait for a GPU either."""
    if name == "ShardedLinearGCLLoss":
        pytest.skip("it compares the numbers of its ranks")
    step_of(name, "meta")()
