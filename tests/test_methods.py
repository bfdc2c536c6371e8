"""The methods' published settings, and losses that are what their names say."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from gclkern.clouds import cloud_sizes
from gclkern.engine import Network, build_head, derive_seed
from gclkern.losses import LinearGCLLoss
from gclkern.methods import METHODS, RETRAINS, SAMPLERS, build_loss, default_model, plan
from gclkern.models import build_backbone
from gclkern.steps import TrainingStep, mixup, step_batches
from gclkern.weights import effective_number_weights, log_prior

COUNTS = [50, 20, 5]
DATASETS = ["digits-lt", "cifar10-lt", "imagenet-lt", "places-lt", "inat18", "folder"]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(("method", "retrain"), list(product(METHODS, [None, *RETRAINS])))
def test_every_combination_has_a_plan(method: str, retrain: str | None, dataset: str) -> None:
    phases = plan(method, retrain, dataset, COUNTS, baseline=True)
    assert phases[0].epochs == sum(phase.epochs for phase in phases[1:])
    assert phases[1].start == "fresh"
    for phase in phases:
        build_loss(phase, COUNTS)
        assert phase.sampler in SAMPLERS
        build_head(phase.head, 4, 3)


def test_gcl_on_cifar_is_the_released_recipe() -> None:
    first, second = plan("gcl", None, "cifar100-lt", COUNTS)
    assert (first.epochs, first.batch_size, first.lr, first.weight_decay, first.mixup, first.sampler) == (200, 64, 0.1, 2e-4, 1.0, "instance")
    assert first.options == {"noise_mul": 0.5, "scale": 30.0}
    assert (second.epochs, second.batch_size, second.lr, second.mixup, second.sampler, second.trains) == (30, 64, 0.002, 1.0, "cben", "head")
    assert second.options == {"noise_mul": 0.5, "margin": 0.1, "scale": 20.0, "gamma": 1.0}
    assert second.start == "previous"


def test_dro_lt_on_cifar_is_the_released_recipe() -> None:
    first, robust, classifier = plan("dro-lt", None, "cifar100-lt", COUNTS)
    assert (first.loss, first.epochs, first.batch_size) == ("ce", 200, 128)
    assert (robust.epochs, robust.batch_size, robust.lr, robust.weight_decay, robust.trains, robust.robust) == (80, 128, 0.005, 1e-4, "backbone", 1.0)
    assert (robust.sampler, robust.sampler_options, robust.epoch_samples) == ("class-aware", {"samples_per_class": 4}, 150)
    assert dict(build_loss(robust, COUNTS).named_buffers())["weight"].tolist() == pytest.approx([1.0, 0.4, 0.1])
    assert (classifier.epochs, classifier.lr, classifier.trains) == (20, 0.01, "head")


def test_given_settings_replace_published_ones() -> None:
    first, second = plan("gcl", None, "cifar10-lt", COUNTS, stage1={"epochs": 7, "mixup": 0.0}, stage2={"sampler": "class-balanced"})
    assert (first.epochs, first.mixup, second.mixup, second.sampler) == (7, 0.0, 0.0, "class-balanced")


def test_every_phase_is_shortened_by_one_factor() -> None:
    phases = plan("dro-lt", "gcl", "cifar10-lt", COUNTS, epochs_scale=0.1)
    assert [phase.epochs for phase in phases] == [20, 8, 2, 3]
    assert phases[0].schedule.warmup == 1
    assert phases[0].schedule.rate(0.1, 0, 20) == phases[0].schedule.rate(0.1, 15, 20) == 0.1  # a warm-up of one epoch is none
    assert [phase.epochs for phase in plan("ce", "tau-norm", "cifar10-lt", COUNTS, epochs_scale=1e-9)] == [1, 0]
    assert plan("gcl", None, "cifar10-lt", COUNTS, epochs_scale=1.0) == plan("gcl", None, "cifar10-lt", COUNTS)
    assert plan("gcl", None, "cifar10-lt", COUNTS, epochs_scale=0.1, stage1={"epochs": 7})[0].epochs == 7


@pytest.mark.parametrize(("cloud", "exponent"), [("log", None), ("cosine", None), ("power-1/3", 1 / 3), ("power-1/4", 1 / 4)])
def test_clouds_are_the_same_in_both_stages(cloud: str, exponent: float | None) -> None:
    expected = cloud_sizes(COUNTS, cloud.split("-")[0], exponent)
    for phase in plan("gcl", None, "cifar10-lt", COUNTS, cloud=cloud):
        torch.testing.assert_close(build_loss(phase, COUNTS).cloud, 0.5 * expected)


def test_a_cloud_without_clouds_is_refused() -> None:
    with pytest.raises(ValueError, match="the method ce has no clouds"):
        plan("ce", None, "cifar10-lt", COUNTS, cloud="cosine")


@pytest.mark.parametrize("retrain", ["none", "ncm", "tau-norm"])
def test_settings_that_nothing_takes_are_refused(retrain: str) -> None:
    with pytest.raises(ValueError, match="settings of"):
        plan("ce", retrain, "digits-lt", COUNTS, stage2={"lr": 0.1})


@pytest.mark.parametrize(("method", "expected"), [
    ("ce", lambda z, y: F.cross_entropy(z, y)),
    ("cb", lambda z, y: F.cross_entropy(z, y, weight=effective_number_weights(COUNTS))),
    ("la", lambda z, y: F.cross_entropy(z + log_prior(COUNTS), y)),
    ("focal", lambda z, y: ((1 - z.softmax(1)[range(len(y)), y]) ** 2 * F.cross_entropy(z, y, reduction="none")).mean()),
])  # fmt: skip
def test_losses_are_what_their_names_say(method: str, expected: object) -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 0])
    assert callable(expected)
    torch.testing.assert_close(build_loss(plan(method, None, "cifar10-lt", COUNTS)[0], COUNTS)(logits, target), expected(logits, target))


def test_the_fused_loss_is_used_for_gcl() -> None:
    assert isinstance(build_loss(plan("gcl", None, "cifar10-lt", COUNTS)[0], COUNTS), LinearGCLLoss)


class Backbone(torch.nn.Module):
    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(images)
        return features


@pytest.mark.parametrize(("trains", "head", "learned"), [
    ("all", "linear", {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias", "weight", "bias"}),
    ("backbone", "linear", {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias"}),
    ("head", "linear", {"weight", "bias"}),
    ("scale", "scaled linear", {"factor"}),
    ("scale", "scaled cosine", {"factor"}),
])  # fmt: skip
def test_what_learns(trains: str, head: str, learned: set[str]) -> None:
    torch.manual_seed(0)
    network = Network(Backbone(), build_head(head, 4, 3))
    if trains == "scale":
        torch.nn.init.normal_(network.head.weight)
    step = TrainingStep(network, build_loss(plan("ce", None, "cifar10-lt", COUNTS)[0], COUNTS), trains=trains)
    optimizer = torch.optim.SGD(step.learn(), lr=0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step.train()
    step(torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor(1), 0).backward()
    optimizer.step()
    changed = {name.partition(".")[2] for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {"layers.2.running_mean", "layers.2.running_var", "layers.2.num_batches_tracked"}
    # A linear layer's bias before batch normalisation has no gradient, but for rounding.
    assert changed - {"layers.1.bias"} == learned - {"layers.1.bias"} | (statistics if trains in ("all", "backbone") else set())


def test_only_the_last_block_learns() -> None:
    network = Network(build_backbone("resnet18"), build_head("linear", 512, 3))
    step = TrainingStep(network, build_loss(plan("ce", None, "places-lt", COUNTS)[0], COUNTS), trains="last-block")
    assert plan("gcl", None, "places-lt", COUNTS)[0].trains == "last-block"
    learned = {id(parameter) for parameter in step.learn()}
    assert learned == {id(parameter) for module in (network.backbone.layer4, network.head) for parameter in module.parameters()}
    step.train()
    assert network.backbone.layer4.training
    assert not network.backbone.layer3.training
    with pytest.raises(ValueError, match="--train all"):
        TrainingStep(Network(Backbone(), build_head("linear", 4, 3)), step.loss, trains="last-block").learn()


def test_mixup_is_a_function_of_the_seed() -> None:
    images, target = torch.randn(8, 1, 2, 2), torch.arange(8)
    mixed, other, share = mixup(images, target, 0.5, seed=3, block=0)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[other])
    assert torch.equal(mixup(images, target, 0.5, seed=3, block=0)[0], mixed)
    _, order, same_share = mixup(images, target, 0.5, seed=3, block=1)
    assert same_share == share
    assert not torch.equal(order, other)


def test_seeds_differ() -> None:
    seeds = {derive_seed(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_are_full() -> None:
    assert list(step_batches(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5]]


def test_default_models() -> None:
    assert [default_model(name) for name in DATASETS] == ["small-cnn", "resnet32", "resnet50", "resnet152", "resnet50", "resnet50"]
