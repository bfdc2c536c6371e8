"""Fused losses for long-tailed recognition: Gaussian clouded logits (GCL) and the DRO-LT bound."""

from __future__ import annotations

from gclkern import functional, samplers
from gclkern.centroids import ClassCentroids
from gclkern.clouds import cloud_sizes
from gclkern.debug import set_debug
from gclkern.dro import DROLTLoss
from gclkern.layers import CosineLinear
from gclkern.losses import CosFaceLoss, FocalLoss, GCLLoss, LDAMLoss, LinearGCLLoss, LogitAdjustedLoss
from gclkern.noise import cloud_noise
from gclkern.weights import drw_weights, effective_number_weights

__version__ = "0.1.0"
__all__ = [
    "ClassCentroids",
    "CosFaceLoss",
    "CosineLinear",
    "DROLTLoss",
    "FocalLoss",
    "GCLLoss",
    "LDAMLoss",
    "LinearGCLLoss",
    "LogitAdjustedLoss",
    "cloud_noise",
    "cloud_sizes",
    "drw_weights",
    "effective_number_weights",
    "functional",
    "samplers",
    "set_debug",
]
