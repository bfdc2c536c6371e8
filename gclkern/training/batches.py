"""The batches of a phase, as one process sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from gclkern.training.config import RunConfig
from gclkern.training.data import DataSplits, Epoch, ImageSet
from gclkern.training.network import Network
from gclkern.training.processes import Processes
from gclkern.training.recipes import SAMPLERS, Phase, build_loss
from gclkern.training.seeds import derive_seed


def step_batches(order: Iterator[int], size: int) -> Iterator[list[int]]:
    """Batches of `size` indices; a smaller last one is dropped."""
    batch: list[int] = []
    for index in order:
        batch.append(index)
        if len(batch) == size:
            yield batch
            batch = []


class PhaseBatches:
    """This process's share of every batch of a phase. Order and augmentation depend only on the seed, the purpose, the epoch and the position in it.

    Attributes:
        steps: batches per epoch.
    """

    def __init__(self, phase: Phase, images: ImageSet, seed: int, processes: Processes) -> None:
        self.phase, self.images, self.seed, self.processes = phase, images, seed, processes
        self.steps = max(1, (phase.epoch_samples or len(images)) // phase.batch_size)
        self._local = phase.batch_size // processes.world
        self._sampler = SAMPLERS[phase.sampler](
            images.labels, num_samples=self.steps * phase.batch_size, seed=derive_seed(seed, phase.name, "order"), num_replicas=processes.world,
            rank=processes.rank, **phase.sampler_options,
        )  # fmt: skip

    def epoch(self, purpose: str, epoch: int, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the steps of an epoch, starting at `step`."""
        done = step * self._local
        self._sampler.set_epoch(epoch, position=done)
        place = Epoch(derive_seed(self.seed, self.phase.name, purpose, epoch), done, self.processes.world, self.processes.rank)
        return self.images.loader(step_batches(iter(self._sampler), self._local), device=self.processes.device, epoch=place)


def check_phases(phases: Sequence[Phase], network: Network, data: DataSplits, config: RunConfig, processes: Processes) -> None:
    """Raise now, before the first phase, the errors that later phases would raise.

    Raises:
        ValueError: settings that a phase's sampler, loss or network cannot work with.
    """
    for phase in phases:
        if not phase.epochs:
            continue
        PhaseBatches(phase, data.train, config.seed, processes)
        build_loss(phase, data.class_counts)
        part, fewest = phase.batch_size // (processes.world * config.accumulate), getattr(network.backbone, "fewest_images", 1)
        if part < fewest and phase.trains in ("all", "last-block", "backbone"):
            remedy = "take a larger `batch_size` or a smaller `accumulate`"
            raise ValueError(f"{phase.name}: the batch normalisation of this network needs {fewest} images at a time, but it is given {part}; {remedy}")
