"""Data sets with one folder of images for each class: finding the images, and splitting off a test set if there is none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from gclkern.training.data.decode import image_suffixes
from gclkern.training.data.files import ImageFiles, file_splits
from gclkern.training.data.images import DataSplits
from gclkern.training.data.longtail import stratified_split
from gclkern.training.printable import printable

_TRAIN, _TEST, _VAL = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
_TEST_SHARE = 0.2
# Folders of file servers and archives with thumbnails and resource forks, whose names look like images.
_SYSTEM_FOLDERS = frozenset(("@eaDir", "__MACOSX"))
# Suffixes of phones and cameras that Pillow does not read.
_PHOTOS = frozenset((".heic", ".heif", ".hif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"))


def find_images(folder: Path, root: Path | None = None) -> tuple[list[str], Counter[str]]:
    """The image files below a folder in alphabetical order, and how many entries of which kind were left out.

    Links are followed, except to a folder above them and to `root`, the folder of all classes. Hidden entries and system folders count as one each.
    """
    found: list[str] = []
    left_out: Counter[str] = Counter()
    suffixes = image_suffixes()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(folder), frozenset(() if root is None else (_identity(str(root)),)))]
    while waiting:
        path, above = waiting.pop()
        here = _identity(path)
        if here in above:
            left_out["links to a folder above them"] += 1
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1]  # noqa: PTH122
                if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
                    left_out["hidden"] += 1
                elif (kind := _kind(entry)) == "folder":
                    waiting.append((entry.path, above | {here}))
                elif kind == "other":
                    left_out["broken links" if entry.is_symlink() else "neither files nor folders"] += 1
                elif suffix.lower() in suffixes:
                    found.append(entry.path)
                else:
                    left_out[suffix or "without a suffix"] += 1
    return sorted(found), left_out


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file" or "other", which a link in a circle is, too: the system refuses to follow it."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        return "other"


def _identity(path: str) -> tuple[int, int]:
    """Identifies a folder independently of its path."""
    status = os.stat(path)  # noqa: PTH116 (millions of files: plain strings)
    return status.st_dev, status.st_ino


def _left_out_note(root: Path, left_out: Mapping[str, int]) -> list[str]:
    if not left_out:
        return []
    kinds = ", ".join(f"{printable(kind)[:30]} ({count})" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:8])
    others = f" and {len(left_out) - 8} more kinds" if len(left_out) > 8 else ""
    remedy = "; convert photos of formats that Pillow does not read to JPEG" if _PHOTOS & {kind.lower() for kind in left_out} else ""
    return [f"left out of {printable(str(root))}: {kinds}{others}{remedy}"]


def read_folder(root: Path) -> tuple[ImageFiles, list[str], list[str]]:
    """Images, class names in alphabetical order, and notes on what was left out, of a folder that has one folder for each class."""
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".") and entry.name not in _SYSTEM_FOLDERS]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    left_out = Counter({"files beside the class folders": count} if (count := len(entries) - len(names)) else {})
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found, others = find_images(root / name, root)
        left_out += others
        paths += found
        labels += [label] * len(found)
    if not paths:
        seen = "; ".join(_left_out_note(root, left_out)) or "there is no file in it"
        raise ValueError(f"{printable(str(root))} has no folder of images for each class, such as {printable(str(root / 'cat' / '1.jpg'))} ({seen})")
    return ImageFiles(paths, torch.tensor(labels, dtype=torch.int64)), names, _left_out_note(root, left_out)


def load_folder(data_dir: str | os.PathLike[str], *, image_size: int | None, workers: int, skip_corrupt: bool, seed: int) -> DataSplits:
    """The folders train/ and test/ (or val/) in `data_dir`, each with one folder for each class; without them one folder, split here."""
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {printable(str(root.absolute()))}; give the folder of train/ and test/, or of the classes, by `data_dir`")
    inside = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    train_root, test_root, val_root = (next((entry for entry in inside if entry.name.lower() in part), None) for part in (_TRAIN, _TEST, _VAL))
    notes: list[str] = []
    if test_root is not None and val_root is not None:
        notes.append(f"{printable(str(val_root))} is not used, since {test_root.name}/ is the test set; `holdout` takes images to choose by")
    test_root = test_root or val_root
    if train_root is None and test_root is not None:
        raise FileNotFoundError(f"{printable(str(root))} holds {test_root.name}/, but no train/; it must hold train/ and test/ or val/, or one folder a class")
    train, names, found = read_folder(train_root or root)
    notes += found
    if len(names) == 1:
        inner = printable(str((train_root or root) / names[0]))
        raise ValueError(f"{printable(names[0])} is the only class; each class must have a folder; if the classes are in {inner}, give that by `data_dir`")
    if test_root is not None:
        test, test_names, found = read_folder(test_root)
        notes += found
        if unknown := [name for name in test_names if name not in names]:
            first = printable(str(test_root / unknown[0]))
            raise ValueError(f"{first} is a class that {printable(str(train_root))} does not have; add training images, or remove it")
        test = ImageFiles(test.paths, torch.tensor([names.index(name) for name in test_names])[test.labels])
    else:
        train, test = _split(train, seed)
        notes.append(
            f"{printable(str(train_root or root))} has no test set beside it: {_TEST_SHARE:.0%} of each class are taken as test images (seed {seed}), "
            f"{len(test.paths)} images"
        )
    splits = file_splits("folder", train, test, class_names=names, image_size=image_size, workers=workers, skip_corrupt=skip_corrupt, notes=notes)
    splits.test_like_train = test_root is None
    return splits


def _split(images: ImageFiles, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """A stratified fifth as test set."""
    kept, taken = stratified_split(images.labels, _TEST_SHARE, seed)
    if not taken.numel():
        raise ValueError("no class has a second image, so that no test images can be taken; add images, or a folder test/")
    return images.take(kept), images.take(taken)
