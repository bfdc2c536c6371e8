"""The laws of test_laws.py for every loss module, with class vectors made of class counts. Where a law does not hold for a loss, a table says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gclkern
from gclkern.distributed import ShardedLinearGCLLoss
from tests.support.laws import Laws, by_name, counts_and_target, few_examples, number, unused

CLASSES, DIM = 7, 16
# A row's matrix and what stands for the classes: cosines alone; features and a classifier's weight; features and prototypes; points and centroids; features
# and the mean directions of distributions; features alone.
Build = Callable[[list[int], Any], nn.Module]
LOSSES: dict[str, tuple[str, Build]] = {
    "GCLLoss": ("logits", lambda counts, reduction: gclkern.GCLLoss(counts, margin=0.1, gamma=1.0, weight=rarity(counts), reduction=reduction)),
    "LDAMLoss": ("logits", lambda counts, reduction: gclkern.LDAMLoss(counts, weight=rarity(counts), reduction=reduction)),
    "LogitAdjustedLoss": ("logits", lambda counts, reduction: gclkern.LogitAdjustedLoss(counts, reduction=reduction)),
    "LabelAwareSmoothingLoss": ("logits", lambda counts, reduction: gclkern.LabelAwareSmoothingLoss(counts, reduction=reduction)),
    "CosFaceLoss": ("logits", lambda counts, reduction: gclkern.CosFaceLoss(weight=rarity(counts), reduction=reduction)),
    "FocalLoss": ("logits", lambda counts, reduction: gclkern.FocalLoss(weight=rarity(counts), reduction=reduction)),
    "ArcFaceLoss": ("logits", lambda counts, reduction: gclkern.ArcFaceLoss(weight=rarity(counts), reduction=reduction)),
    "AGCLLoss": ("logits", lambda counts, reduction: gclkern.AGCLLoss(counts, margin=0.2, reduction=reduction)),
    "DBMLoss": ("logits", lambda counts, reduction: gclkern.DBMLoss(counts, noise_mul=0.3, reduction=reduction)),
    "LinearGCLLoss": ("head", lambda counts, reduction: gclkern.LinearGCLLoss(counts, margin=0.1, tau=1.0, weight=rarity(counts), reduction=reduction)),
    "ShardedLinearGCLLoss": ("head", lambda counts, reduction: ShardedLinearGCLLoss(counts, margin=0.1, tau=1.0, reduction=reduction)),
    "SupConLoss": ("features", lambda counts, reduction: gclkern.SupConLoss(reduction=reduction)),
    "BalancedContrastiveLoss": ("prototypes", lambda counts, reduction: gclkern.BalancedContrastiveLoss(reduction=reduction)),
    "PrototypicalContrastiveLoss": ("prototypes", lambda counts, reduction: gclkern.PrototypicalContrastiveLoss(reduction=reduction)),
    "ProCoLoss": ("distributions", lambda counts, reduction: gclkern.ProCoLoss(counts, DIM, reduction=reduction)),
    "DROLTLoss": ("points", lambda counts, reduction: gclkern.DROLTLoss(counts, epsilon="sqrt", class_weight=rarity(counts), reduction=reduction)),
    "MemoryLoss": ("points", lambda counts, reduction: gclkern.MemoryLoss(margin=40.0, repulsion_weight=0.5)),
}
PRIOR = ("LogitAdjustedLoss", "DBMLoss", "LinearGCLLoss", "ShardedLinearGCLLoss", "ProCoLoss")  # a class's share of the samples is in its logit
NOISY = ("GCLLoss", "AGCLLoss", "DBMLoss", "LinearGCLLoss", "ShardedLinearGCLLoss")


def rarity(counts: list[int]) -> Tensor:
    """A weight for each class that does not depend on the other classes."""
    return torch.tensor(counts).reciprocal()


@dataclass(frozen=True)
class Problem:
    name: str  # of the loss
    counts: list[int]
    target: Tensor  # (N,)
    rows: Tensor  # (N, C) cosines or logits, or (N, D)
    classes: Tensor | None  # (C, D)


@dataclass(frozen=True)
class Outcome:
    value: Tensor
    rows: Tensor  # the gradients of both matrices; of classes None without one
    classes: Tensor | None


def problem(name: str, random: torch.Generator, rows: int) -> Problem:
    kind, _ = LOSSES[name]
    counts, target = counts_and_target(random, CLASSES, rows)
    width = CLASSES if kind == "logits" else DIM
    given, classes = (0.8 * (2 * torch.rand(count, width, generator=random, dtype=torch.float64) - 1) for count in (rows, CLASSES))
    if kind == "distributions":
        classes = classes / classes.norm(dim=1, keepdim=True) * 0.5  # mean unit features
    return Problem(name, counts, target, given, None if kind in ("logits", "features") else classes)


def outcome(given: Problem, reduction: str = "mean", noise: dict[str, int] | None = None) -> Outcome:
    """In eval mode, or with noise in training mode."""
    name = given.name
    kind, build = LOSSES[name]
    criterion: Any = build(given.counts, reduction)
    criterion.train(noise is not None)
    rows = given.rows.clone().requires_grad_()
    leaves = [rows]
    inputs: list[Any] = [rows, given.target]
    if kind == "distributions":
        criterion.sums[0], criterion.counts[0] = given.classes, 1
    elif given.classes is not None:
        classes = given.classes.clone().requires_grad_(name != "DROLTLoss")  # whose centroids are constants
        leaves += [classes] if classes.requires_grad else []
        inputs.insert(2 if kind == "points" else 1, classes)
    value = criterion(*inputs, **noise or {})
    if name == "MemoryLoss" and reduction == "sum":
        value = value * len(rows)  # it has the mean alone
    grads = torch.autograd.grad(value if value.dim() == 0 else value.sum(), leaves)
    return Outcome(value.detach(), grads[0], grads[1] if len(grads) > 1 else None)


def same(found: Outcome, expected: Outcome) -> None:
    """Within a few roundings of the class vectors, which are float32, at logits of up to 64."""
    parts = [{name: getattr(part, name) for name in ("value", "rows", "classes")} for part in (found, expected)]
    torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-6)


def chosen_rows(given: Problem, order: Tensor) -> Problem:
    return replace(given, target=given.target[order], rows=given.rows[order])


def chosen_classes(given: Problem, order: list[int]) -> Problem:
    """Class order[j] is now class j; the first, where it is there several times."""
    places = torch.tensor([order.index(label) for label in range(CLASSES)])
    return Problem(
        given.name, [given.counts[label] for label in order], places[given.target],
        given.rows[:, order] if LOSSES[given.name][0] == "logits" else given.rows,
        None if given.classes is None else given.classes[order],
    )  # fmt: skip


# ---- the laws


def constant_for_all_logits(given: Problem, random: torch.Generator) -> None:
    scale = float(LOSSES[given.name][1](given.counts, "mean").scale)  # type: ignore[arg-type]
    same(outcome(replace(given, rows=given.rows + (number(random, 7) - 3) / scale)), outcome(given))


def permuted_classes(given: Problem, random: torch.Generator) -> None:
    order = torch.randperm(CLASSES, generator=random)
    before = outcome(given)
    rows = before.rows[:, order] if LOSSES[given.name][0] == "logits" else before.rows
    expected = Outcome(before.value, rows, None if before.classes is None else before.classes[order])
    same(outcome(chosen_classes(given, order.tolist())), expected)


def permuted_rows(given: Problem, random: torch.Generator) -> None:
    order = torch.randperm(len(given.target), generator=random)
    before = outcome(given)
    same(outcome(chosen_rows(given, order)), Outcome(before.value, before.rows[order], before.classes))


def split_class(given: Problem, random: torch.Generator) -> None:
    """A class that is no target in two halves: of its samples where they are counted, else of its probability, and without a softmax over classes as it is."""
    label = unused(random, CLASSES, given.target.tolist())
    halved = chosen_classes(given, [*range(CLASSES), label])
    kind, build = LOSSES[given.name]
    if given.name in PRIOR:
        halved.counts[label] = halved.counts[CLASSES] = given.counts[label] // 2
    elif kind == "logits":
        halved.rows[:, [label, CLASSES]] -= math.log(2) / float(build(given.counts, "mean").scale)  # type: ignore[arg-type]

    def together(grad: Tensor) -> Tensor:
        """Of both halves, along the first dimension."""
        return grad[:CLASSES].index_add(0, torch.tensor([label]), grad[CLASSES:])

    found = outcome(halved)
    rows = together(found.rows.t()).t() if kind == "logits" else found.rows
    same(Outcome(found.value, rows, None if found.classes is None else together(found.classes)), outcome(given))


def split_batch(given: Problem, random: torch.Generator) -> None:
    """Also micro-batches: the sums add up, and so do their gradients, with noise that goes on where the part before ends."""
    cut, start = number(random, len(given.target) + 1), number(random, 100)
    ends = [(first, last) for first, last in ((0, cut), (cut, len(given.target))) if first < last]

    def of(first: int, last: int) -> Outcome:
        noise = {"seed": 5, "row_offset": start + first} if given.name in NOISY else None
        return outcome(chosen_rows(given, torch.arange(first, last)), "sum", noise)

    parts = [of(*part) for part in ends]
    classes = None if parts[0].classes is None else torch.stack([part.classes for part in parts if part.classes is not None]).sum(0)
    found = Outcome(torch.stack([part.value for part in parts]).sum(), torch.cat([part.rows for part in parts]), classes)
    same(found, of(0, len(given.target)))


def scaled_rows_of_the_head(given: Problem, random: torch.Generator) -> None:
    """Rows of the weight, of prototypes and of features, each by a factor of its own: the longer, the smaller its gradient."""
    longer, wider = (torch.rand(count, 1, generator=random, dtype=torch.float64).mul(4).exp() for count in (len(given.target), CLASSES))
    has_weight = given.classes is not None and LOSSES[given.name][0] != "distributions"
    found = outcome(replace(given, rows=longer * given.rows, classes=wider * given.classes if has_weight and given.classes is not None else given.classes))
    same(Outcome(found.value, longer * found.rows, None if found.classes is None else wider * found.classes), outcome(given))


def duplicated_rows(given: Problem, random: torch.Generator) -> None:
    rows = len(given.target)
    before, after = outcome(given), outcome(chosen_rows(given, torch.arange(rows).repeat(2)))
    expected = Outcome(before.value, before.rows.repeat(2, 1) / 2, before.classes)
    if given.name == "MemoryLoss":  # by definition the memory's share of its gradient depends on the number of samples
        after, expected = replace(after, classes=None), replace(expected, classes=None)
    same(after, expected)


_BATCH = "every sample is in the softmax of every other one"
_LOGITS = "its argument is ready logits; LinearGCLLoss has the head's law"
# Laws that do not hold, with the reason. Each is broken by some problem, which a test shows.
BROKEN = {
    "constant_for_all_logits": {
        **dict.fromkeys(("ArcFaceLoss", "AGCLLoss"), "the margin adds to the angle, of which the cosine is no linear function"),
        "DBMLoss": "the margin adds to the angle, and depends on the target's cosine",
    },
    "split_class": {
        "LabelAwareSmoothingLoss": "the smoothing is shared out to more classes",
        "BalancedContrastiveLoss": "all classes count alike, so that two halves count twice",
        "PrototypicalContrastiveLoss": "all prototypes count alike, so that two halves count twice",
        "MemoryLoss": "the mean over pairs has more pairs",
    },
    "split_batch": {
        **dict.fromkeys(("SupConLoss", "BalancedContrastiveLoss", "DROLTLoss"), _BATCH),
        "MemoryLoss": "the hinge is on a mean over the batch, and the memory's share of the gradient depends on the number of samples",
    },
    "scaled_rows_of_the_head": dict.fromkeys(("DROLTLoss", "MemoryLoss"), "distances depend on lengths"),
    "duplicated_rows": {
        **dict.fromkeys(("SupConLoss", "BalancedContrastiveLoss"), "a sample and its copy are a pair of cosine 1"),
        "DROLTLoss": "twice as many samples add log 2, which test_laws.py tests",
    },
}
# Laws that speak of an argument that the loss does not have.
NO_ARGUMENT = {
    "constant_for_all_logits": {
        **dict.fromkeys(("LinearGCLLoss", "ShardedLinearGCLLoss"), "its logits are products; test_laws.py adds the constant to the bias of its function"),
        **dict.fromkeys(("SupConLoss", "BalancedContrastiveLoss", "PrototypicalContrastiveLoss", "ProCoLoss"), "its logits are cosines of its arguments"),
        **dict.fromkeys(("DROLTLoss", "MemoryLoss"), "it has distances, no logits"),
    },
    "split_class": {"SupConLoss": "no argument has a place for each class"},
    "scaled_rows_of_the_head": dict.fromkeys([name for name, (kind, _) in LOSSES.items() if kind == "logits"], _LOGITS),
}  # fmt: skip


LAWS = Laws(
    LOSSES, problem,
    by_name(constant_for_all_logits, permuted_classes, permuted_rows, split_class, split_batch, scaled_rows_of_the_head, duplicated_rows), BROKEN, NO_ARGUMENT,
)  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@few_examples
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 5))
def test_laws(name: str, seed: int, rows: int) -> None:
    LAWS.check(name, seed, rows)


@pytest.mark.parametrize(("law", "name"), LAWS.exceptions)
def test_an_exception_is_one(law: str, name: str) -> None:
    assert LAWS.is_broken(law, name, rows=5)


def test_every_loss_and_every_exception_is_known() -> None:
    public = {name for name in gclkern.__all__ if name.endswith("Loss")} | {name for name in gclkern.distributed.__all__ if name.endswith("Loss")}
    assert public == set(LOSSES)
    LAWS.check_names()
