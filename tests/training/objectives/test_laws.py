"""The laws of tests/test_laws_of_modules.py for every objective, on networks without batch normalisation. Where a law does not hold, a table says why."""

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

from gclkern.training.composed_backbones import TwoBranchBackbone
from gclkern.training.network import Network, build_head
from gclkern.training.objectives import OBJECTIVES, Batch, build_objective
from gclkern.training.recipes import Phase, plan
from tests.support.laws import Laws, by_name, counts_and_target, few_examples, number, unused

CLASSES = 11  # no other dimension has this size, or one more
# A method with the objective, and its phase: each name of OBJECTIVES, and the parts of Classification.
METHODS = {name: name for name in OBJECTIVES} | {"mixup": "mixup", "la": "la", "gcl": "gcl", "robust": "dro-lt"}
PHASES = {"oltr": 1, "robust": 1}  # others are the first
SMALL: dict[str, dict[str, Any]] = {  # projection heads of a size that a test can afford
    **{name: {"hidden": 14, "dim": 16} for name in ("bcl", "gcl+bcl", "proco")},
    **{name: {"dim": 16} for name in ("hybrid-sc", "hybrid-psc")},
}
PRIOR = ("la", "proco")  # a class's share of the samples is in its logit


class SmallBackbone(nn.Module):
    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh())
        self.block = nn.Sequential(nn.Conv2d(4, 6, 2), nn.Tanh())

    def split(self) -> tuple[nn.Module, nn.Module]:
        return self.trunk, self.block

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.block(self.trunk(images)).mean((2, 3))
        return features


def phase_of(name: str) -> Phase:
    phase = plan(METHODS[name], None, "digits-lt", [9] * CLASSES)[PHASES.get(name, 0)]
    return replace(phase, options=phase.options | SMALL.get(name, {}))


@dataclass(frozen=True)
class Problem:
    name: str
    counts: list[int]
    state: dict[str, Tensor]  # of the network and the objective
    batch: Batch

    def modules(self) -> tuple[Any, Any]:
        """The network and the objective in eval mode, in the middle of the training."""
        phase = phase_of(self.name)
        two = phase.backbone == "two-branch"
        backbone: Any = TwoBranchBackbone(SmallBackbone(), SmallBackbone(), "small") if two else SmallBackbone()
        network = Network(backbone, build_head(phase.head, backbone.feature_dim, len(self.counts)))
        objective = build_objective(phase, self.counts, backbone.feature_dim)
        objective.set_epoch(network, 6, 10, 0.1)
        if self.state:
            both(network, objective).load_state_dict(self.state)
        return network.eval(), objective.eval()


def both(network: nn.Module, objective: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"network": network, "objective": objective})


def problem(name: str, random: torch.Generator, rows: int) -> Problem:
    """The running statistics are those of a step."""
    phase = phase_of(name)
    counts, target = counts_and_target(random, CLASSES, rows)

    def images(*shape: int) -> Tensor:
        return torch.randn(*shape, 1, 3, 3, generator=random)

    batch = Batch(images(rows), target, torch.tensor(5), row_offset=3)
    if phase.mixup:
        batch = batch._replace(target_b=torch.randint(CLASSES, (rows,), generator=random), lam=torch.tensor(0.3))
    if phase.views:
        batch = batch._replace(views=images(rows, len(phase.views)))
    if phase.second_sampler:
        batch = batch._replace(second_images=images(rows), second_target=torch.randint(CLASSES, (rows,), generator=random))
    if phase.robust:
        batch = batch._replace(centroids=torch.randn(CLASSES, 6, generator=random), counts=torch.ones(CLASSES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
        network, objective = Problem(name, counts, {}, batch).modules()
        for parameter in network.head.parameters():
            nn.init.normal_(parameter)
        with torch.no_grad():
            objective.train()(network.train(), batch)
    return Problem(name, counts, {key: value.detach().clone() for key, value in both(network, objective).state_dict().items()}, batch)


@dataclass(frozen=True)
class Outcome:
    value: Tensor
    grads: dict[str, Tensor]  # of all parameters that have one


def outcome(given: Problem, change_logits: Callable[[Tensor], Tensor] | None = None, *, noise: bool = False) -> Outcome:
    network, objective = given.modules()
    if change_logits is not None:
        network.head.register_forward_hook(lambda module, inputs, output: change_logits(output))
    value = objective.train(noise)(network, given.batch)
    parameters = dict(both(network, objective).named_parameters())
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return Outcome(value.detach(), {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None})


def same(found: Outcome, expected: Outcome) -> None:
    """float32 of logits up to 30 in another order."""
    torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-4, atol=3e-5)


def chosen_rows(given: Problem, order: Tensor) -> Problem:
    by_row = ("images", "target", "target_b", "views", "second_images", "second_target")
    changes = {name: value[order] for name in by_row if (value := getattr(given.batch, name)) is not None}
    return replace(given, batch=given.batch._replace(**changes, row_offset=given.batch.row_offset + int(order[0])))


def chosen_classes(tensors: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """Class order[j] is now class j, in every dimension of that size."""

    def take(tensor: Tensor) -> Tensor:
        for place, size in enumerate(tensor.shape):
            tensor = tensor.index_select(place, torch.tensor(order)) if size == CLASSES else tensor
        return tensor

    return {name: take(tensor) for name, tensor in tensors.items()}


def relabelled(given: Problem, order: list[int]) -> Problem:
    places = torch.tensor([order.index(label) for label in range(CLASSES)])
    changes = {name: places[value] for name in ("target", "target_b", "second_target") if (value := getattr(given.batch, name)) is not None}
    by_class = {name: value for name in ("centroids", "counts") if (value := getattr(given.batch, name)) is not None}
    batch = given.batch._replace(**changes, **chosen_classes(by_class, order))
    return Problem(given.name, [given.counts[label] for label in order], chosen_classes(given.state, order), batch)


# ---- the laws


def constant_for_all_logits(given: Problem, random: torch.Generator) -> None:
    constant = number(random, 20) - 10
    same(outcome(given, lambda logits: logits + constant), outcome(given))


def permuted_classes(given: Problem, random: torch.Generator) -> None:
    order = torch.randperm(CLASSES, generator=random).tolist()
    before = outcome(given)
    same(outcome(relabelled(given, order)), Outcome(before.value, chosen_classes(before.grads, order)))


def permuted_rows(given: Problem, random: torch.Generator) -> None:
    same(outcome(chosen_rows(given, torch.randperm(len(given.batch.target), generator=random))), outcome(given))


def split_class(given: Problem, random: torch.Generator) -> None:
    """A class without samples in two halves: of its images where they are counted, else of its probability."""
    used = {label for name in ("target", "target_b", "second_target") if (value := getattr(given.batch, name)) is not None for label in value.tolist()}
    label = unused(random, CLASSES, used)
    halved = relabelled(given, [*range(CLASSES), label])
    if given.name in PRIOR:
        halved.counts[label] = halved.counts[CLASSES] = given.counts[label] // 2
        found = outcome(halved)
    else:
        lower = torch.zeros(CLASSES + 1).index_fill(0, torch.tensor([label, CLASSES]), math.log(2))
        found = outcome(halved, lambda logits: logits - lower)

    def together(grad: Tensor) -> Tensor:
        return grad[:CLASSES].index_add(0, torch.tensor([label]), grad[CLASSES:]) if len(grad) == CLASSES + 1 else grad

    same(Outcome(found.value, {name: together(grad) for name, grad in found.grads.items()}), outcome(given))


def split_batch(given: Problem, random: torch.Generator) -> None:
    """Micro-batches: their losses and gradients average to those of the batch, also with noise."""
    rows = len(given.batch.target)
    cut = 1 + number(random, rows - 1)
    noise = given.name == "gcl"
    parts = [(share / rows, outcome(chosen_rows(given, torch.arange(first, first + share)), noise=noise)) for first, share in ((0, cut), (cut, rows - cut))]
    whole = outcome(given, noise=noise)
    grads = {name: torch.stack([share * part.grads[name] for share, part in parts]).sum(0) for name in whole.grads}
    same(Outcome(torch.stack([share * part.value for share, part in parts]).sum(), grads), whole)


def scaled_rows_of_the_head(given: Problem, random: torch.Generator) -> None:
    """Each by a factor of its own: the longer, the smaller its gradient."""
    longer, name = torch.rand(CLASSES, 1, generator=random).mul(2).exp(), "network.head.weight"
    found = outcome(replace(given, state=given.state | {name: longer * given.state[name]}))
    same(Outcome(found.value, found.grads | {name: longer * found.grads[name]}), outcome(given))


def duplicated_rows(given: Problem, random: torch.Generator) -> None:
    same(outcome(chosen_rows(given, torch.arange(len(given.batch.target)).repeat(2))), outcome(given))


_CONTRAST = "every sample is in the softmax of every other one"
_PROTOTYPES = "all prototypes count alike, so that two halves count twice"
# Laws that do not hold, with the reason. Each is broken by some problem, which a test shows.
BROKEN = {
    "split_class": {
        **dict.fromkeys(("bcl", "gcl+bcl", "hybrid-psc"), _PROTOTYPES),
        "oltr": "what a feature borrows from the memory, and the mean over pairs, depend on the number of classes",
    },
    "split_batch": {
        **dict.fromkeys(("bcl", "gcl+bcl", "hybrid-sc"), _CONTRAST),
        "robust": "every sample is in the softmax of every class",
        "oltr": "the memory's share of its gradient depends on the number of samples",
    },
    "scaled_rows_of_the_head": {
        **dict.fromkeys(("mixup", "la", "robust", "bcl", "proco", "hybrid-sc", "hybrid-psc", "bbn"), "its classifier is linear"),
        "tde": "gamma is added to the lengths",
        "gcl+bcl": "the projection of the weight, which is the contrast's prototype, is no linear function",
    },
    "duplicated_rows": {
        **dict.fromkeys(("bcl", "gcl+bcl", "hybrid-sc"), "a sample and its copy are a pair of cosine 1"),
        "robust": "twice as many samples add log 2 to the bound",
        "oltr": "the memory's share of its gradient depends on the number of samples",
    },
}
# Laws that speak of something that the objective does not have.
NO_ARGUMENT = {
    "constant_for_all_logits": dict.fromkeys(("gcl", "gcl+bcl"), "its logits are computed within the loss, from features and weight"),
    "split_class": {"gcl": "its logits are computed within the loss, from features and weight"},
}
LAWS = Laws(
    METHODS, problem,
    by_name(constant_for_all_logits, permuted_classes, permuted_rows, split_class, split_batch, scaled_rows_of_the_head, duplicated_rows), BROKEN, NO_ARGUMENT,
)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@few_examples
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 4))
def test_laws(name: str, seed: int, rows: int) -> None:
    LAWS.check(name, seed, rows)


@pytest.mark.parametrize(("law", "name"), LAWS.exceptions)
def test_an_exception_is_one(law: str, name: str) -> None:
    assert LAWS.is_broken(law, name, rows=4)


def test_every_exception_is_known() -> None:
    LAWS.check_names()
