"""Files of any content for everything that reads a user's files: python -m tests.support.fuzzing TARGET --seconds S [--corpus FOLDER]

Each target makes files from bytes and reads them. Whatever the bytes are, it must succeed or raise one of the errors of EXPECTED, whose message names the file;
anything else is a fault. The bytes come from atheris, which looks for those that reach new lines of the readers (`pip install atheris`). What it has found to
be misread is in tests/training/data/test_fuzzing.py, which adds bytes from hypothesis.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    import atheris
    import torchvision  # noqa: F401 (before the next line, which makes imports slow)

    with atheris.instrument_imports(include=["gclkern.training", "torch._weights_only_unpickler"]):
        import gclkern.training.checkpoint
        import gclkern.training.data  # noqa: F401

        importlib.reload(torch._weights_only_unpickler)

from gclkern.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from gclkern.training.data import CorruptImageError, load_data
from gclkern.training.data.cifar import _FILES
from gclkern.training.data.lists import read_list

EXPECTED = (ValueError, FileNotFoundError, CorruptImageError, CheckpointError)


class Bytes:
    """Reads choices from bytes; 0 where they have ended."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, below: int) -> int:
        return int.from_bytes(self.take(1 if below <= 256 else 4), "little") % below

    def text(self, most: int) -> bytes:
        return self.take(self.number(most + 1))

    def rest(self) -> bytes:
        return self.data[self.place :]


def changed(content: bytes, choices: Bytes) -> bytes:
    """With up to three other bytes."""
    copy = bytearray(content)
    for _ in range(choices.number(4)):
        copy[choices.number(len(copy))] = choices.number(256)
    return bytes(copy)


# What errors say about a whole data set, whose folder the user has just named.
_OF_ALL = ("classes without a training image", "the test images have class", "no class has a second image")


def expect_named(root: Path, read: Callable[[], object]) -> None:
    """Call `read`; an error must be of an expected type itself, which a subclass is not, and must name a file below `root` or one that the bytes name."""
    try:
        read()
    except EXPECTED as error:
        message = str(error)
        if type(error) not in EXPECTED or not ("/" in message or message.startswith(_OF_ALL)) or "\n" in message:
            raise AssertionError(f"no error for a user: {type(error).__name__}: {message}") from error
        message.encode()


def read_lists(data: bytes, root: Path) -> None:
    """A list of any bytes, alone and as the training and test list beside some files."""
    (root / "a").mkdir()
    (root / "a" / "b.png").write_bytes(b"no image")
    (root / "list.txt").write_bytes(data)
    expect_named(root, lambda: read_list(root / "list.txt"))
    expect_named(root, lambda: load_data("list", data_dir=root, train_list=root / "list.txt", test_list=root / "list.txt", workers=0))


_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc\xf8\x0f\0\x01\x01\x01\0\x1b\xb6\xeeV\0\0\0\0IEND\xaeB`\x82"


def walk_folders(data: bytes, root: Path) -> None:
    """A folder with folders, files, links and pipes of any names below one another."""
    choices = Bytes(data)
    places = [root / "set"]
    places[0].mkdir()
    names = [b"train", b"test", b"val", b"cat", b"dog", b"1.png", b"2.PNG", b"3.jpg", b"notes.txt"]
    while choices.place < len(data) and len(places) < 40:
        name = names[number] if (number := choices.number(len(names) + 2)) < len(names) else choices.text(6)
        path = places[choices.number(len(places))] / os.fsdecode(name or b"x")
        with contextlib.suppress(OSError, ValueError):  # the name exists, or no file can have it
            match choices.number(7):
                case 0 | 1:
                    path.mkdir()
                    places.append(path)
                case 2 | 3 as kind:
                    with path.open("xb") as file:
                        file.write(_PNG if kind == 2 else choices.text(20))
                case 4:
                    path.symlink_to(places[choices.number(len(places))])
                case 5:
                    path.symlink_to(os.fsdecode(choices.text(6).replace(b"/", b"_") or b".."))
                case 6:
                    os.mkfifo(path)
    skip = bool(choices.number(2))
    expect_named(root, lambda: load_data("folder", data_dir=root / "set", workers=0, skip_corrupt=skip))


def _cifar_value(choices: Bytes, depth: int = 0) -> Any:
    """An object that a pickle may hold."""
    match choices.number(13):
        case 0:
            return choices.text(9)
        case 1:
            return choices.number(2**31) - 5
        case 2:
            return choices.number(12)
        case 3:
            return os.fsdecode(choices.text(9))
        case 4:
            return None
        case 5:
            return bool(choices.number(2))
        case 6:
            return choices.number(9) / 2
        case 7 | 8:
            dtype = ["u1", "i8", "f4", "O", "S3", "M8[s]", ">u2", "u1,u1"][choices.number(8)]
            shape: tuple[int, ...] = [(2, 3072), (3072, 2), (2, 32), (0, 3072), (), (3072,), (2, 3, 1024), (1, 3072)][choices.number(8)]
            return np.asarray(np.zeros(shape, dtype), order="F" if choices.number(2) else "C")
        case 9:
            return [choices.number(12)] * choices.number(4)
        case _ if depth > 2:
            return ()
        case 10:
            return [_cifar_value(choices, depth + 1) for _ in range(choices.number(4))]
        case 11:
            return {_key(choices): _cifar_value(choices, depth + 1) for _ in range(choices.number(4))}
        case _:
            return tuple(_cifar_value(choices, depth + 1) for _ in range(choices.number(4)))


def _key(choices: Bytes) -> Any:
    return [b"data", b"labels", b"fine_labels", b"label_names", "data", 1, b""][choices.number(7)]


def read_cifar(data: bytes, root: Path) -> None:
    """Files of CIFAR-10, one of which has any bytes, or is a pickle of any objects."""
    choices = Bytes(data)
    files = _FILES["cifar10-lt"]
    folder = root / files.folder
    folder.mkdir()
    good = pickle.dumps({b"data": np.zeros((10, 3072), np.uint8), b"labels": list(range(10))}, protocol=2)
    for name in (*files.train, files.test):
        (folder / name).write_bytes(good)
    (folder / files.names).write_bytes(pickle.dumps({b"label_names": [b"name"] * 10}, protocol=2))
    place = folder / [files.train[0], files.test, files.names][choices.number(3)]
    match choices.number(3):
        case 0:
            content = choices.rest()
        case 1:
            content = changed(place.read_bytes(), choices)
        case _:
            keys = {_key(choices): _cifar_value(choices) for _ in range(choices.number(4))}
            content = pickle.dumps(keys, protocol=choices.number(5))
    place.write_bytes(content)
    expect_named(root, lambda: load_data("cifar10-lt", data_dir=root, imbalance=2))


def _good_checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last.pt", {"epoch": 1, "network": {"weight": torch.ones(2, 3), "steps": torch.tensor(3)}, "rows": [("a", 0.5, None)]})
        return (Path(folder) / "last.pt").read_bytes()


def read_checkpoint(data: bytes, root: Path) -> None:
    """A checkpoint of any bytes, one with some bytes changed, or one whose pickle is of any bytes."""
    choices = Bytes(data)
    good = _good_checkpoint()
    archive = zipfile.ZipFile(io.BytesIO(good))
    (described,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    kind = choices.number(4)
    if kind == 0:
        content = choices.rest()
    elif kind == 1:
        content = changed(good, choices)
    else:
        plan = changed(archive.read(described), choices) if kind == 2 else choices.rest()
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as copy:
            for name in archive.namelist():
                copy.writestr(name, plan if name == described else archive.read(name))
        content = file.getvalue()
    (root / "last.pt").write_bytes(content)
    expect_named(root, lambda: load_checkpoint(root / "last.pt"))


TARGETS = {"lists": read_lists, "folders": walk_folders, "cifar": read_cifar, "checkpoint": read_checkpoint}


def check(name: str, data: bytes) -> None:
    """One input of a target, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGETS[name](data, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("build", "fuzzing"))
    args = parser.parse_args()
    corpus = args.corpus / args.target
    corpus.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    options = [
        f"-max_total_time={args.seconds}",
        f"-artifact_prefix={corpus}-",
        "-max_len=2048",
        "-len_control=0",
        "-rss_limit_mb=8000",
        "-timeout=30",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: check(args.target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
