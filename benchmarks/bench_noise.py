"""The noise of clouded logits as a matrix (N, C) in memory: what a loss that draws inside its kernel does not have to write."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.common import TORCH_BACKEND, Case, Contestant, Inputs, Operation, Shape, on_a_cpu
from benchmarks.timing import Call
from gclkern import cloud_noise
from gclkern.dispatch import call_operator


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    return Inputs(shape, dtype, device, (), torch.zeros(shape.rows, dtype=torch.int64, device=device), shape.class_counts())


def ours(inputs: Inputs, phase: str) -> Call:
    seed = torch.tensor(1, device=inputs.device)
    return lambda: cloud_noise(seed, inputs.shape.rows, inputs.shape.classes)


def torch_backend(inputs: Inputs, phase: str) -> Call:
    seed = torch.tensor(1, device=inputs.device)
    return lambda: call_operator("cloud_noise", "torch", seed, inputs.shape.rows, inputs.shape.classes, 0, 0)


def randn(inputs: Inputs, phase: str) -> Call:
    return lambda: torch.randn(inputs.shape.rows, inputs.shape.classes, device=inputs.device).mul_(1 / 3).abs_().clamp_(max=1.0)


def fill(inputs: Inputs, phase: str) -> Call:
    out = torch.empty(inputs.shape.rows, inputs.shape.classes, device=inputs.device)
    return lambda: out.fill_(1.0)


CONTESTANTS = {
    "gclkern": Contestant("a pure function of seed, sample and class", ours),
    **on_a_cpu({TORCH_BACKEND: Contestant("the same, by the torch backend", torch_backend)}),
    "plain torch": Contestant("randn, scaled, absolute, clamped in place; depends on batch and GPU model", randn),
    "device fill": Contestant("floor: one write", fill),
}


def least_bytes(shape: Shape, dtype: str, phase: str) -> float:
    return 4.0 * shape.rows * shape.classes


OPERATION = Operation("noise", make_inputs, CONTESTANTS, phases=("draw",), dtypes=("fp32",), least_bytes=least_bytes)


def test_noise(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
