"""The modules against naive float64 formulas, and what makes them modules: modes, devices and dtypes, no state, early refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.clouds import cloud_sizes
from gclkern.distributed import ShardedLinearGCLLoss
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.layers import CosineLinear
from gclkern.losses import ArcFaceLoss, CosFaceLoss, FocalLoss, GCLLoss, LDAMLoss, LinearGCLLoss, LogitAdjustedLoss
from gclkern.weights import DeferredReweighting, effective_number_weights
from tests.support.cases import PLANS, cosines, labels, vector

COUNTS = [500, 120, 77, 20, 5]
CLASSES = len(COUNTS)
ROWS = 12
N = torch.tensor(COUNTS, dtype=torch.float64)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return cosines(ROWS, CLASSES, dtype).requires_grad_(), labels(ROWS, CLASSES)


def one_hot(target: Tensor) -> Tensor:
    return F.one_hot(target, CLASSES).double()


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    return ((1 - probability) ** gamma * -probability.log()).mean()


# Each loss beside the formula that its docs give, in plain torch.
FORMULAS: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {
    "gcl without clouds": (GCLLoss(COUNTS, noise_mul=0.0), lambda x, y: F.cross_entropy(30 * x, y)),
    "gcl in eval mode": (GCLLoss(COUNTS, margin=0.1).eval(), lambda x, y: F.cross_entropy(30 * (x - 0.1 * one_hot(y)), y)),
    "ldam": (LDAMLoss(COUNTS), lambda x, y: F.cross_entropy(30 * (x - one_hot(y) * 0.5 * (5 / N) ** 0.25), y)),
    "ldam options": (
        LDAMLoss(COUNTS, max_margin=0.3, scale=10, weight=vector(CLASSES, 0.1, 2.0), label_smoothing=0.1, reduction="sum"),
        lambda x, y: F.cross_entropy(
            10 * (x - one_hot(y) * 0.3 * (5 / N) ** 0.25), y, weight=vector(CLASSES, 0.1, 2.0).double(), label_smoothing=0.1, reduction="sum"
        ),
    ),
    "logit adjustment": (LogitAdjustedLoss(COUNTS, tau=1.5), lambda x, y: F.cross_entropy(x + 1.5 * (N / N.sum()).log(), y)),
    "logit adjustment of cosines": (LogitAdjustedLoss(COUNTS, scale=30), lambda x, y: F.cross_entropy(30 * x + (N / N.sum()).log(), y)),
    "balanced softmax": (LogitAdjustedLoss(COUNTS), lambda x, y: ((N * x.exp()).sum(1) / (N[y] * x.gather(1, y[:, None]).exp()[:, 0])).log().mean()),
    "cosface": (CosFaceLoss(), lambda x, y: F.cross_entropy(64 * (x - 0.35 * one_hot(y)), y)),
    "normface": (CosFaceLoss(margin=0.0, scale=30), lambda x, y: F.cross_entropy(30 * x, y)),
    "cosface by class": (CosFaceLoss(margin=vector(CLASSES)), lambda x, y: F.cross_entropy(64 * (x - one_hot(y) * vector(CLASSES).double()), y)),
    "focal": (FocalLoss(), lambda x, y: focal(x, y, 2.0)),
    "focal of cosines": (FocalLoss(gamma=0.5, scale=4), lambda x, y: focal(4 * x, y, 0.5)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_and_gradient(name: str) -> None:
    criterion, formula = FORMULAS[name]
    ours, target = batch()
    theirs, _ = batch()
    loss, expected = criterion(ours, target), formula(theirs, target)
    loss.backward()
    expected.backward()
    assert ours.grad is not None and theirs.grad is not None
    # The class vectors of a module are float32, which rounds them by 6e-8.
    assert torch.allclose(loss, expected, rtol=2e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_gcl_gives_the_functional_layer_its_arguments(backend: str, device: torch.device) -> None:
    cosine, target = batch(torch.float32)
    cosine, target = cosine.detach().to(device), target.to(device)
    weight = vector(CLASSES, 0.1, 2.0)
    criterion = GCLLoss(
        COUNTS, noise_mul=0.5, strategy="power", exponent=0.3, scale=20.0, margin=0.1, weight=weight, gamma=1.0, focal_detach=False, label_smoothing=0.1,
        ignore_index=3, reduction="none", backend=backend,
    ).to(device)  # fmt: skip
    second = labels(ROWS, CLASSES, seed=4).to(device)
    expected = gcl_cross_entropy(
        cosine, target, 0.5 * cloud_sizes(COUNTS, "power", 0.3).to(device), scale=20.0, margin=0.1, weight=weight.to(device), target_b=second, lam=0.3,
        gamma=1.0, focal_detach=False, label_smoothing=0.1, ignore_index=3, reduction="none", seed=11, row_offset=7, backend=backend,
    )  # fmt: skip
    assert torch.equal(criterion(cosine, target, target_b=second, lam=0.3, seed=11, row_offset=7), expected)


@pytest.mark.parametrize("plan", PLANS)
def test_linear_gcl_gives_the_functional_layer_its_arguments(plan: str, backend: str, device: torch.device) -> None:
    classifier = CosineLinear(6, CLASSES).to(device)
    features, target = cosines(ROWS, 6, device=device), labels(ROWS, CLASSES).to(device)
    criterion = LinearGCLLoss(COUNTS, noise_mul=0.5, scale=20.0, margin=0.1, gamma=1.0, plan=plan, backend=backend).to(device)
    second, lam = labels(ROWS, CLASSES, seed=4).to(device), vector(ROWS).to(device)
    expected = linear_gcl_cross_entropy(
        features, classifier.weight, target, 0.5 * cloud_sizes(COUNTS).to(device), scale=20.0, margin=0.1, target_b=second, lam=lam, gamma=1.0, seed=11,
        row_offset=7, plan=plan, backend=backend,
    )  # fmt: skip
    assert torch.equal(criterion(features, classifier.weight, target, target_b=second, lam=lam, seed=11, row_offset=7), expected)


def test_linear_gcl_equals_gcl_of_the_classifier() -> None:
    classifier = CosineLinear(6, CLASSES, dtype=torch.float64)
    features, target = cosines(ROWS, 6, torch.float64), labels(ROWS, CLASSES)
    linear = LinearGCLLoss(COUNTS, margin=0.1)(features, classifier.weight, target, seed=3)
    assert torch.allclose(linear, GCLLoss(COUNTS, margin=0.1)(classifier(features), target, seed=3), rtol=1e-12)


def test_noise_in_training_mode_only() -> None:
    cosine, target = batch(torch.float32)
    criterion = GCLLoss(COUNTS, margin=0.1, reduction="none")
    torch.manual_seed(0)
    first, second = criterion(cosine, target), criterion(cosine, target)
    torch.manual_seed(0)
    assert torch.equal(criterion(cosine, target), first)
    assert not torch.equal(first, second)
    assert torch.equal(criterion(cosine, target, seed=1), criterion(cosine, target, seed=1))
    criterion.eval()
    assert torch.equal(criterion(cosine, target, seed=1), criterion(cosine, target, seed=2))


@pytest.mark.parametrize("counts", [[7, 7, 7, 7, 7], COUNTS])
def test_no_cloud_draws_no_noise(counts: list[int]) -> None:
    criterion = GCLLoss(counts, noise_mul=1.0 if counts[0] == counts[1] else 0.0)
    assert criterion.cloud is None
    cosine, target = batch(torch.float32)
    state = torch.get_rng_state()
    criterion(cosine, target)
    assert torch.equal(torch.get_rng_state(), state)


def test_prediction_and_its_plain_cross_entropy() -> None:
    cosine, target = batch()
    weight, margin = vector(CLASSES, 0.1, 2.0), vector(CLASSES)
    disturbed = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    for criterion in (GCLLoss(COUNTS, scale=20, margin=margin, gamma=1.0, **disturbed), LDAMLoss(COUNTS, scale=20, **disturbed),
                      LogitAdjustedLoss(COUNTS, scale=20, **disturbed), CosFaceLoss(scale=20, **disturbed), FocalLoss(scale=20, **disturbed),
                      ArcFaceLoss(scale=20, **disturbed)):  # fmt: skip
        for mode in (True, False):
            assert torch.allclose(criterion.train(mode).plain_cross_entropy(cosine, target), F.cross_entropy(20 * cosine, target, reduction="sum"), rtol=1e-10)
        probabilities = criterion.predict_proba(cosine)
        assert torch.allclose(probabilities, (20 * cosine).softmax(1), rtol=1e-12)
        assert torch.allclose(criterion.predict_proba(cosine.bfloat16()), (20 * cosine.bfloat16().float()).softmax(1))
        assert torch.equal(criterion.logits(cosine), 20 * cosine)
        assert torch.equal(criterion.logits(cosine.bfloat16()), 20 * cosine.bfloat16().float())
    features, classifier = torch.randn(ROWS, 6), CosineLinear(6, CLASSES)
    for kind in (LinearGCLLoss, ShardedLinearGCLLoss):
        loss = kind(COUNTS, margin=0.1, gamma=1.0).plain_cross_entropy(features, classifier.weight, target)
        assert torch.allclose(loss, F.cross_entropy(30 * classifier(features), target), rtol=1e-5)  # float32


def test_two_targets_in_every_loss() -> None:
    first, second = labels(ROWS, CLASSES), labels(ROWS, CLASSES, seed=4)
    cosine = cosines(ROWS, CLASSES, torch.float64)
    for criterion in (LDAMLoss(COUNTS), LogitAdjustedLoss(COUNTS), CosFaceLoss(), FocalLoss(), GCLLoss(COUNTS).eval()):
        mixed = criterion(cosine, first, target_b=second, lam=0.3)
        assert torch.allclose(mixed, 0.3 * criterion(cosine, first) + 0.7 * criterion(cosine, second), rtol=1e-10)


def test_ignore_index() -> None:
    cosine, target = batch()
    target[3] = -1
    kept = torch.arange(ROWS) != 3
    for make in (LDAMLoss, LogitAdjustedLoss):
        assert torch.allclose(make(COUNTS, ignore_index=-1)(cosine, target), make(COUNTS)(cosine[kept], target[kept]))


def test_deferred_weights_reach_the_loss() -> None:
    cosine, target = batch()
    criterion = LDAMLoss(COUNTS)
    plain = criterion(cosine, target)
    reweighting = DeferredReweighting(criterion, COUNTS, start=160)
    reweighting.set_epoch(159)
    assert torch.allclose(criterion(cosine, target), plain)
    reweighting.set_epoch(160)
    expected = F.cross_entropy(30 * (cosine - one_hot(target) * 0.5 * (5 / N) ** 0.25), target, weight=effective_number_weights(COUNTS).double())
    assert torch.allclose(criterion(cosine, target), expected, rtol=2e-6)


def test_weights_are_copied() -> None:
    weight = torch.ones(CLASSES)
    criterion = LDAMLoss(COUNTS, weight=weight)
    assert criterion.weight is not None
    criterion.weight.fill_(2.0)
    assert torch.equal(weight, torch.ones(CLASSES)), "the caller's tensor is its own"


ALL = {
    "gcl": lambda: GCLLoss(COUNTS, weight=vector(CLASSES, 0.1, 2.0), margin=vector(CLASSES)),
    "linear gcl": lambda: LinearGCLLoss(COUNTS, plan="recompute", margin=0.1),
    "ldam": lambda: LDAMLoss(COUNTS),
    "logit adjustment": lambda: LogitAdjustedLoss(COUNTS),
    "cosface": lambda: CosFaceLoss(),
    "focal": lambda: FocalLoss(weight=vector(CLASSES, 0.1, 2.0)),
}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("name", ALL)
def test_class_vectors_stay_float32(name: str, cast: str) -> None:
    criterion, untouched = ALL[name](), ALL[name]()
    model = nn.Sequential(nn.Linear(2, 2), criterion)
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for vector_name, buffer in untouched.named_buffers():
        assert torch.equal(criterion.get_buffer(vector_name), buffer)
        assert criterion.get_buffer(vector_name).dtype == torch.float32


def test_sixteen_bit_inputs() -> None:
    cosine, target = cosines(ROWS, CLASSES, torch.bfloat16), labels(ROWS, CLASSES)
    criterion = GCLLoss(COUNTS).bfloat16()
    loss = criterion(cosine, target, seed=1)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, GCLLoss(COUNTS)(cosine.float(), target, seed=1), rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_no_state_and_no_parameters(name: str) -> None:
    criterion = ALL[name]()
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    criterion.load_state_dict({})


def test_repr() -> None:
    options = "label_smoothing=0.0, scale=30.0, gamma=0.0, focal_detach=True, ignore_index=-100, reduction='mean', backend='auto'"
    assert repr(GCLLoss(COUNTS, noise_mul=0.5, margin=0.1)) == f"GCLLoss(cloud=(0 to 0.5), margin=0.1, {options})"
    assert repr(LinearGCLLoss(COUNTS)).endswith("backend='auto', plan='auto')")


@pytest.mark.parametrize("make", [GCLLoss, LinearGCLLoss, LDAMLoss, LogitAdjustedLoss])
def test_the_default_device_does_not_matter(make: type[nn.Module]) -> None:
    with torch.device("meta"):
        criterion = make(COUNTS)
        DeferredReweighting(criterion, COUNTS, 0)
    assert all(buffer.device.type == "cpu" for buffer in criterion.buffers())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_class_vectors_follow_the_device(name: str) -> None:
    criterion = ALL[name]().to("cuda", torch.bfloat16)
    assert all(buffer.is_cuda and buffer.dtype == torch.float32 for buffer in criterion.buffers())
    target = labels(ROWS, CLASSES).cuda()
    if isinstance(criterion, LinearGCLLoss):
        loss = criterion(cosines(ROWS, 6, device="cuda"), CosineLinear(6, CLASSES, device="cuda").weight, target)
    else:
        loss = criterion(cosines(ROWS, CLASSES, device="cuda"), target)
    assert loss.isfinite()


@pytest.mark.parametrize("kind", [GCLLoss, LinearGCLLoss])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"class_counts": [3, 0]}, ValueError, ["class_counts[1]", "0"]),
        ({"noise_mul": -0.5}, ValueError, ["noise_mul", "-0.5"]),
        ({"noise_mul": "1"}, TypeError, ["noise_mul", "'1'"]),
        ({"strategy": "exp"}, ValueError, ["strategy", "'exp'"]),
        ({"exponent": 0.3}, ValueError, ["exponent", "0.3"]),
        ({"scale": 0.0}, ValueError, ["scale", "0.0"]),
        ({"scale": math.inf}, ValueError, ["scale", "inf"]),
        ({"margin": torch.zeros(3)}, ValueError, ["margin", "(2,)", "(3,)"]),
        ({"margin": "0.1"}, TypeError, ["margin", "'0.1'"]),
        ({"weight": torch.ones(3)}, ValueError, ["weight", "(2,)", "(3,)"]),
        ({"weight": torch.tensor([1.0, -1.0])}, ValueError, ["weight[1]", "-1"]),
        ({"weight": torch.ones(2, requires_grad=True)}, ValueError, ["weight", "detach"]),
        ({"weight": [1.0, 1.0]}, TypeError, ["weight", "list"]),
        ({"gamma": -1.0}, ValueError, ["gamma", "-1.0"]),
        ({"focal_detach": 1}, TypeError, ["focal_detach", "1"]),
        ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5"]),
        ({"ignore_index": 0.5}, TypeError, ["ignore_index", "0.5"]),
        ({"reduction": "avg"}, ValueError, ["reduction", "'avg'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'"]),
        ({"noise": 1.0}, TypeError, ["noise", "GCLLoss.__init__()"]),
    ],
)
def test_refused_when_built(kind: type[nn.Module], arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        kind(**{"class_counts": [3, 2], **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LinearGCLLoss([3, 2], plan="fast"), ValueError, ["plan", "'fast'"]),
        (lambda: LDAMLoss([3, 2], max_margin=-1.0), ValueError, ["max_margin", "-1.0"]),
        (lambda: LDAMLoss([3, 2], weight=torch.ones(3)), ValueError, ["weight", "(3,)"]),
        (lambda: LogitAdjustedLoss([3, 0]), ValueError, ["class_counts[1]", "0"]),
        (lambda: LogitAdjustedLoss([3, 2], tau=math.nan), ValueError, ["tau", "nan"]),
        (lambda: CosFaceLoss(margin=torch.zeros(2), weight=torch.ones(3)), ValueError, ["weight", "(3,)"]),
        (lambda: CosFaceLoss(scale=-1.0), ValueError, ["scale", "-1.0"]),
        (lambda: FocalLoss(gamma=-2.0), ValueError, ["gamma", "-2.0"]),
        (lambda: GCLLoss([3, 2])(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)), ValueError, ["cosine", "class_counts", "(4, 3)"]),
        (lambda: LinearGCLLoss(COUNTS).logits(torch.zeros(2, CLASSES + 1)), ValueError, ["cosine", f"{CLASSES} columns", "classifier(features)"]),
        (lambda: LinearGCLLoss(COUNTS).predict_proba(torch.zeros(2, CLASSES + 1)), ValueError, ["cosine", f"{CLASSES} columns", "classifier(features)"]),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
