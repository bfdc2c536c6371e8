"""The mean feature of each class over a training set's features (M, D), in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import CIFAR, DTYPES, IMAGENET, INATURALIST, SMOKE, TORCH_BACKEND, Case, Contestant, Inputs, Operation, Shape, on_a_cpu
from benchmarks.timing import Call
from gclkern.dispatch import call_operator
from gclkern.functional import class_centroids

PASS = "pass"


@dataclass(frozen=True)
class FeatureInputs(Inputs):
    features: Tensor  # (M, D)


def images(shape: Shape) -> int:
    return int(shape.class_counts().sum())


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> FeatureInputs:
    counts = shape.class_counts()
    labels = torch.arange(shape.classes).repeat_interleave(counts.long())
    labels = labels[torch.randperm(labels.numel())].to(device)  # a shuffled epoch's order
    features = torch.randn(labels.numel(), shape.dim, device=device, dtype=DTYPES[dtype])
    return FeatureInputs(shape, dtype, device, (), labels, counts, features)


def ours(inputs: FeatureInputs, phase: str) -> Call:
    return lambda: class_centroids(inputs.features, inputs.target, inputs.shape.classes)


def torch_backend(inputs: FeatureInputs, phase: str) -> Call:
    features, target = inputs.features, inputs.target

    def run() -> Tensor:
        sums, counts = call_operator("segment_sums", "torch", features, target, inputs.shape.classes)
        return sums.div_(counts.clamp(min=1)[:, None])

    return run


def index_add(inputs: FeatureInputs, phase: str) -> Call:
    def run() -> Tensor:
        sums = torch.zeros(inputs.shape.classes, inputs.shape.dim, device=inputs.device)
        sums.index_add_(0, inputs.target, inputs.features.float())
        counts = torch.bincount(inputs.target, minlength=inputs.shape.classes)
        return sums / counts.clamp(min=1)[:, None]

    return run


def copy(inputs: FeatureInputs, phase: str) -> Call:
    out = torch.empty_like(inputs.features)
    return lambda: out.copy_(inputs.features)


def least_bytes(shape: Shape, dtype: str, phase: str) -> float:
    """The features read once, float32 centroids written."""
    return float(images(shape) * shape.dim * DTYPES[dtype].itemsize + shape.classes * shape.dim * 4)


CONTESTANTS = {
    "gclkern": Contestant("centroids and counts; sums in a fixed order", ours),
    **on_a_cpu({TORCH_BACKEND: Contestant("the same, by the torch backend", torch_backend)}),
    "plain torch": Contestant("index_add, bincount and a division; float32 sums in no fixed order on a GPU", index_add),
    "device copy": Contestant("floor: the features copied, one read and one write", copy, bytes_factor=2.0),
}
SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (CIFAR,), "cuda": (INATURALIST, IMAGENET, CIFAR)}
OPERATION = Operation("centroids", make_inputs, CONTESTANTS, phases=(PASS,), dtypes=("fp32", "bf16"), shapes=SHAPE_GRIDS, least_bytes=least_bytes)


def test_centroids(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
