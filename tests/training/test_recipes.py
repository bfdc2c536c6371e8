"""The methods' published settings, and losses that are what their names say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import train
from gclkern.clouds import cloud_sizes
from gclkern.losses import LinearGCLLoss
from gclkern.training.config import RunConfig
from gclkern.training.network import build_head
from gclkern.training.objectives import build_objective
from gclkern.training.recipes import METHODS, RETRAINS, SAMPLERS, build_loss, default_model, list_by_family, plan, plan_run
from gclkern.training.schedules import Schedule
from gclkern.training.seeds import derive_seed
from gclkern.weights import effective_number_weights, ldam_margins, log_prior

COUNTS = [50, 20, 5]
DATASETS = ["digits-lt", "cifar10-lt", "imagenet-lt", "places-lt", "inat18", "folder"]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(("method", "retrain"), [
    (method, retrain) for method, retrain in product(METHODS, [None, *RETRAINS]) if retrain in (METHODS[method].retrains or {None, *RETRAINS})
])  # fmt: skip
def test_every_combination_has_a_plan(method: str, retrain: str | None, dataset: str) -> None:
    phases = plan(method, retrain, dataset, COUNTS, baseline=True)
    assert phases[0].epochs == sum(phase.epochs for phase in phases[1:])
    assert phases[1].start == "fresh"
    for phase in phases:
        build_objective(phase, COUNTS, 4)
        assert phase.sampler in SAMPLERS
        assert phase.second_sampler is None or phase.second_sampler in SAMPLERS
        build_head(phase.head, 4, 3)


# The rate of these methods' first phase by epoch: BBN and De-confound-TDE warm up from a third of it, and OLTR takes a tenth in each third of its epochs.
RATES = {
    ("cifar100-lt", "tde"): {0: 0.2 / 3, 4: 0.2 * 13 / 15, 5: 0.2, 119: 0.2, 120: 0.002, 159: 0.002, 160: 2e-5, 199: 2e-5},
    ("cifar10-lt", "bbn"): {0: 0.1 / 3, 4: 0.1 * 13 / 15, 5: 0.1, 119: 0.1, 120: 0.001, 160: 1e-5},
    ("inat18", "bbn"): {0: 0.05, 119: 0.05, 120: 0.005, 160: 0.0005},
    ("imagenet-lt", "oltr"): {0: 0.1, 9: 0.1, 10: 0.01, 20: 0.001},
}
# OLTR's second phase: epochs, batch size, learning rate, its milestones, factors on it, what learns and the backbone.
OLTR_2 = {
    "imagenet-lt": (60, 128, 0.01, (20, 40), {"network.head.memory": 1.0, "network.head": 10.0}, "all", "modulated"),
    "places-lt": (30, 128, 0.0001, (10, 20), {"network.head": 100.0}, "embedding", "embedded-modulated"),
}
# Method, data set, re-training: epochs, batch size, learning rate, sampler, loss, what learns and the classifier it starts from.
# The released GCL says `--lr 0.1`, which its schedule divides to 0.002, and takes cben in the paper's table 5.
STAGE_2 = {
    ("gcl", "cifar100-lt", "gcl"): (30, 64, 0.002, "cben", "gcl", "head", "previous"),
    ("gcl", "imagenet-lt", "gcl"): (30, 256, 0.002, "cben", "gcl", "head", "previous"),
    ("gcl", "places-lt", "gcl"): (30, 512, 0.002, "cben", "gcl", "head", "previous"),
    ("ce", "cifar100-lt", "gcl"): (30, 64, 0.002, "cben", "gcl", "head", "new head"),
    ("gcl", "cifar100-lt", "crt"): (30, 64, 0.002, "cben", "gcl", "head", "new head"),
    ("gcl", "cifar100-lt", "lws"): (30, 64, 0.002, "cben", "gcl", "scale", "previous"),
    ("ce", "cifar100-lt", "crt"): (10, 128, 0.1, "class-balanced", "ce", "head", "new head"),
    ("ce", "imagenet-lt", "crt"): (10, 512, 0.2, "class-aware", "ce", "head", "new head"),
    ("ce", "inat18", "crt"): (30, 512, 0.2, "class-aware", "ce", "head", "new head"),
    ("ldam-drw", "imagenet-lt", "lws"): (5, 512, 0.2, "class-aware", "ce", "scale", "previous"),
}


@pytest.mark.parametrize(("dataset", "method"), RATES)
def test_rates_are_the_published_ones(dataset: str, method: str) -> None:
    phase = plan(method, None, dataset, COUNTS)[0]
    found = {epoch: phase.schedule.rate(phase.lr, epoch, phase.epochs) for epoch in RATES[dataset, method]}
    assert found == pytest.approx(RATES[dataset, method])


@pytest.mark.parametrize("dataset", OLTR_2)
def test_oltr_s_second_phase_is_the_released_one(dataset: str) -> None:
    phase = plan("oltr", None, dataset, COUNTS)[1]
    milestones = tuple(round(share * phase.epochs) for share in phase.schedule.milestones)
    assert (phase.epochs, phase.batch_size, phase.lr, milestones, phase.lr_factors, phase.trains, phase.backbone) == OLTR_2[dataset]
    assert (phase.sampler, phase.sampler_options, phase.weight_decay, phase.schedule.factors) == ("class-aware", {"samples_per_class": 4}, 5e-4, (0.1, 0.01))


def test_networks_of_the_rivals_are_the_released_ones() -> None:
    """BBN's network on CIFAR has two last blocks, and De-confound-TDE takes it; on the large sets it has a ResNeXt-50, on Places-LT from random weights."""
    for method in ("bbn", "tde"):
        assert plan(method, None, "cifar10-lt", COUNTS)[0].backbone == "two-branch"
    assert (METHODS["tde"].models["places"], METHODS["oltr"].models["imagenet"]) == ("resnext50_32x4d", "resnet10")
    for method, kind, trains, pretrained in (("tde", "", "all", False), ("oltr", "embedded", "all", True), ("gcl", "", "new-last-block", True)):
        phase = plan(method, None, "places-lt", COUNTS)[0]
        assert (phase.backbone, phase.trains, phase.pretrained) == (kind, trains, pretrained)
    whole = plan("gcl", None, "places-lt", COUNTS, stage1={"trains": "all"})[0]
    assert (whole.backbone, whole.trains, whole.pretrained) == ("", "all", True)


@pytest.mark.parametrize(("method", "dataset", "retrain"), STAGE_2)
def test_stage_2_is_the_published_one(method: str, dataset: str, retrain: str) -> None:
    first, second = plan(method, retrain, dataset, COUNTS)
    assert (second.epochs, second.batch_size, second.lr, second.sampler, second.loss, second.trains, second.start) == STAGE_2[method, dataset, retrain]
    assert second.schedule == Schedule("cosine")
    assert second.mixup == (first.mixup if second.loss == "gcl" else 0.0)


def test_gcl_s_losses_are_the_released_ones() -> None:
    first, second = plan("gcl", None, "cifar100-lt", COUNTS)
    assert first.options == {"noise_mul": 0.5, "scale": 30.0}
    assert second.options == {"noise_mul": 0.5, "margin": 0.1, "scale": 20.0, "gamma": 1.0}
    first, second = plan("gcl", None, "places-lt", COUNTS)
    assert first.options == {"noise_mul": 1.0, "scale": 30.0}
    assert second.options == {"noise_mul": 1.0, "margin": 0.1, "scale": 15.0}


def test_dro_lt_on_cifar_is_the_released_recipe() -> None:
    first, robust, classifier = plan("dro-lt", None, "cifar100-lt", COUNTS)
    assert (first.loss, first.epochs, first.batch_size) == ("ce", 200, 128)
    assert (robust.epochs, robust.batch_size, robust.lr, robust.weight_decay, robust.trains, robust.robust) == (80, 128, 0.005, 1e-4, "backbone", 1.0)
    assert (robust.sampler, robust.sampler_options, robust.epoch_samples) == ("class-aware", {"samples_per_class": 4}, 150)
    assert dict(build_loss(robust, COUNTS).named_buffers())["weight"].tolist() == pytest.approx([1.0, 0.4, 0.1])
    assert (classifier.epochs, classifier.lr, classifier.trains, classifier.options) == (20, 0.01, "head", {})
    assert (first.lr_factors, robust.lr_factors, classifier.lr_factors) == ({}, {"objective.robust": 0.25}, {})
    assert robust.schedule == classifier.schedule == Schedule()


def test_gcl_with_dro_lt_is_gcl_with_a_stretch_of_dro_lt_between_its_stages() -> None:
    first, robust, second = plan("gcl+dro-lt", None, "cifar100-lt", COUNTS)
    assert (first, second) == tuple(plan("gcl", None, "cifar100-lt", COUNTS, augment="crop,flip,autoaugment,cutout"))  # dro-lt's
    alone = plan("dro-lt", None, "cifar100-lt", COUNTS)[1]
    assert robust == replace(alone, loss="gcl", options=first.options | alone.options, head="cosine")


def test_both_robust_phases_weight_classes_alike() -> None:
    """By n_c / n_max, which undoes the class-aware sampling; without noise GCL's loss is then cross entropy of scaled cosines with these weights."""
    robust = plan("gcl+dro-lt", None, "cifar100-lt", COUNTS)[1]
    features, classes, target = torch.randn(6, 4), torch.randn(3, 4), torch.tensor([0, 1, 2, 0, 1, 0])
    loss = build_loss(robust, COUNTS).eval()(features, classes, target)
    cosine = F.normalize(features) @ F.normalize(classes).T
    torch.testing.assert_close(loss, F.cross_entropy(30.0 * cosine, target, weight=torch.tensor([1.0, 0.4, 0.1])))


def test_given_settings_replace_published_ones() -> None:
    first, second = plan("gcl", None, "cifar10-lt", COUNTS, stage1={"epochs": 7, "mixup": 0.0}, stage2={"sampler": "class-balanced"})
    assert (first.epochs, first.mixup, second.mixup, second.sampler) == (7, 0.0, 0.0, "class-balanced")


@pytest.mark.parametrize(("method", "dataset"), [("gcl", "digits-lt"), ("gcl", "cifar100-lt"), ("ldam-drw", "cifar10-lt"), ("gcl+dro-lt", "places-lt")])
def test_a_baseline_differs_in_the_loss_alone(method: str, dataset: str) -> None:
    """A rival that lacks what the method is given would say nothing of the method."""
    given = {"lr": 0.3, "weight_decay": 0.01, "mixup": 0.7, "sampler": "class-balanced"}
    baseline, first, *rest = plan(method, None, dataset, COUNTS, baseline=True, stage1=given)
    epochs = first.epochs + sum(phase.epochs for phase in rest)
    assert baseline == replace(first, name="baseline", epochs=epochs, loss="ce", options={"scale": 30.0}, drw=None)
    scaled = plan_run(RunConfig(method=method, data=dataset, baseline=True, scale=24.0), COUNTS, 1)
    assert [phase.options["scale"] for phase in scaled[:2]] == [24.0, 24.0]


def test_a_new_classifier_after_one_of_another_kind_is_linear() -> None:
    """De-confound-TDE's subtracts a part of the features from predictions, by a strength that depends on the data set."""
    heads = {method: plan(method, "crt", "cifar10-lt", COUNTS)[1].head for method in ("tde", "bbn", "ce", "ldam-drw", "gcl+bcl")}
    assert heads == {"tde": "linear", "bbn": "linear", "ce": "linear", "ldam-drw": "cosine", "gcl+bcl": "cosine"}


def test_remedies_name_settings_of_the_phase() -> None:
    given = {"data": "cifar10-lt", "accumulate": 3}
    with pytest.raises(
        ValueError, match=r"stage-1: a batch of 64 does not divide .*; take another `accumulate` or `batch_size`, or another number of processes"
    ):
        plan_run(RunConfig(**given), COUNTS, 1)
    with pytest.raises(ValueError, match=r"stage-2: .*; take another `accumulate` or `retrain_batch_size`, or"):
        plan_run(RunConfig(batch_size=48, **given), COUNTS, 1)
    with pytest.raises(ValueError, match=r"stage-1-robust: .*; take another `accumulate`, or"):
        plan_run(RunConfig(method="dro-lt", batch_size=48, **given), COUNTS, 1)


def test_a_baseline_beside_a_finished_stage_1_is_refused() -> None:
    with pytest.raises(ValueError, match="`baseline` does nothing with `stage1`"):
        plan_run(RunConfig(stage1="stage-1.pt", baseline=True), COUNTS, 1)


def test_the_baseline_of_another_classifier_is_linear() -> None:
    for method in ("la", "bbn", "tde"):
        baseline = plan(method, None, "digits-lt", COUNTS, baseline=True)[0]
        assert (baseline.loss, baseline.head, baseline.options) == ("ce", "linear", {})
    with pytest.raises(ValueError, match="`scale` does nothing here"):
        plan_run(RunConfig(method="bcl", data="imagenet-lt", baseline=True, scale=24.0), COUNTS, 1)


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


def test_a_given_augmentation_is_that_of_every_phase() -> None:
    """Published numbers with strong augmentation and without are no comparison of methods."""
    for method in METHODS:
        retrain = None if METHODS[method].retrains else "crt"
        phases = plan(method, retrain, "cifar100-lt", COUNTS, baseline=True, augment="crop,flip,cutout")
        assert {phase.augment for phase in phases} == {"crop,flip,cutout"}
    assert {phase.augment for phase in plan("gcl+dro-lt", None, "cifar100-lt", COUNTS, baseline=True)} == {"crop,flip,autoaugment,cutout"}
    assert {phase.augment for phase in plan("dro-lt", "gcl", "imagenet-lt", COUNTS)} == {None}
    with pytest.raises(ValueError, match="unknown augmentation 'blur'"):
        plan("ce", None, "cifar100-lt", COUNTS, augment="blur")


def test_a_given_sampler_has_its_own_options() -> None:
    """The published one, given by name, keeps those that it is published with."""
    for name, options in (("class-balanced", {}), ("class-aware", {"samples_per_class": 4})):
        second = plan("ce", "crt", "imagenet-lt", COUNTS, stage2={"sampler": name})[1]
        assert (second.sampler, second.sampler_options) == (name, options)


def test_a_cloud_without_clouds_is_refused() -> None:
    with pytest.raises(ValueError, match="the method ce has no clouds"):
        plan("ce", None, "cifar10-lt", COUNTS, cloud="cosine")


def test_weight_decay_is_that_of_all_phases() -> None:
    phases = plan("dro-lt", "crt", "cifar10-lt", COUNTS, stage1={"weight_decay": 0.01})
    assert [phase.weight_decay for phase in phases] == [0.01] * 4


@pytest.mark.parametrize("retrain", ["none", "ncm", "tau-norm", "post-hoc-la"])
def test_settings_that_nothing_takes_are_refused(retrain: str) -> None:
    with pytest.raises(ValueError, match=r"settings of .*`retrain_lr`"):
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


def test_seeds_differ() -> None:
    seeds = {derive_seed(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_default_models() -> None:
    assert [default_model(name, 224, 10**6) for name in DATASETS] == ["small-cnn", "resnet32", "resnet50", "resnet152", "resnet50", "resnet50"]
    assert [default_model("folder", 32, 10**6), default_model("list", 224, 1000)] == ["resnet32", "resnet18"]


OWN_COUNTS = [1500, 1000, 260]


@pytest.mark.parametrize("dataset", ["list", "folder"])
def test_on_a_set_of_ones_own_every_method_has_the_same_budget(dataset: str) -> None:
    first = {method: plan(method, None, dataset, OWN_COUNTS)[0] for method in METHODS}
    assert {(p.epochs, p.batch_size, p.lr, p.weight_decay, p.schedule) for p in first.values()} == {(145, 64, 0.05, 5e-4, Schedule("cosine", warmup=5))}
    assert {name for name, p in first.items() if p.mixup} == {"mixup"}
    assert first["gcl"].options == {"noise_mul": 0.5, "scale": 30.0}
    robust = plan("dro-lt", None, dataset, OWN_COUNTS)[1]
    assert (robust.epochs, robust.epoch_samples) == (58, None)


def test_stage_2_follows_from_stage_1_on_a_set_of_ones_own() -> None:
    """30 epochs of 169 steps at 0.002 on CIFAR-100-LT: fewer steps have a higher rate, and a new classifier has that of stage 1."""
    second = plan("gcl", None, "folder", OWN_COUNTS)[1]
    assert (second.epochs, second.batch_size, second.lr) == (22, 64, 0.0107)
    assert second.epochs * (2760 // 64) * second.lr == pytest.approx(30 * 169 * 0.002, rel=0.01)
    shorter = plan("gcl", None, "folder", OWN_COUNTS, stage1={"epochs": 24, "batch_size": 32, "lr": 0.02})[1]
    assert (shorter.epochs, shorter.batch_size, shorter.lr) == (10, 32, 0.0118)
    assert plan("ce", "crt", "folder", OWN_COUNTS)[1].lr == plan("gcl", "crt", "folder", OWN_COUNTS)[1].lr == 0.05
    pretrained = plan("gcl", None, "folder", OWN_COUNTS, pretrained=True)[0]
    assert (pretrained.epochs, pretrained.lr) == (36, 0.01)


def test_later_phases_follow_the_epochs_of_stage_1() -> None:
    assert [phase.epochs for phase in plan("dro-lt", None, "cifar100-lt", COUNTS, stage1={"epochs": 50})] == [50, 20, 5]
    assert [phase.epochs for phase in plan("gcl", None, "cifar100-lt", COUNTS, stage1={"epochs": 100})] == [100, 15]
    assert [phase.epochs for phase in plan("gcl", None, "cifar100-lt", COUNTS, stage1={"epochs": 100}, stage2={"epochs": 7})] == [100, 7]


def test_clouds_margins_and_reweighting_in_one_stage() -> None:
    (phase,) = plan("gcl-ldam-drw", None, "cifar100-lt", COUNTS)
    assert phase.title == "stage-1: gcl + LDAM-DRW"
    for retrain in RETRAINS:
        if retrain != "none":
            assert plan("ce", retrain, "cifar100-lt", COUNTS)[-1].title == f"stage-2: {retrain}"
    ldam = plan("ldam-drw", None, "cifar100-lt", COUNTS)[0]
    same = ("epochs", "batch_size", "lr", "weight_decay", "schedule", "mixup", "sampler", "head", "drw")
    assert [getattr(phase, name) for name in same] == [getattr(ldam, name) for name in same]
    loss = build_loss(phase, COUNTS)
    assert isinstance(loss, LinearGCLLoss)
    torch.testing.assert_close(loss.margin, build_loss(ldam, COUNTS).margin)
    assert loss.weight is None, "DeferredReweighting writes them"
    torch.testing.assert_close(loss.cloud, 0.5 * cloud_sizes(COUNTS))


def test_arguments_of_the_losses_reach_all_phases_that_have_them() -> None:
    first, second = plan_run(RunConfig(data="cifar10-lt", noise_mul=0.3, scale=16.0), COUNTS, 1)
    assert (first.options["noise_mul"], first.options["scale"], second.options["noise_mul"], second.options["scale"]) == (0.3, 16.0, 0.3, 16.0)
    (phase,) = plan_run(RunConfig(data="cifar10-lt", method="ldam-drw", margin=0.2), COUNTS, 1)
    torch.testing.assert_close(build_loss(phase, COUNTS).margin, ldam_margins(COUNTS, 0.2))
    (phase,) = plan_run(RunConfig(data="cifar10-lt", method="gcl-ldam-drw", margin=0.2), COUNTS, 1)
    torch.testing.assert_close(build_loss(phase, COUNTS).margin, ldam_margins(COUNTS, 0.2))
    for retrain in ("crt", "mislas", "disalign"):  # a classifier goes on with the scale that it was trained with
        phases = plan_run(RunConfig(data="cifar10-lt", method="ldam-drw", retrain=retrain, scale=16.0), COUNTS, 1)
        assert [phase.options["scale"] for phase in phases] == [16.0, 16.0]
    with pytest.raises(ValueError, match=r"`noise_mul` does nothing here: only the losses gcl, agcl, gcl-dbm and gcl\+bcl have it"):
        plan_run(RunConfig(data="cifar10-lt", method="ldam-drw", noise_mul=0.3), COUNTS, 1)


def test_help_lists_every_method_and_re_training_by_family() -> None:
    for entries in (METHODS, RETRAINS):
        lines = list_by_family(entries).splitlines()
        assert all(len(line) <= 140 for line in lines)
        assert sorted(line.split()[0] for line in lines if line.startswith("    ")) == sorted(entries)
        assert {line.strip() for line in lines if not line.startswith("    ")} == {entry.family for entry in entries.values()}


def test_default_method() -> None:
    """A set of one's own has another default than the published ones; a method that is given counts everywhere."""
    found = {name: train.parse_arguments(["--data", name]).config.method for name in ("digits-lt", "cifar100-lt", "inat18", "folder", "list")}
    assert found == {"digits-lt": "gcl", "cifar100-lt": "gcl", "inat18": "gcl", "folder": "gcl-ldam-drw", "list": "gcl-ldam-drw"}
    assert train.parse_arguments(["--data", "folder", "--method", "gcl"]).config.method == "gcl"
