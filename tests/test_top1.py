"""Whether samples are classified correctly, from the products of the head's loss, against the largest cosine in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gclkern import LinearGCLLoss
from gclkern.functional import linear_gcl_cross_entropy, linear_gcl_cross_entropy_with_top1
from gclkern.options import Backend, Plan
from tests.support import oracle
from tests.support.cases import BLOCK_ENDS, SEVERAL_BLOCKS, Options, mixed, moved, vector

# numpy, which interprets the kernels, warns of what a later selection discards
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ROWS, CLASSES, DIM = 8, 150, 11
# raises the logits of the labels that are wrong, and lowers those that are right
BIAS = torch.full((CLASSES,), -9.0).index_fill(0, torch.tensor([149, 64, 128, 70]), 9.0)
# disturbances which turn many predictions: top-1 must not see them
DISTURBANCES: dict[str, Options] = {
    "clouds and margins": {"cloud": vector(CLASSES, 0.5, 1.0), "seed": 3, "margin": 0.9, "bias": BIAS, "scale": 8.0},
    "angles": {"cloud": vector(CLASSES, 0.5, 1.0), "seed": 3, "margin": 0.9, "angular": True, "scale": 8.0, "label_smoothing": 0.1},
    "difficulty": {"margin": 0.7, "difficulty_margin": True, "scale": 8.0, "gamma": 1.0},
}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights and labels, half of which are right: of the first class, the last one, and on both sides of the panels' ends."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CLASSES, DIM, generator=generator)
    target = torch.tensor([0, 149, 63, 64, 127, 128, 5, 70])
    features = torch.randn(ROWS, DIM, generator=generator)
    features[::2] += 3 * weight[target[::2]]
    return features, weight, target


# the interpreted kernels take seconds for a case
CASES = [("materialised", "clouds and margins"), ("materialised", "difficulty"), ("chunked", "clouds and margins"), ("recompute", "angles")]


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize(("plan", "name"), CASES)
def test_predictions_by_bare_cosines(plan: Plan, name: str, backend: Backend, device: torch.device) -> None:
    features, weight, target = problem()
    options = dict(DISTURBANCES[name])
    if name != "difficulty":
        options |= mixed(ROWS, CLASSES)
        options["target_b"] = torch.tensor([0, 149, 64, 63, 5, 128, -100, 149])
        target[1] = -100
        features[3] += 5 * weight[63]  # the second target's prediction
    exact = oracle.top1(features.double(), weight.double(), target, options.get("target_b"), options.get("lam"))
    assert 0.2 < exact.mean() < 0.8
    given = moved({"features": features, "linear_weight": weight, "target": target} | options, device)
    for leaf in ("features", "linear_weight"):
        given[leaf].requires_grad_()
    loss, top1 = linear_gcl_cross_entropy_with_top1(**given, plan=plan, backend=backend)
    torch.testing.assert_close(top1.cpu().double(), exact, rtol=0, atol=1e-7)
    assert not top1.requires_grad
    if backend == "triton" and name != "difficulty":
        return  # interpreted kernels take seconds
    grads = torch.autograd.grad(loss, [given["features"], given["linear_weight"]])
    alone = linear_gcl_cross_entropy(**given, plan=plan, backend=backend)
    assert loss.equal(alone)
    assert all(grad.equal(other) for grad, other in zip(grads, torch.autograd.grad(alone, [given["features"], given["linear_weight"]]), strict=True))


@pytest.mark.compiled
def test_predictions_from_several_blocks_of_a_cpu() -> None:
    """The label, or the only class whose cosine is larger, which is in another block."""
    weight = oracle.unit_rows(torch.randn(SEVERAL_BLOCKS, 64, generator=torch.Generator().manual_seed(1)))
    target, predicted = BLOCK_ENDS.repeat(2), torch.cat((BLOCK_ENDS, BLOCK_ENDS[[4, 2, 1, 0, 3]]))
    features = weight[predicted] + 0.9 * weight[target]
    cosine = oracle.unit_rows(features.double()) @ oracle.unit_rows(weight.double()).T
    assert (cosine > cosine.gather(1, target[:, None])).sum(1).tolist() == [0] * 5 + [1] * 5
    exact = oracle.top1(features.double(), weight.double(), target)
    assert exact.tolist() == [1] * 5 + [0] * 5
    _, top1 = linear_gcl_cross_entropy_with_top1(features, weight, target, plan="materialised", backend="cpu", **DISTURBANCES["difficulty"])
    assert top1.double().equal(exact)


@pytest.mark.usefixtures("small_panels")
def test_plain_products_ties_and_a_single_class(backend: Backend, device: torch.device) -> None:
    weight = torch.tensor([[1.0, 0.0], [3.0, 1.0], [3.0, 1.0]], device=device)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], device=device)
    target = torch.tensor([0, 1, 2], device=device)

    def top1(**options: Any) -> list[float]:
        return linear_gcl_cross_entropy_with_top1(features, weight, target, backend=backend, **options)[1].tolist()

    assert top1() == [1, 0, 0]  # the third sample's cosines are all 0: no class is the largest
    assert top1(normalize=False) == [0, 0, 0]
    assert linear_gcl_cross_entropy_with_top1(features, weight[:1], target * 0, backend=backend)[1].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("small_panels")
def test_the_module_counts_without_noise(backend: Backend, device: torch.device) -> None:
    features, weight, target = (tensor.to(device) for tensor in problem())
    criterion = LinearGCLLoss([*range(CLASSES, 0, -1)], margin=0.5, backend=backend)
    loss, top1 = criterion.with_top1(features, weight, target, seed=2)
    assert loss.equal(criterion(features, weight, target, seed=2))
    assert (
        top1.cpu()
        .double()
        .equal(oracle.top1(*(tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu() for tensor in (features, weight, target))))
    )


def test_what_is_refused() -> None:
    features, weight, target = problem()
    with pytest.raises(TypeError, match=r"linear_gcl_cross_entropy_with_top1\(\) got an unexpected keyword argument 'scal'"):
        linear_gcl_cross_entropy_with_top1(features, weight, target, scal=3.0)  # type: ignore[call-arg]
