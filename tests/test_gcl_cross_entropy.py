"""gcl_cross_entropy against the oracle: every option, dtype and size, and its noise. What every operation promises: test_operations.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gclkern.devices import set_debug
from gclkern.functional import gcl_cross_entropy
from tests.support import oracle
from tests.support.cases import HALVES, LOOPS_SIZES, REDUCTIONS, SIZES, Options, angle_sets, cosines, labels, mixed, moved, option_sets, vector
from tests.support.comparison import ROUNDING, SMALLEST, assert_within, check_logit_loss, noise_error


def call(cosine: Tensor, target: Tensor, options: Options, **more: Any) -> Tensor:
    """The loss with an option set, moved to the device of `cosine`."""
    options = moved({**options, **more}, cosine.device)
    return gcl_cross_entropy(cosine, target.to(cosine.device), options.pop("cloud", None), **options)


def check(cosine: Tensor, target: Tensor, options: Options, upstream: Tensor | None = None, **more: Any) -> None:
    options = {**options, **more}
    check_logit_loss(gcl_cross_entropy, cosine, target, options.pop("cloud", None), upstream, **options)


# ---- values and gradients


@pytest.mark.parametrize("two_targets", [False, True])
def test_a_mean_divides_by_the_weight_of_any_class(two_targets: bool, backend: str, device: torch.device) -> None:
    """The first and the last class included."""
    target = torch.arange(5)
    options: Options = {"weight": vector(5, 0.5, 2.0), **({"target_b": target.flip(0), "lam": 0.3} if two_targets else {})}
    check(cosines(5, 5, device=device), target, options, reduction="mean", backend=backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", option_sets(2, 2))
def test_loss_and_gradients(name: str, reduction: str, backend: str, device: torch.device) -> None:
    rows, classes = 6, 37  # 37: no multiple of a vector, an alignment or a group of the noise
    target = labels(rows, classes)
    target[4] = -100
    upstream = vector(rows, -1.0, 2.0, seed=7) if reduction == "none" else torch.tensor(-0.7)
    check(cosines(rows, classes, device=device), target, option_sets(rows, classes)[name], upstream, reduction=reduction, backend=backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_sixteen_bit_cosines(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    classes = 38 if name == "plain" else 37  # kernels load an even number of 16-bit cosines in pairs
    check(cosines(5, classes, dtype, device), labels(5, classes), option_sets(5, classes)[name], vector(5, 0.5, 2.0), reduction="none", backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", [100, 1000, 8142])
def test_sixteen_bit_cosines_round_to_nearest(dtype: torch.dtype, classes: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds where the interpreter truncates: half the error."""
    monkeypatch.setitem(ROUNDING, dtype, ROUNDING[dtype] / 2)
    check(cosines(16, classes, dtype, "cuda"), labels(16, classes), {}, vector(16, 0.5, 2.0), reduction="none", backend=backend)


@pytest.mark.parametrize("classes", [1, 2, 7, 512, 8142])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_odd_sizes(rows: int, classes: int, backend: str, device: torch.device) -> None:
    """One class gives a loss of 0; 512 is a whole block and tile; 8142 (iNaturalist) is even but no multiple of 4, more than one tile, and has a tail."""
    if rows == 7 and classes == 8142:
        rows = 3  # the oracle draws each number of the noise in Python
    cloud = vector(classes, 0.0, 0.5, seed=6)
    check(cosines(rows, classes, device=device), labels(rows, classes), {"cloud": cloud, "seed": 1}, reduction="mean", backend=backend)


def test_more_rows_than_a_tile(backend: str, device: torch.device) -> None:
    rows = 150
    target = labels(rows, 10)
    target[::7] = -100
    check(cosines(rows, 10, device=device), target, option_sets(rows, 10)["everything"], reduction="mean", backend=backend)


@pytest.mark.triton
def test_programs_that_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large batch makes them: of five tiles of classes two in a program, and none in the last; and all rows of a class in one program."""
    from gclkern.kernels import logit_loss

    rows, classes = 9, 150
    for name, value in (("STATS_COLUMNS", 32), ("PROGRAMS", 4 * rows), ("gradient_splits", lambda *tiles, summing: 1)):
        monkeypatch.setattr(logit_loss, name, value)
    options = angle_sets(rows, classes)["dbm and everything"] | {"class_offset": 8}  # the noise's place, in whole groups
    check(cosines(rows, classes, device=device), labels(rows, classes), options, vector(rows, 0.5, 2.0), reduction="none", backend="triton")


def test_strided_vectors(backend: str, device: torch.device) -> None:
    """Labels, shares, upstream gradients and class vectors need not be contiguous."""
    rows, classes = 5, 9
    options: Options = {
        "weight": vector(2 * classes, 0.1, 2.0)[::2],
        "margin": torch.tensor(0.2).expand(classes),
        "target_b": labels(3 * rows, classes, seed=8)[::3],
        "lam": vector(2 * rows)[::2],
    }
    check(cosines(rows, classes, device=device), labels(2 * rows, classes)[::2], options, vector(2 * rows)[::2], reduction="none", backend=backend)
    check(cosines(rows, classes, device=device), labels(rows, classes), {}, torch.tensor(0.5).expand(rows), reduction="none", backend=backend)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_extreme_logits(scale: float, sign: float, backend: str, device: torch.device) -> None:
    """The target's cosine is 1 and the others -1, or the reverse: losses of 0 and of 2 * scale, no overflow, no NaN."""
    cosine, target = -sign * torch.ones(3, 12, device=device), labels(3, 12)
    cosine[torch.arange(3), target.to(device)] = sign
    for options in ({}, {"gamma": 2.0, "focal_detach": False}, {"gamma": 0.5, "focal_detach": False}, {"label_smoothing": 0.1}):
        check(cosine, target, options, vector(3, 0.5, 1.0), scale=scale, reduction="none", backend=backend)


def test_logits_with_a_large_common_offset(backend: str, device: torch.device) -> None:
    """The softmax does not depend on a common shift; kernels only have this property if they subtract the largest logit."""
    cosine = cosines(4, 15, device=device).round(decimals=3) + 1024
    check(cosine, labels(4, 15), {"scale": 1.0}, reduction="mean", backend=backend)
    check(-cosine, labels(4, 15), {"scale": 1.0}, reduction="mean", backend=backend)


@pytest.mark.parametrize("name", ["plain", "weight_smoothing", "focal_undetached", "everything"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_leaves_the_others_right(bad: float, name: str, backend: str, device: torch.device) -> None:
    rows, classes = 6, 33
    cosine, target = cosines(rows, classes, device=device), labels(rows, classes)
    good = cosine.clone()
    cosine[2, 5] = bad
    target[2] = 7
    cosine, good = cosine.requires_grad_(), good.requires_grad_()
    options = option_sets(rows, classes)[name]
    loss, right = (call(x, target, options, reduction="none", backend=backend) for x in (cosine, good))
    loss.sum().backward()
    right.sum().backward()
    others = torch.arange(rows) != 2
    assert cosine.grad is not None and good.grad is not None
    assert loss[others].equal(right[others]) and loss[others].isfinite().all()
    assert cosine.grad[others].equal(good.grad[others])
    assert loss[2].isnan() and cosine.grad[2].isnan().any()
    assert call(cosine.detach(), target, options, reduction="mean", backend=backend).isnan()
    assert call(cosine.detach(), target, options, reduction="sum", backend=backend).isnan()


def test_a_logit_of_minus_infinity_masks_a_class(backend: str, device: torch.device) -> None:
    """Masked classes, as torch treats them: probability and gradient 0 for a class, an infinite loss for a target."""
    cosine, target = cosines(4, 33, device=device), labels(4, 33)
    cosine[0, (target[0] + 1) % 33] = cosine[1, 7] = float("-inf")
    target[1] = 7
    loss = call(cosine, target, {}, reduction="none", backend=backend)
    expected = F.cross_entropy(30 * cosine.cpu().double(), target, reduction="none")
    assert_within(loss, expected, 2e-5, 2e-6, "loss")  # float32 logits of 30
    leaf = cosine[:1].clone().requires_grad_()
    call(leaf, target[:1], {}, backend=backend).backward()
    assert leaf.grad is not None and leaf.grad[0, (target[0] + 1) % 33] == 0 and leaf.grad.isfinite().all()


# ---- ignored samples, weights and denominators


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["weight_smoothing", "everything"])
def test_a_sample_is_ignored_by_either_target(name: str, reduction: str, backend: str, device: torch.device) -> None:
    rows, classes = 6, 19
    options = {**option_sets(rows, classes)[name], **mixed(rows, classes)}
    first, second = labels(rows, classes), options["target_b"]
    ignore_index = 3  # a class may be the ignored label
    first[first == 3], second[second == 3] = 4, 5
    first[1] = second[3] = ignore_index
    cosine = cosines(rows, classes, device=device)
    cosine[1] = float("nan")  # what an ignored row holds must not matter
    check(cosine, first, options, vector(rows) if reduction == "none" else None, ignore_index=ignore_index, reduction=reduction, backend=backend)
    leaf = cosine.clone().requires_grad_()
    call(leaf, first, options, ignore_index=ignore_index, reduction="sum", backend=backend).backward()
    assert leaf.grad is not None and leaf.grad[[1, 3]].eq(0).all() and leaf.grad[0].ne(0).all()


@pytest.mark.parametrize("name", ["plain", "weight", "focal", "mixed"])
def test_all_samples_ignored(name: str, backend: str, device: torch.device) -> None:
    """0 for the sum, NaN for the mean, as torch; the gradient is 0 for both."""
    rows, classes = 3, 8
    target, options = torch.full((rows,), -100), option_sets(rows, classes)[name]
    for reduction in REDUCTIONS:
        leaf = cosines(rows, classes, device=device).requires_grad_()
        loss = call(leaf, target, options, reduction=reduction, backend=backend)
        assert loss.isnan().all() if reduction == "mean" else loss.eq(0).all()
        loss.sum().backward()
        assert leaf.grad is not None
        ours = leaf.grad.clone()
        leaf.grad = None
        F.cross_entropy(leaf, target.to(device), reduction=reduction).sum().backward()
        torch.testing.assert_close(ours, leaf.grad, rtol=0.0, atol=0.0)
        assert ours.eq(0).all()


def test_all_weights_of_the_batch_are_zero(backend: str, device: torch.device) -> None:
    weight, target = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 0])
    cosine = cosines(2, 3, device=device)
    assert call(cosine, target, {"weight": weight}, backend=backend).isnan()
    assert call(cosine, target, {"weight": weight}, reduction="sum", backend=backend).eq(0)


# ---- near probability 1


def confident(rows: int, classes: int, rest: float) -> tuple[Tensor, Tensor]:
    """Cosines whose target, at scale 30, has probability about 1 - rest."""
    target = labels(rows, classes)
    cosine = 0.2 * cosines(rows, classes)
    cosine[torch.arange(rows), target] = (torch.logsumexp(30 * cosine.scatter(1, target[:, None], -10.0), 1) - torch.tensor(rest).log()) / 30
    return cosine, target


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rest", [2e-4, 1e-6, 1e-9])
def test_the_targets_gradient_keeps_its_digits(rest: float, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """At p = 0.9998 the relative error is at most 1e-5 in float32; 1 - p would have lost 4 digits there, and all of them at 1 - p = 1e-9.

    16-bit outputs add their rounding: 2^-8 for bfloat16 on a GPU, twice that under the interpreter, which truncates.
    """
    if dtype == torch.float16 and rest < 1e-6:
        pytest.skip("the gradient is below float16's smallest number")
    cosine, target = confident(8, 50, rest)
    cosine = cosine.to(dtype)
    leaf = cosine.clone().to(device).requires_grad_()
    gcl_cross_entropy(leaf, target.to(device), reduction="sum", backend=backend).backward()
    double = cosine.double().requires_grad_()
    oracle.gcl_cross_entropy(double, target, reduction="sum").backward()
    assert leaf.grad is not None and double.grad is not None
    place = (torch.arange(8), target)
    assert 1 - torch.softmax(30 * double.detach(), 1)[place].max() < 2 * rest
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    if dtype != torch.float32:
        allowed = allowed * (1 if device.type == "cuda" else 2) + 1e-5
    assert_within(leaf.grad.cpu()[place], double.grad[place], SMALLEST[dtype], allowed, "gradient of the target's cosine")


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("detach", [True, False])
def test_the_focal_factor_keeps_its_digits(gamma: float, detach: bool, backend: str, device: torch.device) -> None:
    """(1 - exp(-l))^gamma at a loss of 2e-4: -expm1 keeps the digits that 1 - exp would lose."""
    cosine, target = confident(8, 50, 2e-4)
    options = {"gamma": gamma, "focal_detach": detach, "reduction": "none"}
    leaf, double = cosine.clone().to(device).requires_grad_(), cosine.double().requires_grad_()
    loss = gcl_cross_entropy(leaf, target.to(device), backend=backend, **options)  # type: ignore[arg-type]
    expected = oracle.gcl_cross_entropy(double, target, **options)  # type: ignore[arg-type]
    loss.sum().backward()
    expected.sum().backward()
    assert leaf.grad is not None and double.grad is not None
    # The factor's power multiplies a loss's relative error of 1e-5 by 1 + gamma.
    assert_within(loss, expected, 0.0, (1 + gamma) * 1e-5, "focal loss")
    assert_within(leaf.grad, double.grad, 0.0, (1 + gamma) * 1e-5, "gradient")


# ---- the noise


@pytest.mark.parametrize(("row_offset", "class_offset"), [(0, 0), (1, 3), (2**31 + 7, 13), (2**33 + 1, 2**20 + 5), (2**40, 2**31 + 6)])
def test_noise_of_an_offset(row_offset: int, class_offset: int, backend: str, device: torch.device) -> None:
    options = {"cloud": vector(19, 0.1, 0.5), "seed": 2**40 + 5, "row_offset": row_offset, "class_offset": class_offset}
    check(cosines(3, 19, device=device), labels(3, 19), options, vector(3, 0.5, 1.0), reduction="none", backend=backend)


def test_seed_as_a_tensor(backend: str, device: torch.device) -> None:
    cosine, target, options = cosines(3, 20, device=device), labels(3, 20), {"cloud": vector(20)}
    as_int = call(cosine, target, options, seed=2**40 + 5, backend=backend)
    as_tensor = call(cosine, target, options, seed=torch.tensor(2**40 + 5), backend=backend)
    assert as_int.equal(as_tensor)
    assert not as_int.equal(call(cosine, target, options, seed=2**40 + 6, backend=backend))


def test_a_split_batch_has_the_same_losses(backend: str, device: torch.device) -> None:
    """Data parallel ranks share a seed and give their place by row_offset."""
    rows, classes = 9, 37
    cosine, target, options = cosines(rows, classes, device=device), labels(rows, classes), {"cloud": vector(classes), "seed": 4, "backend": backend}
    whole = call(cosine, target, options, reduction="none", row_offset=100)
    parts = [call(cosine[i:j], target[i:j], options, reduction="none", row_offset=100 + i) for i, j in ((0, 2), (2, 3), (3, 9))]
    # The noise is bitwise the same; a row's sum may be added up in another order.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0.0)


def test_seed_none_follows_torchs_generator(backend: str, device: torch.device) -> None:
    cosine, target, options = cosines(3, 20, device=device), labels(3, 20), {"cloud": vector(20), "backend": backend}
    torch.manual_seed(12)
    first, second = call(cosine, target, options), call(cosine, target, options)
    torch.manual_seed(12)
    assert call(cosine, target, options).equal(first)
    assert not first.equal(second)
    torch.manual_seed(13)
    assert not call(cosine, target, options).equal(first)


def test_backward_does_not_redraw(backend: str, device: torch.device) -> None:
    """The gradient belongs to the noise of its own forward, whatever is drawn in between."""
    leaf, target, options = cosines(3, 20, device=device).requires_grad_(), labels(3, 20), {"cloud": vector(20), "backend": backend}
    seed = torch.tensor(77, device=device)
    expected = torch.autograd.grad(call(leaf, target, options, seed=77), leaf)[0]
    loss = call(leaf, target, options, seed=seed)
    call(leaf, target, options, seed=None)
    torch.rand(5, device=device)
    assert torch.autograd.grad(loss, leaf)[0].equal(expected)


def test_no_cloud_draws_nothing(backend: str, device: torch.device) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    call(cosines(3, 20, device=device), labels(3, 20), {}, backend=backend)
    assert torch.rand(4, device=device).equal(expected)


# ---- promises


def test_only_the_bias_wants_a_gradient(backend: str, device: torch.device) -> None:
    """Logit adjustment learned on frozen cosines, and cosines with a fixed bias."""
    cosine, target = cosines(5, 12, device=device), labels(5, 12)
    bias = vector(12, -1.0, 1.0).to(device).requires_grad_()
    gcl_cross_entropy(cosine, target.to(device), bias=bias, reduction="sum", backend=backend).backward()
    double = bias.detach().cpu().double().requires_grad_()
    oracle.gcl_cross_entropy(cosine.cpu().double(), target, bias=double, reduction="sum").backward()
    assert bias.grad is not None and double.grad is not None
    assert_within(bias.grad, double.grad, 1e-5, 1e-5, "gradient of bias")  # sums over five rows, each at most 2 with a float32 logit's error of 4e-6


def test_a_drawn_seed_under_compile(backend: str, device: torch.device) -> None:
    """seed=None draws inside the graph, a new one in every call."""
    torch.compiler.reset()
    target, cloud = labels(6, 23).to(device), vector(23).to(device)
    compiled = torch.compile(lambda x: gcl_cross_entropy(x, target, cloud, backend=backend), fullgraph=True, backend="aot_eager")
    cosine = cosines(6, 23, device=device)
    assert not compiled(cosine).equal(compiled(cosine))


# ---- backends


@pytest.mark.triton
def test_the_kernels_refuse_cpu_tensors_outside_the_interpreter() -> None:
    code = """
import torch
from gclkern.functional import gcl_cross_entropy
try:
    gcl_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), backend="triton")
except ValueError as error:
    print("refused:", error)
assert gcl_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "triton" in done.stdout and "cpu" in done.stdout


# ---- any combination


@st.composite
def problems(draw: st.DrawFn, backend: str) -> tuple[Tensor, Tensor, Options]:
    classes = draw(st.sampled_from(LOOPS_SIZES if backend == "cpu" else SIZES))
    rows = draw(st.integers(1, 5 if classes <= 65 else 2))  # the oracle goes over classes in Python
    seed = draw(st.integers(0, 2**16))
    options: Options = {"scale": draw(st.sampled_from([0.5, 1.0, 16.0, 30.0])), "reduction": draw(st.sampled_from(REDUCTIONS))}
    if draw(st.booleans()):
        options |= {"cloud": vector(classes, 0.0, 1.0, seed + 1), "seed": draw(st.integers(0, 2**63 - 1)), "row_offset": draw(st.integers(0, 2**40))}
        options["class_offset"] = draw(st.sampled_from([0, 1, 2**20 + 5, 2**31 + 6]))
    angles = draw(st.sampled_from(["", "", "angular", "difficulty_margin"]))
    if angles:
        options |= {angles: True, "easy_margin": draw(st.booleans())}
    if draw(st.booleans()):
        options["margin"] = draw(st.sampled_from([0.35, vector(classes, 0.0, 0.5, seed + 2)]))
    if draw(st.booleans()):
        options["bias"] = vector(classes, -4.0, 4.0, seed + 3).requires_grad_(not angles)  # beside angles it has none
    if draw(st.booleans()):
        options["weight"] = vector(classes, 0.2, 2.0, seed + 4)
    if draw(st.booleans()):
        options |= {"gamma": draw(st.sampled_from([0.5, 1.0, 2.0, 3.5])), "focal_detach": draw(st.booleans())}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.9, vector(classes, 0.0, 0.4, seed + 8)]))
    target = labels(rows, classes, seed + 5)
    if draw(st.booleans()):
        options |= {"target_b": labels(rows, classes, seed + 6), "lam": vector(rows, seed=seed + 7)}
    for ignored in (target, options.get("target_b")):
        if ignored is not None and draw(st.booleans()):
            ignored[draw(st.integers(0, rows - 1))] = -100
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALVES]))
    # the derivative of an added angle grows without bound towards a cosine of 1, and with it the error
    cosine = ((0.9 if angles else 1.0) * cosines(rows, classes, seed=seed)).to(dtype)
    return (cosine.T.contiguous().T if draw(st.booleans()) else cosine), target, options


@given(data=st.data())
def test_any_problem(data: st.DataObject, backend: str, device: torch.device) -> None:
    cosine, target, options = data.draw(problems(backend))
    check(cosine.to(device), target, options, backend=backend)


# ---- labels that are not read, as on a GPU


@pytest.mark.parametrize("wrong", [-1, 37, 10**12, -(2**40)])
def test_a_label_out_of_range_makes_its_row_nan(wrong: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu":
        pytest.skip("such a label raises an error there; test_operators.py looks at the loops' rows")
    monkeypatch.setattr("gclkern.validation.values_may_be_read", lambda tensor: False)
    rows, classes = 6, 37
    options = option_sets(rows, classes)["everything"]
    cosine, target = cosines(rows, classes, device=device), labels(rows, classes)
    leaf, good = cosine.clone().requires_grad_(), cosine.clone().requires_grad_()
    right = call(good, target, options, reduction="none", backend=backend)
    changed = target.index_fill(0, torch.tensor([3]), wrong)
    loss = call(leaf, changed, options, reduction="none", backend=backend)
    loss.sum().backward()
    right.sum().backward()
    others = torch.arange(rows) != 3
    assert leaf.grad is not None and good.grad is not None
    assert loss[3].isnan() and loss[others].equal(right[others])
    assert leaf.grad[others].equal(good.grad[others])


@pytest.mark.triton
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_rows_than_one_program_finishes(reduction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of batches of more than 512 rows, at a small size."""
    from gclkern.kernels import row_loss

    monkeypatch.setattr(row_loss, "MAX_ROWS_OF_ONE_PROGRAM", 2)
    monkeypatch.setattr(row_loss, "_ROWS", 4)
    options = option_sets(9, 11)
    for name in ("weight", "everything"):
        check(cosines(9, 11, device=device), labels(9, 11), options[name], torch.tensor(-0.7), reduction=reduction, backend="triton")


# ---- what only a GPU shows


@pytest.mark.gpu
def test_debug_mode_reads_labels_on_a_gpu() -> None:
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"target\[1\] is 9"):
            gcl_cross_entropy(cosines(2, 5, device="cuda"), torch.tensor([0, 9], device="cuda"))
    finally:
        set_debug(False)


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    """A captured step replays with new cosines and, seeded from torch's generator, with new noise."""
    rows, classes = 8, 50
    leaf, target, cloud = cosines(rows, classes, device="cuda").requires_grad_(), labels(rows, classes).to("cuda"), vector(classes).to("cuda")

    def step() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        noisy = gcl_cross_entropy(leaf, target, cloud, margin=0.1)
        clean = gcl_cross_entropy(leaf, target, margin=0.1)
        clean.backward()
        return noisy, clean

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()  # all that is captured: a kernel that is loaded for the first time may end a capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy, clean = step()
    graph.replay()
    first = noisy.clone()
    graph.replay()
    assert not noisy.equal(first)
    with torch.no_grad():
        leaf.mul_(0.5)
    graph.replay()
    expected = gcl_cross_entropy(leaf, target, margin=0.1)
    torch.testing.assert_close(clean, expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(expected, leaf)[0], rtol=0.0, atol=0.0)


@pytest.mark.gpu
def test_more_logits_than_32_bits_count() -> None:
    """N * C > 2^31: the last row's loss and gradient equal those of the row alone, at its place in the grid."""
    rows, classes = 2200, 1_000_003
    generator = torch.Generator("cuda").manual_seed(0)
    cosine = torch.rand(rows, classes, dtype=torch.bfloat16, device="cuda", generator=generator)
    target = torch.randint(classes, (rows,), device="cuda", generator=generator)
    cloud = torch.rand(classes, device="cuda", generator=generator)
    tail = cosine[-1:].clone().requires_grad_()
    alone = gcl_cross_entropy(tail, target[-1:], cloud, seed=3, row_offset=rows - 1, reduction="none")
    alone.sum().backward()
    leaf = cosine.requires_grad_()
    losses = gcl_cross_entropy(leaf, target, cloud, seed=3, reduction="none")
    losses.sum().backward()
    assert leaf.grad is not None and tail.grad is not None
    torch.testing.assert_close(losses[-1:], alone, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(leaf.grad[-1:], tail.grad, rtol=2**-7, atol=0.0)  # one step of bfloat16


@pytest.mark.gpu
def test_noise_on_a_gpu_is_within_its_bound(backend: str) -> None:
    """With cosines of 0 and two classes, the loss is a function of the difference of two draws."""
    cosine, target, cloud = torch.zeros(64, 2, device="cuda"), torch.zeros(64, dtype=torch.int64), torch.ones(2)
    losses = gcl_cross_entropy(cosine, target.to("cuda"), cloud.to("cuda"), scale=1.0, seed=9, reduction="none", backend=backend)
    expected = oracle.gcl_cross_entropy(cosine.cpu().double(), target, cloud.double(), scale=1.0, seed=9, reduction="none")
    assert_within(losses, expected, 2 * noise_error(cosine.device), 0.0, "losses")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["weight", "lam"])
def test_values_on_a_gpu_are_read_in_debug_mode_only(name: str) -> None:
    cosine, target = torch.zeros(3, 5, device="cuda"), torch.tensor([0, 4, 2], device="cuda")
    arguments: dict[str, Any] = {"weight": torch.full((5,), -1.0)} if name == "weight" else {"target_b": target, "lam": torch.tensor([0.5, 2.0, 1.0])}
    arguments = {key: value.to("cuda") for key, value in arguments.items()}
    gcl_cross_entropy(cosine, target, **arguments)
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            gcl_cross_entropy(cosine, target, **arguments)
    finally:
        set_debug(False)
