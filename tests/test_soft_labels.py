"""Soft labels, as the transforms of timm and torchvision make them, and label smoothing of each class."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gclkern
from gclkern.distributed import ShardedLinearGCLLoss
from tests.support.cases import BLOCK_ENDS, PLANS, SEVERAL_BLOCKS, class_smoothing_sets, cosines, labels, mixed, vector
from tests.support.comparison import check_head_loss, check_logit_loss

ROWS, CLASSES = 6, 11

# numpy, which interprets the kernels, warns of what a GPU computes in silence and a later selection discards.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


COUNTS = [100, 80, 60, 40, 30, 20, 10, 8, 5, 3, 1]


def soft_labels(target: Tensor, target_b: Tensor, lam: Tensor, classes: int) -> Tensor:
    return lam[:, None] * F.one_hot(target, classes) + (1 - lam)[:, None] * F.one_hot(target_b, classes)


def test_two_classes_and_a_share() -> None:
    target, options = labels(ROWS, CLASSES), mixed(ROWS, CLASSES)
    soft = soft_labels(target, options["target_b"], options["lam"], CLASSES)
    first, second, lam = gclkern.mixed_targets(soft)
    assert torch.allclose(soft_labels(first, second, lam, CLASSES), soft)
    assert bool((lam >= 0.5).all()) and first.dtype == second.dtype == torch.int64
    assert bool((first == second)[(soft > 0).sum(1) == 1].all())


CRITERIA = [
    gclkern.GCLLoss(COUNTS, margin=0.1, gamma=0.5), gclkern.LDAMLoss(COUNTS, weight=vector(CLASSES, 0.5, 2.0)), gclkern.LogitAdjustedLoss(COUNTS),
    gclkern.CosFaceLoss(label_smoothing=0.1), gclkern.FocalLoss(), gclkern.LabelAwareSmoothingLoss(COUNTS), gclkern.ArcFaceLoss(), gclkern.AGCLLoss(COUNTS),
    gclkern.DBMLoss(COUNTS),
]  # fmt: skip


def test_the_criteria_are_all_losses_of_logits() -> None:
    public = {value for name, value in vars(gclkern).items() if name.endswith("Loss") and "cosine" in inspect.signature(value.forward).parameters}
    assert {type(criterion) for criterion in CRITERIA} == public


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: type(criterion).__name__)
def test_every_loss_takes_soft_labels(criterion: torch.nn.Module) -> None:
    target, options = labels(ROWS, CLASSES), mixed(ROWS, CLASSES)
    soft = soft_labels(target, options["target_b"], options["lam"], CLASSES)
    seed = {"seed": 3} if isinstance(criterion, gclkern.GCLLoss) else {}
    first, second = cosines(ROWS, CLASSES).requires_grad_(), cosines(ROWS, CLASSES).requires_grad_()
    one, other = criterion(first, soft, **seed), criterion(second, target, **options, **seed)
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(first.grad, second.grad)


def test_heads_take_soft_labels(backend: str, device: torch.device) -> None:
    target, options = labels(ROWS, CLASSES), mixed(ROWS, CLASSES)
    soft = soft_labels(target, options["target_b"], options["lam"], CLASSES).to(device)
    features, weight = cosines(ROWS, 5, device=device), cosines(CLASSES, 5, device=device, seed=3)
    moved = {name: value.to(device) for name, value in options.items()}
    criterion = gclkern.LinearGCLLoss(COUNTS, backend=backend).to(device)
    expected = criterion(features, weight, target.to(device), seed=3, **moved)
    torch.testing.assert_close(criterion(features, weight, soft, seed=3), expected)
    if backend == "torch":
        for rate in (1.0, 0.5):
            sharded = ShardedLinearGCLLoss(COUNTS, sample_rate=rate, backend=backend).to(device)
            torch.testing.assert_close(sharded(features, weight, soft, seed=3), sharded(features, weight, target.to(device), seed=3, **moved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shares_of_any_precision(dtype: torch.dtype) -> None:
    soft = torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0], [0.0, 0.001, 0.999]], dtype=dtype)
    first, second, lam = gclkern.mixed_targets(soft)
    assert first.tolist() == [1, 0, 2] and second.tolist() == [0, 0, 1]
    assert lam.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(lam.double(), torch.tensor([0.7, 1.0, 0.999], dtype=torch.float64), atol=4 * torch.finfo(dtype).eps)


def test_no_class_is_ignored() -> None:
    """ignore_index is a label; a share of that class counts, as in torch."""
    soft = torch.tensor([[0.3, 0.7, 0.0]])
    loss = gclkern.functional.gcl_cross_entropy(torch.zeros(1, 3), soft, ignore_index=1)
    assert loss.item() == pytest.approx(math.log(3))


def test_equals_torchs_loss_of_class_probabilities() -> None:
    """Without a weight the loss is torch's of class probabilities."""
    target, options = labels(ROWS, CLASSES), mixed(ROWS, CLASSES)
    soft, logits = soft_labels(target, options["target_b"], options["lam"], CLASSES), cosines(ROWS, CLASSES)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            ours = gclkern.functional.gcl_cross_entropy(logits, soft, scale=1.0, label_smoothing=smoothing, reduction=reduction)
            torch.testing.assert_close(ours, F.cross_entropy(logits, soft, label_smoothing=smoothing, reduction=reduction))


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_torchvision(kind: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    torch.manual_seed(0)
    target = labels(8, CLASSES)
    _, soft = getattr(transforms, kind)(num_classes=CLASSES)(torch.rand(8, 3, 8, 8), target)
    check_mixed(soft, target, target.roll(1, 0))


@pytest.mark.parametrize("options", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, {"mixup_alpha": 1.0, "mode": "elem"}], ids=str)
def test_timm(options: dict[str, Any]) -> None:
    mixup = pytest.importorskip("timm.data.mixup")
    torch.manual_seed(0)
    target = labels(8, CLASSES)
    _, soft = mixup.Mixup(num_classes=CLASSES, label_smoothing=0.0, **options)(torch.rand(8, 3, 8, 8), target)
    check_mixed(soft, target, target.flip(0))
    _, soft = mixup.Mixup(num_classes=CLASSES, label_smoothing=0.1, **options)(torch.rand(8, 3, 8, 8), target)
    with pytest.raises(ValueError, match="label_smoothing"):
        gclkern.GCLLoss(COUNTS)(cosines(8, CLASSES), soft)


def check_mixed(soft: Tensor, target: Tensor, other: Tensor) -> None:
    first, second, lam = gclkern.mixed_targets(soft)
    for row in range(len(soft)):
        assert {int(first[row]), int(second[row])} <= {int(target[row]), int(other[row])}
    assert torch.allclose(soft_labels(first, second, lam, CLASSES), soft.float(), atol=1e-6)
    cosine = cosines(8, CLASSES)
    for criterion in CRITERIA:
        seed = {"seed": 3} if isinstance(criterion, gclkern.GCLLoss) else {}
        torch.testing.assert_close(criterion(cosine, soft, **seed), criterion(cosine, first, target_b=second, lam=lam, **seed))


@pytest.mark.parametrize(
    ("soft", "error", "words"),
    [
        (torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.2]]), ValueError, ["target[1]", "3 classes", "label_smoothing"]),
        (torch.tensor([[0.5, 0.3, 0.0]]), ValueError, ["target[0]", "0.8", "add up to 1"]),
        (torch.tensor([[1.2, -0.2, 0.0]]), ValueError, ["target[0]", "negative"]),
        (torch.tensor([[math.nan, 0.5, 0.5]]), ValueError, ["target[0]"]),
        (torch.zeros(2, 4), ValueError, ["target", "(2, 3)", "(2, 4)"]),
        (torch.tensor([0.0, 1.0]), TypeError, ["target", "float32", "soft labels", ".long()"]),
        (torch.ones(2, 3, dtype=torch.int64), ValueError, ["target", "(2, 3)"]),
        (torch.eye(3)[:2].requires_grad_(), ValueError, ["detach()"]),
    ],
)
def test_bad_soft_labels(soft: Tensor, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        gclkern.LogitAdjustedLoss([5, 3, 2])(torch.zeros(len(soft), 3), soft)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_soft_labels_stand_alone() -> None:
    soft = torch.eye(3)[:2]
    with pytest.raises(ValueError, match="leave out target_b and lam"):
        gclkern.LogitAdjustedLoss([5, 3, 2])(torch.zeros(2, 3), soft, target_b=torch.tensor([0, 1]), lam=0.5)
    with pytest.raises(TypeError, match="takes no soft labels"):
        gclkern.SupConLoss()(torch.zeros(2, 3), soft)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
def test_wrong_rows_of_a_graph_are_nan(backend: str) -> None:
    """Where values may not be read, as on a GPU, a row of three classes is NaN and the others are right."""
    soft = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.2], [0.0, 0.5, 0.5]])

    def step(cosine: Tensor, soft: Tensor) -> Tensor:
        return gclkern.functional.gcl_cross_entropy(cosine, soft, reduction="none", backend=backend)

    cosine = cosines(3, 3)
    losses = torch.compile(step, fullgraph=True, backend="aot_eager")(cosine, soft)
    assert losses[1].isnan()
    torch.testing.assert_close(losses[::2], step(cosine[::2], soft[::2]))


# ---- label smoothing of each class


@pytest.mark.parametrize("shape", ["concave", "linear", "convex"])
def test_smoothing_follows_the_counts(shape: str) -> None:
    head, tail = 0.4, 0.1
    found = gclkern.label_aware_smoothing(COUNTS, head, tail, shape)
    for count, value in zip(COUNTS, found.tolist(), strict=True):
        rho = (count - 1) / 99
        expected = {
            "concave": tail + (head - tail) * math.sin(math.pi * rho / 2),
            "linear": tail + (head - tail) * rho,
            "convex": head + (head - tail) * math.sin(1.5 * math.pi + math.pi * rho / 2),
        }[shape]
        assert value == pytest.approx(expected, abs=1e-6)
    assert gclkern.label_aware_smoothing([5, 5], head, tail, shape).tolist() == pytest.approx([head, head])


def test_label_aware_smoothing_as_released() -> None:
    """The release's expression, for each sample: eps_y / C of every class beside 1 - eps_y of the target."""
    logits, target = cosines(ROWS, CLASSES).double(), labels(ROWS, CLASSES)
    criterion = gclkern.LabelAwareSmoothingLoss(COUNTS, head=0.4, tail=0.1)
    log_p = logits.log_softmax(1)
    assert isinstance(criterion.label_smoothing, Tensor) and criterion.label_smoothing.dtype == torch.float32
    eps = criterion.label_smoothing.double()[target]
    expected = ((1 - eps) * -log_p[torch.arange(ROWS), target] + eps * -log_p.mean(1)).mean()
    torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["alone", "weight", "mixed"])
def test_smoothing_of_each_class(name: str, reduction: str, backend: str, device: torch.device) -> None:
    options = dict(class_smoothing_sets(ROWS, CLASSES)[name])
    cloud = options.pop("cloud", None)
    upstream = vector(ROWS, 0.5, 1.0) if reduction == "none" else None
    check_logit_loss(
        gclkern.functional.gcl_cross_entropy, cosines(ROWS, CLASSES, device=device), labels(ROWS, CLASSES), cloud, upstream, reduction=reduction,
        backend=backend, **options,
    )  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize("name", class_smoothing_sets(1, 1))
def test_smoothing_of_each_class_in_several_blocks_of_a_cpu(name: str) -> None:
    rows = len(BLOCK_ENDS)
    options = class_smoothing_sets(rows, SEVERAL_BLOCKS)[name]
    cloud = options.pop("cloud", None)
    check_logit_loss(
        gclkern.functional.gcl_cross_entropy, cosines(rows, SEVERAL_BLOCKS), BLOCK_ENDS, cloud, vector(rows, 0.5, 1.0), reduction="none", backend="cpu",
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_smoothing_of_each_class_in_a_head(plan: str, backend: str, device: torch.device) -> None:
    options = dict(class_smoothing_sets(ROWS, CLASSES)["mixed"])
    cloud = options.pop("cloud", None)
    check_head_loss(
        gclkern.functional.linear_gcl_cross_entropy, cosines(ROWS, 5, device=device), cosines(CLASSES, 5, device=device, seed=3), labels(ROWS, CLASSES), cloud,
        plan=plan, backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gclkern.label_aware_smoothing([5, 3], head=1.5), ValueError, ["head", "1.5"]),
        (lambda: gclkern.label_aware_smoothing([5, 3], shape="square"), ValueError, ["shape", "'square'"]),
        (lambda: gclkern.LDAMLoss([5, 3], label_smoothing=torch.tensor([0.1, 1.5])), ValueError, ["label_smoothing[1]", "1.5"]),
        (lambda: gclkern.LDAMLoss([5, 3], label_smoothing=torch.zeros(3)), ValueError, ["label_smoothing", "(2,)", "(3,)"]),
    ],
)
def test_bad_smoothing(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
