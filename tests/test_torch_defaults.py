"""Nothing depends on torch's default dtype or default device, which a program may set for purposes of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gclkern
from gclkern import functional as F
from gclkern import samplers, weights
from gclkern.distributed import ShardedClassCentroids, ShardedLinearGCLLoss, sharded_dro_lt_loss
from tests.support.cases import cosines, labels, vector

ROWS, CLASSES, DIM = 6, 11, 5
COUNTS = [100, 80, 60, 40, 30, 20, 10, 8, 5, 3, 1]
COSINE, TARGET, OTHER = cosines(ROWS, CLASSES), labels(ROWS, CLASSES), labels(ROWS, CLASSES, seed=11)
FEATURES, WEIGHT, CENTROIDS = (cosines(rows, DIM, seed=seed) for rows, seed in ((ROWS, 1), (CLASSES, 2), (CLASSES, 3)))
CLASS_WEIGHT = vector(CLASSES, 0.5, 2.0)
MIXED: dict[str, Any] = {"target_b": OTHER, "lam": 0.3, "seed": 5}


def _gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    return [value, *torch.autograd.grad(value, leaves)]


def _clouded(backend: str) -> list[Tensor]:
    criterion = gclkern.GCLLoss(COUNTS, margin=0.1, gamma=0.5, label_smoothing=0.1, weight=CLASS_WEIGHT, backend=backend)
    return _gradients(lambda cosine: criterion(cosine, TARGET, **MIXED), COSINE)


def _head(backend: str, plan: str) -> list[Tensor]:
    criterion = gclkern.LinearGCLLoss(COUNTS, backend=backend, plan=plan)
    return _gradients(lambda features, weight: criterion(features, weight, TARGET, **MIXED), FEATURES, WEIGHT)


def _dro_lt(backend: str) -> list[Tensor]:
    criterion = gclkern.DROLTLoss(COUNTS, epsilon="sqrt", backend=backend)
    return _gradients(lambda features: criterion(features, TARGET, CENTROIDS, TARGET.bincount(minlength=CLASSES)), FEATURES)


def _centroids(kind: Any) -> list[Tensor]:
    with torch.device("cpu"):  # a module that owns its buffers is built on the default device, as torch's are
        centroids = kind(CLASSES, DIM)
    centroids.update(FEATURES, TARGET)
    return list(centroids.compute())


def _draws(kind: Callable[..., Any]) -> list[int]:
    sampler = kind([label for label, count in enumerate(COUNTS) for _ in range(count)], seed=3)
    sampler.set_epoch(2)
    return list(sampler)


def _sharded() -> list[Tensor]:
    criterion = ShardedLinearGCLLoss(COUNTS)
    return _gradients(lambda features, weight: criterion(features, weight, TARGET, seed=5), FEATURES, WEIGHT)


CALLS: dict[str, Callable[[str], Any]] = {
    "clouded": _clouded,
    **{f"head {plan}": lambda backend, plan=plan: _head(backend, plan) for plan in ("materialised", "recompute")},  # type: ignore[misc]
    "dro_lt": _dro_lt,
}
CALLS_OF_TORCH: dict[str, Callable[[str], Any]] = {
    "head chunked": lambda backend: _head(backend, "chunked"),
    "cloud_noise": lambda _: gclkern.cloud_noise(7, 3, 10, device="cpu"),
    "cloud_sizes": lambda _: [gclkern.cloud_sizes(COUNTS, strategy) for strategy in ("log", "power", "cosine")],
    "weights": lambda _: [weights.effective_number_weights(COUNTS), weights.ldam_margins(COUNTS), weights.log_prior(COUNTS)],
    "losses": lambda _: [
        loss(COSINE, TARGET) for loss in (gclkern.CosFaceLoss(), gclkern.FocalLoss(), gclkern.LDAMLoss(COUNTS), gclkern.LogitAdjustedLoss(COUNTS))
    ],
    "class_centroids": lambda _: [*F.class_centroids(FEATURES, TARGET, CLASSES), *_centroids(gclkern.ClassCentroids)],
    "samplers": lambda _: [
        _draws(kind)
        for kind in (
            samplers.InstanceBalancedSampler, samplers.SquareRootSampler, samplers.ClassBalancedSampler, samplers.ReversedSampler,
            samplers.EffectiveNumberSampler, samplers.CBENSampler, samplers.ClassAwareSampler,
        )
    ],
    "sharded": lambda _: [*_sharded(), *_centroids(ShardedClassCentroids), sharded_dro_lt_loss(FEATURES, TARGET, CENTROIDS, 0.1, CLASSES)],
}  # fmt: skip


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


@pytest.fixture
def defaults() -> Iterator[Callable[[torch.dtype, str | None], None]]:
    """A function that sets torch's defaults until the end of the test."""
    before = torch.get_default_dtype()

    def choose(dtype: torch.dtype, device: str | None) -> None:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield choose
    choose(before, None)


def check(call: Callable[[str], Any], backend: str, choose: Callable[[torch.dtype, str | None], None]) -> None:
    expected = list(_flat(call(backend)))
    for dtype, device in ((torch.float16, None), (torch.float64, "meta")):
        choose(dtype, device)
        found = list(_flat(call(backend)))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            if isinstance(other, Tensor):
                assert one.dtype == other.dtype and one.device == other.device
                assert torch.equal(one.detach(), other.detach())
            else:
                assert one == other


@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_torch_change_nothing(name: str, backend: str, defaults: Callable[[torch.dtype, str | None], None]) -> None:
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the tensors here are on the CPU")
    check(CALLS[name], backend, defaults)


@pytest.mark.parametrize("name", CALLS_OF_TORCH)
def test_defaults_of_torch_change_nothing_else(name: str, defaults: Callable[[torch.dtype, str | None], None]) -> None:
    check(CALLS_OF_TORCH[name], "auto", defaults)
