"""The re-trainings' settings against tables typed from papers and releases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gclkern import AGCLLoss, ArcFaceLoss, DBMLoss, LinearGCLLoss
from gclkern.training.data.longtail import profile_counts
from gclkern.training.recipes import Phase, build_loss, plan, settings

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


# DBM: epochs, batch, rate, weight decay, warm-up, schedule; margin of the rarest class and scale. Its other sets have settings of our own.
DBM_CIFAR = ((200, 64, 0.1, 2e-4, 5, "cosine"), 0.1, 32.0)


def counts_of(dataset: str, imbalance: str) -> list[int]:
    if dataset in COUNTS:
        return COUNTS[dataset]
    classes = 10 if dataset == "cifar10-lt" else 100
    return profile_counts(classes, 50000 // classes, float(imbalance), "exp")


def rates(phase: Phase) -> list[float]:
    return [phase.schedule.rate(phase.lr, epoch, phase.epochs) for epoch in range(phase.epochs)]


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


@pytest.mark.parametrize("dataset", DECOUPLING)
def test_decoupling(dataset: str) -> None:
    crt_epochs, lws_epochs, *shared = DECOUPLING[dataset]
    for retrain, epochs in (("crt", crt_epochs), ("lws", lws_epochs)):
        phase = plan("ce", retrain, dataset, COUNTS[dataset])[1]
        assert [phase.epochs, phase.batch_size, phase.lr, phase.weight_decay] == [epochs, *shared]
        assert (phase.sampler, phase.schedule.kind, phase.trains) == ("class-balanced", "cosine", {"crt": "head", "lws": "scale"}[retrain])


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


def test_every_entry_of_stage_1_has_its_source() -> None:
    """A letter of [P], [C], [A], [R] or [H] on its line, or on that of its family of data sets."""
    of_family, entries = False, 0
    for line in Path(settings.__file__).read_text(encoding="utf-8").split("STAGE_1: ")[1].split("\n}\n")[0].splitlines():
        named = any(f"[{letter}]" in line for letter in "PCARH")
        if line.startswith('    "'):
            of_family = named
        elif line.startswith('        "'):
            entries += 1
            assert named or of_family, line
    assert entries == sum(len(methods) for methods in settings.STAGE_1.values())
