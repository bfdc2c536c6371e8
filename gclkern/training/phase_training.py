"""The training of a network by one phase, step by step, in place: what train.py and the cross-validation of temperatures share."""

from __future__ import annotations

from collections.abc import Iterator

from gclkern.training.batches import PhaseBatches, plain_batches
from gclkern.training.checkpoint import Checkpoint
from gclkern.training.config import RunConfig
from gclkern.training.data import DataSplits
from gclkern.training.evaluation import epoch_centroids
from gclkern.training.network import Network, gather_classifier
from gclkern.training.processes import Processes
from gclkern.training.progress import Progress
from gclkern.training.recipes import Phase
from gclkern.training.seeds import derive_seed
from gclkern.training.trainer import build_trainer


class PhaseTraining:
    """Trains `network` from the beginning of the phase, or from a checkpoint of it.

    For every epoch the caller runs through :meth:`steps` and then calls ``progress.next_epoch()``; after the last one it calls :meth:`finish`.

    Attributes:
        batches, trainer, progress: of the phase; `progress` moves on with every step.
    """

    def __init__(
        self, phase: Phase, network: Network, data: DataSplits, config: RunConfig, processes: Processes, checkpoint: Checkpoint | None = None
    ) -> None:  # fmt: skip
        self.phase, self.network, self.processes = phase, network, processes
        self._num_classes, self._seed = data.num_classes, config.seed
        self.batches = PhaseBatches(phase, data.train, config.seed, processes)
        self.trainer = build_trainer(phase, network, data.class_counts, config, processes)
        self.progress = Progress.start(processes.device)
        if checkpoint is not None:
            self.trainer.load_state_dict(checkpoint["trainer"])
            self.progress.load_state_dict(checkpoint["progress"])

    @property
    def rate(self) -> float:
        """The learning rate of the current epoch."""
        return self.phase.schedule.rate(self.phase.lr, self.progress.epoch, self.phase.epochs)

    def steps(self) -> Iterator[None]:
        """Train what is left of the current epoch, and yield after each step."""
        progress, phase = self.progress, self.phase
        self.begin_epoch()
        for samples in self.batches.training(progress.epoch, progress.step):
            seed = derive_seed(self._seed, phase.name, progress.epoch, progress.step)
            progress.total += self.trainer.step(samples, seed, progress.epoch * self.batches.steps + progress.step, **progress.centroids)
            progress.step += 1
            yield

    def begin_epoch(self) -> None:
        """Set the trainer for an epoch, or to continue in the middle of one: learning rate, objective, mode. :meth:`steps` calls it."""
        progress, objective = self.progress, self.trainer.module.objective
        self.trainer.set_rate(self.rate)
        objective.set_epoch(self.network, progress.epoch, self.phase.epochs, self.rate)
        if progress.step == 0:
            if objective.needs_centroids(progress.epoch):
                plain = objective.plain_centroids
                loader = plain_batches(self.batches.images, self.processes) if plain else self.batches.epoch("centroids", progress.epoch)
                progress.centroids = epoch_centroids(self.network, loader, self._num_classes, self.processes, objective.centroid_features, amp=self.trainer.amp)
            objective.begin_epoch(self.network, progress.epoch, progress.centroids)
        self.trainer.module.train()

    def finish(self) -> None:
        """Leave in `network` what is to be kept: the averaged weights where there are any, and all classes of a sharded classifier. A collective call."""
        self.network.load_state_dict(self.trainer.eval_network.state_dict())
        gather_classifier(self.network)
