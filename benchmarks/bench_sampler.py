"""One epoch's order of samples, drawn on the CPU, for the labels of a training set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from benchmarks.common import CIFAR, IMAGENET, INATURALIST, SMOKE, Case, Contestant, Operation, Shape
from benchmarks.timing import Call
from gclkern import samplers

EPOCH = "epoch"


@dataclass(frozen=True)
class Labels:
    labels: Tensor  # (M,)
    counts: Tensor  # (C,)


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Labels:
    counts = shape.class_counts()
    return Labels(torch.arange(shape.classes).repeat_interleave(counts.long()), counts)


def ours(kind: Callable[[Tensor], Any]) -> Callable[[Labels, str], Call]:
    def prepare(inputs: Labels, phase: str) -> Call:
        sampler = kind(inputs.labels)
        return lambda: list(sampler)

    return prepare


def torch_sampler(inputs: Labels, phase: str) -> Call:
    sampler = WeightedRandomSampler((1.0 / inputs.counts)[inputs.labels].tolist(), inputs.labels.numel())
    return lambda: list(sampler)


KINDS = (
    samplers.InstanceBalancedSampler,
    samplers.ClassBalancedSampler,
    samplers.EffectiveNumberSampler,
    samplers.CBENSampler,
    samplers.ClassAwareSampler,
)
CONTESTANTS = {
    **{f"gclkern {kind.__name__}": Contestant("the epoch's order as a list; building the sampler left out", ours(kind)) for kind in KINDS},
    "torch WeightedRandomSampler": Contestant("class-balanced weights; neither resumable nor aware of ranks", torch_sampler),
}
SHAPE_GRIDS = {"smoke": (SMOKE,), "cpu": (CIFAR, IMAGENET), "cuda": (INATURALIST, IMAGENET, CIFAR)}
OPERATION = Operation("sampler", make_inputs, CONTESTANTS, phases=(EPOCH,), dtypes=("int64",), shapes=SHAPE_GRIDS, on_device=False)


def test_sampler(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
