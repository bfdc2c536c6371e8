"""A part of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gclkern.training.schedules import Schedule

_RETRAINS = {"scale": "lws", "head-and-scale": "mislas", "calibration": "disalign"}  # by what they train


@dataclass(frozen=True)
class Phase:
    """A part of a run with one loss, one sampler, one schedule and one set of trained parameters."""

    name: str  # of its files and of its row in the table
    epochs: int
    batch_size: int  # of one optimizer step, total over ranks and accumulated parts
    lr: float
    weight_decay: float
    schedule: Schedule
    loss: str  # a loss of recipes/losses.py or an objective of training/objectives
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the loss
    mixup: float = 0.0  # alpha of the Beta distribution; 0 mixes nothing
    sampler: str = "instance"
    head: str = "linear"  # one of network.HEADS
    # What is trained, the rest is frozen: "all", "backbone", "head", the "last-block" of a ResNet and the head, the same with a "new-last-block" of random
    # weights in a fresh network, "embedding" with attention and the head (OLTR), or of the head the "scale", "head-and-scale" or the "calibration". Without
    # epochs, what is computed instead: "tau-norm", "ncm" or "post-hoc-la".
    trains: str = "all"
    backbone: str = ""  # what the run's network is made into: a kind of training/composed_backbones.py, "" for the network itself
    pretrained: bool = False  # whether a fresh network has pretrained weights, unless the run's settings decide it
    start: str = "previous"  # "fresh" network, the "previous" phase's, or that with a "new head"
    drw: float | None = None  # share of the epochs after which the class weights are used
    robust: float = 0.0  # weight of the DRO-LT bound, which is added to the loss
    robust_layers: tuple[str, ...] = ("features",)  # what it bounds: the features, or modules of the backbone by name
    sampler_options: dict[str, Any] = field(default_factory=dict)
    epoch_samples: int | None = None  # draws of an epoch; None is the size of the training set
    augment: str | None = None  # augmentation, as data.augment.parse_augmentation takes it; None is the data set's
    views: tuple[str | None, ...] = ()  # augmentations of further views of the same samples, for losses that compare views; None is the phase's
    second_sampler: str | None = None  # draws a second batch of equal size for each step
    lr_factors: dict[str, float] = field(default_factory=dict)  # factor on the learning rate of parameters by the beginning of their name in TrainingStep
    nesterov: bool = False
    # Batch normalisation: "train" has batch statistics in the trained parts and running statistics in the frozen ones, "frozen" running statistics in all.
    # "shifted" has batch statistics, which move the running ones, in a frozen backbone, whose parameters stay (MiSLAS); "shifted-last-block" has them in
    # only the last block of a ResNet.
    batch_norm: str = "train"

    @property
    def title(self) -> str:
        """The name and the loss; of a re-training with another name than its loss, that name."""
        if self.name == "stage-2" and (retrain := _RETRAINS.get(self.trains) or ("crt" if self.loss == "ce" and self.start == "new head" else "")):
            return f"{self.name}: {retrain}"
        also = " + DRO-LT" if self.robust else " + LDAM-DRW" if self.loss == "gcl" and "max_margin" in self.options else ""
        return f"{self.name}: {self.loss if self.epochs else self.trains}{also}"

    def overrides(self, field: str) -> list[str]:
        """The settings of a run that override a field, in backticks; none for phases between the first and the second stage, whose fields are the method's."""
        if self.name == "stage-2":
            return [f"`retrain_{field}`"]
        return [f"`{field}`"] if self.name in ("baseline", "stage-1") else []

    @property
    def trains_last_block(self) -> bool:
        """Whether the last block is the only part of the backbone that is trained."""
        return self.trains in ("last-block", "new-last-block")

    @property
    def trains_backbone(self) -> bool:
        """Whether a part of the backbone is trained."""
        return self.trains in ("all", "backbone") or self.trains_last_block

    @property
    def has_batch_statistics(self) -> bool:
        """Whether batch normalisation in the backbone normalises by the statistics of the batch."""
        return self.batch_norm.startswith("shifted") or (self.trains_backbone and self.batch_norm == "train")
