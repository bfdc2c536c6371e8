"""The loss of a phase, and the samplers and clouds by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gclkern.distributed import ShardedLinearGCLLoss
from gclkern.losses import FocalLoss, GCLLoss, LabelAwareSmoothingLoss, LDAMLoss, LinearGCLLoss, LogitAdjustedLoss
from gclkern.samplers import (
    CBENSampler,
    ClassAwareSampler,
    ClassBalancedSampler,
    EffectiveNumberSampler,
    InstanceBalancedSampler,
    ProgressiveSampler,
    ReversedSampler,
    SquareRootSampler,
)
from gclkern.training.recipes.phase import Phase
from gclkern.weights import effective_number_weights, inverse_frequency_weights, ldam_margins

SAMPLERS = {
    "instance": InstanceBalancedSampler,
    "square-root": SquareRootSampler,
    "progressive": ProgressiveSampler,
    "class-balanced": ClassBalancedSampler,
    "effective-number": EffectiveNumberSampler,
    "cben": CBENSampler,
    "class-aware": ClassAwareSampler,
    "reversed": ReversedSampler,
}
# How cloud sizes follow from class counts: the strategies that GCL's paper compares.
CLOUDS: dict[str, dict[str, Any]] = {
    "log": {"strategy": "log"},
    "cosine": {"strategy": "cosine"},
    "power-1/3": {"strategy": "power", "exponent": 1 / 3},
    "power-1/4": {"strategy": "power", "exponent": 1 / 4},
}
# Losses that LinearGCLLoss computes from features and the weight of a cosine classifier, with the arguments that select each of them.
_DBM: dict[str, Any] = {"noise_mul": 0.0, "difficulty_margin": True, "tau": 1.0}
FUSED: dict[str, dict[str, Any]] = {
    "gcl": {}, "agcl": {"angular": True}, "arcface": {"noise_mul": 0.0, "angular": True}, "dbm": _DBM, "gcl-dbm": _DBM,
}  # fmt: skip
# Arguments of losses that a run may set, and their names in each loss.
_CLOUDED = {"noise_mul": "noise_mul", "margin": "margin", "scale": "scale"}
_MARGINS = {"margin": "margin", "scale": "scale"}
LOSS_OPTIONS = {
    "gcl": _CLOUDED, "agcl": _CLOUDED, "gcl-dbm": _CLOUDED, "gcl+bcl": _CLOUDED, "arcface": _MARGINS, "dbm": _MARGINS,
    "ldam": {"margin": "max_margin", "scale": "scale"},
}  # fmt: skip


def build_loss(phase: Phase, class_counts: list[int], *, sharded: bool = False) -> nn.Module:
    """The loss of a phase.

    A loss of FUSED on a cosine classifier takes features and the classifier's weight, which may be `sharded`. All others, and every loss where the classifier
    has factors (LWS), take logits or cosines.
    """
    options = dict(phase.options)
    if options.get("weight") == "counts":
        options["weight"] = torch.tensor(class_counts) / max(class_counts)
    # all other arguments have the papers' values as defaults: beta 0.9999 of cb, tau 1 of la, margin 0.5 and scale 30 of ldam
    if phase.loss in FUSED:
        options = FUSED[phase.loss] | options
        if "max_margin" in options:
            options["margin"] = ldam_margins(class_counts, options.pop("max_margin"))
        if "difficulty_margin" in options:
            options["margin"] = ldam_margins(class_counts, options["margin"], exponent=1.0)
        if sharded:
            return ShardedLinearGCLLoss(class_counts, averaged_gradients=True, **options)
        return LinearGCLLoss(class_counts, **options) if phase.head == "cosine" else GCLLoss(class_counts, **options)
    if phase.loss == "la":
        return LogitAdjustedLoss(class_counts, **options)
    if phase.loss == "ldam":
        return LDAMLoss(class_counts, **options)
    if phase.loss == "label-aware-smoothing":
        return LabelAwareSmoothingLoss(class_counts, **options)
    assert phase.loss in ("ce", "focal", "cb", "inverse-frequency"), phase.loss
    if phase.loss == "inverse-frequency":
        options["weight"] = inverse_frequency_weights(class_counts, options.pop("exponent"))
    elif phase.loss == "cb":
        options["weight"] = effective_number_weights(class_counts)
    return FocalLoss(gamma=2.0 if phase.loss == "focal" else 0.0, **options)
