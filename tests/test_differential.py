"""The losses beside implementations that others keep: torch's, and pytorch-metric-learning's and torchmetrics' where they are installed."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy
from tests.support.cases import PLANS
from tests.support.operations import CLASSES, OPERATIONS, Operation

# What torch's cross entropy has no counterpart of.
_OURS = {"cloud", "gamma", "angular", "difficulty_margin", "concentration"}
FAMILY = [
    (operation, name)
    for operation in OPERATIONS
    if operation.leaves and not operation.batch and "top1" not in operation.name
    for name, arguments in operation.samples(6).items()
    if not _OURS & set(arguments) and not isinstance(arguments.get("label_smoothing"), Tensor) and not arguments["target"].is_floating_point()
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


HEADS = [
    (operation, name)
    for operation, name in FAMILY
    if "linear_weight" in operation.leaves and not {"margin", "angular"} & set(operation.samples(6)[name])  # which torch's head lacks
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("operation", "name"), HEADS, ids=str)
def test_heads_equal_torchs_linear_cross_entropy(operation: Operation, name: str, reduction: str) -> None:
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None or "weight" not in inspect.signature(theirs).parameters:
        pytest.skip("needs torch 2.14")
    arguments = operation.sample(name, dtype=torch.float64)
    wanted = operation.differentiable(arguments)
    if "target_b" in arguments:
        arguments["lam"] = 0.3  # the mean of a batch is that of its parts if all rows have one share

    def gradients(loss: Any) -> list[Tensor]:
        leaves = {leaf: arguments[leaf].clone().requires_grad_() for leaf in wanted}
        value = loss(**arguments | leaves)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    def plain(features: Tensor, linear_weight: Tensor, target: Tensor, **given: Any) -> Tensor:
        options = {"linear_bias": given.get("bias"), "weight": given.get("weight"), "label_smoothing": given.get("label_smoothing", 0.0)}
        product = given.get("scale", 30.0) * F.normalize(features), F.normalize(linear_weight)
        loss: Tensor = theirs(*product, target, reduction=reduction, **options)
        return loss if "target_b" not in given else 0.3 * loss + 0.7 * theirs(*product, given["target_b"], reduction=reduction, **options)

    ours = gradients(lambda **given: operation.function(**given, reduction=reduction))
    torch.testing.assert_close(ours, gradients(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_logits_equal_torchs_linear_cross_entropy(reduction: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    features, weight, target = torch.randn(7, 5), torch.randn(11, 5), torch.tensor([0, 10, 3, -100, 3, 5, 9])
    theirs = F.linear_cross_entropy(features, weight, target, reduction=reduction)
    for plan in PLANS:
        ours = linear_gcl_cross_entropy(features, weight, target, normalize=False, scale=1.0, reduction=reduction, plan=plan)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs)


PAIRS = {name: operation for operation in OPERATIONS for name in [operation.name] if name.startswith("linear") and "top1" not in name and "angles" not in name}


@pytest.mark.parametrize("scale", [1.0, 8.0, 64.0])
@pytest.mark.parametrize("peer", ["CosFaceLoss", "ArcFaceLoss"])
@pytest.mark.parametrize("operation", PAIRS.values(), ids=str)
def test_margins_equal_those_of_pytorch_metric_learning(operation: Operation, peer: str, scale: float) -> None:
    """On the table's matrices, and on features that lie at their class or opposite to it, where an angle and its margin pass pi."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    margin = 0.35 if peer == "CosFaceLoss" else math.radians(28.6)
    given = operation.sample("plain", 7, dtype=torch.float64)
    features, weight, target = given["features"], given["linear_weight"], given["target"]
    theirs = getattr(losses, peer)(len(weight), weight.shape[1], margin=0.35 if peer == "CosFaceLoss" else 28.6, scale=scale)
    for places in (features, features + 3 * weight[target], features - 3 * weight[target]):
        leaf = places.clone().requires_grad_()
        theirs.W.data = weight.T.clone()
        expected = theirs(leaf, target)
        options = {"angular": True} if peer == "ArcFaceLoss" else {}
        own, classifier = places.clone().requires_grad_(), weight.clone().requires_grad_()
        ours = operation.function(features=own, linear_weight=classifier, target=target, margin=margin, scale=scale, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
        found, by_them = torch.autograd.grad(ours, [own, classifier]), torch.autograd.grad(expected, [leaf, theirs.W])
        torch.testing.assert_close(found, (by_them[0], by_them[1].T), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("rows", [24, 37])
def test_supcon_equals_that_of_pytorch_metric_learning(rows: int, temperature: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    (operation,) = (operation for operation in OPERATIONS if operation.name == "supervised_contrastive")
    arguments = operation.sample("plain", rows, dtype=torch.float64) | {"temperature": temperature}
    assert arguments["target"].bincount().min() > 1  # the other averages over losses above 0
    features, target = arguments["features"].requires_grad_(), arguments["target"]
    expected = losses.SupConLoss(temperature=temperature)(features, target)
    ours = operation.function(**arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(ours, features), torch.autograd.grad(expected, features), rtol=1e-7, atol=1e-9)


def test_calibration_error_equals_that_of_torchmetrics() -> None:
    """Of the logits of every sample of the table."""
    classification = pytest.importorskip("torchmetrics.functional.classification")
    evaluation = pytest.importorskip("gclkern.training.evaluation")
    (operation,) = (operation for operation in OPERATIONS if operation.name == "gcl_cross_entropy")
    for name in operation.samples(6):
        arguments = operation.sample(name, 300)
        cosine, target = arguments["cosine"], arguments["target"]
        cosine[torch.arange(0, 300, 2), target[::2]] += 1.0  # else hardly a prediction is right
        logits = arguments.get("scale", 30.0) * cosine + arguments.get("bias", 0.0)
        expected = classification.multiclass_calibration_error(logits.softmax(1), target, num_classes=CLASSES, n_bins=15, norm="l1")
        report = evaluation.evaluate_logits(logits, target, {"all": list(range(CLASSES))}, CLASSES)
        assert report.ece == pytest.approx(float(expected), abs=1e-6), name


def test_a_shift_of_the_margin_is_a_shift_of_the_logit() -> None:
    """The function above assumes this of torch's loss; checked on a case by hand."""
    cosine, target = torch.tensor([[0.5, 0.2, -0.1]]), torch.tensor([0])
    ours = gcl_cross_entropy(cosine, target, scale=10.0, margin=0.3)
    torch.testing.assert_close(ours, F.cross_entropy(torch.tensor([[2.0, 2.0, -1.0]]), target))
