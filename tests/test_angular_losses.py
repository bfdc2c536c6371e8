"""ArcFace, AGCL and DBM against their formulas, sample by sample in float64 with acos, and where their gradients would be infinite."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gclkern import AGCLLoss, ArcFaceLoss, DBMLoss, LinearGCLLoss, LogitAdjustedLoss, cloud_sizes, mixed_targets
from gclkern.distributed import ShardedLinearGCLLoss
from tests.support import oracle
from tests.support.cases import BLOCK_ENDS, PLANS, REDUCTIONS, SEVERAL_BLOCKS, angle_sets, cosines, labels, mixed, moved, vector
from tests.support.operations import OPERATIONS, Outcome, outcome
from tests.support.operations import expected as expected_outcome

# numpy, which interprets the kernels, warns of what a later selection discards
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

COUNTS = [400, 150, 60, 20, 8, 3, 1]
ROWS, CLASSES = 9, 7
WEIGHT = vector(CLASSES, 0.5, 2.0)
LOGITS, HEAD = (operation for operation in OPERATIONS if "by angles" in operation.name)


def formula(criterion: nn.Module, cosine: Tensor, target: Tensor, seed: int) -> Tensor:
    """Logits (N, C) of float64 cosines, for targets (N,)."""
    e = oracle.noise(seed, *cosine.shape)
    theta = cosine.acos()
    rows = []
    for i, label in enumerate(target.tolist()):
        row = []
        for j in range(CLASSES):
            c, own = cosine[i, j], j == label
            if isinstance(criterion, ArcFaceLoss):
                m = criterion.margin * own
                z = (theta[i, j] + m).cos() if theta[i, j] + m < math.pi else c - m * math.sin(m)  # type: ignore[operator, arg-type]
            elif isinstance(criterion, AGCLLoss):
                a = math.pi / 2 * float(0.5 * cloud_sizes(COUNTS)[j]) * e[i, j] * criterion.training + criterion.margin * own  # type: ignore[operator]
                if criterion.easy_margin:
                    z = (theta[i, j] + a).cos() if c > 0 else c
                else:
                    z = (theta[i, j] + a).cos() if theta[i, j] + a < math.pi else c - a * a.sin()
            else:
                z = c
                if own:
                    hard = bool(cosine[i].max() > c)
                    m = 0.1 * min(COUNTS) / COUNTS[j] * (1 + hard * (1 - c) / 2)
                    z = (theta[i, j] + m).cos() if theta[i, j] + m < math.pi else c - m * torch.sin(m)
                if isinstance(cloud := criterion.cloud, Tensor) and criterion.training:
                    z = z - float(cloud[j]) * e[i, j]
            bias = math.log(COUNTS[j] / sum(COUNTS)) if isinstance(criterion, DBMLoss) else 0.0
            row.append(criterion.scale * z + bias)  # type: ignore[operator]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def expected(criterion: nn.Module, cosine: Tensor, target: Tensor, seed: int, target_b: Tensor | None, lam: Tensor | None) -> Tensor:
    gamma, reduction = float(criterion.gamma), str(criterion.reduction)  # type: ignore[arg-type]
    weight: Tensor = criterion.weight.double() if isinstance(criterion.weight, Tensor) else torch.ones(CLASSES, dtype=torch.float64)
    parts = [(target, torch.ones(ROWS).double())] if target_b is None or lam is None else [(target, lam.double()), (target_b, 1 - lam.double())]
    losses, denominator = torch.zeros(ROWS).double(), torch.zeros(()).double()
    for label, share in parts:
        loss = oracle.cross_entropy(formula(criterion, cosine, label, seed), label, weight, 0.0, torch.ones(ROWS, dtype=torch.bool))
        losses = losses + share * oracle.focal(loss, gamma, True)
        per_class = torch.ones_like(weight) if gamma > 0 else weight
        denominator = denominator + (share * per_class.index_select(0, label)).sum()
    return losses if reduction == "none" else losses.sum() / (denominator if reduction == "mean" else 1.0)


CRITERIA: dict[str, tuple[Any, dict[str, Any]]] = {
    "ArcFace": (ArcFaceLoss, {"margin": 0.5, "scale": 8.0}),
    "ArcFace, weighted": (ArcFaceLoss, {"margin": 1.2, "scale": 8.0, "weight": WEIGHT}),
    "AGCL": (AGCLLoss, {"class_counts": COUNTS, "scale": 8.0}),
    "AGCL, stage 2": (AGCLLoss, {"class_counts": COUNTS, "scale": 8.0, "margin": 0.3, "gamma": 1.0}),
    "AGCL, easy": (AGCLLoss, {"class_counts": COUNTS, "scale": 8.0, "easy_margin": True, "margin": 0.2}),
    "DBM": (DBMLoss, {"class_counts": COUNTS, "scale": 8.0}),
    "DBM and clouds": (DBMLoss, {"class_counts": COUNTS, "scale": 8.0, "noise_mul": 0.5, "weight": WEIGHT}),
}


def assert_near(found: Outcome, exact: Outcome, device: torch.device) -> None:
    # logits of up to 8 in float32; a GPU's draws of the noise differ by up to 1e-4
    error = 1e-3 if device.type == "cuda" else 2e-5
    for part, reference in exact.parts().items():
        torch.testing.assert_close(found.parts()[part].cpu().double(), reference, rtol=error, atol=error)


@pytest.mark.parametrize("name", angle_sets(1, 1))
def test_every_option_follows_the_formula(name: str, backend: str, device: torch.device) -> None:
    arguments = LOGITS.sample(name, ROWS, device) | {"reduction": "none"}
    assert_near(outcome(functools.partial(LOGITS.function, backend=backend), arguments, LOGITS.leaves), expected_outcome(LOGITS, arguments), device)


@pytest.mark.compiled
@pytest.mark.parametrize("name", angle_sets(1, 1))
def test_classes_in_several_blocks_of_a_cpu(name: str) -> None:
    rows = len(BLOCK_ENDS)
    given = {"cosine": 0.9 * cosines(rows, SEVERAL_BLOCKS), "target": BLOCK_ENDS, "reduction": "none"}
    arguments = given | moved(angle_sets(rows, SEVERAL_BLOCKS)[name], "cpu")
    found = outcome(functools.partial(LOGITS.function, backend="cpu"), arguments, LOGITS.leaves)
    assert_near(found, expected_outcome(LOGITS, arguments), torch.device("cpu"))


def test_an_easy_margin_leaves_a_cosine_of_0_alone(backend: str, device: torch.device) -> None:
    """Rows without a direction have it."""
    plain = moved({"cosine": torch.zeros(2, 5), "target": torch.tensor([0, 3]), "scale": 8.0, "reduction": "none"}, device)
    function = functools.partial(LOGITS.function, backend=backend)
    found = outcome(function, plain | {"angular": True, "easy_margin": True, "margin": 0.5}, LOGITS.leaves)
    assert_near(found, expected_outcome(LOGITS, plain), device)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["everything", "dbm and everything"])
def test_heads_whose_classes_come_in_panels(name: str, plan: str, backend: str, device: torch.device) -> None:
    matrices = {"features": cosines(5, 11), "linear_weight": cosines(150, 11, seed=8), "target": torch.tensor([0, 70, 127, 149, 3])}
    arguments = moved(matrices | angle_sets(5, 150)[name], device) | {"reduction": "none"}
    found = outcome(functools.partial(HEAD.function, backend=backend, plan=plan), arguments, HEAD.leaves)
    assert_near(found, expected_outcome(HEAD, arguments), device)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("form", ["logits", *PLANS])
def test_one_larger_cosine_makes_a_sample_hard(form: str, backend: str, device: torch.device) -> None:
    """Its class may be in the first panel, in the last one, or the other target. An equal cosine does not make the sample hard."""
    features = torch.full((7, 150), -0.1)
    target, second = torch.tensor([70, 70, 70, 3, 127, 70, 70]), torch.tensor([70, 70, 3, 70, 127, 70, 9])
    features[range(7), target] = 0.5
    equal = 0.5 if form == "logits" else 0.4  # rounding may make two equal cosines of a head unequal
    for row, column, value in ((0, 0, 0.9), (1, 149, 0.9), (2, 3, 0.9), (3, 70, 0.9), (5, 8, equal)):
        features[row, column] = value
    arguments = {"target": target, "target_b": second, "lam": 0.3, "difficulty_margin": True, "margin": 0.7, "scale": 8.0, "reduction": "none"}
    operation, matrices = (LOGITS, {"cosine": features}) if form == "logits" else (HEAD, {"features": features, "linear_weight": torch.eye(150)})
    arguments = moved(matrices | arguments, device) | ({} if form == "logits" else {"plan": form})
    found = outcome(functools.partial(operation.function, backend=backend), arguments, operation.leaves)
    arguments.pop("plan", None)
    assert_near(found, expected_outcome(operation, arguments), device)


def call(criterion: nn.Module, cosine: Tensor, target: Tensor, seed: int, **options: Any) -> Tensor:
    """The loss; one without noise takes no seed."""
    loss: Tensor = criterion(cosine, target, **options, **({} if isinstance(criterion, ArcFaceLoss) else {"seed": seed}))
    return loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("two", [False, True], ids=["one target", "two targets"])
@pytest.mark.parametrize("name", CRITERIA)
def test_loss_and_gradient(name: str, two: bool, reduction: str) -> None:
    kind, options = CRITERIA[name]
    criterion = kind(**options, reduction=reduction)
    target, second = labels(ROWS, CLASSES), mixed(ROWS, CLASSES) if two else {"target_b": None, "lam": None}
    base = 0.9 * cosines(ROWS, CLASSES).double()
    ours, exact = base.clone().requires_grad_(), base.clone().requires_grad_()
    loss = call(criterion, ours, target, 5, **second)
    reference = expected(criterion, exact, target, 5, **second)
    upstream = torch.linspace(0.5, 1.0, ROWS).double() if reduction == "none" else torch.ones(()).double()
    loss.backward(upstream)
    reference.backward(upstream)
    # the noise and the class vectors are float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_head_has_the_same_options(name: str) -> None:
    """The head of one process, and the head whose classes are spread over processes; for sampling of classes see test_sharded_classifier.py."""
    criterion = CRITERIA[name][0](**CRITERIA[name][1])
    linear: dict[str, Any] = {
        **{option: getattr(criterion, option) for option in ("scale", "gamma", "weight", "angular", "difficulty_margin", "easy_margin")},
        "margin": criterion.margin, "noise_mul": 0.0 if criterion.cloud is None else float(criterion.cloud.max()),
        "tau": 0.0 if criterion.bias is None else 1.0,
    }  # fmt: skip
    features, weight, target = cosines(ROWS, 5, seed=7), cosines(CLASSES, 5, seed=8), labels(ROWS, CLASSES)
    grads = []
    for form in ("logits", "head", "sharded"):
        leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
        if form == "logits":
            loss = call(criterion, nn.functional.normalize(leaves[0]) @ nn.functional.normalize(leaves[1]).T, target, 3)
        else:
            loss = (LinearGCLLoss if form == "head" else ShardedLinearGCLLoss)(COUNTS, **linear)(leaves[0], leaves[1], target, seed=3)
        grads.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", CRITERIA)
def test_gradients_are_finite_where_a_feature_is_its_class(name: str, sign: float, backend: str) -> None:
    kind, options = CRITERIA[name]
    cosine = torch.full((4, CLASSES), -sign)
    target = torch.arange(4)
    cosine[target, target] = sign
    cosine.requires_grad_()
    loss = call(kind(**options, backend=backend), cosine, target, 1)
    loss.backward()
    assert loss.isfinite() and cosine.grad is not None and cosine.grad.isfinite().all()
    # 1 / sin at 1 - cos^2 = 1e-6 is 1000; no class pulls more than scale times that
    assert cosine.grad.abs().max() <= 8.0 * 1000 * 2


def test_the_slope_where_a_feature_is_its_class(backend: str, device: torch.device) -> None:
    """The root of 1 - cosine^2, below 1e-6, is that of 1e-6, which has no derivative: the target's cosine has the slope cos(margin)."""
    cosine = torch.tensor([[1.0, 0.25, -0.5]], device=device, requires_grad=True)
    arguments = {"target": torch.tensor([0], device=device), "margin": 0.5, "angular": True, "scale": 8.0}
    loss = LOGITS.function(cosine, **arguments, backend=backend)
    logits = 8.0 * torch.tensor([math.cos(0.5) - 1e-3 * math.sin(0.5), 0.25, -0.5], dtype=torch.float64)
    by_cosine = 8.0 * torch.tensor([math.cos(0.5), 1.0, 1.0], dtype=torch.float64) * (logits.softmax(0) - torch.tensor([1.0, 0.0, 0.0]))
    assert float(loss.detach()) == pytest.approx(float(-logits.log_softmax(0)[0]), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, cosine)[0][0].cpu().double(), by_cosine, rtol=1e-5, atol=1e-6)


def test_an_angle_of_pi_counts_as_beyond_it() -> None:
    """To the last bit, which only the same function of the same numbers hits."""
    margin, target = torch.tensor([0.3, 0.5, 0.7, 1.1], dtype=torch.float64), torch.arange(4)
    cosine = torch.zeros(4, 4, dtype=torch.float64).index_put_((target, target), -margin.cos())
    losses = LOGITS.function(cosine, target, angular=True, margin=margin, scale=8.0, reduction="none", backend="torch")
    torch.testing.assert_close(losses, nn.functional.cross_entropy(8.0 * (cosine - (margin * margin.sin()).diag()), target, reduction="none"))


def test_eval_mode_has_no_noise_and_keeps_the_margin() -> None:
    criterion = AGCLLoss(COUNTS, margin=0.3, scale=8.0).eval()
    cosine, target = 0.9 * cosines(ROWS, CLASSES).double(), labels(ROWS, CLASSES)
    assert criterion(cosine, target, seed=1).equal(criterion(cosine, target, seed=2))
    torch.testing.assert_close(criterion(cosine, target), ArcFaceLoss(margin=0.3, scale=8.0)(cosine.clamp(min=-0.9), target), rtol=1e-6, atol=1e-6)


def test_dbm_without_a_margin_is_a_balanced_softmax() -> None:
    cosine, target = cosines(ROWS, CLASSES), labels(ROWS, CLASSES)
    torch.testing.assert_close(DBMLoss(COUNTS, margin=0.0, scale=16.0)(cosine, target), LogitAdjustedLoss(COUNTS, scale=16.0)(cosine, target))


def test_soft_labels_and_ignored_samples() -> None:
    criterion = DBMLoss(COUNTS, noise_mul=0.5, reduction="none")
    cosine, target = cosines(ROWS, CLASSES), labels(ROWS, CLASSES)
    options = mixed(ROWS, CLASSES)
    soft = options["lam"][:, None] * nn.functional.one_hot(target, CLASSES) + (1 - options["lam"])[:, None] * nn.functional.one_hot(
        options["target_b"], CLASSES
    )
    first, second, lam = mixed_targets(soft)
    torch.testing.assert_close(criterion(cosine, soft, seed=2), criterion(cosine, first, target_b=second, lam=lam, seed=2))
    options["target_b"][3] = target[4] = -100
    losses = criterion(cosine, target, seed=2, **options)
    assert losses[[3, 4]].eq(0).all() and losses[[0, 1, 2, 5]].ne(0).all()
    mean = DBMLoss(COUNTS, noise_mul=0.5)(cosine, target, seed=2, **options)
    torch.testing.assert_close(mean, losses.sum() / (ROWS - 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ArcFaceLoss(margin=2.0), ValueError, ["margin", "is 2,"]),
        (lambda: AGCLLoss(COUNTS, noise_mul=1.5), ValueError, ["noise_mul", "1.5"]),
        (lambda: AGCLLoss(COUNTS, easy_margin=1), TypeError, ["easy_margin", "1"]),
        (lambda: DBMLoss(COUNTS, margin=1.0), ValueError, ["margin", "is 1,"]),
        (lambda: DBMLoss(COUNTS, exponent=-1.0), ValueError, ["exponent", "-1.0"]),
        (lambda: DBMLoss([3, 0]), ValueError, ["class_counts[1]"]),
        (lambda: DBMLoss(COUNTS)(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), ValueError, ["cosine", "class_counts", "(2, 3)"]),
        (lambda: DBMLoss(COUNTS)(torch.zeros(2, 7), torch.tensor([0, 7])), ValueError, ["target[1]", "7"]),
        (lambda: DBMLoss(COUNTS)(torch.zeros(2, 7), torch.tensor([0, 1]), lam=0.5), ValueError, ["target_b", "lam"]),
    ],
)
def test_refusals(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
