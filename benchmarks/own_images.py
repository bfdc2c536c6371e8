"""Compares methods on image folders, with the defaults for images of your own: python -m benchmarks.own_images --cifar data

    python -m benchmarks.own_images --cifar data --pixels 16 --epochs 24    # a quarter of the time on a CPU
    python -m benchmarks.own_images --images drawn --epochs 24              # needs no data

--images chooses the folder, which is written as PNG files: `subset` is 40 classes of CIFAR-100 with 270 to 5 training images each, `whole` all 100 classes with
500 to 5, `drawn` 600 drawn photos of 12 classes; each class has 100 test images. Runs of train.py differ only in the method, the number of epochs and the
seed. A finished run leaves a JSON file in --results and is not run again, an unfinished one is resumed from its checkpoint, so the same command continues. At
the end the tables of all results are printed, as docs/accuracy.md has them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy import METHODS, Bench, Run, cpu_options, results_of, run_all
from benchmarks.common import RESULTS
from benchmarks.drawn_photos import COUNTS, SHAPES, draw_photos
from benchmarks.provenance import ROOT
from gclkern.training.arguments import number
from gclkern.training.atomic_files import replace_text
from gclkern.training.calibration import fit_temperature
from gclkern.training.checkpoint import load_checkpoint
from gclkern.training.data import DeviceImages, load_data
from gclkern.training.data.cifar import load_cifar
from gclkern.training.data.groups import GROUPS
from gclkern.training.data.longtail import profile_counts, stratified_split
from gclkern.training.evaluation import evaluate_logits, predict
from gclkern.training.network import load_network
from gclkern.training.processes import Processes

OWN_IMAGES = RESULTS / "own_images"
TEST_IMAGES = 100  # of each class
COMPARED = ("ce", "ldam-drw", "gcl", "gcl-ldam-drw")
EPOCHS = (24, 60, 200)
COMPILED = 200_000  # images seen in training: from here on a compiled step on a CPU saves more time than compiling takes
HEADER = ("pixels", "epochs", "method", "seeds", "top-1", *GROUPS, "ECE", "ECE, one temperature", "NLL", "NLL, one temperature")


class Images(NamedTuple):
    """What an image folder holds; --images has its name."""

    title: str
    counts: list[int]  # training images of each class


FOLDERS = {
    "subset": Images("40 classes of CIFAR-100", profile_counts(40, 270, 50.0)),
    "whole": Images("CIFAR-100", profile_counts(100, 500, 100.0)),
    "drawn": Images("drawn photos of 12 classes", list(COUNTS)),
}


def _cifar_images(cifar: Path, counts: list[int]) -> Iterator[tuple[str, str, Image.Image]]:
    """Part, class name and image, of the first classes of CIFAR-100-LT with imbalance 100; of each class the first training images in its order."""
    splits = load_cifar("cifar100-lt", cifar, 100.0, "exp", 0, download=False)
    for part, images in (("train", splits.train), ("test", splits.test)):
        assert isinstance(images, DeviceImages)
        for label in range(len(counts)):
            places = (images.labels == label).nonzero().flatten()
            if part == "train":
                places = places[: counts[label]]
            name = str(label) if splits.class_names is None else splits.class_names[label]
            for place in places.tolist():
                image = images.images[place]
                if image.max() == image.min():
                    blank = f"{part} image {place} of class {name} has one colour"
                    raise ValueError(f"{blank}: these CIFAR files are incomplete; give the official ones by --cifar")
                yield part, name, Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _drawn_images() -> Iterator[tuple[str, str, Image.Image]]:
    """Part, class name and image, of drawn photos."""
    for part, counts, seed in (("train", COUNTS, 0), ("test", (TEST_IMAGES,) * len(SHAPES), 1)):
        yield from ((part, name, photo) for name, photo in draw_photos(counts, seed))


def write_folder(images: str, cifar: Path, folder: Path, pixels: int) -> None:
    """Write train/CLASS/*.png and test/CLASS/*.png of that size; an existing folder is kept."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    found = _drawn_images() if images == "drawn" else _cifar_images(cifar, FOLDERS[images].counts)
    for place, (part, name, image) in enumerate(found):
        path = unfinished / part / name / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((pixels, pixels), Image.Resampling.BOX).save(path)
    unfinished.rename(folder)


@dataclass(frozen=True)
class OwnRun(Run):
    """A run on the image folder, with defaults but for the method, the seed, the number of epochs, and that no image is held out."""

    epochs: int = 0
    pixels: int = 0
    images: str = "subset"

    @property
    def name(self) -> str:
        folder = "" if self.images == "subset" else f"{self.images}-"
        return f"{folder}{self.pixels}-pixels-{self.epochs}-epochs-{self.method}-seed{self.seed}"

    @property
    def base(self) -> None:
        return None

    @property
    def arguments(self) -> list[str]:
        return [
            *("--data", "folder", "--method", self.method, "--epochs", str(self.epochs), "--seed", str(self.seed)),
            *("--holdout", "0", "--eval-every", str(self.epochs), "--no-pictures", *self.options),
        ]


@dataclass(frozen=True)
class OwnBench(Bench):
    """Adds the calibration by one temperature to the result of a run."""

    def collect(self, run: Run) -> dict[str, Any]:
        assert isinstance(run, OwnRun)
        data, single = load_data("folder", data_dir=self.data_dir), Processes.single(torch.device("cpu"))
        calibrated = {}
        for phase in json.loads((self.folder(run) / "summary.json").read_text())["reports"]:
            network = load_network(load_checkpoint(self.folder(run) / f"{phase}.pt"), single.device)
            calibrated[phase] = one_temperature(predict(network, data.test, single)[0], data.test.labels)
        result = super().collect(run)
        result |= {"pixels": run.pixels, "epochs": run.epochs, "calibrated": calibrated}
        del result["curves"]
        replace_text(self.result(run), json.dumps(result, indent=1) + "\n")
        return result


def one_temperature(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """ECE and NLL after division by a temperature. It is fitted on half of the test images and judged on the others, then the other way round."""
    halves = stratified_split(labels, 0.5, 0)
    classes = logits.shape[1]
    found = []
    for fitted, judged in (halves, halves[::-1]):
        temperature = fit_temperature(logits[fitted], labels[fitted])
        found.append(evaluate_logits(logits[judged] / temperature, labels[judged], {}, classes))
    return {"ece": statistics.mean(report.ece for report in found), "nll": statistics.mean(report.nll for report in found)}


def _cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean over seeds, with the sample standard deviation where there are two or more."""
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _row(found: Sequence[dict[str, Any]], phase: str, label: str) -> list[str]:
    reports, calibrated = ([result[kind][phase] for result in found] for kind in ("reports", "calibrated"))
    percent = lambda values: _cell([100 * value for value in values])  # noqa: E731
    return [
        str(found[0]["pixels"]),
        str(found[0]["epochs"]),
        label,
        str(len(found)),
        percent([report["top1"] for report in reports]),
        *(percent([report["groups"][group] for report in reports]) for group in GROUPS),
        percent([report["ece"] for report in reports]),
        percent([report["ece"] for report in calibrated]),
        _cell([report["nll"] for report in reports], 2),
        _cell([report["nll"] for report in calibrated], 2),
    ]


def _table(found: Sequence[dict[str, Any]]) -> str:
    """The table of an image folder's results, in Markdown; GCL has a row for its first stage, too."""
    lines: list[Sequence[str]] = [HEADER, ("---:", "---:", "---", *("---:",) * (len(HEADER) - 3))]
    for (*_, method), part in groupby(found, key=lambda result: (result["pixels"], result["epochs"], result["method"])):
        group = list(part)
        phases = list(group[0]["reports"])
        for phase in phases:
            label = METHODS[method].label
            lines.append(_row(group, phase, label if phase == phases[-1] else f"{label}, {phase.replace('-', ' ')}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results: Path) -> str:
    """A title and a table for each image folder that has results, in Markdown."""
    found = sorted(results_of(results), key=lambda result: (result["pixels"], result["epochs"], COMPARED.index(result["method"]), result["seed"]))
    parts = []
    for title, counts in FOLDERS.values():
        if of_folder := [result for result in found if sorted(result["class_counts"], reverse=True) == counts]:
            about = f"**{title[0].upper()}{title[1:]}**: {counts[0]} to {counts[-1]} training images of each class, {sum(counts):,} in all."
            parts += [about, "", _table(of_folder), ""]
    return "\n".join(parts[:-1])


def _options(images_seen: int) -> tuple[str, ...]:
    """Options of train.py that make a run faster and leave the method as it is; a result says in `settings` which it had."""
    return (images_seen >= COMPILED and cpu_options()) or ("--channels-last",)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", choices=FOLDERS, default="subset", help="the image folder (default subset)")
    add("--cifar", type=Path, default=Path("data"), help="folder of CIFAR-100's official files (default data)")
    add("--pixels", type=number(int, 8, 32), default=32, metavar="N", help="size of the images (default 32)")
    add("--methods", nargs="+", choices=COMPARED, default=COMPARED, metavar="NAME", help=f"of {', '.join(COMPARED)} (default all)")
    add("--epochs", nargs="+", type=number(int, 1), default=EPOCHS, metavar="N", help="of stage 1 (default 24, 60 and 200)")
    add("--seeds", nargs="+", type=number(int, 0), default=(0, 1, 2), metavar="SEED", help="default 0 1 2")
    add("--jobs", type=number(int, 1), default=1, help="runs at a time (default 1)")
    add("--seconds", type=number(float, 0), default=float("inf"), help="stop after so long, with checkpoints (default never)")
    add("--runs", type=Path, default=ROOT / "runs" / "own_images", help="folder of the images and the runs' folders (default runs/own_images)")
    add("--results", type=Path, default=OWN_IMAGES, help="folder of the results (default benchmarks/results/own_images)")
    args = parser.parse_args(argv)
    folder = args.runs.resolve() / ("images" + ("" if args.images == "subset" else f"-{args.images}") + f"-{args.pixels}")
    write_folder(args.images, args.cifar, folder, args.pixels)
    counts = FOLDERS[args.images].counts
    bench = OwnBench(args.runs.resolve(), args.results.resolve(), str(folder), threads=max(1, torch.get_num_threads() // args.jobs))
    runs = [
        OwnRun("folder", counts[0] / counts[-1], method, seed, 1.0, _options(epochs * sum(counts)), epochs, args.pixels, args.images)
        for epochs in args.epochs
        for seed in args.seeds
        for method in args.methods
    ]
    failed = run_all(bench, runs, jobs=args.jobs, seconds=args.seconds)
    print("\n" + tables(bench.results))
    if failed:
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")


if __name__ == "__main__":
    main()
