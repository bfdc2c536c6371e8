"""One table of the public modules beside that of the functions: how each is built and called. A new module gets the tests of test_modules.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gclkern
from gclkern.distributed import ShardedCosineLinear, ShardedLinearGCLLoss
from tests.support.cases import cosines, labels, vector

COUNTS = [400, 150, 60, 20, 8, 3, 1]
ROWS, CLASSES, DIM = 6, len(COUNTS), 16


@dataclass(frozen=True)
class Module:
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]  # of those below
    options: dict[str, Any] = field(default_factory=dict)  # of the call
    constant: tuple[str, ...] = ()  # inputs and parameters without a gradient, or with another one than the derivative
    graph: bool = True  # False: it is a collective call, which stays outside of graphs

    def arguments(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Of a call, on the CPU."""
        made: dict[str, Tensor] = {
            "cosine": 0.9 * cosines(ROWS, CLASSES), "features": cosines(ROWS, DIM, seed=1), "classes": cosines(CLASSES, DIM, seed=2),
            "target": labels(ROWS, CLASSES), "maps": cosines(ROWS, 4 * 3 * 2, seed=3).view(ROWS, 4, 3, 2),
        }  # fmt: skip
        return [made[name].to(dtype) if made[name].is_floating_point() else made[name] for name in self.inputs]

    def made(self, dtype: torch.dtype = torch.float32) -> Any:
        """The module with parameters that are no initial values; buffers keep their dtype."""
        module = self.build().to(dtype)
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                parameter.copy_(vector(parameter.numel(), -0.5, 0.5, seed=number).view(parameter.shape))
        return module


_LOGITS, _HEAD, _PROTOTYPES, _POINTS = (
    ("cosine", "target"),
    ("features", "classes", "target"),
    ("features", "classes", "target"),
    ("features", "target", "classes"),
)
_NOISE = {"seed": 3}
MODULES: dict[str, Module] = {
    "gclkern.GCLLoss": Module(lambda: gclkern.GCLLoss(COUNTS, margin=0.1, gamma=1.0, focal_detach=False), _LOGITS, _NOISE),
    "gclkern.AGCLLoss": Module(lambda: gclkern.AGCLLoss(COUNTS, margin=0.2), _LOGITS, _NOISE),
    "gclkern.DBMLoss": Module(lambda: gclkern.DBMLoss(COUNTS, noise_mul=0.2), _LOGITS, _NOISE),
    "gclkern.LDAMLoss": Module(lambda: gclkern.LDAMLoss(COUNTS, weight=vector(CLASSES, 0.1, 2.0)), _LOGITS),
    "gclkern.LogitAdjustedLoss": Module(lambda: gclkern.LogitAdjustedLoss(COUNTS), _LOGITS),
    "gclkern.LabelAwareSmoothingLoss": Module(lambda: gclkern.LabelAwareSmoothingLoss(COUNTS), _LOGITS),
    "gclkern.CosFaceLoss": Module(lambda: gclkern.CosFaceLoss(scale=8.0), _LOGITS),
    "gclkern.ArcFaceLoss": Module(lambda: gclkern.ArcFaceLoss(scale=8.0), _LOGITS),
    "gclkern.FocalLoss": Module(lambda: gclkern.FocalLoss(label_smoothing=0.1), _LOGITS),
    "gclkern.LinearGCLLoss": Module(lambda: gclkern.LinearGCLLoss(COUNTS, margin=0.1), _HEAD, _NOISE),
    "gclkern.distributed.ShardedLinearGCLLoss": Module(lambda: ShardedLinearGCLLoss(COUNTS, margin=0.1), _HEAD, _NOISE, graph=False),
    "gclkern.SupConLoss": Module(lambda: gclkern.SupConLoss(), ("features", "target")),
    "gclkern.BalancedContrastiveLoss": Module(lambda: gclkern.BalancedContrastiveLoss(), _PROTOTYPES),
    "gclkern.PrototypicalContrastiveLoss": Module(lambda: gclkern.PrototypicalContrastiveLoss(), _PROTOTYPES),
    "gclkern.ProCoLoss": Module(lambda: gclkern.ProCoLoss(COUNTS, DIM), ("features", "target")),
    "gclkern.DROLTLoss": Module(lambda: gclkern.DROLTLoss(COUNTS, base_epsilon=0.3), _POINTS, constant=("classes",)),
    "gclkern.MemoryLoss": Module(lambda: gclkern.MemoryLoss(margin=40.0), _POINTS, constant=("classes",)),
    "gclkern.CosineLinear": Module(lambda: gclkern.CosineLinear(DIM, CLASSES), ("features",)),
    "gclkern.distributed.ShardedCosineLinear": Module(lambda: ShardedCosineLinear(DIM, CLASSES), ("features",), constant=("features", "weight"), graph=False),
    "gclkern.AdaptiveCalibration": Module(lambda: gclkern.AdaptiveCalibration(DIM, CLASSES), ("cosine", "features")),
    "gclkern.TDEClassifier": Module(lambda: gclkern.TDEClassifier(DIM, CLASSES), ("features",)),
    "gclkern.MetaEmbeddingClassifier": Module(lambda: gclkern.MetaEmbeddingClassifier(DIM, CLASSES), ("features",), constant=("memory",)),
    "gclkern.ModulatedAttention": Module(lambda: gclkern.ModulatedAttention(4, 3, 2), ("maps",)),
}  # fmt: skip
