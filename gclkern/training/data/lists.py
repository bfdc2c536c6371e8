"""Image files on disk: the lists of ImageNet-LT, Places-LT and iNaturalist 2018, a user's own lists, and folders with one folder for each class."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gclkern.training.data.groups import count_groups
from gclkern.training.data.images import DataSplits, Epoch, uniform_numbers
from gclkern.training.extras import need


class _Lists(NamedTuple):
    train: str
    test: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LISTS = {
    "imagenet-lt": _Lists("ImageNet_LT_train.txt", "ImageNet_LT_test.txt", 1000, _IMAGENET_MEAN, _IMAGENET_STD),
    "places-lt": _Lists("Places_LT_train.txt", "Places_LT_test.txt", 365, _IMAGENET_MEAN, _IMAGENET_STD),
    "inat18": _Lists("iNaturalist18_train.txt", "iNaturalist18_val.txt", 8142, (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
LISTS = tuple(_LISTS)
_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class CorruptImageError(RuntimeError):
    """An image file that cannot be read."""


class _Request(NamedTuple):
    """A sample as a worker is asked for it."""

    place: int
    seed: int


def _open(path: str, draft: bool = False) -> Any:
    """The decoded image; when only whether it can be decoded matters, a `draft` of a JPEG at an eighth of its size, which reads the whole file all the same.

    Raises:
        CorruptImageError: the file is missing or cannot be read; the message begins with its path.
    """
    try:
        with need("PIL.Image", "a data set of image files").open(path) as file:
            if draft:
                file.draft("RGB", (1, 1))
            return file.convert("RGB")
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise CorruptImageError(f"{path} does not exist") from error
    except Exception as error:  # decoders raise many kinds on a damaged file
        raise CorruptImageError(f"{path} cannot be read as an image ({error})") from error


class _Files(Dataset[Any]):
    """Decodes and transforms image files in worker processes."""

    def __init__(self, paths: Sequence[str], labels: Tensor, image_size: int, train: bool) -> None:
        self.paths, self.labels = paths, labels
        transforms = need("torchvision.transforms", "a data set of image files")
        if train:
            steps = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.4, 0.4, 0.4, 0)]
        else:
            steps = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __getitem__(self, request: _Request) -> tuple[Tensor, int] | str:
        """Pixels (3, H, W) uint8 and label, or what is wrong with the file, as an exception would arrive with the worker's traceback for a message."""
        try:
            image = _open(self.paths[request.place])
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
    return torch.stack(pixels), torch.tensor(labels)


class _Check(Dataset[str]):
    """What is wrong with each file, "" for nothing."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __getitem__(self, place: int) -> str:
        try:
            _open(self.paths[place], draft=True)
        except CorruptImageError as error:
            return str(error)
        return ""

    def __len__(self) -> int:
        return len(self.paths)


def _leave_out_corrupt(paths: Sequence[str], labels: Tensor, workers: int) -> tuple[list[str], Tensor, list[str]]:
    """Paths and labels of the images that can be read, and what is wrong with the others. Every file is read once."""
    checks: DataLoader[str] = DataLoader(_Check(paths), batch_size=64, collate_fn=list, generator=torch.Generator(), **_worker_processes(workers))
    failures = [failure for batch in checks for failure in batch]
    kept = [place for place, failure in enumerate(failures) if not failure]
    return [paths[place] for place in kept], labels[kept], [failure for failure in failures if failure]


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
        for answer in loader:
            if isinstance(answer, str):
                raise CorruptImageError(f"{answer}; repair the file or take it out of the list, or pass --skip-corrupt to leave out such images")
            pixels, labels = (column.to(device, non_blocking=True) for column in answer)
            yield pixels.to(torch.float32).div_(255).sub_(mean).div_(std), labels


def read_list(path: str | os.PathLike[str]) -> tuple[list[str], Tensor]:
    """The relative paths and labels (M,) of a list with a line `relative/path label` for each image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not of this form, or no line; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path.absolute()}; each line of it should be `relative/path label`")
    paths, labels = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with the mark that some editors put first, or without it
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = " ".join(line.strip().rsplit(maxsplit=1)).rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{path}:{number}: expected `relative/path label` with a label from 0 on, got {line!r}")
        paths.append(name)
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{path} lists no image")
    return paths, torch.tensor(labels, dtype=torch.int64)


def _places_candidates(folder: PurePosixPath, class_folder: PurePosixPath | None) -> Iterator[PurePosixPath]:
    """Where the two layouts of Places keep the images that a list has in `folder`; `class_folder` is where it has the training images of their class.

    The small-image archive has data_256/a/apartment_building/outdoor/ and val_256/, the other one train/apartment_building-outdoor/ and val/airfield/.
    """
    yield folder
    top, *names = folder.parts or ("",)
    if top == "data_256" and len(names) > 1:
        for part in ("train", "val"):
            yield from (PurePosixPath(part, joint.join(names[1:])) for joint in "-_/")
    elif top in ("train", "val") and names:
        yield from (PurePosixPath("data_256", names[0][0], *joined) for joined in (names, "-".join(names).split("-")))
        yield PurePosixPath("val_256")
    elif top == "val_256" and class_folder is not None:
        for train_folder in _places_candidates(class_folder, None):
            if train_folder.parts[0] == "train":
                yield PurePosixPath("val", *train_folder.parts[1:])


def _locate(root: Path, paths: Sequence[str], labels: Tensor, class_folders: dict[int, PurePosixPath], *, places: bool, incomplete: bool) -> list[str]:
    """The files of a list under `root`, with none missing unless it may be `incomplete`. A folder is looked up and listed once, no file is opened."""
    found: dict[tuple[PurePosixPath, int], Path] = {}
    held: dict[Path, set[str]] = {}
    located = []
    for path, label in zip(map(PurePosixPath, paths), labels.tolist(), strict=True):
        key = path.parent, label
        if key not in found:
            candidates = list(_places_candidates(path.parent, class_folders.get(label))) if places else [path.parent]
            exists = [root / folder for folder in candidates if (root / folder / path.name).is_file()] or [root / f for f in candidates if (root / f).is_dir()]
            if not exists:
                raise FileNotFoundError(f"the list has {path}, but {root} holds no folder {' or '.join(map(str, candidates))}; pass the folder with --data-dir")
            found[key] = exists[0]
        folder = found[key]
        if folder not in held:
            held[folder] = set() if incomplete else {file.name for file in folder.iterdir()}
        if not incomplete and path.name not in held[folder]:
            raise FileNotFoundError(f"the list has {path}, but there is no {folder / path.name}; add it, or pass --skip-corrupt to leave out such images")
        located.append(str(folder / path.name))
    return located


def _read_folder(root: Path) -> tuple[list[str], Tensor, list[str]]:
    """Paths, labels and class names of a folder that has one folder for each class, in alphabetical order; hidden ones, which programs leave, do not count."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(names):
        found = [file for file in (root / name).rglob("*") if file.suffix.lower() in _SUFFIXES]
        files = sorted(str(file) for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts))
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise ValueError(f"{root} has no folder of images for each class, such as {root / 'cat' / '1.jpg'}")
    return paths, torch.tensor(labels, dtype=torch.int64), names


def _splits(
    name: str,
    train: tuple[Sequence[str], Tensor],
    test: tuple[Sequence[str], Tensor],
    *,
    mean: Sequence[float] = _IMAGENET_MEAN,
    std: Sequence[float] = _IMAGENET_STD,
    class_names: list[str] | None = None,
    image_size: int,
    workers: int,
    skip_corrupt: bool,
) -> DataSplits:
    """Checks the labels, which must be 0 to C - 1 with training images for each, and with `skip_corrupt` the files."""
    num_classes = int(train[1].max()) + 1 if class_names is None else len(class_names)
    if (highest := int(test[1].max())) >= num_classes:
        raise ValueError(f"the test images have class {highest}, but the training images only 0 to {num_classes - 1}; number classes alike in both lists")
    sets = []
    for paths, labels in (train, test):
        skipped: list[str] = []
        if skip_corrupt:
            paths, labels, skipped = _leave_out_corrupt(paths, labels, workers)
            if not paths:
                raise CorruptImageError(f"not one image can be read, the first is: {skipped[0]}")
        sets.append(ListImages(paths, labels, mean=mean, std=std, image_size=image_size, workers=workers, skipped=skipped))
    counts = sets[0].labels.bincount(minlength=num_classes).tolist()
    if missing := [label for label, count in enumerate(counts) if count == 0]:
        names = ", ".join(str(label) if class_names is None else class_names[label] for label in missing[:10])
        remedy = "labels must be 0 to C - 1 without a gap" if class_names is None else "remove their folders, or fill them"
        raise ValueError(f"classes without a training image: {names}; {remedy}")
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
    )


def load_lists(
    name: str,
    data_dir: str | os.PathLike[str],
    train_list: str | os.PathLike[str] | None,
    test_list: str | os.PathLike[str] | None,
    *,
    image_size: int,
    workers: int,
    skip_corrupt: bool,
) -> DataSplits:
    """A data set of list files, known by name or a user's own ("list"); without arguments for them the known lists are looked for in `data_dir`."""
    root, known = Path(data_dir), _LISTS.get(name)
    if known is None and (train_list is None or test_list is None):
        raise ValueError("the data set 'list' needs --train-list and --test-list, text files with a line `relative/path label` for each image")
    listed = []
    for given, default in ((train_list, known and known.train), (test_list, known and known.test)):
        path = Path(given) if given is not None else root / str(default)
        if given is None and not path.is_file():
            raise FileNotFoundError(f"{name} needs its list {default} in {root}; put it there, or pass --train-list and --test-list")
        listed.append(read_list(path))
    (train_paths, train_labels), (test_paths, test_labels) = listed
    if known is not None and (found := train_labels.unique().numel()) != known.num_classes:
        raise ValueError(f"{name} has {known.num_classes} classes, but its training list has {found}; for a list of your own take the data set 'list'")
    look = {"places": name == "places-lt", "incomplete": skip_corrupt}
    class_folders = {label: PurePosixPath(path).parent for path, label in zip(train_paths, train_labels.tolist(), strict=True)}
    mean, std = (known.mean, known.std) if known is not None else (_IMAGENET_MEAN, _IMAGENET_STD)
    return _splits(
        name,
        (_locate(root, train_paths, train_labels, class_folders, **look), train_labels),
        (_locate(root, test_paths, test_labels, class_folders, **look), test_labels),
        mean=mean,
        std=std,
        image_size=image_size,
        workers=workers,
        skip_corrupt=skip_corrupt,
    )


def load_folder(data_dir: str | os.PathLike[str], *, image_size: int, workers: int, skip_corrupt: bool) -> DataSplits:
    """The folder train/ and one of test/ and val/ in `data_dir`, each with one folder for each class."""
    root = Path(data_dir)
    test_root = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise FileNotFoundError(f"{root} must hold train/ and test/ or val/, each with one folder of images for each class; for text lists take 'list'")
    train_paths, train_labels, names = _read_folder(root / "train")
    test_paths, test_labels, test_names = _read_folder(test_root)
    if unknown := [name for name in test_names if name not in names]:
        raise ValueError(f"{test_root / unknown[0]} is a class that {root / 'train'} does not have; add training images, or remove it")
    to_train = torch.tensor([names.index(name) for name in test_names])
    return _splits(
        "folder",
        (train_paths, train_labels),
        (test_paths, to_train[test_labels]),
        class_names=names,
        image_size=image_size,
        workers=workers,
        skip_corrupt=skip_corrupt,
    )
