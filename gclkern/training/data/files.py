"""Images that stay in their files: decoded and augmented by worker processes, and checked before a run starts."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gclkern.training.data.decode import CorruptImageError, open_image
from gclkern.training.data.duplicates import duplicate_notes
from gclkern.training.data.groups import count_groups
from gclkern.training.data.images import DataSplits, Epoch, EvaluationTransform, uniform_numbers
from gclkern.training.extras import need
from gclkern.training.names import printable

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZES_IN_DIGEST = 1000  # all of a large set's would take minutes on a network file system


class ImageFiles(NamedTuple):
    """Image files and their labels (M,)."""

    paths: list[str]
    labels: Tensor

    def take(self, indices: Tensor) -> ImageFiles:
        """Those at `indices`."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.labels[indices])


class WorkerError(RuntimeError):
    """A process that reads images has failed."""


class _Request(NamedTuple):
    """A sample as a worker is asked for it."""

    place: int
    seed: int


def _resize(image_size: int) -> int:
    """The shorter side to which images are resized before the centre crop of an evaluation."""
    return round(image_size * 256 / 224)


class _Files(Dataset[Any]):
    """Decodes and transforms image files in worker processes."""

    def __init__(self, paths: Sequence[str], labels: Tensor, image_size: int, train: bool) -> None:
        self.paths, self.labels = paths, labels
        transforms = need("torchvision.transforms", "a data set of image files")
        if train:
            steps = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.4, 0.4, 0.4, 0)]
        else:
            steps = [transforms.Resize(_resize(image_size)), transforms.CenterCrop(image_size)]
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __getitem__(self, request: _Request) -> tuple[Tensor, int] | str:
        """Pixels (3, H, W) uint8 and label, or what is wrong with the file, as an exception would arrive with the worker's traceback for a message."""
        try:
            image = open_image(self.paths[request.place])
        except CorruptImageError as error:
            return str(error)
        # torchvision's transforms draw from torch's own generator: the main process must find it as it was, and each sample has its own numbers
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(request.seed)
            return self.transform(image), int(self.labels[request.place])


def _worker_processes(count: int) -> dict[str, Any]:
    """Arguments of a DataLoader for `count` workers.

    On Linux they are forks, which was Python's own choice up to 3.13. Those of 3.14 are given the paths of all files and import torch anew in every epoch, and
    end with a server process, which a signal to the process group reaches.
    """
    return {"num_workers": count, "multiprocessing_context": "fork" if count and sys.platform == "linux" else None}


def _own_group(_worker: int) -> None:
    """Keep a worker from signals to the process group, which terminals and torchrun send: the main process needs it to end its step and save a checkpoint."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    failure = next((sample for sample in samples if isinstance(sample, str)), None)
    if failure is not None:
        return failure
    pixels, labels = zip(*samples, strict=True)
    batch = torch.stack(pixels), torch.tensor(labels)
    if get_worker_info() is not None:
        # A queue would do this in a thread of the worker, whose failure nobody hears of: the main process would wait for the batch for ever.
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
    """What to say of a worker process that has failed."""
    cause = str(error).strip().splitlines()[-1]
    return f"a process that reads images has failed ({cause}); take `workers=0`, or make /dev/shm larger"


class _Check(Dataset[str]):
    """What is wrong with each file, "" for nothing."""

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
    """The images that can be read, and what is wrong with the others. Every file is read once."""
    checks: DataLoader[str] = DataLoader(_Check(images.paths), batch_size=64, collate_fn=list, generator=torch.Generator(), **_worker_processes(workers))
    failures = [failure for batch in _answers(checks) for failure in batch]
    kept = torch.tensor([place for place, failure in enumerate(failures) if not failure], dtype=torch.int64)
    return images.take(kept), [failure for failure in failures if failure]


class ListImages:
    """Images that stay in their files, decoded and augmented by worker processes. `skipped` says what was wrong with each file that was left out."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int = 224,
        workers: int = 4,
        augment: str = "standard",
        skipped: Sequence[str] = (),
    ) -> None:
        self.paths, self.labels = paths, labels
        self.mean, self.std = mean, std
        self.image_size, self.workers, self.augment = image_size, workers, augment
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> ListImages:
        """A set of the samples at `indices`, with the same settings."""
        other = object.__new__(ListImages)
        other.__dict__ = {**self.__dict__, "paths": [self.paths[i] for i in indices.tolist()], "labels": self.labels[indices]}
        return other

    def digest(self) -> str:
        """A hash of the labels, the file names and some files' sizes; folders do not count, since the same images may lie elsewhere."""
        digest = hashlib.sha256(self.labels.numpy().data)
        for path in self.paths:
            digest.update(os.fsencode(os.path.basename(path)) + b"\0")  # noqa: PTH119 (a Path for each of a million files takes seconds)
        for path in self.paths[:: -(-len(self) // _SIZES_IN_DIGEST)]:
            digest.update(b"%d " % (os.path.getsize(path) if os.path.isfile(path) else -1))  # noqa: PTH113, PTH202
        return digest.hexdigest()

    def evaluation_transform(self) -> EvaluationTransform:
        return {"resize": _resize(self.image_size), "crop": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def loader(self, batches: Iterable[Sequence[int]], *, device: torch.device, epoch: Epoch | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augment not in ("standard", "none"):
            raise ValueError(f"augment must be standard or none for image files, got {self.augment!r}")
        requests: list[list[_Request]] = []
        done, drawn = 0, epoch or Epoch(seed=0)
        for batch in batches:
            places = drawn.places(done, len(batch))
            done += len(batch)
            seeds = (uniform_numbers(drawn.seed, places, 2).double() * 2**24).to(torch.int64)  # whole numbers of 24 bits
            requests.append([_Request(index, (high << 24) | low) for index, (high, low) in zip(batch, seeds.tolist(), strict=True)])
        loader: DataLoader[Any] = DataLoader(
            _Files(self.paths, self.labels, self.image_size, epoch is not None and self.augment == "standard"),
            batch_sampler=requests,  # type: ignore[arg-type]
            collate_fn=_collate,
            worker_init_fn=_own_group,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed for its workers, which must not move torch's own generator
            **_worker_processes(self.workers),
        )
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        for answer in _answers(loader):
            if isinstance(answer, str):
                raise CorruptImageError(f"{answer}; repair the file or take it out of the list, or pass --skip-corrupt to leave out such images")
            pixels, labels = (column.to(device, non_blocking=True) for column in answer)
            yield pixels.to(torch.float32).div_(255).sub_(mean).div_(std), labels


def file_splits(
    name: str,
    train: ImageFiles,
    test: ImageFiles,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    class_names: list[str] | None = None,
    image_size: int,
    workers: int,
    skip_corrupt: bool,
    notes: Sequence[str] = (),
) -> DataSplits:
    """Checks the labels, which must be 0 to C - 1 with training images for each, looks for duplicates, and with `skip_corrupt` reads all files."""
    num_classes = int(train.labels.max()) + 1 if class_names is None else len(class_names)
    if (highest := int(test.labels.max())) >= num_classes:
        raise ValueError(f"the test images have class {highest}, but the training images only 0 to {num_classes - 1}; number classes alike in both lists")
    skipped: list[list[str]] = [[], []]
    if skip_corrupt:
        (train, skipped[0]), (test, skipped[1]) = (_leave_out_corrupt(images, workers) for images in (train, test))
        for images, failures in zip((train, test), skipped, strict=True):
            if not images.paths:
                raise CorruptImageError(f"not one image can be read, the first is: {failures[0]}")
    counts, tested = (images.labels.bincount(minlength=num_classes).tolist() for images in (train, test))

    def named(classes: Sequence[int]) -> str:
        shown = ", ".join(str(label) if class_names is None else printable(class_names[label]) for label in classes[:10])
        return shown if len(classes) <= 10 else f"{shown} and {len(classes) - 10} more"

    if missing := [label for label, count in enumerate(counts) if count == 0]:
        remedy = "labels must be 0 to C - 1 without a gap" if class_names is None else "remove their folders, or fill them"
        raise ValueError(f"classes without a training image: {named(missing)}; {remedy}")
    notes = [*notes, *duplicate_notes((train.paths, train.labels.tolist()), (test.paths, test.labels.tolist()))]
    if untested := [label for label, count in enumerate(tested) if count == 0]:
        notes.append(f"classes without a test image, which no accuracy counts: {named(untested)}")
    sets = [
        ListImages(images.paths, images.labels, mean=mean, std=std, image_size=image_size, workers=workers, skipped=failures)
        for images, failures in zip((train, test), skipped, strict=True)
    ]
    return DataSplits(
        name=name,
        train=sets[0],
        test=sets[1],
        holdout=None,
        class_counts=counts,
        groups=count_groups(counts),
        num_classes=num_classes,
        class_names=class_names,
        channels=3,
        image_size=image_size,
        notes=notes,
    )
