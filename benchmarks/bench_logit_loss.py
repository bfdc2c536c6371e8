"""The loss of cosines (N, C) that are in memory: GCL's first stage, noise on.

As in training, the product has just written the cosines, so they stay in the cache if they fit, for every contestant alike.
Under autocast the cosines are bfloat16, so autocast is not a case of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import (
    BOTH,
    CIFAR,
    COMPILED_PHASES,
    DIGITS,
    DTYPES,
    IMAGENET,
    INATURALIST,
    SCALE,
    SHAPES,
    TORCH_BACKEND,
    Case,
    Contestant,
    Inputs,
    Operation,
    Shape,
    compiled,
    draw_labels,
    installed,
    on_a_cpu,
    plain_gcl,
    step_of,
)
from benchmarks.timing import Call
from gclkern.functional import gcl_cross_entropy
from gclkern.options import Backend


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    cosine = torch.empty(shape.rows, shape.classes, dtype=DTYPES[dtype], device=device).uniform_(-0.5, 0.5).requires_grad_()
    return Inputs(shape, dtype, device, (cosine,), draw_labels(shape, device), shape.class_counts())


def copy(inputs: Inputs, phase: str) -> Call:
    source = inputs.leaves[0].detach()
    out = torch.empty_like(source)
    return lambda: out.copy_(source)


def liger(inputs: Inputs, phase: str) -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return step_of(lambda inputs: liger_cross_entropy(SCALE * inputs.leaves[0], inputs.target))(inputs, phase)


def least_bytes(shape: Shape, dtype: str, phase: str) -> float:
    """Forward reads the cosines; backward reads them and writes their gradient, or as one with forward only writes."""
    elements = {"forward": 1, "backward": 2, BOTH: 2}[phase]
    return float(elements * shape.rows * shape.classes * DTYPES[dtype].itemsize)


def ours(backend: Backend) -> Callable[[Inputs, str], Call]:
    return step_of(lambda inputs: gcl_cross_entropy(inputs.leaves[0], inputs.target, inputs.cloud, scale=SCALE, backend=backend))


CONTESTANTS = {
    "gclkern": Contestant("seed, noise, loss; gradient of the cosines", ours("auto")),
    **on_a_cpu({TORCH_BACKEND: Contestant('the same, backend="torch"', ours("torch"))}),
    "gclkern, no noise": Contestant(
        "cloud=None: loss; gradient of the cosines", step_of(lambda inputs: gcl_cross_entropy(inputs.leaves[0], inputs.target, scale=SCALE))
    ),
    "plain torch": Contestant(
        "the same formula in torch operators, noise by randn", step_of(lambda inputs: plain_gcl(inputs.leaves[0], inputs.cloud, inputs.target))
    ),
    "torch.compile": Contestant(
        "plain torch under torch.compile, compilation left out",
        step_of(lambda inputs: compiled(plain_gcl, inputs)(inputs.leaves[0], inputs.cloud, inputs.target)),
        COMPILED_PHASES,
    ),
    "torch cross entropy": Contestant(
        "less: scale and cross entropy, no noise", step_of(lambda inputs: F.cross_entropy(SCALE * inputs.leaves[0], inputs.target))
    ),
    "device copy": Contestant("floor: the cosines copied, one read and one write", copy, (BOTH,)),
}
if installed("liger_kernel") and torch.cuda.is_available():
    CONTESTANTS["Liger cross entropy"] = Contestant("less: scale and Liger's cross entropy, no noise; its forward makes the gradient", liger, (BOTH,))

SHAPE_GRIDS = {**SHAPES, "cpu": (DIGITS, CIFAR, IMAGENET, INATURALIST)}
OPERATION = Operation("logit loss", make_inputs, CONTESTANTS, dtypes=("fp32", "bf16"), shapes=SHAPE_GRIDS, least_bytes=least_bytes)


def test_logit_loss(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
