"""What the benchmarks share: shapes, long-tailed inputs, contestants, and the cases that they make.

A bench_*.py file describes one Operation: how its inputs are made, its contestants, and the least work that it takes. The fixture `measure` of conftest.py
runs a case of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import gclkern
from benchmarks.provenance import ROOT
from benchmarks.timing import Call

RESULTS = ROOT / "benchmarks" / "results"
SCALE = 30.0  # GCL's first stage
NOISE_MUL = 0.5
STOPPED, BROKEN = 10, 11  # exit codes of a benchmark process: its time is over; a failed kernel has destroyed its CUDA context
BOTH = "forward + backward"
PHASES = ("forward", "backward", BOTH)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}  # autocast: features of its dtype beside float32 weights


@dataclass(frozen=True)
class Shape:
    """Samples in a batch, classes, feature dimensions; the counts of the most frequent and the rarest class; training images."""

    name: str
    rows: int
    classes: int
    dim: int
    most: int = 1000
    least: int = 1
    counts_file: str | None = None  # of the folder that GCLKERN_DATA names: the true counts, one a line

    def class_counts(self) -> Tensor:
        """Training images of each class (C,) float64: true ones where there are, else the exponential profile of the long-tailed benchmarks."""
        folder = os.environ.get("GCLKERN_DATA")
        if folder is not None and self.counts_file is not None and (path := Path(folder, self.counts_file)).exists():
            return torch.tensor([float(line) for line in path.read_text().split()], dtype=torch.float64)
        share = torch.arange(self.classes, dtype=torch.float64) / max(self.classes - 1, 1)
        return (self.most * (self.least / self.most) ** share).floor().clamp(min=1.0)


SMOKE = Shape("smoke", 8, 24, 16, 50, 2)
DIGITS = Shape("digits", 8, 10, 64, 100, 10)
CIFAR = Shape("CIFAR-100", 128, 100, 64, 500, 5)
IMAGENET = Shape("ImageNet-LT", 512, 1000, 2048, 1280, 5, "counts_imagenet_lt.txt")
INATURALIST = Shape("iNaturalist", 512, 8142, 2048, 1000, 2, "counts_inat18.txt")
HUNDRED_THOUSAND = Shape("100k classes", 4096, 100_000, 512)
MILLION = Shape("1M classes", 1024, 1_000_000, 512)

# By grid. The most important shapes come first, because a report that runs out of time lacks the last ones.
SHAPES = {
    "smoke": (SMOKE,),
    "cpu": (CIFAR, IMAGENET),
    "cuda": (INATURALIST, HUNDRED_THOUSAND, MILLION, IMAGENET, CIFAR),
}


@dataclass(frozen=True)
class Sweep:
    """Shapes that differ in only one size, to show how the head's cost grows with it."""

    base: tuple[int, int, int]  # samples, classes, dimensions
    sizes: Mapping[str, tuple[int, ...]]  # the values that each of them takes while the others stay

    def shapes(self) -> Iterable[Shape]:
        for place, (size, values) in enumerate(self.sizes.items()):
            for value in values:
                rows, classes, dim = (value if i == place else kept for i, kept in enumerate(self.base))
                yield Shape(f"sweep {size} {value}", rows, classes, dim)


SWEEPS = {
    "cpu": Sweep((128, 4_000, 128), {"N": (32, 128, 512), "C": (1_000, 4_000, 16_000), "D": (128, 512, 2048)}),
    "cuda": Sweep((1024, 100_000, 512), {"N": (256, 1024, 4096), "C": (1_000, 10_000, 100_000, 1_000_000), "D": (128, 512, 2048)}),
}


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: `leaves` are the tensors whose gradients a step returns."""

    shape: Shape
    dtype: str
    device: torch.device
    leaves: tuple[Tensor, ...]
    target: Tensor  # (N,)
    class_counts: Tensor  # (C,)

    @functools.cached_property
    def cloud(self) -> Tensor:
        return (NOISE_MUL * gclkern.cloud_sizes(self.class_counts)).to(self.device)

    @property
    def leaf_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast, for its own cases alone: to enter one that is turned off takes as long as a small loss."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "autocast" else contextlib.nullcontext()


AnyInputs = TypeVar("AnyInputs", bound=Inputs)


def draw_labels(shape: Shape, device: torch.device) -> Tensor:
    """Labels of a batch (N,) as instance-balanced sampling draws them."""
    return torch.multinomial(shape.class_counts(), shape.rows, replacement=True).to(device)


@dataclass(frozen=True)
class Contestant:
    """One way to do the operation."""

    includes: str  # what a timing of it includes, and what of the operation it leaves out
    prepare: Callable[[Any, str], Call]  # from the inputs and a phase, the call that is timed
    phases: tuple[str, ...] | None = None  # those that it has; None: all
    dtypes: tuple[str, ...] | None = None
    shapes: Callable[[Shape], bool] = lambda shape: True
    bytes_factor: float = 1.0  # what it must move over the operation's least bytes


TORCH_BACKEND = "gclkern, torch backend"  # the contestant that serves a CPU without the compiled loops


def on_a_cpu(contestants: dict[str, Contestant]) -> dict[str, Contestant]:
    """Contestants that take none of a GPU's time."""
    return {} if torch.cuda.is_available() else contestants


@dataclass(frozen=True)
class Operation:
    """What a bench_*.py file measures."""

    name: str
    make_inputs: Callable[[Shape, str, torch.device], Any]
    contestants: Mapping[str, Contestant]
    phases: tuple[str, ...] = PHASES
    dtypes: tuple[str, ...] = tuple(DTYPES)
    shapes: Mapping[str, tuple[Shape, ...]] | None = None  # None: SHAPES
    least_bytes: Callable[[Shape, str, str], float] = lambda shape, dtype, phase: 0.0  # 0: no useful bound
    least_flops: Callable[[Shape, str, str], float] = lambda shape, dtype, phase: 0.0
    swept: tuple[str, ...] = ()  # contestants whose growth is measured
    cold: bool = False  # whether training finds the inputs in memory rather than in the cache
    graph: bool = True  # whether only the device's time counts; else launches count too, as in a training loop
    on_device: bool = True  # False: runs on the CPU everywhere

    def cases(self, grid: str) -> Iterable[Case]:
        for shape in (SHAPES if self.shapes is None else self.shapes)[grid]:
            dtypes, phases = self.dtypes, self.phases
            if grid == "smoke":
                phases = phases[-1:]
            if grid == "cpu" and shape is not CIFAR:
                dtypes = dtypes[:1]  # products of 16 bits are slow on most CPUs
            if shape in (HUNDRED_THOUSAND, MILLION):
                dtypes = (*dtypes[1:], dtypes[0])  # those that such a size is trained in come first
            for dtype in dtypes:
                for name in self.contestants:
                    # on a CPU the compiler takes longer than all the rest
                    if name != "torch.compile" or grid == "cuda" or (dtype == "fp32" and shape in (SMOKE, CIFAR)):
                        yield from self._cases_of(name, shape, dtype, phases)
        if self.swept and grid in SWEEPS:
            for shape in SWEEPS[grid].shapes():
                for name in self.swept:
                    if name in self.contestants:
                        yield from self._cases_of(name, shape, "bf16" if grid == "cuda" else "fp32", (BOTH,))

    def _cases_of(self, name: str, shape: Shape, dtype: str, phases: Iterable[str]) -> Iterable[Case]:
        contestant = self.contestants[name]
        if (contestant.dtypes is None or dtype in contestant.dtypes) and contestant.shapes(shape):
            for phase in phases:
                if contestant.phases is None or phase in contestant.phases:
                    yield Case(self, shape, dtype, name, phase)


@dataclass(frozen=True)
class Case:
    operation: Operation
    shape: Shape
    dtype: str
    contestant: str
    phase: str

    @property
    def key(self) -> str:
        return " | ".join((self.operation.name, self.shape.name, self.dtype, self.contestant, self.phase))

    @property
    def group(self) -> str:
        return " | ".join((self.operation.name, self.shape.name, self.dtype, self.phase))

    def __str__(self) -> str:
        return "-".join((self.shape.name, self.dtype, self.contestant, self.phase)).replace(" + ", "+").replace(" ", "_")


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def step_of(loss: Callable[[AnyInputs], Tensor]) -> Callable[[AnyInputs, str], Call]:
    """The phases of a loss: "forward" with everything that backward needs, "backward" from there to the gradients of all leaves, or both."""

    def prepare(inputs: AnyInputs, phase: str) -> Call:
        def forward() -> Tensor:
            with inputs.autocast():
                return loss(inputs)

        if phase == "forward":
            return forward
        if phase == BOTH:
            return lambda: torch.autograd.grad(forward(), inputs.leaves)
        value = forward()
        return lambda: torch.autograd.grad(value, inputs.leaves, retain_graph=True)

    return prepare


@functools.cache
def _compiled(function: Callable[..., Tensor], shape: Shape, dtype: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # else the second shape compiles for any shape
    # the smoke test wants to know that the function can be traced, not to wait for a compiler
    return torch.compile(function, dynamic=False, backend="eager" if shape is SMOKE else "inductor")


def compiled(function: Callable[..., Tensor], inputs: Inputs) -> Callable[..., Tensor]:
    """`function` under torch.compile for exactly these shapes. Its buffers are gone after one backward, so it has no phase of backward alone."""
    return _compiled(function, inputs.shape, inputs.dtype)


COMPILED_PHASES = ("forward", BOTH)


def plain_gcl(
    cosine: Tensor,  # (N, C)
    cloud: Tensor,  # (C,)
    target: Tensor,  # (N,)
) -> Tensor:
    """GCL as one writes it in torch operators: the noise by randn, the logits by a chain of operators."""
    noise = torch.randn_like(cosine).mul(1 / 3).abs().clamp(max=1.0)
    return F.cross_entropy(SCALE * (cosine - cloud * noise), target)


def plain_head(features: Tensor, weight: Tensor, cloud: Tensor, target: Tensor) -> Tensor:
    return plain_gcl(F.linear(F.normalize(features), F.normalize(weight)), cloud, target)
