"""Sets of images and their batches. The augmentation of a sample depends only on the seed of the epoch and the sample's position in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from gclkern.torch_backend.noise import philox_words
from gclkern.training.data.augment import COLUMNS, augment_batch, parse_augmentation, resample, resized_boxes
from gclkern.training.data.identity import DataIdentity
from gclkern.validation import resolve_seed

# Makes the numbers of augmentation independent of the noise and the samplers, which may use the same seed.
_STREAM = 0x3C6EF372A54FF53A
# Pixels augmented at once: on a GPU small batches would cost more in kernel launches than in work, on a CPU large ones leave its caches.
_DEVICE_PIXELS = 1 << 22
_CPU_PIXELS = 1 << 18


class Epoch(NamedTuple):
    """How an epoch's samples are augmented: seed and position of a rank, on which the random numbers depend, and by what."""

    seed: int
    position: int = 0  # samples of the epoch that this rank has already done, as for the samplers
    num_replicas: int = 1
    rank: int = 0
    augment: str | None = None  # the augmentation, as parse_augmentation takes it; None is the set's

    def places(self, start: int, count: int) -> Tensor:
        """Positions in the epoch over all ranks, numbered as in gclkern.samplers, of this rank's samples `start` to `start + count - 1` after `position`."""
        return torch.arange(self.position + start, self.position + start + count) * self.num_replicas + self.rank


def uniform_numbers(seed: int, places: Tensor, count: int) -> Tensor:
    """Random numbers (places, count) in [0, 1), float32: a pure function of the seed, a sample's place in the epoch and the column."""
    groups = torch.arange(-(-count // 4), device=places.device)
    key = resolve_seed(seed, places.device) ^ _STREAM
    words = philox_words(key, places, groups).flatten(1)[:, :count]
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


class EvaluationTransform(TypedDict):
    """The transform from an image with values in [0, 1] to the network's input. An image of crop x crop pixels is only normalised."""

    resize: int  # pixels of the shorter side
    crop: int  # pixels of a side of the centre crop that follows
    mean: list[float]  # of each channel; (value - mean) / std
    std: list[float]


class ImageSet(Protocol):
    """Images with labels."""

    labels: Tensor  # (M,) int64, on the CPU
    augment: str  # the default augmentation of training, as parse_augmentation takes it

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> ImageSet:
        """A set of the samples at `indices`, with the same settings."""
        ...

    def digest(self) -> str:
        """A hash of the labels and of the images: of their pixels, or of their file names, whichever folder they are in."""
        ...

    def evaluation_transform(self) -> EvaluationTransform:
        """How images are prepared for evaluation."""
        ...

    def loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epoch: Epoch | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of each batch of indices, on the device; images (B, C, H, W) are normalised float32.

        If `epoch` is given they are augmented. The augmentation of a sample depends only on the epoch's seed and its position in the epoch, so it is the same
        in a resumed epoch and for any number of ranks.
        """
        ...

    def view_loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epochs: Sequence[Epoch]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """As `loader`, but with several views of the same samples, one for each of `epochs`: (list of images, labels) of each batch."""
        ...


class DeviceImages:
    """A set of images that is stored on the device as uint8 and augmented there in large batches."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str,
        image_size: int | None = None,
        views: Tensor | None = None,
    ) -> None:
        """`images` (M, C, H, W) uint8, `labels` (M,); `mean` and `std` of each channel, of values in [0, 1].

        Photos are stored as squares a little larger than `image_size`. `views` (M, 2) is then the height and width of the centre crop of evaluation, a square
        in the original photo, as fractions of its sides. Without `views`, images are used unchanged.
        """
        self.images, self.labels, self.views = images, labels.to("cpu", torch.int64), views
        self.augment, self.image_size = augment, image_size or images.shape[-1]
        self.mean, self.std = list(mean), list(std)
        self._scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        self._shift = -torch.tensor(mean).view(-1, 1, 1) / torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return self.labels.numel()

    def subset(self, indices: Tensor) -> DeviceImages:
        """A set of the samples at `indices`, with the same settings."""
        other = object.__new__(DeviceImages)
        views = None if self.views is None else self.views[indices]
        other.__dict__ = {**self.__dict__, "images": self.images[indices], "labels": self.labels[indices], "views": views}
        return other

    def digest(self) -> str:
        """A hash of the labels and pixels."""
        digest = hashlib.sha256(self.labels.numpy().data)
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def evaluation_transform(self) -> EvaluationTransform:
        """Images at the size of this set are only normalised."""
        size = self.images.shape[-1]
        return {"resize": size, "crop": size, "mean": self.mean, "std": self.std}

    def loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epoch: Epoch | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        view = parse_augmentation((epoch and epoch.augment) or self.augment)
        if self.images.device != device:
            self.images, self._scale, self._shift = self.images.to(device), self._scale.to(device), self._shift.to(device)
            self.views = None if self.views is None else self.views.to(device)
        done = 0
        for chunk in _chunks(batches, max(1, (_CPU_PIXELS if device.type == "cpu" else _DEVICE_PIXELS) // self.image_size**2)):
            sizes = [len(batch) for batch in chunk]
            indices = torch.tensor([index for batch in chunk for index in batch])
            places = indices.to(device)
            images, labels = self.images[places], self.labels[indices].to(device)
            views = None if self.views is None else self.views[places]
            numbers = None
            if epoch is not None and view.numbers:
                numbers = uniform_numbers(epoch.seed, epoch.places(done, indices.numel()).to(device), view.numbers)
            if numbers is not None and view.least_area is not None:
                square = torch.ones(len(images), 2, device=device)
                boxes = resized_boxes(numbers[:, COLUMNS.resized_crop], square if views is None else views, view.least_area)
                images = resample(images, boxes, self.image_size)
            elif views is not None:
                images = resample(images, torch.cat([(1 - views) / 2, views], 1), self.image_size)
            if numbers is not None:
                images = augment_batch(images, numbers, view)
            done += indices.numel()
            yield from zip(images.to(torch.float32).mul_(self._scale).add_(self._shift).split(sizes), labels.split(sizes), strict=True)

    def view_loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epochs: Sequence[Epoch]) -> Iterator[tuple[list[Tensor], Tensor]]:
        drawn = list(batches)
        for parts in zip(*(self.loader(drawn, device=device, epoch=epoch) for epoch in epochs), strict=True):
            yield [images for images, _ in parts], parts[0][1]


def _chunks(batches: Iterable[Sequence[int]], least: int) -> Iterator[list[Sequence[int]]]:
    """Groups of consecutive batches with at least `least` samples, except the last group."""
    chunk: list[Sequence[int]] = []
    size = 0
    for batch in batches:
        chunk.append(batch)
        size += len(batch)
        if size >= least:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass
class DataSplits:
    """A data set ready for training.

    The groups are computed before images are held out, so that holding out does not move classes between them.
    """

    name: str
    train: ImageSet
    test: ImageSet
    holdout: ImageSet | None  # a stratified part taken out of the training set
    class_counts: list[int]  # of `train`
    groups: dict[str, list[int]]  # "many", "medium", "few": class indices; an empty group is absent
    num_classes: int
    class_names: list[str] | None
    channels: int
    image_size: int
    notes: list[str] = field(default_factory=list)  # what a user should know of the files, a sentence each
    test_like_train: bool = False  # the test images were split off the training set: classes have the same frequencies in both

    @cached_property
    def identity(self) -> DataIdentity:
        """Compared when a run is resumed or a checkpoint is evaluated."""
        parts = {"training": self.train, "held-out": self.holdout, "test": self.test}
        return {
            "name": self.name,
            "class_names": self.class_names,
            "class_counts": self.class_counts,
            "images": {name: len(images) for name, images in parts.items() if images is not None},
            "digests": {name: images.digest() for name, images in parts.items() if images is not None},
        }
