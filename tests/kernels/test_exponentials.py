"""The head that keeps exponentials in place of cosines, against the oracle, and where it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.machine_code.launches import capture_launches
from gclkern.functional import linear_gcl_cross_entropy, linear_gcl_cross_entropy_with_top1
from gclkern.kernels.terms import LossTerms
from tests.support import oracle
from tests.support.cases import Options, angle_sets, labels, option_sets, vector
from tests.support.comparison import check_head_loss

pytestmark = pytest.mark.triton

ROWS, CLASSES, DIM = 6, 290, 19
KERNEL = "_exponentials_kernel"


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the head store exponentials at any size, in panels of 128 classes."""
    from gclkern.kernels import exponentials, head

    monkeypatch.setattr(head, "exponentials_pay", lambda *shape: True)
    monkeypatch.setattr(exponentials, "PANEL_BYTES", 1)


def problem(device: torch.device, dtype: torch.dtype = torch.float16, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(ROWS, DIM, generator=generator), 0.25 * torch.randn(CLASSES, DIM, generator=generator)
    return features.to(device, dtype), weight.to(dtype).to(device, weight_dtype or dtype), labels(ROWS, CLASSES)


def call(features: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each sample and both gradients, by the kernels that exponentials need."""
    leaves = features.detach().requires_grad_(), weight.detach().requires_grad_()
    with capture_launches() as launches:
        loss = linear_gcl_cross_entropy(*leaves, target.to(features.device), plan="materialised", backend="triton", **options)
        of_features, of_weight = torch.autograd.grad(loss.sum(), leaves)
    assert KERNEL in launches.names
    return loss.detach(), of_features, of_weight


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize(
    ("name", "reduction"), [("focal_stage_2", "mean"), *((name, "none") for name in ("plain", "weight", "focal_undetached", "cloud", "mixed", "focal_stage_2"))]
)
def test_loss_and_gradients(name: str, reduction: str, device: torch.device) -> None:
    features, weight, target = problem(device)
    target[4] = -100
    options = {**(angle_sets(ROWS, CLASSES) | option_sets(ROWS, CLASSES))[name], "reduction": reduction, "plan": "materialised", "backend": "triton"}
    if "cloud" in options:
        options["class_offset"] = 72  # the noise's place, in whole groups
    upstream = vector(ROWS, -1.0, 2.0, seed=7) if reduction == "none" else torch.tensor(-0.7)
    check_head_loss(linear_gcl_cross_entropy, features, weight, target, options.pop("cloud", None), upstream, **options)


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str
)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    features, weight, target = problem(device, dtype, weight_dtype)
    options: Options = {"cloud": vector(CLASSES, 0.0, 0.5), "seed": 5, "plan": "materialised", "backend": "triton"}
    check_head_loss(linear_gcl_cross_entropy, features, weight, target, options.pop("cloud"), None, **options)


@pytest.mark.usefixtures("paying")
def test_whole_tiles_and_a_tail(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 2048 classes: two of one program, as in a large batch, and the tail of another one."""
    from gclkern.kernels import exponentials

    monkeypatch.setattr(exponentials, "_splits", lambda *tiles: 2)
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(2, 8, generator=generator).to(device, torch.float16), torch.randn(5000, 8, generator=generator).to(device, torch.float16)
    options: Options = {"seed": 5, "plan": "materialised", "backend": "triton", "reduction": "none"}
    check_head_loss(linear_gcl_cross_entropy, features, weight, torch.tensor([2047, 4999]), vector(5000, 0.0, 0.5), vector(2, 0.5, 2.0), **options)


@pytest.mark.usefixtures("paying")
def test_rows_longer_than_a_block(device: torch.device) -> None:
    """Kernels that pass over rows take 1024 elements at a time."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(2, 1100, generator=generator).to(device, torch.float16), torch.randn(3, 1100, generator=generator).to(device, torch.float16)
    options: Options = {"scale": 8.0, "plan": "materialised", "backend": "triton", "reduction": "none"}
    check_head_loss(linear_gcl_cross_entropy, features, weight, torch.tensor([2, 0]), None, vector(2, 0.5, 2.0), **options)


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_ends_of_the_range(scale: float, device: torch.device) -> None:
    """Cosines of -1 and 1, a cloud that takes all classes to the lower end, weights of very different norms, and rows whose own class is at either end."""
    features, weight, target = problem(device, weight_dtype=torch.float32)
    weight = weight * 10.0 ** torch.linspace(-6, 4, CLASSES, device=device)[:, None]
    for row, sign in enumerate((1.0, -1.0)):
        weight[target[row]] = sign * features[row].float() * weight[target[row]].norm() / features[row].float().norm()
    options: Options = {"seed": 5, "scale": scale, "plan": "materialised", "backend": "triton", "reduction": "none"}
    check_head_loss(linear_gcl_cross_entropy, features, weight, target, torch.full((CLASSES,), 0.8), torch.ones(ROWS), **options)


@pytest.mark.usefixtures("paying")
def test_a_target_keeps_its_digits(device: torch.device) -> None:
    """p near 1, where 1 - p is a rest of exponentials: the loss in float32, and the stored target within a rounding of bfloat16 (2^-8 where it truncates)."""
    from gclkern.kernels.head import run_forward

    features, weight, target = problem(device)
    weight[target] = features  # cosine 1
    terms = terms_of(target.to(device))._replace(scale=12.0)
    loss, (stats, denominator, _, _, inverse_norm, _, stored) = run_forward(features, weight, terms, True, "materialised")
    exact = features.cpu().double(), weight.cpu().double()
    cosine = (oracle.unit_rows(exact[0]) @ oracle.unit_rows(exact[1]).T).requires_grad_()
    expected = oracle.gcl_cross_entropy(cosine, target, scale=12.0)
    expected.backward()
    own = torch.arange(ROWS)
    assert cosine.grad is not None and 0.9 < 1 + cosine.grad[own, target].mul(ROWS / 12.0).min() < 0.9999
    assert abs(loss.item() - expected.item()) <= 12 * 2**-11 * expected.item()  # float16 cosines of the other classes
    assert stored.dtype == torch.bfloat16 and torch.isfinite(denominator)
    # dL / dcosine over |w| is the stored value times exp2(anchor2 - offset) s / N
    from gclkern.kernels.exponentials import TOP_EXPONENT
    from gclkern.kernels.row_loss import LOG2E

    factor = torch.exp2(12 * LOG2E - TOP_EXPONENT - stats[0].double().cpu()) * 12 / ROWS
    found = stored.cpu()[own, target].double() * factor / inverse_norm.cpu()[target].double()
    assert ((found / cosine.grad[own, target] - 1).abs() <= 2**-8 + 12 * 2**-11).all()


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("classes", [CLASSES, 2100])  # 2100: the tile of 2048 that needs no mask, too
def test_top1_is_of_the_cosines(classes: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, 24, generator=generator)
    target = labels(ROWS, classes)
    features = torch.randn(ROWS, 24, generator=generator) + 3 * weight[target] * (torch.arange(ROWS) % 2)[:, None]
    given = features.to(device, torch.float16), weight.to(device, torch.float16), target.to(device)
    loss, top1 = linear_gcl_cross_entropy_with_top1(*given, torch.ones(classes, device=device), seed=1, plan="materialised", backend="triton")
    assert loss.equal(linear_gcl_cross_entropy(*given, torch.ones(classes, device=device), seed=1, plan="materialised", backend="triton"))
    assert top1.cpu().double().equal(oracle.top1(features.half().double(), weight.half().double(), target))


@pytest.mark.usefixtures("paying")
def test_rows_that_hold_no_number(device: torch.device) -> None:
    """A row of NaN has no effect if it is ignored, and else only affects itself; a label out of range makes its own row NaN."""
    features, weight, target = problem(device)
    target[0] = -100
    clean = call(features, weight, target, reduction="none")
    features[0] = float("nan")
    for found, right in zip(call(features, weight, target, reduction="none"), clean, strict=True):
        assert torch.equal(found, right)
    features[1] = float("nan")
    loss, of_features, _ = call(features, weight, target, reduction="none")
    assert loss.isnan().tolist() == of_features.isnan().any(1).tolist() == [False, True, False, False, False, False]
    assert torch.equal(of_features[2:], clean[1][2:])


@pytest.mark.usefixtures("paying")
def test_a_class_without_a_direction_and_a_head_of_one_class(device: torch.device) -> None:
    features, weight, target = problem(device)
    weight[3] = 0.0
    loss, _, of_weight = call(features, weight, target)
    assert loss.isfinite() and not of_weight[3].any() and of_weight.isfinite().all()
    loss, of_features, of_weight = call(features, weight[:1], target * 0, scale=40.0, margin=0.5)
    assert loss == 0.0 and not of_features.any() and not of_weight.any()


class OneRank:
    """All classes, as if others held some, too."""

    def __init__(self, terms: LossTerms) -> None:
        self.terms, self.num_classes, self.scattered = terms, CLASSES, 0

    def merge(self, peak: Tensor, rest: Tensor, blend: None, hardest: None, own: list[Tensor], factor: float) -> tuple[Any, ...]:
        top = peak.amax(0)
        return top[None], (rest * torch.exp(factor * (peak - top))).sum(0)[None], None, None, list(torch.stack(own))

    def scatter(self, gradient: Tensor) -> Callable[[], Tensor]:
        self.scattered += 1
        return lambda: gradient


def terms_of(target: Tensor) -> LossTerms:
    cloud, seed = torch.zeros(CLASSES, device=target.device), torch.zeros((), dtype=torch.int64, device=target.device)
    return LossTerms(target, None, None, cloud, None, None, None, seed, 30.0, 0.0, False, 0.0, -100, 0, 0, "mean")


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("two", [False, True])
def test_sharded_classes(two: bool, device: torch.device) -> None:
    from gclkern.kernels.head import run_backward, run_forward

    features, weight, target = problem(device)
    terms = terms_of(target.to(device))
    if two:
        terms = terms._replace(target_b=labels(ROWS, CLASSES, seed=11).to(device), lam=vector(ROWS).to(device))
    shards = OneRank(terms)
    results = []
    for others in (None, shards):
        loss, saved = run_forward(features, weight, terms, True, "materialised", others)
        results.append((loss, *run_backward(torch.ones_like(loss), features, weight, saved, terms, True, "materialised", True, True, False, others)))
    assert shards.scattered == 1
    for alone, sharded in zip(*results, strict=True):
        torch.testing.assert_close(alone, sharded)


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize(
    ("options", "serves"),
    [
        ({}, True),
        ({"gamma": 2.0, "margin": 0.1, "class_offset": 16}, True),
        ({"angular": True, "margin": 0.1}, True),  # turns the targets alone
        ({"bias": torch.zeros(CLASSES)}, False),
        ({"label_smoothing": 0.1}, False),
        ({"scale": 64.0}, False),
        ({"class_offset": 3}, False),
        ({"angular": True, "cloud": torch.ones(CLASSES), "seed": 1}, False),
        ({"normalize": False, "scale": 1.0}, False),
    ],
)
def test_where_exponentials_serve(options: Options, serves: bool, device: torch.device) -> None:
    features, weight, target = problem(device)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    with capture_launches(execute=False) as launches:
        linear_gcl_cross_entropy(features, weight, target.to(device), plan="materialised", backend="triton", **moved)
        linear_gcl_cross_entropy(features, weight, target.to(device), plan="chunked", backend="triton", **moved)
        linear_gcl_cross_entropy(features.float(), weight.float(), target.to(device), plan="materialised", backend="triton", **moved)
    assert launches.names.count(KERNEL) == serves


@pytest.mark.usefixtures("paying")
def test_not_where_torch_has_no_product_of_two_precisions(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, target = problem(device)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with capture_launches(execute=False) as launches:
        linear_gcl_cross_entropy(features, weight, target.to(device), plan="materialised", backend="triton")
    assert launches.names and KERNEL not in launches.names


@pytest.mark.parametrize(
    ("rows", "classes", "dim", "pays"),
    [
        (4096, 100_000, 512, True),
        (1024, 1_000_000, 512, True),
        (2048, 8142, 2048, True),
        (512, 8142, 2048, False),
        (256, 1_000_000, 512, False),
        (4096, 100, 64, False),
    ],
)
def test_sizes_at_which_they_pay(rows: int, classes: int, dim: int, pays: bool) -> None:
    from gclkern.kernels.head import exponentials_pay

    assert exponentials_pay(rows, classes, dim) is pays


@pytest.mark.usefixtures("paying")
def test_shapes_without_values_are_those_of_the_kernels(device: torch.device) -> None:
    features, weight, target = problem(device, torch.bfloat16)
    terms = terms_of(target.to(device))
    arguments = (features, weight, *terms, True, "materialised", True, False)
    operator = torch.ops.gclkern.head_forward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    loss, saved = operator(*arguments)
    backward = torch.ops.gclkern.head_backward.default
    torch.library.opcheck(
        backward, (loss, features, weight, saved, *terms, True, "materialised", True, True, False), test_utils=("test_schema", "test_faketensor")
    )
