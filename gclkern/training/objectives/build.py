"""From a phase to its objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gclkern.losses import LinearGCLLoss, LogitAdjustedLoss
from gclkern.training.objectives import bcl
from gclkern.training.objectives.base import Objective
from gclkern.training.objectives.bilateral import BilateralBranch
from gclkern.training.objectives.causal import CausalClassification
from gclkern.training.objectives.classification import Classification
from gclkern.training.objectives.hybrid import Hybrid
from gclkern.training.objectives.memory import MemoryClassification
from gclkern.training.objectives.proco import ProbabilisticContrast
from gclkern.training.objectives.robust import RobustLayers
from gclkern.training.recipes import Phase, build_loss
from gclkern.weights import DeferredReweighting


def _balanced_contrast(loss: Callable[..., nn.Module], phase: Phase, class_counts: list[int], feature_dim: int) -> Objective:
    """Balanced contrast beside a loss of the classifier."""
    own = {name: value for name, value in phase.options.items() if name in bcl.OPTIONS}
    others = {name: value for name, value in phase.options.items() if name not in own}
    return bcl.BalancedContrast(Classification(loss(class_counts, **others)), feature_dim, **own)


# By `Phase.loss`: built from the phase, the class counts and the dimensions of the features. All other names are losses of recipes/losses.py.
OBJECTIVES: dict[str, Callable[[Phase, list[int], int], Objective]] = {
    "bcl": lambda *arguments: _balanced_contrast(LogitAdjustedLoss, *arguments),
    "gcl+bcl": lambda *arguments: _balanced_contrast(LinearGCLLoss, *arguments),
    "proco": lambda phase, class_counts, feature_dim: ProbabilisticContrast(class_counts, feature_dim, **phase.options),
    "hybrid-sc": lambda phase, class_counts, feature_dim: Hybrid(class_counts, feature_dim, prototypes=False, **phase.options),
    "hybrid-psc": lambda phase, class_counts, feature_dim: Hybrid(class_counts, feature_dim, prototypes=True, **phase.options),
    "tde": lambda phase, class_counts, feature_dim: CausalClassification(**phase.options),
    "bbn": lambda phase, class_counts, feature_dim: BilateralBranch(**phase.options),
    "oltr": lambda phase, class_counts, feature_dim: MemoryClassification(),
}


def build_objective(phase: Phase, class_counts: list[int], feature_dim: int, *, sharded: bool = False) -> Objective:
    """The objective of a phase, on the CPU; with `sharded` that of a classifier whose classes are spread over the processes.

    Raises:
        ValueError: the phase has mixup, which its objective does not take.
    """
    if phase.loss in OBJECTIVES:
        objective = OBJECTIVES[phase.loss](phase, class_counts, feature_dim)
    else:
        loss = build_loss(phase, class_counts, sharded=sharded)
        objective = Classification(
            loss,
            robust=RobustLayers(class_counts, phase.robust_layers) if phase.robust else None,
            robust_weight=phase.robust,
            reweighting=None if phase.drw is None else DeferredReweighting(loss, class_counts, round(phase.drw * phase.epochs)),
        )
    if phase.mixup and not objective.takes_mixup:
        raise ValueError(f"{phase.name}: the loss {phase.loss} has no second target, which `mixup={phase.mixup:g}` needs; leave it out")
    return objective
