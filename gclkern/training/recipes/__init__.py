"""Methods by name, each with its published settings: what `train.py --method ... --retrain ...` runs, as a list of phases.

    methods.py        the methods and re-trainings by name, each with a line of `train.py --help`
    settings.py       the published numbers, each with its source: data and nothing else
    phase.py          Phase: a part of a run, with one loss, one sampler, one schedule and one set of trained parameters
    plan.py           from a method, a re-training and a data set to phases
    second_stage.py   from a re-training and stage 1 to the phase of stage 2
    losses.py         from a phase to its loss

Stage 1 is one phase; for OLTR and DRO-LT, which start from a trained model, it is two or three. A re-training stage is another phase. The cross-entropy
baseline is one more, on a network of its own. To add a method: a line in methods.py, its numbers in settings.py, and a loss in losses.py; a method whose loss
needs more than the logits of one batch has an objective instead, see :mod:`gclkern.training.objectives`.
"""

from gclkern.training.recipes.losses import CLOUDS, FUSED, SAMPLERS, build_loss
from gclkern.training.recipes.methods import METHODS, RETRAINS, list_by_family
from gclkern.training.recipes.phase import Phase
from gclkern.training.recipes.plan import plan, plan_run
from gclkern.training.recipes.settings import COSINE_SCALE, default_method, default_model, family

__all__ = [
    "CLOUDS",
    "COSINE_SCALE",
    "FUSED",
    "METHODS",
    "RETRAINS",
    "SAMPLERS",
    "Phase",
    "build_loss",
    "default_method",
    "default_model",
    "family",
    "list_by_family",
    "plan",
    "plan_run",
]
