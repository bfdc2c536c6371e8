"""linear_gcl_cross_entropy against the oracle: three plans, two backends, and what a head is beyond its cosines. test_operations.py has what all promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.memory import allocated_peak
from gclkern.dispatch import resolve_plan
from gclkern.functional import linear_gcl_cross_entropy
from tests.support import oracle
from tests.support.cases import LOOPS_SIZES, PLANS, REDUCTIONS, SIZES, Options, labels, moved, option_sets, vector
from tests.support.comparison import ROUNDING, assert_within, check_head_loss

DTYPE_PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal entries, the same on every device."""
    return (size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def pair(rows: int, classes: int, width: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features and weights that require gradients."""
    return matrix(rows, width, dtype, device).requires_grad_(), matrix(classes, width, dtype, device, seed=1).requires_grad_()


def call(features: Tensor, linear_weight: Tensor, target: Tensor, options: Options, **more: Any) -> Tensor:
    """The loss with an option set, moved to the device of `features`."""
    options = moved({**options, **more}, features.device)
    return linear_gcl_cross_entropy(features, linear_weight, target.to(features.device), options.pop("cloud", None), **options)


def check(features: Tensor, linear_weight: Tensor, target: Tensor, options: Options, upstream: Tensor | None = None, **more: Any) -> None:
    options = {**options, **more}
    check_head_loss(linear_gcl_cross_entropy, features, linear_weight, target, options.pop("cloud", None), upstream, **options)


# ---- values and gradients


@pytest.mark.parametrize("name", ["plain", "bias", "weight_smoothing", "focal_undetached", "cloud", "mixed", "focal_stage_2", "everything"])
def test_loss_and_gradients(name: str, plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 6, 37, 19
    target = labels(rows, classes)
    target[4] = -100
    options = option_sets(rows, classes)[name]
    features, weight = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1)
    check(features, weight, target, options, vector(rows, -1.0, 2.0, seed=7), reduction="none", plan=plan, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
def test_reductions(normalize: bool, reduction: str, plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 5, 37, 19
    options = option_sets(rows, classes)["everything"] | {"scale": 8.0 if normalize else 1.0}
    features, weight = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1)
    check(features, weight, labels(rows, classes), options, torch.tensor(-0.7), normalize=normalize, reduction=reduction, plan=plan, backend=backend)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize(("name", "normalize"), [("plain", True), ("everything", True), ("everything", False)])
def test_many_panels(name: str, normalize: bool, plan: str, backend: str, device: torch.device) -> None:
    """Classes in three pieces, of which the last has a tail: statistics go on from one to the next, and each takes its part of every class vector."""
    rows, classes, width = 4, 150, 8
    options = option_sets(rows, classes)[name] | {"scale": 8.0 if normalize else 1.0}
    features, weight = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1)
    check(features, weight, labels(rows, classes), options, vector(rows), normalize=normalize, reduction="none", plan=plan, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "normalize"), [*((*pair, True) for pair in DTYPE_PAIRS), (*DTYPE_PAIRS[0], False), (*DTYPE_PAIRS[3], False)], ids=str
)
def test_sixteen_bit_features(dtype: torch.dtype, weight_dtype: torch.dtype, normalize: bool, plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 5, 37, 32
    options = option_sets(rows, classes)["cloud"] | {"scale": 16.0 if normalize else 1.0}
    # Float32 weights enter the products in the dtype of the features: these are exact in it. test_float32_weights_are_rounded has others.
    features, weight = matrix(rows, width, dtype, device), matrix(classes, width, dtype, device, seed=1, size=0.25).to(weight_dtype)
    check(features, weight, labels(rows, classes), options, vector(rows, 0.5, 2.0), normalize=normalize, reduction="none", plan=plan, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_are_rounded(dtype: torch.dtype, plan: str, backend: str, device: torch.device) -> None:
    """Beside 16-bit features float32 weights may lose what those lack: one rounding of a unit vector's elements changes a cosine by less than itself."""
    scale, rounding = 16.0, ROUNDING[dtype]
    features, weight, target = matrix(5, 32, dtype, device).requires_grad_(), matrix(37, 32, device=device, seed=1).requires_grad_(), labels(5, 37)
    loss = call(features, weight, target, {}, scale=scale, reduction="none", plan=plan, backend=backend)
    loss.sum().backward()
    exact = features.detach().cpu().double().requires_grad_(), weight.detach().cpu().double().requires_grad_()
    expected = oracle.linear_gcl_cross_entropy(*exact, target, scale=scale, reduction="none")
    expected.sum().backward()
    assert_within(loss, expected, 2 * scale * rounding, 0.0, "loss")
    for ours, reference in ((features.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert ours is not None and reference is not None
        difference = (ours.cpu().double() - reference).norm() / reference.norm()
        assert difference < 2 * scale * rounding, f"{difference:.3f}"  # the logit's error is the relative error of every probability
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32, torch.float32), *DTYPE_PAIRS], ids=str)
@pytest.mark.parametrize(("rows", "classes", "width"), [(130, 1000, 200), (64, 8142, 256)])
def test_full_tiles(rows: int, classes: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype, plan: str) -> None:
    """Sizes that fill the tiles and leave tails, too slow for the interpreter."""
    features, weight = matrix(rows, width, dtype, "cuda"), matrix(classes, width, dtype, "cuda", seed=1).to(weight_dtype)
    check(features, weight, labels(rows, classes), {"margin": 0.1, "weight": vector(classes, 0.5, 2.0)}, vector(rows), reduction="none", plan=plan)


@pytest.mark.parametrize(("rows", "classes", "width"), [(1, 1, 1), (1, 2, 3), (7, 1, 5), (2, 7, 1), (3, 100, 130), (17, 65, 64), (2, 520, 4)])
def test_odd_sizes(rows: int, classes: int, width: int, plan: str, backend: str, device: torch.device) -> None:
    features, weight = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1)
    cloud = vector(classes, 0.0, 0.5, seed=6)
    check(features, weight, labels(rows, classes), {"cloud": cloud, "seed": 1, "scale": 10.0}, plan=plan, backend=backend)


def test_rows_longer_than_a_block(backend: str, device: torch.device) -> None:
    """Kernels that pass over rows take 1024 elements at a time, the loops of the CPU 512."""
    features, weight = matrix(2, 1100, device=device), matrix(3, 1100, device=device, seed=1)
    check(features, weight, torch.tensor([2, 0]), {"scale": 8.0}, vector(2), reduction="none", plan="materialised", backend=backend)


def test_more_rows_than_a_tile(plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 150, 140, 24
    target = labels(rows, classes)
    target[::7] = -100
    features, weight = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1)
    check(features, weight, target, {"margin": 0.1, "weight": vector(classes, 0.5, 2.0)}, plan=plan, backend=backend)


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "classes"),
    [("cpu", torch.float32, "torch", 2**15), ("meta", torch.float32, "triton", 2**19), ("meta", torch.bfloat16, "triton", 2**20)],
)  # "meta" stands for a GPU
def test_auto_chooses_by_the_bytes_of_the_logits(device: str, dtype: torch.dtype, backend: str, classes: int) -> None:
    features = torch.empty(1024, 1, device=device, dtype=dtype)
    assert resolve_plan("auto", features, classes, normalize=True, backend=backend) == "materialised"
    assert resolve_plan("auto", features, classes + 1, normalize=True, backend=backend) == ("chunked" if backend == "triton" else "recompute")


# ---- norms


@pytest.mark.parametrize("size", [0.0, 0.998e-12])
def test_rows_without_a_direction(size: float, plan: str, backend: str, device: torch.device) -> None:
    """A norm of at most 1e-12 gives cosine 0 to everything and gradient 0: its direction is noise, and F.normalize's gradient there is 1e12.

    One that is barely larger counts.
    """
    rows, classes, width = 4, 9, 6
    features, weight = matrix(rows, width), matrix(classes, width, seed=1)
    features[1] = size / width**0.5
    weight[2] = size / width**0.5
    features[3], weight[5] = (1.002e-12 * row / row.norm() for row in (features[3], weight[5]))
    target = torch.tensor([0, 3, 2, 5])  # 2: the class without a direction is also a target
    options: Options = {"cloud": vector(classes, 0.0, 0.5), "seed": 2, "bias": vector(classes, -1.0, 1.0).requires_grad_()}
    check(features.to(device), weight.to(device), target, options, vector(rows), reduction="none", plan=plan, backend=backend)
    left, right = (x.clone().to(device).requires_grad_() for x in (features, weight))
    call(left, right, target, {}, plan=plan, backend=backend).backward()
    assert left.grad is not None and right.grad is not None
    assert left.grad[1].eq(0).all() and right.grad[2].eq(0).all()


@pytest.mark.parametrize("size", [1e-8, 1e17])
def test_rows_of_any_size(size: float, plan: str, backend: str, device: torch.device) -> None:
    """Small and large norms cancel in the cosine; neither may under- or overflow on the way, nor may 1e-8 count as no direction."""
    features, weight = matrix(4, 6, device=device, size=size), matrix(9, 6, device=device, seed=1, size=size)
    check(features, weight, labels(4, 9), {"scale": 8.0}, vector(4), reduction="none", plan=plan, backend=backend)


def test_a_row_whose_squares_leave_float32_is_nan_and_no_plausible_loss(backend: str, device: torch.device) -> None:
    features, weight = matrix(3, 8, device=device), matrix(5, 8, device=device, seed=1)
    huge = torch.tensor([1.0, 1e20, 1.0], device=device)[:, None]
    loss = call(features * huge, weight, labels(3, 5), {}, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    weight[4] *= 1e20
    assert call(features, weight, labels(3, 5), {}, reduction="none", backend=backend).isnan().all(), "it is a class of every row"


def test_float16_norms_do_not_overflow(plan: str, backend: str, device: torch.device) -> None:
    """The squares of 40 numbers near 300 add up to 3.6 million, beyond float16's 65504."""
    features, weight = matrix(4, 40, torch.float16, device, size=300.0), matrix(9, 40, torch.float16, device, seed=1, size=300.0)
    check(features, weight, labels(4, 9), {"scale": 8.0}, vector(4, 100.0, 200.0), reduction="none", plan=plan, backend=backend)


def test_parallel_rows(plan: str, backend: str, device: torch.device) -> None:
    """Features equal to their class's weight: cosine 1, no direction left to improve, so the gradient of the target's cosine points nowhere."""
    weight = matrix(5, 8, device=device, seed=1)
    target = torch.tensor([0, 4, 2])
    features = 3 * weight[target.to(device)]
    check(features, weight, target, {}, vector(3), reduction="none", plan=plan, backend=backend)


# ---- bad and ignored rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_leaves_the_others_right(bad: float, plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 6, 33, 8
    features, weight, target = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1), labels(rows, classes)
    good = features.clone().requires_grad_()
    features[2, 5] = bad
    leaf, anchors = features.requires_grad_(), weight.clone().requires_grad_()
    options = option_sets(rows, classes)["everything"] | {"plan": plan, "backend": backend}
    loss, right = call(leaf, anchors, target, options, reduction="none"), call(good, weight, target, options, reduction="none")
    loss.sum().backward()
    right.sum().backward()
    others = torch.arange(rows) != 2
    assert leaf.grad is not None and good.grad is not None and anchors.grad is not None
    assert loss[2].isnan() and loss[others].equal(right[others])
    # A matrix product may add up a row in another order, but no other row's numbers enter it.
    torch.testing.assert_close(leaf.grad[others], good.grad[others], rtol=1e-5, atol=1e-6)
    assert anchors.grad.isnan().any()
    for reduction in ("mean", "sum"):
        assert call(leaf.detach(), weight, target, options, reduction=reduction).isnan()


def test_an_ignored_row_adds_nothing_whatever_it_holds(plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 6, 33, 8
    options = option_sets(rows, classes)["everything"] | {"plan": plan, "backend": backend}
    target, options["target_b"] = labels(rows, classes), options["target_b"].clone()
    target[2] = options["target_b"][4] = -100
    results = []
    for bad in (0.0, float("nan")):
        features, weight = pair(rows, classes, width, device)
        with torch.no_grad():
            features[2, 5] = bad
            features[4] = -bad * 1e30
        loss = call(features, weight, target, options)
        results.append([loss.detach(), *torch.autograd.grad(loss, (features, weight))])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean)
    assert results[1][1][[2, 4]].eq(0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_samples_ignored(reduction: str, plan: str, backend: str, device: torch.device) -> None:
    leaf, weight = matrix(3, 4, device=device).requires_grad_(), matrix(8, 4, device=device, seed=1).requires_grad_()
    loss = call(leaf, weight, torch.full((3,), -100), {"cloud": vector(8), "seed": 1}, reduction=reduction, plan=plan, backend=backend)
    assert loss.isnan().all() if reduction == "mean" else loss.eq(0).all()
    loss.sum().backward()
    assert leaf.grad is not None and weight.grad is not None
    assert leaf.grad.eq(0).all() and weight.grad.eq(0).all()


# ---- near probability 1


def test_the_targets_gradient_keeps_its_digits(plan: str, backend: str, device: torch.device) -> None:
    """Orthogonal anchors and a feature that leans to one of them: at p near 0.9998 the feature's gradient is made of 1 - p alone.

    A product in float32 gives the cosine, so the error of a logit of 30 cos is a few times 2e-6, and that is the relative error of 1 - p.
    """
    width = 8
    weight = torch.eye(width)
    features = 0.3 * torch.rand(4, width, generator=torch.Generator().manual_seed(3))
    target = torch.arange(4)
    features[target, target] = 0.45
    left, right = (x.clone().to(device).requires_grad_() for x in (features, weight))
    call(left, right, target, {}, reduction="none", plan=plan, backend=backend).sum().backward()
    exact_left, exact_right = (x.double().requires_grad_() for x in (features, weight))
    loss = oracle.linear_gcl_cross_entropy(exact_left, exact_right, target, reduction="none")
    loss.sum().backward()
    assert loss.min() < 1e-3
    assert left.grad is not None and exact_left.grad is not None and right.grad is not None and exact_right.grad is not None
    for ours, reference in ((left.grad, exact_left.grad), (right.grad, exact_right.grad)):
        assert_within(ours, reference, 3e-5 * reference.abs().amax(1, keepdim=True), 0.0, "gradient")


# ---- promises


def test_noise_of_an_offset_and_a_split_batch(plan: str, backend: str, device: torch.device) -> None:
    rows, classes, width = 9, 37, 8
    features, weight, target = matrix(rows, width, device=device), matrix(classes, width, device=device, seed=1), labels(rows, classes)
    options: Options = {"cloud": vector(classes), "seed": 2**40 + 5, "class_offset": 2**20 + 3, "reduction": "none", "plan": plan, "backend": backend}
    start = 2**33 + 1
    check(features[:2], weight, target[:2], options, vector(2), row_offset=start)
    whole = call(features, weight, target, options, row_offset=start)
    parts = [call(features[i:j], weight, target[i:j], options, row_offset=start + i) for i, j in ((0, 2), (2, 3), (3, 9))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)  # the noise is bitwise the same, a product of other shape is not


# ---- backends


# ---- memory


def test_recompute_holds_nothing_of_size_n_times_c(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward together, gradients included, stay below the two bytes per logit that a 16-bit buffer would take alone.

    The interpreter's tiles are numpy arrays that the profiler does not see; what a kernel writes to is torch's.
    """
    if device.type == "cuda":
        rows, classes, width = 1024, 200_000, 16
    elif backend != "triton":  # panels of 2 MB and the noise's own; the matrix is far larger
        rows, classes, width = 256, 32768, 4
    else:
        rows, classes, width = 64, 2048, 4
        monkeypatch.setattr("gclkern.kernels.head.PANEL_ELEMENTS", 2**14)
    leaves, target, cloud = pair(rows, classes, width, device), labels(rows, classes).to(device), vector(classes).to(device)

    def step() -> None:
        torch.autograd.grad(linear_gcl_cross_entropy(*leaves, target, cloud, seed=1, plan="recompute", backend=backend), leaves)

    assert allocated_peak(step, device) < 2 * rows * classes


# ---- any combination


@st.composite
def problems(draw: st.DrawFn, backend: str) -> tuple[Tensor, Tensor, Tensor, Options]:
    classes, width = draw(st.sampled_from(LOOPS_SIZES if backend == "cpu" else SIZES)), draw(st.sampled_from([2, 7, 16, 33]))
    rows = draw(st.integers(1, 5 if classes <= 65 else 2))  # the oracle goes over classes in Python
    seed = draw(st.integers(0, 2**16))
    normalize = draw(st.booleans())
    options: Options = {"normalize": normalize, "plan": draw(st.sampled_from(PLANS)), "scale": 1.0}
    options["reduction"] = draw(st.sampled_from(REDUCTIONS))
    dtype = torch.float32
    if normalize:
        # the tolerance follows the rounding of 16-bit cosines times the scale: at a scale of 30 it would be 6% of a probability
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
        options["scale"] = draw(st.sampled_from([1.0, 10.0, 30.0] if dtype == torch.float32 else [1.0, 10.0]))
    if draw(st.booleans()):
        options |= {"cloud": vector(classes, 0.0, 1.0, seed + 1), "seed": draw(st.integers(0, 2**63 - 1)), "class_offset": draw(st.integers(0, 2**20))}
    if draw(st.booleans()):
        options["margin"] = vector(classes, 0.0, 0.5, seed + 2)
    if draw(st.booleans()):
        options["bias"] = vector(classes, -2.0, 2.0, seed + 3).requires_grad_()
    if draw(st.booleans()):
        options["weight"] = vector(classes, 0.2, 2.0, seed + 4)
    if draw(st.booleans()):
        options |= {"gamma": draw(st.sampled_from([1.0, 2.0])), "focal_detach": draw(st.booleans())}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, vector(classes, 0.0, 0.4, seed + 9)]))
    target = labels(rows, classes, seed + 5)
    if draw(st.booleans()):
        options |= {"target_b": labels(rows, classes, seed + 6), "lam": vector(rows, seed=seed + 7)}
    for ignored in (target, options.get("target_b")):
        if ignored is not None and draw(st.booleans()):
            ignored[draw(st.integers(0, rows - 1))] = -100
    return matrix(rows, width, dtype, seed=seed), matrix(classes, width, dtype, seed=seed + 8), target, options


@given(data=st.data())
def test_any_problem(data: st.DataObject, backend: str, device: torch.device) -> None:
    features, weight, target, options = data.draw(problems(backend))
    check(features.to(device), weight.to(device), target, options, backend=backend)


# ---- what only a GPU shows


@pytest.mark.parametrize("wrong", [37])
def test_a_label_out_of_range_makes_its_row_nan(wrong: int, plan: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels are not read, as on a GPU."""
    if backend == "cpu":
        pytest.skip("such a label raises an error there; test_operators.py looks at the loops' rows")
    monkeypatch.setattr("gclkern.validation.values_may_be_read", lambda tensor: False)
    rows, classes = 6, 37
    options = option_sets(rows, classes)["everything"] | {"plan": plan, "reduction": "none", "backend": backend}
    features, weight, target = matrix(rows, 8, device=device), matrix(classes, 8, device=device, seed=1), labels(rows, classes)
    leaf, good = features.clone().requires_grad_(), features.clone().requires_grad_()
    right = call(good, weight, target, options)
    changed = target.index_fill(0, torch.tensor([3]), wrong)
    loss = call(leaf, weight, changed, options)
    loss.sum().backward()
    right.sum().backward()
    others = torch.arange(rows) != 3
    assert leaf.grad is not None and good.grad is not None
    assert loss[3].isnan() and loss[others].equal(right[others])
    torch.testing.assert_close(leaf.grad[others], good.grad[others], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_more_logits_than_32_bits_count(plan: str) -> None:
    """N * C > 2^31: the last sample's loss and gradient equal those of the sample alone, at its place in the grid."""
    rows, classes, width = 2200, 1_000_003, 16
    features, weight = matrix(rows, width, torch.bfloat16, "cuda"), matrix(classes, width, torch.bfloat16, "cuda", seed=1)
    target, cloud = labels(rows, classes).to("cuda"), vector(classes).to("cuda")
    leaf, tail = features.clone().requires_grad_(), features[-1:].clone().requires_grad_()
    losses = linear_gcl_cross_entropy(leaf, weight, target, cloud, seed=3, reduction="none", plan=plan)
    losses.sum().backward()
    alone = linear_gcl_cross_entropy(tail, weight, target[-1:], cloud, seed=3, row_offset=rows - 1, reduction="none", plan=plan)
    alone.sum().backward()
    assert leaf.grad is not None and tail.grad is not None
    torch.testing.assert_close(losses[-1:], alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(leaf.grad[-1:], tail.grad, rtol=2**-6, atol=2**-8 * float(tail.grad.abs().max()))


@pytest.mark.gpu
def test_float32_follows_the_matmul_precision(plan: str) -> None:
    """tf32 where torch's own products use it: visibly different numbers, within its 10 bits; IEEE float32 otherwise (all other tests)."""
    features, weight, target = matrix(64, 256, device="cuda"), matrix(300, 256, device="cuda", seed=1), labels(64, 300)
    exact = call(features, weight, target, {}, reduction="none", plan=plan, backend="triton")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        fast = call(features, weight, target, {}, reduction="none", plan=plan, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert not fast.equal(exact)
    torch.testing.assert_close(fast, exact, rtol=1e-2, atol=30 * 2**-9)
