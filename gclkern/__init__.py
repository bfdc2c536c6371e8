"""Fused losses for long-tailed recognition: Gaussian clouded logits (GCL), the DRO-LT bound and related losses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gclkern import functional, samplers
from gclkern.centroids import ClassCentroids
from gclkern.clouds import cloud_sizes
from gclkern.devices import set_debug
from gclkern.layers import AdaptiveCalibration, CosineLinear
from gclkern.losses import (
    AGCLLoss,
    ArcFaceLoss,
    BalancedContrastiveLoss,
    CosFaceLoss,
    DBMLoss,
    DROLTLoss,
    FocalLoss,
    GCLLoss,
    LabelAwareSmoothingLoss,
    LDAMLoss,
    LinearGCLLoss,
    LogitAdjustedLoss,
    ProCoLoss,
    PrototypicalContrastiveLoss,
    SupConLoss,
)
from gclkern.noise import cloud_noise
from gclkern.oltr import MemoryLoss, MetaEmbeddingClassifier, ModulatedAttention
from gclkern.soft_labels import mixed_targets
from gclkern.tde import TDEClassifier
from gclkern.weights import DeferredReweighting, effective_number_weights, inverse_frequency_weights, label_aware_smoothing, ldam_margins, log_prior

if TYPE_CHECKING:
    from gclkern import distributed, training

__version__ = "0.1.0"
__all__ = [
    "AGCLLoss",
    "AdaptiveCalibration",
    "ArcFaceLoss",
    "BalancedContrastiveLoss",
    "ClassCentroids",
    "CosFaceLoss",
    "CosineLinear",
    "DBMLoss",
    "DROLTLoss",
    "DeferredReweighting",
    "FocalLoss",
    "GCLLoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LinearGCLLoss",
    "LogitAdjustedLoss",
    "MemoryLoss",
    "MetaEmbeddingClassifier",
    "ModulatedAttention",
    "ProCoLoss",
    "PrototypicalContrastiveLoss",
    "SupConLoss",
    "TDEClassifier",
    "cloud_noise",
    "cloud_sizes",
    "distributed",
    "effective_number_weights",
    "functional",
    "inverse_frequency_weights",
    "label_aware_smoothing",
    "ldam_margins",
    "log_prior",
    "mixed_targets",
    "samplers",
    "set_debug",
    "training",
]


def __getattr__(name: str) -> Any:
    """`gclkern.distributed` and `gclkern.training` are imported on first use, because most programs need neither."""
    if name in ("distributed", "training"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'gclkern' has no attribute {name!r}")
