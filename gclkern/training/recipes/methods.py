"""The methods and re-trainings by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """What trains stage 1. Its numbers are in settings.py."""

    family: str  # its heading in `train.py --help`
    summary: str  # its line in `train.py --help`
    loss: str  # of stage 1: a loss of losses.py or an objective of training/objectives
    head: str = "linear"
    settings: str = "plain"  # key of its settings in STAGE_1; a data set without this key has those of "plain"
    drw: float | None = None  # as in Phase
    robust: bool = False  # DRO-LT's phases follow
    retrain: str = "none"  # the re-training if none is chosen
    more: Mapping[str, Any] = field(default_factory=dict)  # other fields of Phase, whatever the data set
    retrains: frozenset[str] | None = None  # re-trainings that its network can have; None for all
    models: Mapping[str, str] = field(default_factory=dict)  # network by family of data sets, where its published results have another one
    memory: bool = False  # OLTR's second phase follows


@dataclass(frozen=True)
class Retrain:
    """What follows stage 1, on its features."""

    family: str
    summary: str


_NEW_HEADS = frozenset({"none", "crt", "ncm", "gcl"})  # re-trainings that need nothing of stage 1's classifier
METHODS: dict[str, Method] = {
    "ce": Method("Cross entropy and class weights", "cross entropy", "ce"),
    "mixup": Method("Cross entropy and class weights", "cross entropy with mixup: stage 1 of mislas (CVPR 2021)", "ce", settings="mixup"),
    "focal": Method("Cross entropy and class weights", "focal loss, gamma 2", "focal"),
    "cb": Method("Cross entropy and class weights", "class-balanced: weights by effective numbers of samples", "cb"),
    "ldam-drw": Method("Margins", "margins, larger for rare classes; class weights in the last epochs (NeurIPS 2019)", "ldam", head="cosine", drw=0.8),
    "arcface": Method("Margins", "one margin for all classes, added to the angle (CVPR 2019)", "arcface", head="cosine"),
    "dbm": Method("Margins", "angular margins, larger for rare classes and hard samples; logit adjustment (AAAI 2025)", "dbm", head="cosine", settings="dbm"),
    "la": Method("Logit adjustment", "cross entropy of logits + log prior (ICLR 2021)", "la"),
    "balanced-softmax": Method("Logit adjustment", "the same with tau 1 (NeurIPS 2020); on CIFAR with the settings of dbm", "la", settings="dbm"),
    "gcl": Method("Gaussian clouds", "clouds: noise on the cosines, larger for rare classes (CVPR 2022)", "gcl", head="cosine", settings="gcl", retrain="gcl"),
    "gcl-ldam-drw": Method("Gaussian clouds", "gcl's clouds and ldam-drw's margins and weights in one stage", "gcl", head="cosine", drw=0.8),
    "agcl": Method("Gaussian clouds", "gcl with clouds that add to the angle (TAI 2024)", "agcl", head="cosine", settings="gcl", retrain="gcl"),
    "gcl-dbm": Method("Gaussian clouds", "gcl's clouds and dbm's margins and logit adjustment in one stage", "gcl-dbm", head="cosine", settings="dbm"),
    "dro-lt": Method("Robust features", "cross entropy, then features pulled to their class's centroid (ICCV 2021)", "ce", settings="dro-lt", robust=True),
    "gcl+dro-lt": Method("Robust features", "dro-lt's robust phase between gcl's stages", "gcl", head="cosine", settings="gcl", robust=True, retrain="gcl"),
    "bcl": Method(
        "Contrast", "balanced contrast of two views and class prototypes, beside logit adjustment (CVPR 2022)", "bcl", settings="bcl",
        more={"views": ("sim", "sim")},
    ),
    "gcl+bcl": Method(
        "Contrast", "bcl with gcl's clouds in place of logit adjustment", "gcl+bcl", head="cosine", settings="bcl", more={"views": ("sim", "sim")},
    ),
    "proco": Method(
        "Contrast", "contrast with a distribution of each class, beside logit adjustment (TPAMI 2024)", "proco", settings="proco",
        more={"views": ("sim-sharp", "sim-sharp")},
    ),
    "hybrid-sc": Method(
        "Contrast", "contrast of samples, replaced step by step by a classifier on class-balanced batches (CVPR 2021)", "hybrid-sc", settings="hybrid-sc",
        more={"views": (None,), "second_sampler": "class-balanced"},
    ),
    "hybrid-psc": Method(
        "Contrast", "the same with learned prototypes of the classes in place of samples (CVPR 2021)", "hybrid-psc", settings="hybrid-psc",
        more={"second_sampler": "class-balanced"},
    ),
    "tde": Method(
        "Other networks", "two normalised heads; predictions without the mean feature's direction (NeurIPS 2020)", "tde", head="tde", settings="tde",
        more={"backbone": "two-branch"}, models=dict.fromkeys(("imagenet", "places", "inat"), "resnext50_32x4d"), retrains=_NEW_HEADS,
    ),
    "bbn": Method(
        "Other networks", "two branches, the second on rare classes, whose share grows in training (CVPR 2020)", "bbn", settings="bbn",
        more={"backbone": "two-branch", "second_sampler": "reversed", "nesterov": True}, models={"places": "resnet50"},
    ),
    "oltr": Method(
        "Other networks", "cross entropy, then features that draw on a memory of class means (CVPR 2019)", "ce", settings="oltr", memory=True,
        models={"imagenet": "resnet10"}, retrains=frozenset({"none"}),
    ),
}  # fmt: skip
_LEARNED, _COMPUTED = "Trained", "Computed without training"
RETRAINS: dict[str, Retrain] = {
    "none": Retrain("None", "no stage 2"),
    "crt": Retrain(_LEARNED, "a new classifier on class-balanced batches (ICLR 2020)"),
    "lws": Retrain(_LEARNED, "a factor for each class (ICLR 2020)"),
    "tau-norm": Retrain(_COMPUTED, "weights divided by a power of their norms (ICLR 2020)"),
    "ncm": Retrain(_COMPUTED, "the nearest class mean of centred, normalised features (ICLR 2020)"),
    "post-hoc-la": Retrain(_COMPUTED, "logits - tau log prior (ICLR 2021)"),
    "gcl": Retrain(_LEARNED, "gcl's second stage: the classifier with clouds and a margin (CVPR 2022)"),
    "mislas": Retrain(_LEARNED, "classifier and factors, smoother labels for frequent classes, shifted batch norm (CVPR 2021)"),
    "disalign": Retrain(_LEARNED, "a calibration of the logits with re-weighted classes (CVPR 2021)"),
}


def list_by_family(entries: Mapping[str, Method | Retrain]) -> str:
    """The entries with a line each, under the heading of their family."""
    lines: dict[str, list[str]] = {}
    for name, entry in entries.items():
        lines.setdefault(entry.family, []).append(f"    {name:<18}{entry.summary}")
    return "\n".join(line for heading, part in lines.items() for line in (f"  {heading}", *part))
