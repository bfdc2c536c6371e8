"""The batches of a phase, as one process sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gclkern.training.backbones import last_block
from gclkern.training.config import RunConfig
from gclkern.training.data import DataSplits, Epoch, ImageSet
from gclkern.training.network import Network
from gclkern.training.objectives import Samples, build_objective, check_layers
from gclkern.training.processes import Processes
from gclkern.training.recipes import SAMPLERS, Phase
from gclkern.training.seeds import derive_seed


def step_batches(order: Iterator[int], size: int) -> Iterator[list[int]]:
    """Batches of `size` indices; a smaller last one is dropped."""
    batch: list[int] = []
    for index in order:
        batch.append(index)
        if len(batch) == size:
            yield batch
            batch = []


def steps_of(phase: Phase, images: int) -> int:
    """Steps of an epoch of a phase, on a training set of that many images."""
    return max(1, (phase.epoch_samples or images) // phase.batch_size)


def plain_batches(images: ImageSet, processes: Processes, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of all images, once each and without augmentation, with their labels."""
    indices = range(processes.rank, len(images), processes.world)
    return images.loader([indices[start : start + size] for start in range(0, len(indices), size)], device=processes.device)


class PhaseBatches:
    """This process's share of every batch of a phase. Order and augmentation depend only on the seed, the purpose, the epoch and the position in it.

    Attributes:
        steps: batches per epoch.
    """

    def __init__(self, phase: Phase, images: ImageSet, seed: int, processes: Processes) -> None:
        self.phase, self.images, self.seed, self.processes = phase, images, seed, processes
        self.steps = steps_of(phase, len(images))
        self._local = phase.batch_size // processes.world
        self._sampler = self._new_sampler(phase.sampler, "order", **phase.sampler_options)
        self._second = None if phase.second_sampler is None else self._new_sampler(phase.second_sampler, "second order")

    def _new_sampler(self, name: str, purpose: str, **options: Any) -> Any:
        if name == "progressive":
            options["epochs"] = self.phase.epochs
        return SAMPLERS[name](
            self.images.labels, num_samples=self.steps * self.phase.batch_size, seed=derive_seed(self.seed, self.phase.name, purpose),
            num_replicas=self.processes.world, rank=self.processes.rank, **options,
        )  # fmt: skip

    def epoch(self, purpose: str, epoch: int, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the steps of an epoch, starting at `step`."""
        return self.images.loader(self._batches(self._sampler, epoch, step), device=self.processes.device, epoch=self._place(epoch, step, purpose))

    def training(self, epoch: int, step: int = 0) -> Iterator[Samples]:
        """The samples of the training steps of an epoch, starting at `step`, with further views and the second batch where the phase has them."""
        device = self.processes.device
        epochs = [self._place(epoch, step, "training")]
        epochs += [self._place(epoch, step, "training", "view", place, augment=augment) for place, augment in enumerate(self.phase.views)]
        first = self.images.view_loader(self._batches(self._sampler, epoch, step), device=device, epochs=epochs)
        second: Iterator[tuple[Tensor, Tensor] | None] = itertools.repeat(None)
        if self._second is not None:
            second = self.images.loader(self._batches(self._second, epoch, step), device=device, epoch=self._place(epoch, step, "training", "second"))
        for ((images, *views), target), other in zip(first, second, strict=False):
            samples: Samples = {"images": images, "target": target}
            if views:
                samples["views"] = torch.stack(views, 1)
            if other is not None:
                samples["second_images"], samples["second_target"] = other
            yield samples

    def _batches(self, sampler: Any, epoch: int, step: int) -> Iterator[list[int]]:
        """The indices of the steps of an epoch, starting at `step`."""
        sampler.set_epoch(epoch, position=step * self._local)
        return step_batches(iter(sampler), self._local)

    def _place(self, epoch: int, step: int, *purpose: object, augment: str | None = None) -> Epoch:
        """What the augmentation of an epoch depends on; without `augment` it is the phase's."""
        seed = derive_seed(self.seed, self.phase.name, *purpose, epoch)
        return Epoch(seed, step * self._local, self.processes.world, self.processes.rank, augment or self.phase.augment)


def check_phases(phases: Sequence[Phase], network: Network, data: DataSplits, config: RunConfig, processes: Processes) -> None:
    """Raise now, before the first phase, the errors that later phases would raise.

    Raises:
        ValueError: settings that a phase's sampler, loss or network cannot work with.
    """
    for phase in phases:
        if not phase.epochs:
            continue
        PhaseBatches(phase, data.train, config.seed, processes)
        build_objective(phase, data.class_counts, network.backbone.feature_dim)
        if phase.robust:
            image = torch.zeros(1, data.channels, data.image_size, data.image_size, device=processes.device)
            check_layers(network.backbone, phase.robust_layers, image)
        if phase.trains_last_block:
            last_block(network.backbone)
        check_part_size(phase, network, config, processes)


def check_part_size(phase: Phase, network: Network, config: RunConfig, processes: Processes) -> None:
    """Check that batch normalisation can be trained on the images that a process passes through the network at a time.

    Raises:
        ValueError: they are too few.
    """
    together = phase.batch_size // (processes.world * config.accumulate)
    larger = "".join(f"a larger {setting}, " for setting in phase.overrides("batch_size"))
    if together < getattr(network.backbone, "fewest_images", 1) and phase.has_batch_statistics:
        raise ValueError(
            f"{phase.name}: batch normalisation cannot be trained on {together} image, and at this image size the network has maps of a single pixel; "
            f"take {larger}a smaller `accumulate`, larger images or another `model`"
        )
