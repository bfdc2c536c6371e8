"""The DRO-LT bound against its formula, summed class by class in float64, and its module. What every operation promises: test_operations.py."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.machine_code.launches import Launches
from gclkern.devices import set_debug
from gclkern.functional import class_centroids, dro_lt_loss
from gclkern.kernels.terms import PREFIXES
from gclkern.losses import DROLTLoss
from tests.support import oracle
from tests.support.cases import HALVES, REDUCTIONS
from tests.support.comparison import ROUNDING

# numpy, which interprets the kernels, warns of what a GPU computes in silence and a later selection discards.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def problem(rows: int, classes: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels, centroids, epsilon (C,)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    return features, target, torch.randn(classes, dim, generator=generator), torch.rand(classes, generator=generator)


def check(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, backend: str, device: torch.device,
    *, upstream: Tensor | None = None, rtol: float = 2e-5, **options: Any,
) -> None:  # fmt: skip
    """Loss and both gradients; `rtol` is relative to the largest gradient of a sample, since its parts cancel."""
    leaf = features.to(device).detach().requires_grad_()
    radius = epsilon.to(device).detach().requires_grad_()
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = dro_lt_loss(leaf, target.to(device), centroids.to(device), radius, backend=backend, **moved)
    double, double_radius = features.double().requires_grad_(), epsilon.double().requires_grad_()
    expected = oracle.dro_lt_loss(double, target, centroids.double(), double_radius, **options)
    upstream = torch.tensor(1.0) if upstream is None else upstream
    loss.backward(upstream.to(loss))
    expected.backward(upstream.double())
    assert leaf.grad is not None and radius.grad is not None and double.grad is not None and double_radius.grad is not None
    assert loss.dtype == torch.float32 and leaf.grad.dtype == features.dtype and radius.grad.shape == epsilon.shape
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=rtol, atol=1e-6)
    size = double.grad.abs().amax(1, keepdim=True).expand_as(double.grad)
    error = (leaf.grad.cpu().double() - double.grad).abs()
    # float16 holds nothing below 2^-24
    assert (error <= (rtol + ROUNDING[features.dtype]) * size + (2**-24 if features.dtype == torch.float16 else 1e-9)).all(), float((error / size).max())
    torch.testing.assert_close(radius.grad.cpu().double(), double_radius.grad, rtol=rtol, atol=1e-7)


# ---- values and gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["epsilon per class", "one epsilon"])
@pytest.mark.parametrize("classes", [3, 40], ids=["classes with many samples", "more classes than samples"])
def test_loss_and_gradients(classes: int, shared: bool, weighted: bool, reduction: str, backend: str, device: torch.device) -> None:
    features, target, centroids, epsilon = problem(21, classes, 19)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(5)) + 0.1 if weighted else None
    upstream = torch.linspace(-1.0, 2.0, 21) if reduction == "none" else torch.tensor(-0.7)
    epsilon = epsilon[0] if shared else epsilon
    check(features, target, centroids, epsilon, backend, device, upstream=upstream, temperature=0.7, class_weight=weight, reduction=reduction)


@pytest.mark.parametrize("shared", [False, True], ids=["epsilon per class", "one epsilon"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_with_unused_rows(reduction: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which does not say how many classes are in the batch: 9 rows for 3 classes, with a last class that stays out whatever its centroid holds."""
    monkeypatch.setattr("gclkern.torch_backend.dro_lt.is_on_cpu", lambda tensor: False)
    features, _, centroids, epsilon = problem(9, 12, 7)
    target = torch.tensor([4, 4, 7, 11, 0, 7, 4, 7, 0])
    weight = torch.linspace(1.0, 2.0, 12)
    weight[11] = 0.0
    upstream = torch.linspace(-1.0, 2.0, 9) if reduction == "none" else torch.tensor(-0.7)
    radius = epsilon[0] if shared else epsilon
    check(features, target, centroids, radius, "torch", torch.device("cpu"), upstream=upstream, temperature=0.7, class_weight=weight, reduction=reduction)
    leaf = features.requires_grad_()
    expected = torch.autograd.grad(dro_lt_loss(leaf, target, centroids, radius, class_weight=weight, reduction="sum", backend="torch"), leaf)[0]
    centroids[11] = float("nan")
    grad = torch.autograd.grad(dro_lt_loss(leaf, target, centroids, radius, class_weight=weight, reduction="sum", backend="torch"), leaf)[0]
    assert grad.equal(expected)


@given(
    rows=st.integers(1, 24), classes=st.integers(1, 32), dim=st.integers(1, 140), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 4.0]), reduction=st.sampled_from(["mean", "sum"]), data=st.data(),
)  # fmt: skip
def test_any_shape(
    rows: int, classes: int, dim: int, seed: int, temperature: float, reduction: str, data: st.DataObject, backend: str, device: torch.device
) -> None:
    features, target, centroids, epsilon = problem(rows, classes, dim, seed)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(seed)) + 0.1
    if data.draw(st.booleans(), "a class without weight") and len(set(target.tolist())) > 1:
        weight[target[0]] = 0.0
    check(features, target, centroids, epsilon, backend, device, temperature=temperature, class_weight=weight, reduction=reduction, rtol=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize("tile", [(16, 32, 32), (16, 16, 32), (8, 8, 128)], ids=str)
def test_every_tile(tile: tuple[int, int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each shape in all three dimensions, the last of them partly empty; the tile's shape depends on the batch size."""
    from gclkern.kernels import dro_lt

    monkeypatch.setattr(dro_lt, "_distance_tile", lambda num_anchors, num_rows: tile)
    check(*problem(43, 60, 135), "triton", device)


@pytest.mark.triton
def test_large_batches_get_large_tiles() -> None:
    from gclkern.kernels import dro_lt

    assert dro_lt._distance_tile(4096, 4096) == (16, 32, 32)
    assert dro_lt._distance_tile(512, 512) == (16, 16, 32)
    assert dro_lt._distance_tile(100, 128) == (8, 8, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "classes", "dim"), [(512, 8142, 2048), (1024, 2000, 257), (1023, 10, 64)])
def test_large_batches(rows: int, classes: int, dim: int, device: torch.device) -> None:
    """The large tiles, against the torch backend in float64."""
    features, target, centroids, epsilon = (part.to(device) for part in problem(rows, classes, dim))
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaf, radius = features.to(dtype).requires_grad_(), epsilon.to(dtype).requires_grad_()
        loss = dro_lt_loss(leaf, target, centroids, radius, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (leaf, radius))))
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_features(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(*problem(21, 6, 37, dtype=dtype), backend, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_gradients_round_to_nearest(dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds where the interpreter truncates: half the error."""
    monkeypatch.setitem(ROUNDING, dtype, ROUNDING[dtype] / 2)
    check(*problem(130, 60, 200, dtype=dtype), backend, device)


# ---- where digits are lost


def test_a_sample_at_its_centroid_has_no_distance_and_no_gradient(backend: str, device: torch.device) -> None:
    """That sample and a copy of it alone in the batch: two terms of log(2) / 2, and a gradient of exactly 0 where the norm has none."""
    centroids = torch.randn(4, 37)
    features = centroids[[2, 2]].to(device).requires_grad_()
    loss = dro_lt_loss(features, torch.tensor([2, 2], device=device), centroids.to(device), 0.3, reduction="none", backend=backend)
    torch.testing.assert_close(loss.cpu(), torch.full((2,), 0.5 * math.log(2.0)))
    loss.sum().backward()
    assert features.grad is not None and features.grad.eq(0).all()


def test_a_sample_at_its_centroid_among_others(backend: str, device: torch.device) -> None:
    features, target, centroids, epsilon = problem(12, 4, 10)
    features[5] = centroids[target[5]]
    check(features, target, centroids, epsilon, backend, device)


def test_far_from_the_origin(backend: str, device: torch.device) -> None:
    """1e4 away the expanded square |mu|^2 + |z|^2 - 2 mu.z has no correct digit of a distance of 0.1; differences keep what the inputs hold."""
    features, target, centroids, epsilon = problem(14, 4, 40)
    check(features * 0.1 + 1e4, target, centroids * 0.1 + 1e4, epsilon, backend, device, temperature=0.1)


def test_close_to_its_centroid_and_far_from_the_others(backend: str, device: torch.device) -> None:
    """The direction of the gradient is (z - mu) / |z - mu|, here a millionth of the spread of the centroids."""
    _, target, centroids, epsilon = problem(14, 4, 40)
    near = torch.randint(1, 9, (14, 40), generator=torch.Generator().manual_seed(1)) * 2.0**-20
    centroids = (centroids * 64).round() / 64  # so that centroid + near is exact
    check(centroids[target] + near, target, centroids, epsilon, backend, device, temperature=2.0)


def test_small_temperature(backend: str, device: torch.device) -> None:
    """Distances of 20 over a temperature of 0.05: exp(-400) is 0 in float32, and log(sum(exp)) would be -inf."""
    features, target, centroids, epsilon = problem(16, 5, 200)
    check(features, target, centroids, epsilon, backend, device, temperature=0.05, rtol=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_probability_near_one_keeps_the_digits_of_the_rest(temperature: float, backend: str, device: torch.device) -> None:
    """A lone sample much nearer than the others: loss and gradients are a sum of about 1e-9 (1e-12), which 1 - p would round to 0.

    So would a difference of two equal logits, where a fused multiply-add sees one of them before its product with 1 / temperature is rounded.
    """
    centroids = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    features = torch.tensor([[0.0, 1.0], [21.0, 0.0], [0.0, 22.5]])
    target = torch.tensor([0, 1, 1])
    weight = torch.tensor([1.0, 0.0])
    check(features, target, centroids, torch.tensor([0.1, 0.2]), backend, device, temperature=temperature, class_weight=weight)
    mu, here = centroids.to(device), weight.to(device)
    loss = dro_lt_loss(features.to(device), target.to(device), mu, 0.1, temperature=temperature, class_weight=here, backend=backend)
    double = dro_lt_loss(features.double(), target, centroids, 0.1, temperature=temperature, class_weight=weight)
    assert 0 < double < 1e-8
    assert abs(loss.item() / double.item() - 1) < 1e-5


def test_gradient_of_epsilon_is_never_negative(backend: str, device: torch.device) -> None:
    features, target, centroids, epsilon = (part.to(device) for part in problem(30, 12, 8))
    epsilon.requires_grad_()
    dro_lt_loss(features, target, centroids, epsilon, temperature=0.5, backend=backend).backward()
    present = torch.zeros(12, dtype=torch.bool, device=device).index_fill_(0, target, True)
    assert epsilon.grad is not None and epsilon.grad[present].gt(0).all() and epsilon.grad[~present].eq(0).all()


def test_one_sample(backend: str, device: torch.device) -> None:
    check(*problem(1, 3, 7), backend, device)


# ---- classes that stay out


def test_a_class_of_weight_0_stays_out_whatever_its_centroid_holds(backend: str, device: torch.device) -> None:
    features, target, centroids, epsilon = problem(15, 4, 9, seed=1)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5])  # class 0, which also stands where kernels pad
    check(features, target, centroids, epsilon, backend, device, class_weight=weight)
    centroids[0] = float("nan")
    leaf = features.to(device).requires_grad_()
    terms = dro_lt_loss(leaf, target.to(device), centroids.to(device), 0.5, class_weight=weight.to(device), reduction="none", backend=backend)
    terms.sum().backward()
    assert terms[target == 0].eq(0).all() and terms[target != 0].gt(0).all()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad[target == 0].ne(0).any(), "its samples are still told apart from others"


def test_all_classes_out(backend: str, device: torch.device) -> None:
    """0 for the sum, NaN for the mean, as torch's cross entropy; the gradient is 0."""
    features, target, centroids, epsilon = (part.to(device) for part in problem(5, 3, 4))
    features.requires_grad_()
    for reduction, value in (("sum", 0.0), ("mean", float("nan")), ("none", 0.0)):
        loss = dro_lt_loss(features, target, centroids, epsilon, class_weight=torch.zeros(3, device=device), reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), features)
        assert grad.eq(0).all()


def operators(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        importlib.import_module("gclkern.kernels.dro_lt")
    return getattr(torch.ops.gclkern, f"{PREFIXES[backend]}dro_lt_forward"), getattr(torch.ops.gclkern, f"{PREFIXES[backend]}dro_lt_backward")


@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**62)])
def test_a_label_out_of_range_spoils_its_own_row_only(wrong: int, backend: str, device: torch.device) -> None:
    """As on a GPU, where the public function does not read labels; the operators behave so on every device."""
    features, target, centroids, epsilon = (part.to(device) for part in problem(9, 4, 6))
    target[3] = wrong
    forward, backward = operators(backend)
    terms, saved = forward(features, target, centroids, epsilon, None, 1.0, "none")
    grad, _ = backward(torch.ones(9, device=device), features, target, centroids, epsilon, saved, 1.0, "none", True, True)
    other = torch.arange(9, device=device) != 3
    assert terms[3].isnan() and grad[3].isnan().all() and terms[other].isfinite().all() and grad[other].isfinite().all()
    weighted, _ = forward(features, target, centroids, epsilon, torch.ones(4, device=device), 1.0, "none")
    torch.testing.assert_close(weighted, terms, equal_nan=True)
    # among the others it counts as a sample of no class: as one of a class without weight
    out_of_range = target.clone()
    out_of_range[3] = 4
    padded_centroids, weight = torch.cat((centroids, centroids[:1])), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], device=device)
    expected, _ = forward(features, out_of_range, padded_centroids, torch.cat((epsilon, epsilon[:1])), weight, 1.0, "none")
    torch.testing.assert_close(terms[other], expected[other])


@pytest.mark.gpu
def test_a_label_out_of_range_on_a_gpu(device: torch.device) -> None:
    features, target, centroids, epsilon = (part.to(device) for part in problem(9, 4, 6))
    target[3] = 4
    assert dro_lt_loss(features, target, centroids, epsilon, reduction="none").isnan().tolist() == [i == 3 for i in range(9)]
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"target\[3\] is 4"):
            dro_lt_loss(features, target, centroids, epsilon)
    finally:
        set_debug(False)


# ---- contracts


@pytest.mark.triton
def test_kernels_run(launches: Launches, device: torch.device) -> None:
    features, target, centroids, epsilon = (part.to(device) for part in problem(9, 4, 6))
    dro_lt_loss(features.requires_grad_(), target, centroids, epsilon.requires_grad_(), backend="triton").backward()
    assert launches.names == [
        "_leaders_kernel", "_anchors_kernel", "_distance_kernel", "_softmax_kernel", "_reduce_kernel", "_pull_kernel", "_features_kernel"
    ]  # fmt: skip


# ---- arguments


# ---- the module


def test_module_learns_epsilon(device: torch.device) -> None:
    module = DROLTLoss([500, 50, 5, 2]).to(device)
    assert isinstance(module.epsilon, torch.nn.Parameter) and module.epsilon.tolist() == [0.5] * 4
    features, target, centroids, _ = (part.to(device) for part in problem(9, 4, 6))
    torch.testing.assert_close(module(features, target, centroids), dro_lt_loss(features, target, centroids, 0.5))
    with torch.no_grad():
        module.epsilon.fill_(-1.0)
    torch.testing.assert_close(module(features, target, centroids), dro_lt_loss(features, target, centroids, 0.0))
    assert list(module.state_dict()) == ["epsilon"]


def test_module_with_constants() -> None:
    features, target, centroids, _ = problem(9, 4, 6)
    counts = [400, 100, 25, 4]
    root = DROLTLoss(counts, epsilon="sqrt", base_epsilon=2.0, temperature=0.5)
    torch.testing.assert_close(root(features, target, centroids), dro_lt_loss(features, target, centroids, torch.tensor([0.1, 0.2, 0.4, 1.0]), temperature=0.5))
    number = DROLTLoss(counts, epsilon=0.25, class_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), reduction="none")
    expected = dro_lt_loss(features, target, centroids, 0.25, class_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), reduction="none")
    torch.testing.assert_close(number(features, target, centroids), expected)
    assert not list(number.parameters()) and not number.state_dict() and "epsilon=0.25" in repr(number) and "'sqrt'" in repr(root)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_constants_stay_float32(cast: str) -> None:
    arguments: dict[str, Any] = {"class_counts": [400, 100, 25, 7], "epsilon": "sqrt", "class_weight": torch.tensor([1.0, 2.3, 3.1, 4.7])}
    module, untouched = DROLTLoss(**arguments), DROLTLoss(**arguments)
    getattr(torch.nn.Sequential(module), cast)()
    for name, buffer in untouched.named_buffers():
        assert module.get_buffer(name).dtype == torch.float32 and torch.equal(module.get_buffer(name), buffer)


def test_module_leaves_unseen_classes_out() -> None:
    features, target, _, _ = problem(9, 4, 6)
    seen = target != 1
    assert not seen.all()
    centroids, counts = class_centroids(features[seen], target[seen], 4)
    for weight in (None, torch.tensor([1.0, 2.0, 3.0, 4.0])):
        loss = DROLTLoss([9, 8, 7, 6], class_weight=weight)(features, target, centroids, counts)
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        torch.testing.assert_close(loss, dro_lt_loss(features, target, centroids, 0.5, class_weight=mask if weight is None else mask * weight))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_counts": [3, 0]}, ValueError, r"class_counts\[1\] is 0"),
        ({"epsilon": "fixed"}, ValueError, "epsilon must be one of"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be a finite number"),
        ({"epsilon": 0.1, "base_epsilon": 1.0}, ValueError, r"base_epsilon is given \(1.0\)"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must have shape \(2,\)"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"backend": "numpy"}, ValueError, "backend"),
    ],
)
def test_bad_module_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DROLTLoss(**{"class_counts": [3, 1], **arguments})


def test_module_checks_what_it_is_given() -> None:
    features, target, centroids, _ = problem(9, 4, 6)
    module = DROLTLoss([4, 3, 2])
    with pytest.raises(ValueError, match="centroids must have 3 rows"):
        module(features, target, centroids)
    with pytest.raises(ValueError, match=r"counts must have shape \(3,\)"):
        module(features, target.clamp(max=2), centroids[:3], torch.ones(4))
    with pytest.raises(TypeError, match="counts must be a tensor"):
        module(features, target.clamp(max=2), centroids[:3], [1, 2, 3])
