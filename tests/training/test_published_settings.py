"""The methods' and re-trainings' settings against tables typed from papers and releases."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gclkern import AGCLLoss, ArcFaceLoss, DBMLoss, LinearGCLLoss, TDEClassifier
from gclkern.functional import dro_lt_loss
from gclkern.training.config import RunConfig
from gclkern.training.data.longtail import profile_counts
from gclkern.training.network import build_network
from gclkern.training.objectives import build_objective
from gclkern.training.objectives.bcl import BalancedContrast
from gclkern.training.processes import Processes
from gclkern.training.recipes import METHODS, Phase, build_loss, plan, plan_run, settings
from gclkern.training.schedules import Schedule
from gclkern.training.trainer import build_trainer

# Class counts, largest and smallest, as published.
COUNTS = {"imagenet-lt": [1280, 100, 5], "inat18": [1000, 50, 2], "places-lt": [4980, 100, 5]}

# MiSLAS, by data set and imbalance: label smoothing of the most frequent and of the rarest class, factor on the rate of weights and bias, shifted BN.
MISLAS = """
    cifar10-lt   100   .3  0    .5    no
    cifar10-lt   50    .2  0    .2    no
    cifar10-lt   10    .1  0    .2    no
    cifar100-lt  100   .4  .1   .2    yes
    cifar100-lt  50    .3  0    .1    yes
    cifar100-lt  10    .2  0    .1    yes
    imagenet-lt  -     .3  0    .05   yes
    inat18       -     .3  0    .05   yes
    places-lt    -     .4  .1   .05   last-block
"""
# MiSLAS's first stage: epochs, batch, rate, weight decay, mixup, schedule.
MISLAS_1 = {
    "cifar10-lt": (200, 128, 0.1, 2e-4, 1.0, "steps"),
    "cifar100-lt": (200, 128, 0.1, 2e-4, 1.0, "steps"),
    "imagenet-lt": (180, 256, 0.1, 5e-4, 0.2, "cosine"),
    "inat18": (200, 256, 0.1, 1e-4, 0.2, "cosine"),
    "places-lt": (90, 256, 0.1, 5e-4, 0.2, "cosine"),
}
# Decoupling's second stages: epochs of cRT and of LWS, batch, rate, weight decay.
DECOUPLING = {
    "imagenet-lt": (10, 5, 512, 0.2, 5e-4),
    "inat18": (30, 5, 512, 0.2, 1e-4),
    "places-lt": (10, 5, 256, 0.1, 5e-4),
}
# Stage 1 by method and data set: epochs, batch, rate, weight decay, mixup; epochs at which the rate falls and its multiples from there, or "cosine" and the
# epochs of its warm-up.
# The rows of hybrid networks on iNaturalist are from memory of the paper.
STAGE_1 = """
    ce          cifar10-lt   200  128  .1    2e-4  0   160,180  .01,.0001
    ce          cifar100-lt  200  128  .1    2e-4  0   160,180  .01,.0001
    ldam-drw    cifar10-lt   200  128  .1    2e-4  0   160,180  .01,.0001
    ldam-drw    cifar100-lt  200  128  .1    2e-4  0   160,180  .01,.0001
    dro-lt      cifar10-lt   200  128  .1    1e-4  0   160,180  .01,.0001
    dro-lt      cifar100-lt  200  128  .1    1e-4  0   160,180  .01,.0001
    dro-lt      imagenet-lt  90   512  .2    5e-4  0   cosine
    gcl+dro-lt  cifar100-lt  200  64   .1    2e-4  1   160,180  .1,.01
    ce          imagenet-lt  90   512  .2    5e-4  0   cosine
    ce          inat18       90   512  .2    1e-4  0   cosine
    la          inat18       90   512  .2    1e-4  0   cosine
    la          cifar10-lt   200  128  .1    2e-4  0   160,180  .01,.0001
    la          cifar100-lt  200  128  .1    2e-4  0   160,180  .01,.0001
    balanced-softmax  cifar10-lt   200  64  .1  2e-4  0  cosine  5
    balanced-softmax  cifar100-lt  200  64  .1  2e-4  0  cosine  5
    balanced-softmax  imagenet-lt  90  512  .2  5e-4  0  cosine
    focal       places-lt    90   512  .2    5e-4  0   60,80    .1,.01
    mixup       cifar10-lt   200  128  .1    2e-4  1   160,180  .1,.01
    gcl         cifar10-lt   200  64   .1    2e-4  1   160,180  .1,.01
    gcl         cifar100-lt  200  64   .1    2e-4  1   160,180  .1,.01
    gcl         places-lt    90   512  .2    5e-4  .2  60,80    .1,.01
    gcl         imagenet-lt  200  256  .1    5e-4  .2  cosine
    gcl         inat18       200  256  .1    1e-4  .2  cosine
    tde         cifar10-lt   200  256  .2    5e-4  0   120,160  .01,.0001
    tde         cifar100-lt  200  256  .2    5e-4  0   120,160  .01,.0001
    tde         imagenet-lt  90   512  .2    5e-4  0   cosine
    tde         places-lt    90   512  .2    5e-4  0   cosine
    bbn         cifar10-lt   200  128  .1    2e-4  0   120,160  .01,.0001
    bbn         cifar100-lt  200  128  .1    2e-4  0   120,160  .01,.0001
    bbn         inat18       180  128  .05   1e-4  0   120,160  .1,.01
    hybrid-sc   cifar10-lt   200  512  .5    1e-4  0   120,160  .1,.01
    hybrid-sc   cifar100-lt  200  512  .5    1e-4  0   120,160  .1,.01
    hybrid-sc   inat18       100  100  .05   1e-4  0   60,80    .1,.01
    hybrid-psc  cifar10-lt   200  512  .5    1e-4  0   120,160  .1,.01
    hybrid-psc  cifar100-lt  200  512  .5    1e-4  0   120,160  .1,.01
    hybrid-psc  inat18       100  100  .05   1e-4  0   60,80    .1,.01
    oltr        imagenet-lt  30   128  .1    5e-4  0   10,20    .1,.01
    oltr        places-lt    30   128  .001  5e-4  0   10,20    .1,.01
    bcl         cifar10-lt   200  256  .15   5e-4  0   160,180  .1,.01
    bcl         cifar100-lt  200  256  .15   5e-4  0   160,180  .1,.01
    bcl         imagenet-lt  90   256  .1    5e-4  0   cosine
    bcl         inat18       100  256  .2    1e-4  0   cosine
    proco       cifar10-lt   200  256  .3    2e-4  0   160,180  .1,.01
    proco       cifar100-lt  200  256  .3    2e-4  0   160,180  .1,.01
    proco       imagenet-lt  90   256  .1    5e-4  0   cosine
    proco       inat18       90   256  .2    1e-4  0   cosine
"""
# Options of rivals, as released.
RIVAL_OPTIONS = {
    ("tde", "cifar10-lt"): {"alpha": 1.0},
    ("tde", "cifar100-lt"): {"alpha": 1.5},
    ("tde", "imagenet-lt"): {"alpha": 3.0, "momentum_by_rate": True},
    ("tde", "places-lt"): {"alpha": 3.0, "momentum_by_rate": True},
    ("bbn", "cifar100-lt"): {},
    ("bbn", "inat18"): {"period": 200 / 180},
    ("hybrid-psc", "cifar10-lt"): {"temperature": 1.0},
    ("hybrid-psc", "cifar100-lt"): {},
    ("bcl", "imagenet-lt"): {"weight": 1.0, "contrast_weight": 0.35, "temperature": 0.07, "hidden": 2048, "dim": 1024, "scale": 30.0},
    ("bcl", "inat18"): {"weight": 1.0, "contrast_weight": 0.35, "temperature": 0.07, "hidden": 2048, "dim": 1024, "scale": 30.0},
}


# DBM: epochs, batch, rate, weight decay, warm-up, schedule; margin of the rarest class and scale. Its other sets have settings of our own.
DBM_CIFAR = ((200, 64, 0.1, 2e-4, 5, "cosine"), 0.1, 32.0)


def counts_of(dataset: str, imbalance: str) -> list[int]:
    if dataset in COUNTS:
        return COUNTS[dataset]
    classes = 10 if dataset == "cifar10-lt" else 100
    return profile_counts(classes, 50000 // classes, float(imbalance), "exp")


def rates(phase: Phase) -> list[float]:
    return [phase.schedule.rate(phase.lr, epoch, phase.epochs) for epoch in range(phase.epochs)]


@pytest.mark.parametrize("row", STAGE_1.strip().splitlines(), ids=lambda row: " ".join(row.split()[:2]))
def test_stage_1(row: str) -> None:
    method, dataset, *numbers, falls, factors = f"{row} 0".split()[:9]
    phase = plan(method, None, dataset, COUNTS.get(dataset, [500, 50, 5]))[0]
    assert [phase.epochs, phase.batch_size, phase.lr, phase.weight_decay, phase.mixup] == [float(number) for number in numbers]
    assert phase.sampler == "instance"
    assert phase.drw == (0.8 if method == "ldam-drw" else None)
    if falls == "cosine":
        assert (phase.schedule.kind, phase.schedule.warmup) == ("cosine", int(factors))
        return
    epochs = [int(epoch) for epoch in falls.split(",")]
    found = [phase.schedule.rate(phase.lr, epoch, phase.epochs) for first in epochs for epoch in (first - 1, first)]
    low, lowest = (float(factor) * phase.lr for factor in factors.split(","))
    assert found == pytest.approx([phase.lr, low, low, lowest])


def test_options_of_rivals() -> None:
    for (method, dataset), options in RIVAL_OPTIONS.items():
        assert plan(method, None, dataset, COUNTS.get(dataset, [500, 50, 5]))[0].options == options, (method, dataset)
    # their defaults, which CIFAR has
    contrast = build_objective(plan("bcl", None, "cifar100-lt", [500, 5])[0], [500, 5], 64)
    assert isinstance(contrast, BalancedContrast)
    assert (contrast.weight, contrast.contrast_weight, contrast.contrast.temperature) == (2.0, 0.6, 0.1)
    assert [layer.out_features for layer in contrast.project if isinstance(layer, nn.Linear)] == [512, 128]
    classifier = TDEClassifier(128, 10)
    assert (classifier.num_heads, classifier.scale, classifier.gamma) == (2, 16.0, 1 / 32)
    assert float(classifier.momentum) == pytest.approx(0.9)
    bbn = plan("bbn", None, "cifar100-lt", [500, 5])[0]
    assert (bbn.nesterov, bbn.second_sampler, bbn.schedule.warmup, bbn.schedule.warmup_start) == (True, "reversed", 5, 1 / 3)
    ldam = plan("ldam-drw", None, "cifar100-lt", [500, 5])[0]
    assert (ldam.drw, ldam.schedule.warmup) == (0.8, 5)


@pytest.mark.parametrize("row", MISLAS.strip().splitlines())
def test_mislas(row: str) -> None:
    dataset, imbalance, head, tail, factor, shifted = row.split()
    counts = counts_of(dataset, imbalance)
    first, second = plan("mixup", "mislas", dataset, counts)
    assert (first.epochs, first.batch_size, first.lr, first.weight_decay, first.mixup, first.schedule.kind) == MISLAS_1[dataset]
    assert second.options == {"head": float(head), "tail": float(tail)}
    assert second.lr_factors == {"network.head.weight": float(factor), "network.head.bias": float(factor)}
    assert second.batch_norm == {"no": "frozen", "yes": "shifted", "last-block": "shifted-last-block"}[shifted]
    assert (second.batch_size, second.weight_decay, second.mixup) == (first.batch_size, first.weight_decay, 0.0)
    assert (second.sampler, second.sampler_options) == ("class-aware", {"samples_per_class": 4})
    assert (second.head, second.trains, second.start) == ("scaled linear", "head-and-scale", "previous")
    # 0.1 (1 + cos(pi e / 10)) / 2 for the factors, so that the rate is never 0
    assert rates(second)[:2] + rates(second)[-1:] == pytest.approx([0.1, 0.0975528, 0.0024472], abs=1e-7)
    assert len(rates(second)) == 10
    smoothing = dict(build_loss(second, counts).named_buffers())["label_smoothing"]
    assert float(smoothing[0]) == pytest.approx(float(head))
    assert float(smoothing[-1]) == pytest.approx(float(tail))


def test_mislas_of_an_unreleased_imbalance_is_that_of_the_nearest() -> None:
    for imbalance, nearest in (("200", "100"), ("60", "50"), ("80", "100"), ("1", "10")):
        found, expected = (plan("mixup", "mislas", "cifar100-lt", counts_of("cifar100-lt", value))[1] for value in (imbalance, nearest))
        assert found == expected


@pytest.mark.parametrize("dataset", ["imagenet-lt", "inat18", "places-lt"])
def test_disalign(dataset: str) -> None:
    """Its release has ImageNet-LT alone: 10 epochs of 256 at 0.1 by cosine on instance-balanced batches, exponent 1.2, weights that span 776 to 1."""
    first, second = plan("ce", "disalign", dataset, COUNTS[dataset])
    assert (second.epochs, second.batch_size, second.lr, second.schedule.kind, second.sampler, second.mixup) == (10, 256, 0.1, "cosine", "instance", 0.0)
    assert second.weight_decay == first.weight_decay
    assert (second.head, second.trains, second.start) == ("calibrated linear", "calibration", "previous")
    if dataset == "imagenet-lt":
        assert second.weight_decay == 5e-4
        weight = dict(build_loss(second, COUNTS[dataset]).named_buffers())["weight"]
        torch.testing.assert_close(weight[2] / weight[0], torch.tensor((1280 / 5) ** 1.2))
        assert float(weight.sum()) == pytest.approx(3.0)


def test_disalign_s_own_stage_1() -> None:
    """The flags of docs/methods.md: 90 epochs of 256 at 0.1 by cosine, with a linear classifier or with a cosine classifier of scale 20 in both stages."""
    given: dict[str, Any] = {"data": "imagenet-lt", "retrain": "disalign", "batch_size": 256, "lr": 0.1}
    linear = plan_run(RunConfig(method="ce", **given), COUNTS["imagenet-lt"], 1)
    cosine = plan_run(RunConfig(method="arcface", margin=0.0, scale=20.0, **given), COUNTS["imagenet-lt"], 1)
    for first, second in (linear, cosine):
        assert (first.epochs, first.batch_size, first.lr, first.weight_decay, first.schedule) == (90, 256, 0.1, 5e-4, Schedule("cosine"))
        assert (second.batch_size, second.lr, second.weight_decay) == (256, 0.1, 5e-4)
    assert ([phase.head for phase in linear], [phase.head for phase in cosine]) == (["linear", "calibrated linear"], ["cosine", "calibrated cosine"])
    assert [phase.options["scale"] for phase in cosine] == [20.0, 20.0]
    features, target = torch.rand(3, 3), torch.tensor([0, 1, 2])
    loss = build_loss(cosine[0], COUNTS["imagenet-lt"])(features, torch.eye(3), target)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(20.0 * nn.functional.normalize(features), target))


@pytest.mark.parametrize("dataset", DECOUPLING)
def test_decoupling(dataset: str) -> None:
    crt_epochs, lws_epochs, *shared = DECOUPLING[dataset]
    for retrain, epochs in (("crt", crt_epochs), ("lws", lws_epochs)):
        phase = plan("ce", retrain, dataset, COUNTS[dataset])[1]
        assert [phase.epochs, phase.batch_size, phase.lr, phase.weight_decay] == [epochs, *shared]
        assert (phase.sampler, phase.sampler_options, phase.schedule.kind) == ("class-aware", {"samples_per_class": 4}, "cosine")
        assert phase.trains == {"crt": "head", "lws": "scale"}[retrain]


def test_decoupling_on_cifar_is_class_balanced() -> None:
    """As its paper says and GCL's README has it, whose runs the published rows are; by this name on the large sets, too."""
    assert plan("ce", "crt", "cifar100-lt", [500, 5])[1].sampler == "class-balanced"
    given = plan("ce", "crt", "imagenet-lt", [500, 5], stage2={"sampler": "class-balanced"})[1]
    assert (given.sampler, given.sampler_options) == ("class-balanced", {})


@pytest.mark.parametrize("dataset", ["cifar10-lt", "cifar100-lt"])
@pytest.mark.parametrize("method", ["dbm", "gcl-dbm"])
def test_dbm(method: str, dataset: str) -> None:
    settings_of, margin, scale = DBM_CIFAR
    counts = counts_of(dataset, "100")
    (phase,) = plan(method, None, dataset, counts)
    assert (phase.epochs, phase.batch_size, phase.lr, phase.weight_decay, phase.schedule.warmup, phase.schedule.kind) == settings_of
    assert (phase.augment, phase.mixup, phase.head) == ("crop,flip,autoaugment,cutout", 0.0, "cosine")
    loss, expected = build_loss(phase, counts), DBMLoss(counts, margin=margin, scale=scale, noise_mul=0.5 if method == "gcl-dbm" else 0.0)
    assert isinstance(loss, LinearGCLLoss)
    assert loss._options() == expected._options()
    assert loss.state_dict() == expected.state_dict()
    torch.testing.assert_close(dict(loss.named_buffers()), dict(expected.named_buffers()))
    assert plan(method, None, "imagenet-lt", COUNTS["imagenet-lt"])[0].options["scale"] == 30.0


@pytest.mark.parametrize("dataset", ["cifar10-lt", "cifar100-lt"])
def test_balanced_softmax_is_as_the_authors_of_dbm_ran_it(dataset: str) -> None:
    """Its published row is theirs: a linear classifier with bias, and the augmentation of DBM. On other data sets it is logit adjustment."""
    counts = counts_of(dataset, "100")
    (phase,), (of_dbm,) = plan("balanced-softmax", None, dataset, counts), plan("dbm", None, dataset, counts)
    assert phase == replace(of_dbm, loss="la", options={}, head="linear")
    assert phase.augment == "crop,flip,autoaugment,cutout"
    assert plan("la", None, dataset, counts)[0].augment is None
    for other in ("digits-lt", "places-lt", "folder"):
        assert plan("balanced-softmax", None, other, counts) == plan("la", None, other, counts)


@pytest.mark.parametrize("dataset", ["cifar100-lt", "places-lt"])
def test_agcl(dataset: str) -> None:
    """Its release has Places-LT alone; other sets have the same arguments, and all have GCL's stages."""
    counts = counts_of(dataset, "100")
    phases, of_gcl = plan("agcl", None, dataset, counts), plan("gcl", None, dataset, counts)
    assert [replace(phase, loss="gcl", options={}) for phase in phases] == [replace(phase, options={}) for phase in of_gcl]
    for phase, gamma in zip(phases, (0.0, 1.0), strict=True):
        loss, expected = build_loss(phase, counts), AGCLLoss(counts, noise_mul=0.5, margin=0.0, easy_margin=True, scale=30.0, gamma=gamma)
        assert loss._options() == expected._options()  # type: ignore[operator]
        torch.testing.assert_close(dict(loss.named_buffers()), dict(expected.named_buffers()))


@pytest.mark.parametrize("method", ["dro-lt", "gcl+dro-lt"])
def test_the_radius_of_dro_lt_moves_as_in_its_release(method: str) -> None:
    """The release learns the radius r, from 1 at the rate 0.005; here it is 2 epsilon. Two steps of SGD with momentum 0.9, without weight decay."""
    counts = [50, 20, 5]
    phase = replace(plan(method, None, "cifar10-lt", counts)[1], weight_decay=0.0)
    torch.manual_seed(0)
    network = build_network("small-cnn", phase.head, 3, in_channels=1, image_size=8)
    trainer = build_trainer(phase, network, counts, RunConfig(), Processes.single(torch.device("cpu")))
    trainer.set_rate(phase.lr)
    trainer.module.train()
    ((epsilon, factor),) = [(group["params"], group["factor"]) for group in trainer.optimizer.param_groups if group["factor"] != 1.0]
    assert ([parameter.tolist() for parameter in epsilon], factor) == ([[0.5] * 3], 0.25)
    images, target, centroids = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 0]), torch.randn(3, 64)
    radius = torch.ones(3, requires_grad=True)
    release = torch.optim.SGD([radius], lr=0.005, momentum=0.9)
    for step in range(2):
        with torch.no_grad():
            features = copy.deepcopy(trainer.module.network.backbone)(images)
        release.zero_grad()
        dro_lt_loss(features, target, centroids, radius / 2).backward()
        release.step()
        trainer.step({"images": images, "target": target}, step, step, centroids=centroids, counts=torch.ones(3, dtype=torch.int64))
        assert bool((radius > 0).all()) and bool((radius < 1).all())
        torch.testing.assert_close(2 * epsilon[0].detach(), radius.detach())


def test_arcface() -> None:
    loss, expected = build_loss(plan("arcface", None, "cifar100-lt", [50, 5])[0], [50, 5]), ArcFaceLoss(margin=0.5, scale=30.0)
    assert loss._options() == expected._options()  # type: ignore[operator]
    assert loss._arguments()["margin"] == 0.5  # type: ignore[operator]
    assert loss.cloud is None


@pytest.mark.parametrize("retrain", ["mislas", "disalign"])
def test_a_cosine_classifier_keeps_its_scale(retrain: str) -> None:
    second = plan("gcl", retrain, "cifar100-lt", counts_of("cifar100-lt", "100"))[-1]
    assert second.options["scale"] == 30.0
    assert second.head.endswith("cosine")


def test_settings_of_every_method_are_there() -> None:
    """A name that no data set has would mean the plain ones."""
    known = {name for stages in settings.STAGE_1.values() for name in stages}
    assert {method.settings for method in METHODS.values()} == known


def test_every_entry_of_stage_1_has_its_source() -> None:
    """A letter of [P], [C], [A], [R], [M] or [H] on its line, or on that of its family of data sets."""
    of_family, entries = False, 0
    for line in Path(settings.__file__).read_text(encoding="utf-8").split("STAGE_1: ")[1].split("\n}\n")[0].splitlines():
        named = any(f"[{letter}]" in line for letter in "PCARMH")
        if line.startswith('    "'):
            of_family = named
        elif line.startswith('        "'):
            entries += 1
            assert named or of_family, line
    assert entries == sum(len(methods) for methods in settings.STAGE_1.values())
