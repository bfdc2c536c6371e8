"""What only the kernels of the head can get wrong: the edges of 16-bit copies, of addresses and of grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.dlpack

from benchmarks.machine_code.launches import Launches, capture_launches
from gclkern.autograd import HeadLoss
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.kernels.terms import LossTerms
from tests.conftest import GPU, PTX_TARGET
from tests.support.cases import PLANS, Options, labels, vector
from tests.support.comparison import check_head_loss

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("plan", ["materialised", "recompute"])
@pytest.mark.parametrize("length", [1e-9, 1e-4, 1e6])
def test_cosines_beside_float16_features_do_not_depend_on_the_length_of_float32_weights(device: torch.device, plan: str, length: float) -> None:
    torch.manual_seed(0)
    features, directions, target = torch.randn(4, 32, device=device).half(), torch.randn(20, 32, device=device), torch.arange(4, device=device)

    def run(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaf, weight = features.clone().requires_grad_(), (directions * scale).requires_grad_()
        loss = linear_gcl_cross_entropy(leaf, weight, target, scale=10.0, plan=plan, backend="triton")
        loss.backward()
        assert leaf.grad is not None and weight.grad is not None
        return loss.detach(), leaf.grad, weight.grad * scale

    for found, wanted in zip(run(length), run(1.0), strict=True):
        # rounding to float16 (2^-11) and of the gradient to bfloat16 (2^-8), which hits other digits at another length
        assert (found - wanted).norm() <= 2**-6 * wanted.norm()


def test_sixteen_bit_rows_at_an_odd_address_are_not_loaded_in_pairs(launches: Launches, device: torch.device) -> None:
    odd = torch.utils.dlpack.from_dlpack(torch.zeros(81, dtype=torch.float16, device=device)[1:].view(8, 10))
    gcl_cross_entropy(odd, torch.arange(8, device=device), backend="triton")
    assert odd.data_ptr() % 4 == 2
    assert [launch.argument("PAIRED") for launch in launches if launch.name == "_row_stats_kernel"] == [False]


@pytest.mark.parametrize(("value", "expected"), [("high", "tf32"), ("tf32", "tf32"), ("highest", "ieee"), ("ieee", "ieee")])
def test_float32_products_follow_both_settings_of_their_precision(launches: Launches, device: torch.device, value: str, expected: str) -> None:
    """If the new setting chose tf32, torch raises an error when the old setting is read."""
    from gclkern.kernels.products import uses_cublas

    features, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device, requires_grad=True)
    try:
        if value.startswith("high"):
            torch.set_float32_matmul_precision(value)
        else:
            torch.backends.cuda.matmul.fp32_precision = value
        linear_gcl_cross_entropy(features, weight, torch.arange(4, device=device), backend="triton").backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    products = [launch for launch in launches if "PRECISION" in launch.kernel.arg_names]
    assert len(products) == (2 if uses_cublas(torch.float32, torch.float32, device) else 3)
    assert {launch.argument("PRECISION") for launch in products} == {expected}


compiled = pytest.mark.skipif(not GPU and PTX_TARGET is None, reason="Triton's interpreter has neither wide tiles nor tf32: test_compiled_kernels.py runs this")


@compiled
@pytest.mark.parametrize(("plan", "angular"), [*((plan, False) for plan in PLANS), ("recompute", True)])
def test_wide_tiles(plan: str, angular: bool, device: torch.device, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 x 256, which products of 16 bits take on Hopper, with rows, classes and dimensions that end within one; angles take 64 x 64."""
    from gclkern.kernels import products, runtime

    monkeypatch.setattr(products, "MULTIPROCESSORS", 1)  # so that few classes are enough for the weights' gradient
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(size, 264, generator=generator).to(device, torch.bfloat16) for size in (5, 260))
    options: Options = {"seed": 5, "scale": 16.0, "reduction": "none", "plan": plan, "angular": angular, "backend": "triton"}
    check_head_loss(linear_gcl_cross_entropy, features, weight, labels(5, 260), vector(260, 0.0, 0.5), vector(5, 0.5, 2.0), **options)
    if runtime.is_hopper(device):
        tiles = {launch.name: launch.argument("COLUMNS") for launch in launches if launch.name in ("_cosine_kernel", "_weight_gradient_kernel")}
        assert set(tiles.values()) == {256} and "_weight_gradient_kernel" in tiles


@compiled
@pytest.mark.parametrize("plan", PLANS)
def test_products_in_tf32(plan: str, device: torch.device) -> None:
    """The error is within tf32's 10 bits of mantissa, and larger than float32's."""
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(size, 40, generator=generator).to(device).requires_grad_() for size in (6, 150))
    target = labels(6, 150).to(device)

    def results() -> list[torch.Tensor]:
        loss = linear_gcl_cross_entropy(features, weight, target, scale=4.0, reduction="none", plan=plan, backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (features, weight))]

    exact = results()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        fast = results()
    finally:
        torch.set_float32_matmul_precision("highest")
    for found, right in zip(fast, exact, strict=True):
        torch.testing.assert_close(found, right, rtol=2**-8, atol=2**-8 * float(right.abs().max()))
        assert not found.equal(right)


@pytest.mark.parametrize("plan", PLANS)
def test_the_librarys_product_gives_the_same_gradient(plan: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several panels of classes, whose products are added up; on a GPU it is torch.mm of two 16-bit matrices with a float32 result."""
    from gclkern.kernels import head, products

    torch.manual_seed(0)
    features, weight, target = torch.randn(6, 20, device=device).requires_grad_(), torch.randn(300, 20, device=device), torch.arange(6, device=device)
    monkeypatch.setattr(head, "PANEL_ELEMENTS", 6 * 128)

    def gradient() -> torch.Tensor:
        loss = linear_gcl_cross_entropy(features, weight, target, plan=plan, backend="triton")
        return torch.autograd.grad(loss, features)[0]

    ours = gradient()
    calls: list[tuple[int, int]] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append((a.shape[1], b.shape[0]))
        return a @ b

    monkeypatch.setattr(products, "uses_cublas", lambda *args: True)
    monkeypatch.setattr(products, "library_product", product)
    torch.testing.assert_close(gradient(), ours)
    assert calls == ([(300, 300)] if plan == "materialised" else [(128, 128), (128, 128), (44, 44)])


@pytest.mark.parametrize("plan", ["materialised", "recompute"])
def test_plain_products_have_the_shapes_that_a_compiler_expects(plan: str, device: torch.device) -> None:
    """The table of operations has those of cosines."""
    features, weight, target = torch.ones(3, 8, device=device), torch.ones(5, 8, device=device), torch.arange(3, device=device)
    terms = LossTerms(target, None, None, None, None, None, None, None, 1.0, 0.0, True, 0.0, -100, 0, 0, "mean")
    arguments = (features, weight, *terms, False, plan, True, False)
    forward, backward = torch.ops.gclkern.head_forward.default, torch.ops.gclkern.head_backward.default
    linear_gcl_cross_entropy(features, weight, target, backend="triton")  # registers the operators
    torch.library.opcheck(forward, arguments, test_utils="test_faketensor")
    loss, saved = forward(*arguments)
    torch.library.opcheck(backward, (loss, features, weight, saved, *terms, False, plan, True, True, False), test_utils="test_faketensor")


@pytest.mark.parametrize("normalize", [True, False])
def test_copies_of_what_is_saved_serve_backward(normalize: bool, device: torch.device) -> None:
    """Such as offloading to the CPU makes: rows without padding."""
    features, weight = vector(24).view(3, 8).to(device).requires_grad_(), vector(40, seed=3).view(5, 8).to(device).requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = linear_gcl_cross_entropy(features, weight, torch.arange(3, device=device), normalize=normalize, plan="materialised", backend="triton")
        return torch.autograd.grad(loss, [features, weight])

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
        copied = gradients()
    assert all(map(torch.equal, copied, gradients()))


@pytest.mark.parametrize(("dim", "copied"), [(64, False), (40, False), (36, True), (37, True)])
def test_products_read_aligned_rows(dim: int, copied: bool) -> None:
    """Rows of 16-bit weights that are no multiple of 16 bytes are copied, filled up with zeros."""
    from gclkern.kernels import products

    weight = torch.ones(5, dim, dtype=torch.float16)
    rows = products.weight_rows(weight, torch.float16)
    assert (rows.data_ptr() != weight.data_ptr()) is copied
    assert rows.stride(0) * 2 % 16 == 0
    assert torch.equal(rows, weight)
    whole = rows.as_strided((5, rows.stride(0)), rows.stride())
    assert not whole[:, dim:].any()
    assert products.weight_rows(weight[:, : dim - 1], torch.float16).data_ptr() != weight.data_ptr(), "a view that ends within a vector"


@pytest.mark.parametrize("plan", ["materialised", "chunked"])
def test_buffers_of_all_classes_have_the_width_of_the_features(plan: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cosines and their gradient are the largest tensors of a step: beside 16-bit features they have 16 bits, and the gradient the range of bfloat16."""
    from gclkern.kernels import head
    from gclkern.kernels.logit_loss import empty_rows

    made: list[torch.dtype] = []

    def noted(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(dtype)
        return empty_rows(num_rows, num_classes, dtype, device)

    monkeypatch.setattr(head, "empty_rows", noted)
    features, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device, requires_grad=True)
    target = torch.arange(4, device=device)
    linear_gcl_cross_entropy(features.half(), weight, target, plan=plan, backend="triton").backward()
    assert set(made) == {torch.float16, torch.bfloat16}
    made.clear()
    linear_gcl_cross_entropy(features, weight, target, plan=plan, backend="triton").backward()
    assert set(made) == {torch.float32}


@pytest.mark.parametrize("plan", PLANS)
def test_no_grid_outgrows_its_second_axis(device: torch.device, plan: str) -> None:
    classes = 4_400_000
    features, weight = torch.empty(1, 1, device=device), torch.empty(1, 1, device=device).expand(classes, 1)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    features.requires_grad_()
    with capture_launches(execute=False) as launches:
        linear_gcl_cross_entropy(features, weight, target, plan=plan, backend="triton").backward()
    assert launches.names
    assert all(extent <= 65535 for launch in launches for extent in tuple(launch.grid)[1:])


def test_evaluation_keeps_nothing_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def apply(*args: Any) -> torch.Tensor:
        seen.append(args[6])
        return torch.zeros(())

    monkeypatch.setattr(HeadLoss, "apply", apply)
    features, weight = torch.randn(2, 4), torch.nn.Parameter(torch.randn(3, 4))
    linear_gcl_cross_entropy(features, weight, torch.arange(2))
    with torch.no_grad():
        linear_gcl_cross_entropy(features, weight, torch.arange(2))
    assert seen == [True, False]
