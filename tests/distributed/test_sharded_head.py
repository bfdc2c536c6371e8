"""The loss of a head whose classes are spread over ranks equals that of one process: values and gradients, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gclkern.distributed import sharded_linear_gcl_cross_entropy
from gclkern.distributed.head import sharded_loss
from gclkern.distributed.ranks import Ranks
from gclkern.functional import linear_gcl_cross_entropy, linear_gcl_cross_entropy_with_top1
from tests.conftest import GPU, TRITON
from tests.support.cases import PLANS, REDUCTIONS, Options, angle_sets, labels, moved, option_sets, vector
from tests.support.processes import run_ranks

ROWS, CLASSES, WIDTH = 3, 41, 19  # rows of each rank
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


def compare(rank: int, world: int, options: Options, dtype: torch.dtype = torch.float32, device: str = "cpu", **more: Any) -> None:
    """One call with its backward on all ranks, against the same call of one process."""
    options = moved({**options, **more}, device)
    features, weight, target = (tensor.to(device) for tensor in problem(world, dtype))
    learned = not (options.get("angular") or options.get("difficulty_margin"))  # beside angles a bias has no gradient
    reduction, bias = options.get("reduction", "mean"), options.pop("bias", None) if learned else None
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    first = sum(sizes(world)[:rank])
    held = slice(first, first + sizes(world)[rank])
    upstream = (vector(ROWS * world, -1.0, 2.0, seed=7) if reduction == "none" else torch.tensor(-0.7)).to(device, dtype)

    def leaves(*tensors: Tensor | None) -> list[Any]:
        return [None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors]

    whole = leaves(features, weight, bias)
    reference = options if device == "cuda" else {**options, "backend": "torch"}  # interpreted kernels are slow
    expected, expected_top1 = linear_gcl_cross_entropy_with_top1(whole[0], whole[1], target, **({"bias": whole[2]} if learned else {}), **reference)
    expected.backward(upstream)

    own = leaves(features[mine], weight[held], bias)
    local = {name: value[mine] if name in ("target_b", "lam") and isinstance(value, Tensor) and value.dim() else value for name, value in options.items()}
    bias_given = {"bias": own[2]} if learned else {}
    if reduction == "none":
        loss, top1 = sharded_loss(own[0], own[1], target[mine], group=None, averaged_gradients=False, with_top1=True, **bias_given, **local)
        torch.testing.assert_close(top1, expected_top1[mine], **TOLERANCE[torch.float32])  # a share of mixed targets, in float32
    else:
        loss = sharded_linear_gcl_cross_entropy(own[0], own[1], target[mine], **bias_given, **local)
    loss.backward(upstream[mine] if reduction == "none" else upstream)

    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected[mine] if reduction == "none" else expected, **tolerance)
    torch.testing.assert_close(own[0].grad, whole[0].grad[mine], **tolerance)
    torch.testing.assert_close(own[1].grad, whole[1].grad[held], **tolerance)
    if bias is not None:
        torch.testing.assert_close(own[2].grad, whole[2].grad, **tolerance)


def in_a_mesh(rank: int) -> None:
    """Two replicas of a classifier over two ranks each: the mesh's second dimension is the group, and each replica has its own samples."""
    mesh = init_device_mesh("cpu", (2, 2))
    features, weight, target = problem(4, torch.float64)
    replica = slice(rank // 2 * 2 * ROWS, (rank // 2 + 1) * 2 * ROWS)
    whole = weight.clone().requires_grad_()
    expected = linear_gcl_cross_entropy(features[replica], whole, target[replica])
    expected.backward()
    held = [torch.arange(CLASSES).chunk(2)[rank % 2]]
    sharded = DTensor.from_local(weight[held], mesh, [Replicate(), Shard(0)], shape=weight.shape, stride=weight.stride()).requires_grad_()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    loss = sharded_linear_gcl_cross_entropy(features[mine], sharded, target[mine])
    loss.backward()
    grad: Any = sharded.grad
    torch.testing.assert_close(loss, expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(grad.to_local(), whole.grad[held], **TOLERANCE[torch.float64])  # type: ignore[index]


def kernels(rank: int, world: int, device: str) -> None:
    sets = option_sets(ROWS * world, CLASSES)
    for name, plan in zip(("plain", "everything", "everything"), PLANS, strict=True):
        compare(rank, world, sets[name], device=device, plan=plan, backend="triton", reduction="none" if plan == "chunked" else "mean")
    for name in ("everything", "dbm and everything"):
        compare(rank, world, angle_sets(ROWS * world, CLASSES)[name], device=device, plan="materialised", backend="triton")


def every_option(rank: int, world: int) -> None:
    """The option sets, each with another plan in turn, so that with 1, 2, 3 and 4 ranks each set is tried with every plan."""
    sets = option_sets(ROWS * world, CLASSES) | {f"angles: {name}": options for name, options in angle_sets(ROWS * world, CLASSES).items()}
    for place, (name, options) in enumerate(sets.items(), world):
        compare(rank, world, options, plan=PLANS[place % 3])
        exact = torch.float32 if "cloud" in options else torch.float64
        compare(rank, world, options, exact, reduction="none", plan=PLANS[(place + 1) % 3])
        if name in ("plain", "everything"):
            for reduction, plan in zip(REDUCTIONS, PLANS, strict=True):
                compare(rank, world, {**options, "scale": 1.0}, normalize=False, reduction=reduction, plan=plan)
    if TRITON and not GPU and world == 2:  # interpreted kernels are slow
        kernels(rank, world, "cpu")
    if world == 4:
        in_a_mesh(rank)


def test_one_rank_equals_the_whole_head() -> None:
    every_option(0, 1)


@pytest.mark.gpu
def test_one_rank_on_a_gpu() -> None:
    kernels(0, 1, "cuda")


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
def test_equals_one_process(world: int) -> None:
    run_ranks(world, every_option)


def test_torch_compile_leaves_the_sharded_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To check a call, ranks read each other's numbers, which cannot be part of a graph."""
    traced: list[bool] = []

    class SeenRanks(Ranks):
        def __init__(self, group: Any) -> None:
            traced.append(torch.compiler.is_compiling())
            super().__init__(group)

    def step(features: Tensor) -> Tensor:
        return 2 * sharded_linear_gcl_cross_entropy(features.sin(), weight, target, seed=1)

    features, weight, target = torch.randn(4, 5), torch.randn(3, 5), torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr("gclkern.distributed.head.Ranks", SeenRanks)
    torch.compiler.reset()
    assert torch.compile(step, backend="eager")(features).equal(step(features))
    assert traced == [False, False]
