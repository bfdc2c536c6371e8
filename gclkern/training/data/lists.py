"""Data sets given by lists of image files: ImageNet-LT, Places-LT, iNaturalist 2018, and users' own lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.training.data.files import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, file_splits
from gclkern.training.data.images import DataSplits
from gclkern.training.printable import printable


class _Lists(NamedTuple):
    train: str
    test: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_LISTS = {
    "imagenet-lt": _Lists("ImageNet_LT_train.txt", "ImageNet_LT_test.txt", 1000, IMAGENET_MEAN, IMAGENET_STD),
    "places-lt": _Lists("Places_LT_train.txt", "Places_LT_test.txt", 365, IMAGENET_MEAN, IMAGENET_STD),
    "inat18": _Lists("iNaturalist18_train.txt", "iNaturalist18_val.txt", 8142, (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
LISTS = tuple(_LISTS)


class ImageList(NamedTuple):
    """The contents of a list: paths, labels (M,), and for error messages the file and the line numbers."""

    source: Path
    paths: list[str]
    labels: Tensor
    lines: list[int]

    def place(self, index: int) -> str:
        """File and line of an image."""
        return f"{printable(str(self.source))}:{self.lines[index]}"


def read_list(path: str | os.PathLike[str]) -> ImageList:
    """A list with a line `relative/path label` for each image; paths may hold spaces, and bytes that are not UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not of this form, or no line; the message names file, line and cause.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {printable(str(path.absolute()))}; each line of it should be `relative/path label`")
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")  # without the mark that some editors put first
    if "\0" in text:
        raise ValueError(f"{printable(str(path))} is not a text file in UTF-8; save it as one")
    read = ImageList(path, [], torch.empty(0), [])
    labels: list[int] = []
    lines = [line.strip() for line in text.split("\n")]
    most = sum(map(bool, lines))
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        read.lines.append(number)
        name, _, label = " ".join(line.rsplit(maxsplit=1)).rpartition(" ")
        if not name or not label.isdecimal():
            expected = f"expected `relative/path label` with a label from 0 on, got {printable(line)[:200]!r}"
            raise ValueError(f"{read.place(-1)}: {expected}{_cause(line)}")
        if len(label) > 9 or int(label) > 10 * most + 100_000:
            raise ValueError(f"{read.place(-1)}: the label {label[:30]} is too large: labels are 0 to C - 1 without a gap; replace ids by them")
        read.paths.append(name)
        labels.append(int(label))
    if not labels:
        raise ValueError(f"{printable(str(path))} lists no image; add a line `relative/path label` for each")
    return read._replace(labels=torch.tensor(labels, dtype=torch.int64))


def _cause(line: str) -> str:
    """The probable error in a line, or in a path that does not exist; empty if there is no guess."""
    if line.startswith(("#", "//")):
        return "; a list has no comments, remove the line"
    if line.startswith(('"', "'")):
        return "; write paths without quotes, even if they hold spaces"
    if re.search(r"[,;]\s*\d*$", line):
        return "; separate path and label by a space, not by a comma or a semicolon"
    if "\\" in line:
        return "; separate folders by /, not by a backslash"
    if not line.isprintable():
        return "; it holds bytes that are not UTF-8, save the list as UTF-8"
    return ""


def _places_candidates(folder: PurePosixPath, class_folder: PurePosixPath | None) -> Iterator[PurePosixPath]:
    """Folders that may hold the images that a list has in `folder`, in both layouts of Places; `class_folder` has their class's training images.

    The archive of small images has data_256/a/apartment_building/outdoor/ and val_256/, the other one train/apartment_building-outdoor/ and val/airfield/.
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


def _imagenet_candidates(folder: PurePosixPath, class_folder: PurePosixPath | None) -> Iterator[PurePosixPath]:
    """Where ImageNet's validation images may be: in a folder for each class, or flat, as its archive has them."""
    yield folder
    if folder.parts[:1] == ("val",):
        yield PurePosixPath("val")
        if class_folder is not None:
            yield PurePosixPath("val", class_folder.name)


_CANDIDATES = {"places-lt": _places_candidates, "imagenet-lt": _imagenet_candidates}


def _is_file(path: Path) -> bool:
    """False for a path that the system refuses, too, such as one that is too long; `Path.is_file` would raise."""
    return os.path.isfile(path)  # noqa: PTH113


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _locate(name: str, root: Path, listed: ImageList, class_folders: dict[int, PurePosixPath], *, incomplete: bool) -> ImageFiles:
    """The files of a list under `root`. Unless `incomplete`, a missing file raises an error. Each folder is listed once, and no file is opened."""
    found: dict[tuple[PurePosixPath, int], Path] = {}
    held: dict[Path, set[str]] = {}
    located = []
    for index, (written, label) in enumerate(zip(listed.paths, listed.labels.tolist(), strict=True)):
        path = PurePosixPath(written)
        key = path.parent, label
        if key not in found:
            candidates = list(dict.fromkeys(_CANDIDATES[name](path.parent, class_folders.get(label)) if name in _CANDIDATES else [path.parent]))
            folders = [root / folder for folder in candidates]
            exists = [folder for folder in folders if _is_file(folder / path.name)] or [folder for folder in folders if _is_folder(folder)]
            if not exists:
                wanted = " or ".join(printable(str(folder)) for folder in candidates)
                remedy = _cause(written) or "; pass the folder with `data_dir`"
                raise FileNotFoundError(f"{listed.place(index)}: the list has {printable(written)}, but {root} holds no folder {wanted}{remedy}")
            found[key] = exists[0]
        folder = found[key]
        if folder not in held:
            held[folder] = set() if incomplete else {file.name for file in folder.iterdir()}
        if not incomplete and path.name not in held[folder]:
            missing = f"the list has {printable(written)}, but there is no {printable(str(folder / path.name))}"
            remedy = _cause(written) or "; add it, or pass `skip_corrupt` to leave out such images"
            raise FileNotFoundError(f"{listed.place(index)}: {missing}{remedy}")
        located.append(str(folder / path.name))
    return ImageFiles(located, listed.labels)


def load_lists(
    name: str,
    data_dir: str | os.PathLike[str],
    train_list: str | os.PathLike[str] | None,
    test_list: str | os.PathLike[str] | None,
    *,
    image_size: int | None,
    workers: int,
    skip_corrupt: bool,
) -> DataSplits:
    """A data set of list files: a published one by name, whose lists are by default in `data_dir`, or a user's own ("list")."""
    root, known = Path(data_dir), _LISTS.get(name)
    if known is None and (train_list is None or test_list is None):
        raise ValueError("the data set 'list' needs `train_list` and `test_list`, text files with a line `relative/path label` for each image")
    listed = []
    for given, default in ((train_list, known and known.train), (test_list, known and known.test)):
        path = Path(given) if given is not None else root / str(default)
        if given is None and not path.is_file():
            raise FileNotFoundError(f"{name} needs its list {default} in {root}; put it there, or pass `train_list` and `test_list`")
        listed.append(read_list(path))
    train = listed[0]
    if known is not None and (found := train.labels.unique().numel()) != known.num_classes:
        raise ValueError(f"{name} has {known.num_classes} classes, but its training list has {found}; for a list of your own take the data set 'list'")
    class_folders = {label: PurePosixPath(path).parent for path, label in zip(train.paths, train.labels.tolist(), strict=True)}
    mean, std = (known.mean, known.std) if known is not None else (IMAGENET_MEAN, IMAGENET_STD)
    located = [_locate(name, root, part, class_folders, incomplete=skip_corrupt) for part in listed]
    return file_splits(
        name, *located, mean=mean, std=std, image_size=image_size or (None if known is None else 224), workers=workers, skip_corrupt=skip_corrupt
    )
