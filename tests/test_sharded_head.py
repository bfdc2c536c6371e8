"""The loss of a head whose classes are spread over ranks equals that of one process: values and gradients, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gclkern.distributed import sharded_linear_gcl_cross_entropy
from gclkern.functional import linear_gcl_cross_entropy
from tests.conftest import TRITON
from tests.problems import REDUCTIONS, Options, labels, option_sets, vector
from tests.processes import run_ranks

ROWS, CLASSES, WIDTH = 3, 41, 19  # rows of each rank
PLANS = ["materialised", "chunked", "recompute"]
# A sum over the classes in another order, of losses up to 30: float32's 6e-8 times a few tens. Without noise, float64 tells a wrong formula from rounding.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def sizes(world: int) -> list[int]:
    """Classes of each rank: uneven, the second rank with one class alone."""
    if world == 1:
        return [CLASSES]
    rest = CLASSES - 1
    return [rest - (world - 2) * (rest // world), 1, *[rest // world] * (world - 2)]


def problem(world: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS * world, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    target = labels(ROWS * world, CLASSES)
    target[1] = -100
    return features, weight, target


def compare(rank: int, world: int, options: Options, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """One call with its backward on all ranks, against the same call of one process."""
    options = {**options, **more}
    features, weight, target = problem(world, dtype)
    reduction, bias = options.get("reduction", "mean"), options.pop("bias", None)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    first = sum(sizes(world)[:rank])
    held = slice(first, first + sizes(world)[rank])
    upstream = vector(ROWS * world, -1.0, 2.0, seed=7).to(dtype) if reduction == "none" else torch.tensor(-0.7, dtype=dtype)

    def leaves(*tensors: Tensor | None) -> list[Any]:
        return [None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors]

    whole = leaves(features, weight, bias)
    expected = linear_gcl_cross_entropy(whole[0], whole[1], target, bias=whole[2], **options)
    expected.backward(upstream)

    own = leaves(features[mine], weight[held], bias)
    local = {name: value[mine] if name in ("target_b", "lam") and isinstance(value, Tensor) and value.dim() else value for name, value in options.items()}
    loss = sharded_linear_gcl_cross_entropy(own[0], own[1], target[mine], bias=own[2], **local)
    loss.backward(upstream[mine] if reduction == "none" else upstream)

    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected[mine] if reduction == "none" else expected, **tolerance)
    torch.testing.assert_close(own[0].grad, whole[0].grad[mine], **tolerance)
    torch.testing.assert_close(own[1].grad, whole[1].grad[held], **tolerance)
    if bias is not None:
        torch.testing.assert_close(own[2].grad, whole[2].grad, **tolerance)


def every_option(rank: int, world: int) -> None:
    sets = option_sets(ROWS * world, CLASSES)
    for name, options in sets.items():
        compare(rank, world, options, reduction="none")
        if "cloud" not in options:
            compare(rank, world, options, torch.float64, reduction="none", scale=options.get("scale", 30.0))
        for plan in PLANS:
            compare(rank, world, options, plan=plan)
        if name in ("plain", "everything"):
            for reduction in REDUCTIONS:
                compare(rank, world, {**options, "scale": 1.0}, normalize=False, reduction=reduction)
    if TRITON and world == 2:  # interpreted kernels are slow
        for name in ("plain", "weight_smoothing", "everything"):
            for plan in PLANS:
                compare(rank, world, sets[name], plan=plan, backend="triton", reduction="none" if plan == "chunked" else "mean")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process(world: int) -> None:
    run_ranks(world, every_option)
