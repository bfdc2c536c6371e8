"""Classify images with a trained network: python -m gclkern.training.predict RUN PATHS...

    python -m gclkern.training.predict runs/folder-gcl-ldam-drw photo.jpg holiday/
    python -m gclkern.training.predict runs/folder-gcl-ldam-drw holiday/ --top 3 --csv holiday.csv
    python -m gclkern.training.predict runs/folder-gcl-ldam-drw holiday/ --json-lines holiday.jsonl

Folders are searched for images of every format that PIL reads. Files that cannot be read are listed and counted; the command continues, but its exit
status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from gclkern.training.arguments import number
from gclkern.training.checkpoint import CheckpointError
from gclkern.training.classifier import NOT_CALIBRATED, Classifier, Prediction, load_classifier
from gclkern.training.data import CorruptImageError
from gclkern.training.data.decode import open_image
from gclkern.training.data.folders import find_images
from gclkern.training.extras import need
from gclkern.training.output import echo
from gclkern.training.printable import printable

_BATCH = 64

Write = Callable[[str, Sequence[Prediction]], None]


def collect(paths: Sequence[str]) -> list[str]:
    """The image files of the paths: files as given, and the images found in folders.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in the folders.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 (a path is kept as it was given)
            found += find_images(Path(path))[0]
        elif os.path.exists(path):  # noqa: PTH110
            found.append(path)
        else:
            raise FileNotFoundError(f"{printable(path)} does not exist")
    if not found:
        raise FileNotFoundError(f"there is no image file in {', '.join(printable(path) for path in paths)}")
    return found


def classify(classifier: Classifier, paths: Sequence[str], top: int, write: Write) -> list[str]:
    """Pass the predictions of every readable image to `write`, and return an error message for each of the others."""
    failures: list[str] = []
    bar = need("tqdm", "the progress bar").tqdm
    with bar(total=len(paths), unit=" img", disable=not sys.stderr.isatty()) as progress:
        for start in range(0, len(paths), _BATCH):
            images: dict[str, Any] = {}
            for path in paths[start : start + _BATCH]:
                try:
                    images[path] = open_image(path)
                except CorruptImageError as error:
                    failures.append(str(error))
            if images:
                for path, predictions in zip(images, classifier.predict(list(images.values()), top), strict=True):
                    write(path, predictions)
            progress.update(len(paths[start : start + _BATCH]))
    return failures


def _as_text(path: str, predictions: Sequence[Prediction]) -> None:
    """One line on the terminal."""
    echo("  ".join([printable(path), *(f"{printable(one.name)} {one.probability:.3f}" for one in predictions)]))


def _csv_writer(file: TextIO, top: int) -> Write:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["path", *(f"{column} {place}" for place in range(1, top + 1) for column in ("class", "probability"))])

    def write(path: str, predictions: Sequence[Prediction]) -> None:
        table.writerow([path, *(cell for one in predictions for cell in (one.name, f"{one.probability:.6g}"))])

    return write


def _json_writer(file: TextIO) -> Write:
    def write(path: str, predictions: Sequence[Prediction]) -> None:
        file.write(json.dumps({"path": path, "predictions": [one._asdict() for one in predictions]}) + "\n")

    return write


@contextlib.contextmanager
def _writer(args: argparse.Namespace, top: int) -> Iterator[Write]:
    """Writes predictions as lines of text, or to a file. Bytes of names that are not valid text are preserved by surrogate escapes."""
    target = args.csv or args.json_lines
    if target is None:
        yield _as_text
        return
    place, owned = (sys.stdout.fileno(), False) if target == "-" else (target, True)
    with open(place, "w", encoding="utf-8", errors="surrogateescape", newline="", closefd=owned) as file:
        yield _csv_writer(file, top) if args.csv else _json_writer(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gclkern.training.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="folder of a finished run of train.py, or a checkpoint in it")
    add("paths", metavar="PATH", nargs="+", help="image files, and folders that are searched for them")
    add("--top", type=number(int, 1), default=5, metavar="K", help="classes of each image, the most probable first (default 5)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if there is one)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--csv", metavar="FILE", help="write a table instead of lines of text; - for standard output")
    either("--json-lines", metavar="FILE", help="write one JSON object per line instead of lines of text; - for standard output")
    args = parser.parse_args(argv)
    try:
        classifier = load_classifier(args.checkpoint, args.device)
        paths = collect(args.paths)
        if not classifier.calibrated:
            print(NOT_CALIBRATED, file=sys.stderr)  # noqa: T201
        top = min(int(args.top), len(classifier.class_names))
        with _writer(args, top) as write:
            failures = classify(classifier, paths, top, write)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, CheckpointError) as error:
        sys.exit(f"predict: error: {error}")
    for failure in failures:
        print(failure, file=sys.stderr)  # noqa: T201
    if failures:
        print(f"{len(failures)} of {len(paths)} files could not be read", file=sys.stderr)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
