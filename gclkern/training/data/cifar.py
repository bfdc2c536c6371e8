"""CIFAR-10-LT and CIFAR-100-LT from the official files of the Python version, unpickled without executing code from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from gclkern.training.data.groups import count_groups
from gclkern.training.data.images import DataSplits, DeviceImages
from gclkern.training.data.longtail import choose_subset, profile_counts
from gclkern.training.extras import need
from gclkern.training.printable import printable


class _Files(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    labels_key: bytes
    names_key: bytes
    num_classes: int
    torchvision: str


_FILES = {
    "cifar10-lt": _Files(
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", b"labels", b"label_names", 10, "CIFAR10"
    ),
    "cifar100-lt": _Files("cifar-100-python", ("train",), "test", "meta", b"fine_labels", b"fine_label_names", 100, "CIFAR100"),
}
CIFAR = tuple(_FILES)
_PIXELS = 3 * 32 * 32
_AGAIN = "pass `download` to fetch it again"
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _encode(text: str, encoding: str) -> bytes:
    """`codecs.encode`, by which old pickle protocols store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays from plain data and rejects everything else, because a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("numpy._core", "numpy.core") == "numpy.core.multiarray" and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # its module depends on the version of numpy
        match module, name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "_codecs", "encode":
                return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")


def read_pickle(path: Path) -> dict[bytes, Any]:
    """The dictionary in an official file.

    Raises:
        ValueError: the file is damaged, asks for anything but plain data and arrays, or is not a dictionary; the message names it.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # an unpickler raises many kinds of errors on invalid files
        raise ValueError(f"{printable(str(path))} is not a file of CIFAR's Python version, or it is damaged ({printable(str(error))}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{printable(str(path))} is not a file of CIFAR's Python version: it holds a {type(content).__name__}, not a dictionary")
    return content


def _read_images(path: Path, labels_key: bytes, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (M, 3, 32, 32) uint8 and labels (M,)."""
    content, shown = read_pickle(path), printable(str(path))
    data, labels = content.get(b"data"), content.get(labels_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise ValueError(f"{shown}: b'data' must be a uint8 array (images, {_PIXELS}), got {_describe(data)}; {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise ValueError(f"{shown}: {labels_key!r} must list {len(data)} classes in [0, {num_classes}), got {_describe(labels)}; {_AGAIN}")
    return torch.from_numpy(np.ascontiguousarray(data)).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


def _describe(value: object) -> str:
    """Its kind and size: a text of the value itself may have many lines, and Python refuses one of an integer of over 4300 digits."""
    if isinstance(value, np.ndarray):
        array: npt.NDArray[Any] = value
        return f"a {array.dtype} array {array.shape}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | tuple | dict | bytes | str) else f"a value of type {type(value).__name__}"


def _find(files: _Files, data_dir: Path) -> Path | None:
    """The folder of the official files: `data_dir` or a folder in it; None if files are missing."""
    for folder in (data_dir / files.folder, data_dir):
        if all((folder / name).is_file() for name in (*files.train, files.test)):
            return folder
    return None


def _fetch(files: _Files, data_dir: Path, *, damaged: bool = False) -> Path:
    """The folder of the official files, which are downloaded if they are missing or `damaged`; torchvision compares their checksums.

    A lock makes processes that start at the same time wait for the first one, which downloads the files.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"):
            if (found := _find(files, data_dir)) and not damaged:
                return found
            getattr(need("torchvision.datasets", "`download`"), files.torchvision)(root=str(data_dir), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the download of {files.torchvision} into {printable(str(data_dir))} failed ({error}); fetch it by hand and unpack it there"
        ) from error
    return data_dir / files.folder


def _missing(files: _Files, data_dir: Path) -> FileNotFoundError:
    needed, folder = (*files.train, files.test), data_dir / files.folder
    if folder.is_dir():
        missing = ", ".join(name for name in needed if not (folder / name).is_file())
        return FileNotFoundError(f"{printable(str(folder))} lacks {missing}; unpack the archive of {files.torchvision}'s Python version again, all of it")
    return FileNotFoundError(
        f"no {files.torchvision} in {printable(str(data_dir))}: it needs the folder {files.folder} of the official Python version with {', '.join(needed)}; "
        f"pass the folder that holds it with `data_dir`, or `download` to fetch it"
    )


def _read(files: _Files, folder: Path) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], list[str] | None]:
    """Images and labels of the training files and of the test file, and the class names."""
    *train, test = (_read_images(folder / part, files.labels_key, files.num_classes) for part in (*files.train, files.test))
    return train, test, _class_names(folder / files.names, files.names_key, files.num_classes)


def load_cifar(name: str, data_dir: str | os.PathLike[str], imbalance: float, profile: str, seed: int, download: bool) -> DataSplits:
    """The long-tailed training subset and the balanced test set of 10,000 images."""
    files, root = _FILES[name], Path(data_dir)
    folder = _find(files, root)
    if download and (folder is None or os.access(root, os.W_OK)):  # in a writable folder another run may still be unpacking
        folder = _fetch(files, root)
    if folder is None:
        raise _missing(files, root)
    try:
        parts, test, names = _read(files, folder)
    except ValueError:
        if not download:
            raise
        parts, test, names = _read(files, _fetch(files, root, damaged=True))
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    per_class = labels.bincount(minlength=files.num_classes)
    if (fewest := int(per_class.min())) != int(per_class.max()) or fewest == 0:
        found = f"{fewest} to {int(per_class.max())} training images of a class"
        raise ValueError(f"{printable(str(folder))} has {found}, but {files.torchvision} has the same number of each; {_AGAIN}")
    counts = profile_counts(files.num_classes, int(per_class.max()), imbalance, profile)
    train = choose_subset(labels, counts, seed)
    return DataSplits(
        name=name,
        train=DeviceImages(images[train], labels[train], mean=_MEAN, std=_STD, augment="crop,flip"),
        test=DeviceImages(*test, mean=_MEAN, std=_STD, augment="crop,flip"),
        holdout=None,
        class_counts=counts,
        groups=count_groups(counts),
        num_classes=files.num_classes,
        class_names=names,
        channels=3,
        image_size=32,
    )


def _class_names(path: Path, key: bytes, num_classes: int) -> list[str] | None:
    """The names, or None where their file is absent: training does not need them."""
    if not path.is_file():
        return None
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{printable(str(path))}: {key!r} must list {num_classes} names, got {_describe(names)}; {_AGAIN}")
    return [name.decode(errors="backslashreplace") if isinstance(name, bytes) else name for name in names]
