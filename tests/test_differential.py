"""The losses beside implementations that others keep: torch's, and pytorch-metric-learning's and torchmetrics' where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy, supervised_contrastive
from tests.support.operations import OPERATIONS, Operation

# What torch's cross entropy has no counterpart of.
_OURS = {"cloud", "gamma", "angular", "difficulty_margin", "concentration"}
FAMILY = [
    (operation, name)
    for operation in OPERATIONS
    if operation.leaves and not operation.batch and "top1" not in operation.name
    for name, arguments in operation.samples(6).items()
    if not _OURS & set(arguments)
]


def by_torch(logits: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The sum of torch's cross entropies of all targets."""
    target, scale = arguments["target"], arguments.get("scale", 30.0)
    weight, smoothing = arguments.get("weight"), arguments.get("label_smoothing", 0.0)
    logits = scale * logits
    margin = torch.as_tensor(arguments.get("margin", 0.0), dtype=logits.dtype).expand(logits.shape[1])

    def loss(labels: Tensor) -> Tensor:
        own = F.one_hot(labels.clamp(min=0), logits.shape[1])
        z = logits - scale * margin * own + arguments.get("bias", 0.0)
        return F.cross_entropy(z, labels, weight=weight, label_smoothing=smoothing, reduction="none")

    if "target_b" not in arguments:
        return loss(target).sum()
    return (arguments["lam"] * loss(target) + (1 - arguments["lam"]) * loss(arguments["target_b"])).sum()


@pytest.mark.parametrize(("operation", "name"), FAMILY, ids=str)
def test_cross_entropies_equal_torchs(operation: Operation, name: str) -> None:
    """In float64, where torch's difference 1 - p still has digits."""
    arguments = operation.sample(name, dtype=torch.float64)
    wanted = operation.differentiable(arguments)

    def gradients(loss: Any) -> list[Tensor]:
        leaves = {leaf: arguments[leaf].clone().requires_grad_() for leaf in wanted}
        value = loss(**arguments | leaves)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    def plain(**given: Any) -> Tensor:
        if "cosine" in given:
            return by_torch(given["cosine"], given)
        features, weight = given["features"], given["linear_weight"]
        if given.get("normalize", True):
            features, weight = F.normalize(features), F.normalize(weight)
        return by_torch(features @ weight.T, given)

    ours = gradients(lambda **given: operation.function(**given, reduction="sum"))
    torch.testing.assert_close(ours, gradients(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_logits_equal_torchs_linear_cross_entropy(reduction: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    features, weight, target = torch.randn(7, 5), torch.randn(11, 5), torch.tensor([0, 10, 3, -100, 3, 5, 9])
    theirs = F.linear_cross_entropy(features, weight, target, reduction=reduction)
    for plan in ("materialised", "chunked", "recompute"):
        ours = linear_gcl_cross_entropy(features, weight, target, normalize=False, scale=1.0, reduction=reduction, plan=plan)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs)


def test_cosface_equals_that_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CosFaceLoss(num_classes=11, embedding_size=5, margin=0.35, scale=30.0)
    features, target = torch.randn(7, 5, requires_grad=True), torch.arange(7)
    expected = theirs(features, target)
    ours = linear_gcl_cross_entropy(features, theirs.W.T, target, margin=0.35, scale=30.0)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, features), torch.autograd.grad(expected, features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supcon_equals_that_of_pytorch_metric_learning(temperature: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, target = torch.randn(24, 6, requires_grad=True), torch.arange(24) % 5  # of each class two or more: the other averages over losses above 0
    expected = losses.SupConLoss(temperature=temperature)(features, target)
    ours = supervised_contrastive(features, target, temperature=temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, features), torch.autograd.grad(expected, features), rtol=1e-4, atol=1e-5)


def test_calibration_error_equals_that_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    evaluation = pytest.importorskip("gclkern.training.evaluation")
    logits, target = 3 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 7
    expected = classification.multiclass_calibration_error(logits.softmax(1), target, num_classes=7, n_bins=15, norm="l1")
    report = evaluation.evaluate_logits(logits, target, {"all": list(range(7))}, 7)
    assert report.ece == pytest.approx(float(expected), abs=1e-6)


def test_a_shift_of_the_margin_is_a_shift_of_the_logit() -> None:
    """The function above assumes this of torch's loss; checked on a case by hand."""
    cosine, target = torch.tensor([[0.5, 0.2, -0.1]]), torch.tensor([0])
    ours = gcl_cross_entropy(cosine, target, scale=10.0, margin=0.3)
    torch.testing.assert_close(ours, F.cross_entropy(torch.tensor([[2.0, 2.0, -1.0]]), target))
