"""What the kernels cost, read from the machine code that the compiler makes for each GPU, so that a lost optimisation fails a test on a machine without one.

Every case runs a launcher at iNaturalist size, whose 8142 classes are divisible by 2 only: a kernel that is fast at 8192 and slow here does not pass.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from tests.aot import CompiledKernel, submit

pytestmark = pytest.mark.triton

ROWS, CLASSES, DIM = 512, 8142, 2048
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def loss_bf16() -> None:
    _loss(torch.bfloat16)


def loss_bf16_without_noise() -> None:
    _loss(torch.bfloat16, noise=False)


def loss_fp32() -> None:
    _loss(torch.float32)


def head_bf16() -> None:
    _head(torch.bfloat16, torch.bfloat16)


def head_mixed() -> None:
    _head(torch.bfloat16, torch.float32)


def head_fp32() -> None:
    _head(torch.float32, torch.float32)


def noise() -> None:
    from gclkern.kernels.noise import cloud_noise

    cloud_noise(torch.zeros((), dtype=torch.int64), ROWS, CLASSES, 0, 0)


def dro_lt() -> None:
    from gclkern.kernels.dro_lt import dro_lt_backward, dro_lt_forward

    features, centroids = torch.empty(ROWS, DIM), torch.empty(CLASSES, DIM)
    target, epsilon = torch.zeros(ROWS, dtype=torch.int64), torch.full((CLASSES,), 0.5)
    _, saved = dro_lt_forward(features, target, centroids, epsilon, None, 1.0, "mean")
    dro_lt_backward(torch.ones(()), features, target, centroids, epsilon, saved, 1.0, "mean", True, True)


def centroids() -> None:
    from gclkern.kernels.centroids import segment_sums

    segment_sums(torch.empty(8 * CLASSES, DIM), torch.arange(8 * CLASSES) % CLASSES, CLASSES)


CASES = (loss_bf16, loss_bf16_without_noise, loss_fp32, head_bf16, head_mixed, head_fp32, noise, dro_lt, centroids)
Case = Callable[[], None]


def _terms(noise: bool) -> tuple[object, ...]:
    from gclkern.kernels.terms import LossTerms

    return LossTerms(
        target=torch.zeros(ROWS, dtype=torch.int64), target_b=None, lam=None, cloud=torch.ones(CLASSES) if noise else None, margin=None, bias=None, weight=None,
        seed=torch.zeros((), dtype=torch.int64) if noise else None, scale=30.0, gamma=0.0, focal_detach=True, label_smoothing=0.0, ignore_index=-100,
        row_offset=0, class_offset=0, reduction="mean",
    )  # fmt: skip


def _loss(dtype: torch.dtype, noise: bool = True) -> None:
    from gclkern.kernels.logit_loss import logit_backward, logit_forward

    cosine, terms = torch.empty(ROWS, CLASSES, dtype=dtype), _terms(noise)
    loss, stats, denominator = logit_forward(cosine, *terms)
    logit_backward(loss, cosine, stats, denominator, *terms, False)


def _head(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    from gclkern.kernels.head import head_backward, head_forward

    features, weight, terms = torch.empty(ROWS, DIM, dtype=dtype), torch.empty(CLASSES, DIM, dtype=weight_dtype), _terms(True)
    for plan in ("materialised", "chunked", "recompute"):
        loss, saved = head_forward(features, weight, *terms, True, plan, True)
        head_backward(loss, features, weight, saved, *terms, True, plan, True, True, False)


class Builds:
    """Compilations of the cases, begun together so that they share the processor's cores."""

    def __init__(self, wanted: set[tuple[Case, str]]) -> None:
        self._futures: dict[tuple[Case, str], Future[list[CompiledKernel]]] = {key: submit(*key) for key in sorted(wanted, key=str)}

    def of(self, case: Case, target: str, kernel: str | None = None) -> list[CompiledKernel]:
        built = [build for build in self._futures[case, target].result() if kernel in (None, build.name)]
        assert built, f"{case.__name__} launches no {kernel}: {sorted({build.name for build in self._futures[case, target].result()})}"
        return built


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Builds:
    wanted = set()
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec"):
            wanted.add((item.callspec.params["case"], item.callspec.params.get("target", "sm_90")))
    return Builds(wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_fit_their_gpu(builds: Builds, case: Case, target: str) -> None:
    for kernel in builds.of(case, target):
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0), kernel.name
        assert kernel.shared_bytes <= kernel.shared_limit, kernel.name
        assert "enable_fp_fusion" in kernel.options, f"{kernel.name}: its default differs between versions of Triton"
