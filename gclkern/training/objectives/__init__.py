"""What a phase minimises: an objective computes the loss of a network on a batch.

Most methods are a loss of the logits or features of one batch: :mod:`gclkern.training.recipes.losses` builds it, :class:`Classification` applies it. A method
that needs more has an :class:`Objective` in a file of its own here, and a line in OBJECTIVES under the name that `Phase.loss` has:

    several views     `Phase.views` names the augmentation of each further view; they arrive as `Batch.views`
    a second batch    `Phase.second_sampler` draws it; it arrives as `Batch.second_images` and `Batch.second_target`
    its own layers    projection heads and prototypes are modules and parameters of the objective: they train, take part in checkpoints and are not evaluated
    a schedule        `set_epoch` writes a share that depends on the epoch into a buffer
    running state     buffers; `begin_epoch` may reset them
    parameter groups  `Phase.lr_factors`, with names such as "objective.project" and "network.head.weight"

:class:`gclkern.training.trainer.TrainingStep` selects what is trained and in which mode; an objective only computes.
"""

from gclkern.training.objectives.base import Batch, Objective, Samples
from gclkern.training.objectives.build import OBJECTIVES, build_objective
from gclkern.training.objectives.classification import Classification
from gclkern.training.objectives.robust import check_layers

__all__ = ["OBJECTIVES", "Batch", "Classification", "Objective", "Samples", "build_objective", "check_layers"]
