"""Data sets of image files: decoded once if they fit into memory, else in every epoch by worker processes."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gclkern.training.data.augment import COLUMNS, augment_batch, parse_augmentation
from gclkern.training.data.decode import BILINEAR, CorruptImageError, open_image, resize_and_crop
from gclkern.training.data.duplicates import duplicate_notes
from gclkern.training.data.groups import count_groups, tercile_groups
from gclkern.training.data.images import DataSplits, DeviceImages, Epoch, EvaluationTransform, uniform_numbers
from gclkern.training.extras import need
from gclkern.training.printable import printable

OWN = ("list", "folder")  # data sets without published settings
SMALL = 64  # image size in pixels up to which images are not cropped for evaluation and only shifted for training
# Processes that read images. More than there are cores slow each other down, and torch warns of them.
DEFAULT_WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_LARGE = 224
_MEMORY = 2 << 30
_LOOKED_AT = 200
_WORTH_A_BAR = 1000  # images, which take seconds to decode
_REPAIR = "repair the file, remove it from the data set, or pass `skip_corrupt` to leave out such images"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZES_IN_DIGEST = 1000  # reading all file sizes of a large set would take minutes on a network file system


class ImageFiles(NamedTuple):
    """Image files and their labels (M,)."""

    paths: list[str]
    labels: Tensor

    def take(self, indices: Tensor) -> ImageFiles:
        """Those at `indices`."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.labels[indices])

    def digest(self) -> str:
        """A hash of the labels, the file names and the sizes of some files, without the folders, since the files may have been moved."""
        digest = hashlib.sha256(self.labels.numpy().data)
        for path in self.paths:
            digest.update(os.fsencode(os.path.basename(path)) + b"\0")  # noqa: PTH119 (a Path for each of a million files takes seconds)
        for path in self.paths[:: -(-len(self.paths) // _SIZES_IN_DIGEST)]:
            digest.update(b"%d " % (os.path.getsize(path) if os.path.isfile(path) else -1))  # noqa: PTH113, PTH202
        return digest.hexdigest()


class WorkerError(RuntimeError):
    """A process that reads images has failed."""


class _Request(NamedTuple):
    """A request for one sample, sent to a worker."""

    place: int
    seeds: list[int]  # of each view's crop


def _resize(image_size: int) -> int:
    """The shorter side to which images are resized before the centre crop of evaluation; small images are not cropped."""
    return image_size if image_size <= SMALL else round(image_size * 256 / 224)


class _Files(Dataset[Any]):
    """Decodes image files in worker processes: for each view a random crop of at least that share of the image, for training, or the centre crop for None."""

    def __init__(self, images: ImageFiles, image_size: int, least_areas: Sequence[float | None]) -> None:
        self.images, self.size = images, image_size
        self.crops = [None if area is None else self._random_crop(area) for area in least_areas]

    def _random_crop(self, least_area: float) -> Any:
        return need("torchvision.transforms", "a data set of image files").RandomResizedCrop(self.size, scale=(least_area, 1))

    def __getitem__(self, request: _Request) -> tuple[Tensor, int] | str:
        """Pixels (V, 3, H, W) uint8 and label, or an error message, because an exception would arrive with the worker's traceback as its message."""
        try:
            image = open_image(self.images.paths[request.place])
        except CorruptImageError as error:
            return str(error)
        views = [self._view(image, crop, seed) for crop, seed in zip(self.crops, request.seeds, strict=True)]
        return torch.stack(views), int(self.images.labels[request.place])

    def _view(self, image: Any, crop: Any, seed: int) -> Tensor:
        if crop is None:
            return _pixels(resize_and_crop(image, resize=_resize(self.size), crop=self.size))
        # torchvision's transforms use torch's global generator: seed it for each sample, and restore it for the main process
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _pixels(crop(image))


def _pixels(image: Any) -> Tensor:
    """A PIL image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _worker_processes(count: int) -> dict[str, Any]:
    """Arguments of a DataLoader for `count` workers.

    On Linux they are forked, Python's default up to 3.13. With the default of 3.14, a server process, workers receive all paths and import torch again in every
    epoch, and die with the server, which receives signals to the process group.
    """
    return {"num_workers": count, "multiprocessing_context": "fork" if count and sys.platform == "linux" else None}


def _own_group(_worker: int) -> None:
    """Protect a worker from signals that terminals and torchrun send to the process group: the main process needs it to finish its step before it stops."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    failure = next((sample for sample in samples if isinstance(sample, str)), None)
    if failure is not None:
        return failure
    pixels, labels = zip(*samples, strict=True)
    batch = torch.stack(pixels), torch.tensor(labels)
    if get_worker_info() is not None:
        # A queue would do this in a thread of the worker, whose errors are lost: the main process would wait forever.
        for tensor in batch:
            tensor.share_memory_()
    return batch


def _answers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        WorkerError: a worker process has died, or has no shared memory for a batch.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            raise WorkerError(worker_problem(error)) from error
        yield batch


def worker_problem(error: RuntimeError) -> str:
    """The error message for a worker process that has failed."""
    cause = str(error).strip().splitlines()[-1]
    return f"a process that reads images has failed ({cause}); take `workers=0`, or make /dev/shm larger"


class _Check(Dataset[str]):
    """An error message for each file, "" if it can be read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __getitem__(self, place: int) -> str:
        try:
            open_image(self.paths[place], draft=True)
        except CorruptImageError as error:
            return str(error)
        return ""

    def __len__(self) -> int:
        return len(self.paths)


def _leave_out_corrupt(images: ImageFiles, workers: int) -> tuple[ImageFiles, list[str]]:
    """The images that can be read, and error messages for the others. Every file is read once."""
    checks: DataLoader[str] = DataLoader(_Check(images.paths), batch_size=64, collate_fn=list, generator=torch.Generator(), **_worker_processes(workers))
    failures = [failure for batch in _answers(checks) for failure in batch]
    kept = torch.tensor([place for place, failure in enumerate(failures) if not failure], dtype=torch.int64)
    return images.take(kept), [failure for failure in failures if failure]


class _Decoded(Dataset[Any]):
    """Each image resized to a square of `side` pixels, with the fractions of its sides that the centre crop covers; without `side`, the centre crop."""

    def __init__(self, paths: Sequence[str], image_size: int, side: int | None) -> None:
        self.paths, self.size, self.side = paths, image_size, side

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor] | str:
        try:
            image = open_image(self.paths[place])
        except CorruptImageError as error:
            return str(error)
        width, height = image.size
        seen = min(width, height)
        if self.side is None:
            image = resize_and_crop(image, resize=_resize(self.size), crop=self.size)
        else:
            seen *= 1 if width == height == self.size else self.size / self.side
            image = image.resize((self.side, self.side), resample=BILINEAR)
        return _pixels(image), torch.tensor([seen / height, seen / width])

    def __len__(self) -> int:
        return len(self.paths)


def _decode(
    images: ImageFiles, image_size: int, side: int | None, workers: int, *, skip_corrupt: bool, **settings: Any
) -> tuple[DecodedImages, list[str]]:  # fmt: skip
    """All images, decoded once, and error messages for those that were left out."""
    loader: DataLoader[Any] = DataLoader(
        _Decoded(images.paths, image_size, side), batch_size=64, collate_fn=list, generator=torch.Generator(), **_worker_processes(workers)
    )
    extent = side or image_size
    pixels, views = torch.empty(len(images.paths), 3, extent, extent, dtype=torch.uint8), torch.empty(len(images.paths), 2)
    failures: list[str] = []
    kept: list[int] = []
    shown = len(images.paths) >= _WORTH_A_BAR and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    bar = need("tqdm", "the progress bar").tqdm((answer for batch in _answers(loader) for answer in batch), "decoding", len(images.paths), disable=not shown)
    for place, answer in enumerate(bar):
        if not isinstance(answer, str):
            pixels[len(kept)], views[len(kept)] = answer
            kept.append(place)
        elif skip_corrupt:
            failures.append(answer)
        else:
            raise CorruptImageError(f"{answer}; {_REPAIR}")
    files = images.take(torch.tensor(kept, dtype=torch.int64))
    return DecodedImages(files, pixels[: len(kept)], views=None if side is None else views[: len(kept)], image_size=image_size, **settings), failures


class DecodedImages(DeviceImages):
    """Images that were read from files."""

    def __init__(self, files: ImageFiles, pixels: Tensor, **settings: Any) -> None:
        super().__init__(pixels, files.labels, **settings)
        self.files = files

    def subset(self, indices: Tensor) -> DecodedImages:
        """A set of the samples at `indices`, with the same settings."""
        other = copy.copy(self)
        other.__dict__ |= vars(super().subset(indices)) | {"files": self.files.take(indices)}
        return other

    def digest(self) -> str:
        """The digest of the files."""
        return self.files.digest()

    def evaluation_transform(self) -> EvaluationTransform:
        return {"resize": _resize(self.image_size), "crop": self.image_size, "mean": self.mean, "std": self.std}


class FileImages:
    """Images that are decoded from their files in every epoch: decoded and cropped by worker processes, augmented on the device."""

    def __init__(self, images: ImageFiles, *, mean: Sequence[float], std: Sequence[float], image_size: int, workers: int, augment: str) -> None:
        self.files, self.labels = images, images.labels
        self.mean, self.std = mean, std
        self.image_size, self.workers, self.augment = image_size, workers, augment

    def __len__(self) -> int:
        return len(self.files.paths)

    def subset(self, indices: Tensor) -> FileImages:
        """A set of the samples at `indices`, with the same settings."""
        settings: dict[str, Any] = {"image_size": self.image_size, "workers": self.workers, "augment": self.augment}
        return FileImages(self.files.take(indices), mean=self.mean, std=self.std, **settings)

    def digest(self) -> str:
        """The digest of the files."""
        return self.files.digest()

    def evaluation_transform(self) -> EvaluationTransform:
        return {"resize": _resize(self.image_size), "crop": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epoch: Epoch | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for (images,), labels in self._loader(batches, device, [epoch]):
            yield images, labels

    def view_loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epochs: Sequence[Epoch]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """A file is decoded once for all of its views."""
        return self._loader(batches, device, epochs)

    def _loader(self, batches: Iterable[Sequence[int]], device: torch.device, epochs: Sequence[Epoch | None]) -> Iterator[tuple[list[Tensor], Tensor]]:
        views = [parse_augmentation((epoch and epoch.augment) or self.augment) for epoch in epochs]
        requests: list[list[_Request]] = []
        done = 0
        for batch in batches:
            seeds = torch.stack([_crop_seeds(epoch or Epoch(seed=0), done, len(batch)) for epoch in epochs], 1)
            requests.append([_Request(*pair) for pair in zip(batch, seeds.tolist(), strict=True)])
            done += len(batch)
        loader: DataLoader[Any] = DataLoader(
            _Files(self.files, self.image_size, [None if epoch is None else view.least_area for epoch, view in zip(epochs, views, strict=True)]),
            batch_sampler=requests,  # type: ignore[arg-type]
            collate_fn=_collate,
            worker_init_fn=_own_group,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the seed for the workers must not be drawn from torch's global generator
            **_worker_processes(self.workers),
        )
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        done = 0
        for answer in _answers(loader):
            if isinstance(answer, str):
                raise CorruptImageError(f"{answer}; {_REPAIR}")
            pixels, labels = (column.to(device, non_blocking=True) for column in answer)
            images = []
            for part, epoch, view in zip(pixels.unbind(1), epochs, views, strict=True):
                if epoch is not None and view.numbers:
                    numbers = uniform_numbers(epoch.seed, epoch.places(done, len(labels)).to(device), view.numbers)
                    images.append(augment_batch(part, numbers, view))
                else:
                    images.append(part)
            done += len(labels)
            yield [part.to(torch.float32).div_(255).sub_(mean).div_(std) for part in images], labels


def _crop_seeds(epoch: Epoch, start: int, count: int) -> Tensor:
    """Seeds of 48 bits for the random crops of this rank's samples from `start` on."""
    numbers = uniform_numbers(epoch.seed, epoch.places(start, count), COLUMNS.resized_crop.stop)[:, COLUMNS.resized_crop]
    high, low = (numbers[:, :2].double() * 2**24).to(torch.int64).unbind(1)  # whole numbers of 24 bits
    return (high << 24) | low


def _sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Width and height of images, from the headers of their files; files that cannot be read are left out."""
    sizes = []
    for path in paths:
        try:
            with need("PIL.Image", "a data set of image files").open(path) as file:
                sizes.append(file.size)
        except ImportError:
            raise
        except Exception:  # reported when the image is decoded
            continue
    return sizes


def choose_size(paths: Sequence[str]) -> int:
    """The median shorter side of some of the images, at most 224. If sizes differ it is rounded, to multiples of 8 up to 64 and of 32 above."""
    shorter = sorted(min(size) for size in _sizes(paths[:: max(1, len(paths) // _LOOKED_AT)]))
    if not shorter:
        return _LARGE
    usual = shorter[len(shorter) // 2]
    if shorter[0] != shorter[-1]:
        step = 8 if usual <= SMALL else 32
        usual = max(step, step * round(usual / step))
    return min(usual, _LARGE)


def file_splits(
    name: str,
    train: ImageFiles,
    test: ImageFiles,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    class_names: list[str] | None = None,
    image_size: int | None,
    workers: int,
    skip_corrupt: bool,
    notes: Sequence[str] = (),
) -> DataSplits:
    """A data set of image files. Labels must be 0 to C - 1, each with training images; duplicates are reported.

    If all images fit into 2 GiB as uint8, they are decoded here, once, and augmented on the device; the limit is fixed, so that a data set gives the same
    results on every machine. Otherwise they are decoded in every epoch; with `skip_corrupt` all files are read once to find those that cannot be decoded.
    """
    num_classes = int(train.labels.max()) + 1 if class_names is None else len(class_names)
    if (highest := int(test.labels.max())) >= num_classes:
        raise ValueError(f"the test images have class {highest}, but the training images only 0 to {num_classes - 1}; number classes equally in both lists")

    def named(classes: Sequence[int]) -> str:
        shown = ", ".join(str(label) if class_names is None else printable(class_names[label]) for label in classes[:10])
        return shown if len(classes) <= 10 else f"{shown} and {len(classes) - 10} more"

    def check_counts(labels: Tensor) -> list[int]:
        counts: list[int] = labels.bincount(minlength=num_classes).tolist()
        if missing := [label for label, count in enumerate(counts) if count == 0]:
            remedy = "labels must be 0 to C - 1 without a gap" if class_names is None else "remove their folders, or fill them"
            raise ValueError(f"classes without a training image: {named(missing)}; {remedy}")
        return counts

    check_counts(train.labels)  # before the files are read, and again after some may have been left out
    if image_size is None:
        image_size = choose_size(train.paths)
        if image_size != _LARGE:
            notes = [*notes, f"images are resized to {image_size} x {image_size} pixels, their usual shorter side; `image_size` changes it"]
    notes = [*notes, *duplicate_notes((train.paths, train.labels.tolist()), (test.paths, test.labels.tolist()))]
    augment = "crop" if image_size <= SMALL and name in OWN else "resized-crop,flip,color"
    settings: dict[str, Any] = {"mean": mean, "std": std, "augment": augment}
    sets: list[DecodedImages | FileImages] = []
    side = None if image_size <= SMALL else round(image_size * 256 / 224)
    fits = 3 * (len(train.paths) * (side or image_size) ** 2 + len(test.paths) * image_size**2) <= _MEMORY
    if fits and side is not None and set(_sizes(train.paths)) == {(image_size, image_size)}:
        side = None  # all images have this size already
    for images, part, extent in ((train, "training", side), (test, "test", None)):
        if fits:
            decoded, failures = _decode(images, image_size, extent, workers, skip_corrupt=skip_corrupt, **settings)
            sets.append(decoded)
        else:
            left, failures = _leave_out_corrupt(images, workers) if skip_corrupt else (images, [])
            sets.append(FileImages(left, image_size=image_size, workers=workers, **settings))
        if failures:
            notes.append(f"{len(failures)} {part} image{'s' * (len(failures) > 1)} left out{', the first' * (len(failures) > 1)}: {failures[0]}")
        if not len(sets[-1]):
            raise CorruptImageError(f"no image can be read; the first error is: {failures[0]}")
    counts = check_counts(sets[0].labels)
    if untested := [label for label, count in enumerate(sets[1].labels.bincount(minlength=num_classes).tolist()) if count == 0]:
        notes.append(f"classes without a test image, which are not part of any accuracy: {named(untested)}")
    groups = count_groups(counts)
    if name in OWN and len(groups) < 3 <= num_classes and max(counts) > min(counts):
        groups = tercile_groups(counts)
        notes.append("many, medium and few are thirds of the classes by their counts, since limits of 100 and 20 images would leave a group empty")
    return DataSplits(
        name=name,
        train=sets[0],
        test=sets[1],
        holdout=None,
        class_counts=counts,
        groups=groups,
        num_classes=num_classes,
        class_names=class_names,
        channels=3,
        image_size=image_size,
        notes=notes,
    )
