"""What the kernels cost, read from the machine code that the compiler makes for each GPU, so that a lost optimisation fails a test on a machine without one.

Every case runs a launcher at iNaturalist size, whose 8142 classes are divisible by 2 only: a kernel that is fast at 8192 and slow here does not pass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine_code.aot import CompiledKernel, submit
from benchmarks.predict_times import resident_blocks
from tests.support.cases import PLANS

pytestmark = pytest.mark.triton

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ROWS, CLASSES, DIM = 512, 8142, 2048


def loss_bf16() -> None:
    _loss(torch.bfloat16)


def loss_bf16_without_noise() -> None:
    _loss(torch.bfloat16, noise=False)


def loss_of_many_rows() -> None:
    _loss(torch.bfloat16, rows=2048)  # more than one program finishes


def loss_fp32() -> None:
    _loss(torch.float32)


def loss_by_angles() -> None:
    _loss(torch.bfloat16, angular=True)


def head_by_angles() -> None:
    _head(torch.bfloat16, torch.bfloat16, angular=True)


def head_by_difficulty() -> None:
    _head(torch.bfloat16, torch.bfloat16, difficulty_margin=True)


def head_bf16() -> None:
    _head(torch.bfloat16, torch.bfloat16)


def head_mixed() -> None:
    _head(torch.bfloat16, torch.float32)


def head_fp32() -> None:
    _head(torch.float32, torch.float32)


def head_bf16_of_200() -> None:
    _head(torch.bfloat16, torch.bfloat16, 200)  # rows of 400 bytes, a multiple of 16 and not of 32


def head_bf16_of_301() -> None:
    _head(torch.bfloat16, torch.bfloat16, 301)


def head_mixed_of_300() -> None:
    _head(torch.bfloat16, torch.float32, 300)


def head_fp32_of_1001() -> None:
    _head(torch.float32, torch.float32, 1001)


def head_of_many_rows() -> None:
    _head(torch.bfloat16, torch.bfloat16, rows=2048, plans=("materialised",))  # which keep exponentials


def head_mixed_of_many_rows() -> None:
    _head(torch.float16, torch.float32, 300, rows=2048, plans=("materialised",))


def noise() -> None:
    from gclkern.kernels.noise import cloud_noise

    cloud_noise(torch.zeros((), dtype=torch.int64), ROWS, CLASSES, 0, 0)


def dro_lt() -> None:
    from gclkern.kernels.dro_lt import dro_lt_backward, dro_lt_forward

    features, centroids = torch.empty(ROWS, DIM), torch.empty(CLASSES, DIM)
    target, epsilon = torch.zeros(ROWS, dtype=torch.int64), torch.full((CLASSES,), 0.5)
    _, saved = dro_lt_forward(features, target, centroids, epsilon, None, 1.0, "mean")
    dro_lt_backward(torch.ones(()), features, target, centroids, epsilon, saved, 1.0, "mean", True, True)


def contrastive() -> None:
    from gclkern.kernels.contrastive_loss import contrastive_backward, contrastive_forward

    features, prototypes, target, counts = torch.empty(4096, 128), torch.empty(100, 128), torch.zeros(4096, dtype=torch.int64), torch.ones(100)
    for form in ((None, None), (prototypes, counts)):  # SupCon, BCL
        _, saved = contrastive_forward(features, form[0], target, form[1], 0.1, True, True, "mean")
        contrastive_backward(torch.ones(()), features, form[0], form[1], saved, 0.1, True, True, True, form[0] is not None)


def vmf() -> None:
    from gclkern.kernels.vmf import vmf_backward, vmf_forward

    cosine, concentration = torch.empty(ROWS, CLASSES), torch.empty(CLASSES)
    vmf_backward(vmf_forward(cosine, concentration, 511.0, 0.07), cosine, concentration, 511.0, 0.07)


def centroids() -> None:
    from gclkern.kernels.centroids import segment_sums

    segment_sums(torch.empty(8 * CLASSES, DIM), torch.arange(8 * CLASSES) % CLASSES, CLASSES)


Case = Callable[[], None]
# Every kernel for every kind of GPU; a variant of the same kernels for one of each maker.
FIT: list[Any] = [
    *(
        (case, "sm_90")
        for case in (
            head_bf16,
            loss_bf16,
            dro_lt,
            contrastive,
            vmf,
            centroids,
            noise,
            loss_fp32,
            loss_bf16_without_noise,
        )
    ),
    *(pytest.param(case, "sm_90", marks=pytest.mark.slow) for case in (head_fp32, head_mixed, head_bf16_of_301)),
    *(
        pytest.param(case, target, marks=pytest.mark.slow)
        for case in (head_bf16, loss_bf16, dro_lt, contrastive, vmf, centroids, noise)
        for target in ("sm_80", "sm_100", "gfx942")
    ),
    *(pytest.param(case, "gfx942", marks=pytest.mark.slow) for case in (head_fp32, head_mixed, loss_fp32, loss_bf16_without_noise)),
    (loss_of_many_rows, "sm_90"),
    (loss_by_angles, "sm_90"),
    *(
        pytest.param(case, target, marks=pytest.mark.slow)
        for case, target in ((head_by_angles, "sm_90"), (head_by_angles, "sm_80"), (head_by_difficulty, "sm_90"), (loss_by_angles, "gfx942"))
    ),
    (head_of_many_rows, "sm_90"),
    *(pytest.param(head_of_many_rows, target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100")),
    *(pytest.param(head_of_many_rows, target, marks=pytest.mark.exhaustive) for target in ("sm_86", "sm_120")),
    pytest.param(head_mixed_of_many_rows, "sm_90", marks=pytest.mark.slow),
    # what users have at home and in the cloud: 100 KiB of shared memory where an A100 has 163
    *(pytest.param(case, target, marks=pytest.mark.exhaustive) for case in (head_bf16, loss_bf16, dro_lt) for target in ("sm_86", "sm_89", "sm_120")),
    *(pytest.param(case, "sm_90", marks=pytest.mark.slow) for case in (head_bf16_of_200, head_mixed_of_300, head_fp32_of_1001)),
]


def _terms(noise: bool, rows: int = ROWS, **angles: bool) -> tuple[object, ...]:
    from gclkern.kernels.terms import LossTerms

    return LossTerms(
        target=torch.zeros(rows, dtype=torch.int64), target_b=None, lam=None, cloud=torch.ones(CLASSES) if noise else None, margin=None, bias=None, weight=None,
        seed=torch.zeros((), dtype=torch.int64) if noise else None, scale=30.0, gamma=0.0, focal_detach=True, label_smoothing=0.0, ignore_index=-100,
        row_offset=0, class_offset=0, reduction="mean", **angles,
    )  # fmt: skip


def _loss(dtype: torch.dtype, noise: bool = True, rows: int = ROWS, **angles: bool) -> None:
    from gclkern.kernels.logit_loss import logit_backward, logit_forward

    cosine, terms = torch.empty(rows, CLASSES, dtype=dtype), _terms(noise, rows, **angles)
    loss, saved = logit_forward(cosine, *terms, True)
    logit_backward(loss, cosine, saved, *terms, False)


def _head(dtype: torch.dtype, weight_dtype: torch.dtype, dim: int = DIM, rows: int = ROWS, plans: Sequence[str] = PLANS, **angles: bool) -> None:
    from gclkern.kernels.head import head_backward, head_forward

    features, weight = torch.empty(rows, dim, dtype=dtype), torch.empty(CLASSES, dim, dtype=weight_dtype)
    terms = _terms(True, rows, **angles)
    for plan in plans:
        loss, saved = head_forward(features, weight, *terms, True, plan, True, False)
        head_backward(loss, features, weight, saved, *terms, True, plan, True, True, False)


class Builds:
    """Compilations of the cases, started together so that they run in parallel."""

    def __init__(self, wanted: set[tuple[Case, str]]) -> None:
        self._futures: dict[tuple[Case, str], Future[list[CompiledKernel]]] = {key: submit(*key) for key in sorted(wanted, key=str)}

    def of(self, case: Case, target: str, kernel: str | None = None) -> list[CompiledKernel]:
        if (case, target) not in self._futures:
            self._futures[case, target] = submit(case, target)
        built = self._futures[case, target].result()
        chosen = [build for build in built if kernel in (None, build.name)]
        assert chosen, f"{case.__name__} launches no {kernel}: {sorted({build.name for build in built})}"
        return chosen


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Builds:
    wanted = set()
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec"):
            wanted.add((item.callspec.params["case"], item.callspec.params.get("target", "sm_90")))
    return Builds(set() if "PYTEST_XDIST_WORKER" in os.environ else wanted)  # each process of pytest-xdist has all the items, and runs some


@pytest.mark.parametrize(("case", "target"), FIT)
def test_kernels_fit_their_gpu(builds: Builds, case: Case, target: str) -> None:
    for kernel in builds.of(case, target):
        assert kernel.spills_in_loops == 0, kernel.name
        assert kernel.spill_stores <= 16, f"{kernel.name}: more than the four registers that Triton 3.7's assembler puts aside"
        assert kernel.shared_bytes <= kernel.shared_limit, kernel.name
        assert "enable_fp_fusion" in kernel.options, f"{kernel.name}: its default differs between versions of Triton"


def test_every_kernel_is_among_the_cases(builds: Builds) -> None:
    launched = {
        build.name
        for case in (head_bf16, head_of_many_rows, loss_of_many_rows, dro_lt, contrastive, vmf, centroids, noise)
        for build in builds.of(case, "sm_90")
    }
    defined = {name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert defined == launched


@pytest.mark.parametrize(
    ("case", "kernel", "limit"),
    [
        # Those without angles are from before there were angles, difficulty margins and label smoothing by class: who uses none of these pays nothing for them.
        # About 14 of them are the noise, which forward draws and backward draws again.
        (loss_bf16, "_row_stats_kernel", 25),
        (loss_bf16, "_gradient_kernel", 24),
        (loss_bf16_without_noise, "_row_stats_kernel", 11),
        (loss_bf16_without_noise, "_gradient_kernel", 13),
        (loss_by_angles, "_row_stats_kernel", 39),
        (loss_by_angles, "_gradient_kernel", 45),
        (loss_fp32, "_row_stats_kernel", 24),
        (loss_fp32, "_gradient_kernel", 28),
        # in a head the cosines lie in a padded buffer; its gradient is also divided by norms and summed over rows
        (head_bf16, "_row_stats_kernel", 25),
        (head_bf16, "_gradient_kernel", 26),
        (head_of_many_rows, "_exponentials_kernel", 27),
    ],
)
def test_instructions_per_logit(builds: Builds, case: Case, kernel: str, limit: float) -> None:
    for build in builds.of(case, "sm_90", kernel):
        loop = build.hot_loop("MUFU.EX2")
        logits = build.constants["ROWS"] * build.constants["COLUMNS"] // (32 * build.options["num_warps"])
        assert logits <= loop.count("MUFU.EX2") < 2 * logits, "not one pass over `logits` logits"
        assert loop.instructions_per_logit(logits) <= limit
        assert loop.slow_paths == 0
        assert loop.count("SHFL") == 0, "threads exchange values in the loop"


@pytest.mark.parametrize(
    ("case", "kernel", "bits"),
    [
        (loss_bf16, "_row_stats_kernel", 32),  # a row of 8142 elements is aligned to two of them, whoever made it
        (loss_bf16, "_gradient_kernel", 32),
        (loss_fp32, "_row_stats_kernel", 64),
        (head_of_many_rows, "_exponentials_kernel", 32),  # 128 for cosines, and terms of two classes at a time
        (head_bf16, "_row_stats_kernel", 128),  # the rows of our own buffers are aligned
    ],
)
def test_loads_are_as_wide_as_rows_are_aligned(builds: Builds, case: Case, kernel: str, bits: int) -> None:
    for build in builds.of(case, "sm_90", kernel):
        assert min(build.hot_loop("MUFU.EX2").load_bits) >= bits


def test_the_exponentials_fill_a_multiprocessor(builds: Builds) -> None:
    from gclkern.kernels.exponentials import RESIDENT

    for build in builds.of(head_of_many_rows, "sm_90", "_exponentials_kernel"):
        assert resident_blocks(build.registers, build.shared_bytes, build.options["num_warps"]) >= RESIDENT
        assert build.hot_loop("MUFU.EX2").count("STG.E.128") == 2, "16 exponentials a thread, rounded to 16 bits"


@pytest.mark.parametrize(("case", "kernel"), [(contrastive, "_denominator_kernel"), (contrastive, "_pull_kernel")])
def test_programs_that_share_keys_run_at_once(builds: Builds, case: Case, kernel: str) -> None:
    from gclkern.kernels.contrastive_loss import RESIDENT

    for build in builds.of(case, "sm_90", kernel):
        assert resident_blocks(build.registers, build.shared_bytes, build.options["num_warps"]) >= RESIDENT


@pytest.mark.parametrize("case", [head_bf16, loss_bf16])
def test_no_load_of_the_gradient_waits_for_another_one(builds: Builds, case: Case) -> None:
    """The gradient kernel loads cosines before it reads whether their row has a gradient, and the seed before the loop."""
    for build in builds.of(case, "sm_90", "_gradient_kernel"):
        opcodes = build.hot_loop("MUFU.EX2").opcodes
        widest = max(build.hot_loop("MUFU.EX2").load_bits)
        cosines = [place for place, opcode in enumerate(opcodes) if opcode == ("LDG.E.128" if widest == 128 else "LDG.E")]
        asked = [place for place, opcode in enumerate(opcodes) if opcode.startswith("FSETP.NEU")]
        assert cosines and asked and cosines[0] < asked[0]
        assert opcodes.count("LDG.E.64") <= 1, "a target, and no seed"


@pytest.mark.parametrize("case", [head_bf16, *(pytest.param(case, marks=pytest.mark.slow) for case in (head_mixed, head_bf16_of_301))])
@pytest.mark.parametrize("kernel", ["_cosine_kernel", "_feature_gradient_kernel", "_weight_gradient_kernel", "_fused_stats_kernel", "_fused_gradient_kernel"])
def test_products_run_on_the_tensor_cores(builds: Builds, case: Case, kernel: str) -> None:
    for build in builds.of(case, "sm_90", kernel):
        loop = build.hot_loop("HGMMA")
        assert loop.count("HGMMA") > 0
        assert set(loop.load_bits) <= {128}
        assert loop.slow_paths == 0
