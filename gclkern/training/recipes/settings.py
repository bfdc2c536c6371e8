"""The published settings: data, each number with its source.

[P] is a paper, [C] its authors' released code, [A] their word in an issue or README, [R] code by others that repeats it, [M] a paper as remembered, whose text
was not at hand to check, [H] chosen here, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gclkern.training import own_data
from gclkern.training.schedules import Schedule

COSINE_SCALE = 30.0
CLASS_AWARE: dict[str, Any] = {"sampler": "class-aware", "sampler_options": {"samples_per_class": 4}}  # [C] decoupling, OLTR, MiSLAS, DRO-LT


class Stage(NamedTuple):
    """Settings of a phase, in the order of :class:`gclkern.training.recipes.Phase`."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: Schedule
    mixup: float = 0.0
    more: Mapping[str, Any] = MappingProxyType({})  # other fields of Phase


# A linear warm-up of 5 epochs, then steps at epochs 160 and 180 of 200.
LDAM_STEPS = Schedule("steps", warmup=5, milestones=(0.8, 0.9), factors=(0.01, 0.0001))  # [C] LDAM-DRW
MISLAS_STEPS = Schedule("steps", warmup=5, milestones=(0.8, 0.9), factors=(0.1, 0.01))  # [C] MiSLAS, GCL
PLACES_STEPS = Schedule("steps", milestones=(60 / 90, 80 / 90), factors=(0.1, 0.01))  # [C] GCL
COSINE = Schedule("cosine")
CONTRAST_STEPS = Schedule("steps", warmup=5, milestones=(0.8, 0.9), factors=(0.1, 0.01))  # [C] ProCo, [R] BCL in ConCutMix
HYBRID_STEPS = Schedule("steps", milestones=(0.6, 0.8), factors=(0.1, 0.01))  # [R] a reproduction of Hybrid-SC; [M] on iNaturalist

# Contrastive methods. On the large sets the classifier is a cosine classifier.
_STRONG_SMALL = "crop,flip,autoaugment,cutout"  # [C] ProCo
_STRONG_LARGE = "resized-crop,flip,color,rand-augment"  # [C] BCL, ProCo
_GREY = "crop,flip,grey"  # [R]
_KEYS_LARGE: dict[str, Any] = {"hidden": 2048, "dim": 1024, "temperature": 0.07, "scale": COSINE_SCALE}  # [C] BCL, ProCo
_BCL_LARGE: dict[str, Any] = {
    "augment": _STRONG_LARGE, "views": ("sim-sharp", "sim-sharp"), "head": "cosine", "options": {**_KEYS_LARGE, "weight": 1.0, "contrast_weight": 0.35},
}  # fmt: skip
_PROCO_LARGE: dict[str, Any] = {"augment": _STRONG_LARGE, "head": "cosine", "options": _KEYS_LARGE}

# Methods with networks of their own.
# [C] BBN and De-confound-TDE on CIFAR: a warm-up from a third of the rate, then steps at epochs 120 and 160 of 200.
BBN_STEPS = Schedule("steps", warmup=5, warmup_start=1 / 3, milestones=(0.6, 0.8), factors=(0.01, 0.0001))
BBN_INAT_STEPS = Schedule("steps", milestones=(120 / 180, 160 / 180), factors=(0.1, 0.01))  # [C] BBN
THIRDS = Schedule("steps", milestones=(1 / 3, 2 / 3), factors=(0.1, 0.01))  # [C] OLTR

_FROM_SCRATCH: dict[str, Any] = {"trains": "all", "pretrained": False}  # on Places-LT, where others train a part of a pretrained network
# [C] De-confound-TDE: the network as it is, and a momentum that follows the learning rate. The release's cosine schedule is an epoch ahead, so that its last
# epoch trains nothing.
_TDE_LARGE: dict[str, Any] = {"backbone": "", "options": {"alpha": 3.0, "momentum_by_rate": True}}
# [C] BBN: shares as if there were 200 epochs, and no change of colours.
_BBN_LARGE: dict[str, Any] = {"options": {"period": 200 / 180}, "augment": "resized-crop,flip"}

# Stage 1 by data set or family of data sets, and by `Method.settings`; see `stage1_settings`.
STAGE_1: dict[str, dict[str, Stage]] = {
    "digits": {  # [H] a minute on two cores
        "plain": Stage(80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5)),
        "gcl": Stage(80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5), mixup=0.2),
        "mixup": Stage(80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5), mixup=0.2),
        # [H] as CIFAR-10, which has as many classes
        "hybrid-psc": Stage(80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5), more={"options": {"temperature": 1.0}}),
    },
    "cifar": {
        "plain": Stage(200, 128, 0.1, 2e-4, LDAM_STEPS),  # [C] LDAM-DRW
        "dro-lt": Stage(200, 128, 0.1, 1e-4, LDAM_STEPS),  # [C] DRO-LT: LDAM-DRW's but for the weight decay, a default that its README's command keeps
        "gcl": Stage(200, 64, 0.1, 2e-4, MISLAS_STEPS, mixup=1.0),  # [C] GCL
        "mixup": Stage(200, 128, 0.1, 2e-4, MISLAS_STEPS, mixup=1.0),  # [C] MiSLAS
        "bcl": Stage(200, 256, 0.15, 5e-4, CONTRAST_STEPS, more={"augment": _STRONG_SMALL}),  # [R] ConCutMix, which leaves out cutout; [C] none for CIFAR
        "proco": Stage(200, 256, 0.3, 2e-4, CONTRAST_STEPS, more={"augment": _STRONG_SMALL}),  # [C] ProCo
        "hybrid-sc": Stage(200, 512, 0.5, 1e-4, HYBRID_STEPS, more={"augment": _GREY}),  # [R] a reproduction, no release
        "hybrid-psc": Stage(200, 512, 0.5, 1e-4, HYBRID_STEPS, more={"augment": _GREY}),  # [R]
        "bbn": Stage(200, 128, 0.1, 2e-4, BBN_STEPS),  # [C] BBN
        "dbm": Stage(200, 64, 0.1, 2e-4, Schedule("cosine", warmup=5), more={"augment": _STRONG_SMALL}),  # [C] DBM, which has balanced softmax, too
    },
    "cifar10-lt": {
        "hybrid-psc": Stage(200, 512, 0.5, 1e-4, HYBRID_STEPS, more={"augment": _GREY, "options": {"temperature": 1.0}}),  # [R]
        "tde": Stage(200, 256, 0.2, 5e-4, BBN_STEPS, more={"options": {"alpha": 1.0}}),  # [C] De-confound-TDE
    },
    "cifar100-lt": {
        "tde": Stage(200, 256, 0.2, 5e-4, BBN_STEPS, more={"options": {"alpha": 1.5}}),  # [C] De-confound-TDE
    },
    "imagenet": {
        "plain": Stage(90, 512, 0.2, 5e-4, COSINE),  # [C] decoupling
        "gcl": Stage(200, 256, 0.1, 5e-4, COSINE, mixup=0.2),  # [C] MiSLAS, but [A] 200 epochs
        "mixup": Stage(180, 256, 0.1, 5e-4, COSINE, mixup=0.2),  # [C] MiSLAS
        "bcl": Stage(90, 256, 0.1, 5e-4, COSINE, more=_BCL_LARGE),  # [C] BCL
        "proco": Stage(90, 256, 0.1, 5e-4, COSINE, more=_PROCO_LARGE),  # [C] ProCo
        "tde": Stage(90, 512, 0.2, 5e-4, COSINE, more=_TDE_LARGE),  # [C] De-confound-TDE
        "bbn": Stage(180, 128, 0.05, 1e-4, BBN_INAT_STEPS, more=_BBN_LARGE),  # [H] its iNaturalist's
        "oltr": Stage(30, 128, 0.1, 5e-4, THIRDS),  # [C] OLTR
    },
    "inat": {
        "plain": Stage(90, 512, 0.2, 1e-4, COSINE),  # [C] decoupling
        "gcl": Stage(200, 256, 0.1, 1e-4, COSINE, mixup=0.2),  # [C] MiSLAS
        "mixup": Stage(200, 256, 0.1, 1e-4, COSINE, mixup=0.2),  # [C] MiSLAS
        "bcl": Stage(100, 256, 0.2, 1e-4, COSINE, more=_BCL_LARGE),  # [A] BCL
        "proco": Stage(90, 256, 0.2, 1e-4, COSINE, more=_PROCO_LARGE),  # [C] ProCo
        "tde": Stage(90, 512, 0.2, 1e-4, COSINE, more=_TDE_LARGE),  # [H] its ImageNet-LT's, with this set's weight decay
        # [M] epochs, batch, rate and steps: no release or reproduction has them; [H] this set's weight decay, and the augmentation of other methods
        "hybrid-sc": Stage(100, 100, 0.05, 1e-4, HYBRID_STEPS),  # [M], [H]
        "hybrid-psc": Stage(100, 100, 0.05, 1e-4, HYBRID_STEPS),  # [M], [H]
        "bbn": Stage(180, 128, 0.05, 1e-4, BBN_INAT_STEPS, more=_BBN_LARGE),  # [C] BBN, "2x"
        "oltr": Stage(30, 128, 0.1, 1e-4, THIRDS),  # [H] its ImageNet-LT's, with this set's weight decay
    },
    "places": {
        "plain": Stage(90, 512, 0.2, 5e-4, PLACES_STEPS),  # [H] GCL's without mixup
        "gcl": Stage(90, 512, 0.2, 5e-4, PLACES_STEPS, mixup=0.2),  # [C] GCL
        "mixup": Stage(90, 256, 0.1, 5e-4, COSINE, mixup=0.2),  # [C] MiSLAS
        "tde": Stage(90, 512, 0.2, 5e-4, COSINE, more=_TDE_LARGE | _FROM_SCRATCH),  # [C] De-confound-TDE
        "bbn": Stage(180, 128, 0.05, 1e-4, BBN_INAT_STEPS, more=_BBN_LARGE | _FROM_SCRATCH),  # [H] its iNaturalist's
        "oltr": Stage(30, 128, 0.001, 5e-4, THIRDS, more={"trains": "all", "backbone": "embedded", "lr_factors": {"network.head": 100.0}}),  # [C] OLTR
    },
}


# On Places-LT [C] MiSLAS and GCL freeze a pretrained ResNet-152 but for its last block, which they train from random weights.
PLACES_NETWORK: dict[str, Any] = {"trains": "new-last-block", "pretrained": True}


class Stage2(NamedTuple):
    """Settings of a second stage."""

    epochs: int
    batch_size: int
    lr: float


# GCL's second stage: [C] for CIFAR, whose `--lr 0.1` is 0.002 after its schedule has divided it; [H] the large sets have the same with stage 1's batch size.
# [H] Digits have few steps and need a higher rate. [H] On Places-LT images are mixed like labels; the release mixes the labels alone in its stage 2.
GCL_STAGE_2 = {
    "digits": Stage2(10, 64, 0.02), "cifar": Stage2(30, 64, 0.002), "imagenet": Stage2(30, 256, 0.002), "inat": Stage2(30, 256, 0.002),
    "places": Stage2(30, 512, 0.002),
}  # fmt: skip
_GCL_LARGE: tuple[dict[str, Any], dict[str, Any]] = ({"noise_mul": 1.0, "scale": COSINE_SCALE}, {"noise_mul": 1.0, "margin": 0.1, "scale": 15.0})
_GCL_SMALL: tuple[dict[str, Any], dict[str, Any]] = (
    {"noise_mul": 0.5, "scale": COSINE_SCALE}, {"noise_mul": 0.5, "margin": 0.1, "scale": 20.0, "gamma": 1.0}
)  # fmt: skip
# Arguments of GCL's loss in stages 1 and 2: [C] for CIFAR and Places-LT; [H] the other large sets have those of Places-LT, all others those of CIFAR.
GCL_OPTIONS = {"digits": _GCL_SMALL, "cifar": _GCL_SMALL, "own": _GCL_SMALL, "imagenet": _GCL_LARGE, "inat": _GCL_LARGE, "places": _GCL_LARGE}

# AGCL [C] for Places-LT, [H] used for all sets, because its scripts for CIFAR do not use its loss; with GCL's epochs, batch sizes and rates.
_AGCL: dict[str, Any] = {"noise_mul": 0.5, "easy_margin": True, "scale": COSINE_SCALE}
LDAM_MARGIN = 0.5  # [C] LDAM-DRW, of the rarest class
ARCFACE_OPTIONS: dict[str, Any] = {"margin": 0.5, "scale": COSINE_SCALE}  # [P] the margin; [H] the scale of other cosine classifiers, as 64 is for faces
DBM_MARGIN = 0.1  # [C] DBM
DBM_SCALES = {"cifar": 32.0}  # [C] DBM, which has 30 for the large sets


def loss_options(loss: str, group: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a loss for a family of data sets: in stage 1, and in GCL's second stage."""
    dbm = {"margin": DBM_MARGIN, "scale": DBM_SCALES.get(group, COSINE_SCALE)}
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gcl": GCL_OPTIONS[group], "agcl": (_AGCL, _AGCL | {"gamma": 1.0}), "arcface": (ARCFACE_OPTIONS, {}), "dbm": (dbm, {}),
        "gcl-dbm": (dbm | {"noise_mul": GCL_OPTIONS[group][0]["noise_mul"]}, {}),  # [H] the clouds of gcl
        "gcl+bcl": (GCL_OPTIONS[group][0], {}),  # [H] gcl's first stage
    }  # fmt: skip
    return known.get(loss, ({}, {}))


# cRT and LWS after a plain stage 1: [C] decoupling, for the large sets; by cosine and without mixup. Other sets have the epochs of ImageNet-LT.
# The release trains on class-aware batches, where its paper says class-balanced: both draw all classes equally often, but class-aware ones draw all images of a
# class before any of them again. `sampler=class-balanced` is the paper's, and that of other sets: the published rows of CIFAR are GCL's, whose README has it.
RETRAIN_EPOCHS = {"crt": 10, "lws": 5}
INAT_CRT_EPOCHS = 30
RETRAIN_SAMPLERS = dict.fromkeys(("imagenet", "inat", "places"), CLASS_AWARE)
RETRAIN_RATES = {"places": (256, 0.1)}  # batch size and learning rate; of other sets those of stage 1

# MiSLAS's second stage: [C] 10 epochs by cosine with stage 1's batch size and weight decay; the factors learn at 0.1, weights and bias at a share of it.
# [H] An epoch draws as many images as the training set has; the release's has up to two batches more.
MISLAS_STAGE_2 = (10, 0.1)


class MiSLAS(NamedTuple):
    """What MiSLAS's second stage has for each data set."""

    head: float  # label smoothing of the most frequent class
    tail: float  # of the rarest
    lr_factor: float  # share of the learning rate that weights and bias have
    batch_norm: str  # as in Phase; where stage 1 trains only the last block, only that is shifted


# [C] MiSLAS, by data set and, for CIFAR, imbalance. Its settings for imbalance 200 were not released.
MISLAS: dict[tuple[str, int | None], MiSLAS] = {
    ("cifar10-lt", 100): MiSLAS(0.3, 0.0, 0.5, "frozen"),
    ("cifar10-lt", 50): MiSLAS(0.2, 0.0, 0.2, "frozen"),
    ("cifar10-lt", 10): MiSLAS(0.1, 0.0, 0.2, "frozen"),
    ("cifar100-lt", 100): MiSLAS(0.4, 0.1, 0.2, "shifted"),
    ("cifar100-lt", 50): MiSLAS(0.3, 0.0, 0.1, "shifted"),
    ("cifar100-lt", 10): MiSLAS(0.2, 0.0, 0.1, "shifted"),
    ("imagenet-lt", None): MiSLAS(0.3, 0.0, 0.05, "shifted"),
    ("inat18", None): MiSLAS(0.3, 0.0, 0.05, "shifted"),
    ("places-lt", None): MiSLAS(0.4, 0.1, 0.05, "shifted"),
    ("digits-lt", None): MiSLAS(0.3, 0.0, 0.5, "frozen"),  # [H] those of CIFAR-10-LT, which also has ten classes
}
_MISLAS_OWN = MiSLAS(0.3, 0.0, 0.2, "shifted")  # [H] the most frequent values

# DisAlign's second stage: epochs, batch size, learning rate, by cosine, and rho, the exponent of its class weights. [C] ImageNet-LT, whose settings the other
# large sets have [H], with the rho of which the paper searches 0.8 to 1.5; other sets have stage 1's batch size and learning rate [H]. Stage 1 is that of the
# method, not DisAlign's own, which flags select: see docs/methods.md.
DISALIGN_STAGE_2 = {"imagenet": Stage2(10, 256, 0.1), "inat": Stage2(10, 256, 0.1), "places": Stage2(10, 256, 0.1)}
DISALIGN_EPOCHS = 10
DISALIGN_EXPONENTS = {"imagenet": 1.2}
DISALIGN_EXPONENT = 1.0

# DRO-LT [C] for CIFAR, [H] used for all sets: the robust phase trains the features, then a quarter of its epochs the classifier. Digits: [H] as many steps.
# The release learns the radius around a centroid itself, at the rate of the features. Here the radius is 2 epsilon: its gradient counts twice for epsilon, and
# a step of epsilon twice for the radius. A quarter of the rate moves the radius as in the release; weight decay pulls it back a quarter as fast.
ROBUST = Stage(80, 128, 0.005, 1e-4, Schedule(), more=CLASS_AWARE | {"lr_factors": {"objective.robust": 0.25}})
ROBUST_EPOCHS = {"digits": 10}
ROBUST_CLASSIFIER_LR = 0.01
ROBUST_AUGMENT = "crop,flip,autoaugment,cutout"  # on CIFAR, in all phases

# OLTR's second phase: [C] for ImageNet-LT and Places-LT; [H] iNaturalist has ImageNet-LT's, all others a tenth of stage 1's rate as ImageNet-LT has, too.
# Classifier and memory have rates of their own.
_MEMORY: dict[str, Any] = {"lr_factors": {"network.head.memory": 1.0, "network.head": 10.0}}
MEMORY_STAGE = {
    "digits": Stage(20, 64, 0.01, 5e-4, THIRDS, more=_MEMORY),
    "cifar": Stage(60, 128, 0.01, 2e-4, THIRDS, more=_MEMORY),
    "imagenet": Stage(60, 128, 0.01, 5e-4, THIRDS, more=_MEMORY),
    "inat": Stage(60, 128, 0.01, 1e-4, THIRDS, more=_MEMORY),
    "places": Stage(30, 128, 0.0001, 5e-4, THIRDS, more={"lr_factors": {"network.head": 100.0}, "trains": "embedding", "backbone": "embedded-modulated"}),
}


def family(dataset: str) -> str:
    """The group of data sets with the same settings; "own" is for sets without published ones, see own_data.py."""
    known = {"digits-lt": "digits", "cifar10-lt": "cifar", "cifar100-lt": "cifar", "imagenet-lt": "imagenet", "places-lt": "places", "inat18": "inat"}
    return known.get(dataset, "own")


def default_method(dataset: str) -> str:
    """The method of a run that names none.

    Example:
        >>> default_method("digits-lt"), default_method("folder")
        ('gcl', 'gcl-ldam-drw')
    """
    return own_data.METHOD if family(dataset) == "own" else "gcl"


def stage1_settings(dataset: str, name: str, class_counts: list[int], *, pretrained: bool) -> Stage:
    """Settings of stage 1: those of the data set or of its family by `name`, which is `Method.settings`, else the family's "plain" ones."""
    group = family(dataset)
    if group == "own":
        own = Stage(*own_data.stage1_settings(class_counts, pretrained=pretrained))
        return own._replace(mixup=0.2) if name == "mixup" else own  # [H] that of the large sets
    of_set, of_family = STAGE_1.get(dataset, {}), STAGE_1[group]
    return of_set.get(name) or of_family.get(name) or of_family["plain"]


def mislas(dataset: str, class_counts: list[int]) -> MiSLAS:
    """MiSLAS's settings; for CIFAR those of the nearest imbalance by its logarithm."""
    imbalance = max(class_counts) / min(class_counts)
    known = [key for key in MISLAS if key[0] == dataset]
    return MISLAS[min(known, key=lambda key: abs(math.log(imbalance / (key[1] or imbalance))))] if known else _MISLAS_OWN


def default_model(dataset: str, image_size: int, images: int) -> str:
    """The backbone of the published results on a data set; for other sets it depends on the size and number of the images."""
    group = family(dataset)
    if group == "own":
        return own_data.default_model(image_size, images)
    return {"digits": "small-cnn", "cifar": "resnet32", "places": "resnet152"}.get(group, "resnet50")
