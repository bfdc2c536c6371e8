"""The folder of a run: its configuration, metrics as CSV and TensorBoard, checkpoints, the summary and the pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclkern.checkpoint import load_checkpoint, save_checkpoint
from gclkern.data import DataSplits
from gclkern.engine import Ranks, measure, predict
from gclkern.extras import need
from gclkern.methods import Phase
from gclkern.metrics import Report, format_table
from gclkern.networks import load_network

COLUMNS = ("phase", "epoch", "lr", "loss", "top1", "many", "medium", "few", "ece", "holdout")


def new_folder(parent: Path, name: str) -> Path:
    """A folder that is not there yet: `name`, or with the first free number behind it."""
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def progress_bar(name: str, images: int, done: int, *, show: bool) -> Any:
    """Images of a phase, on a terminal often, in a log file twice a minute."""
    bar = need("tqdm", "the progress bar").tqdm
    return bar(total=images, initial=done, desc=name, unit=" img", unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 30.0, disable=not show)


class RunFolder:
    """Writes what a run leaves behind; on ranks but the first it writes nothing.

    `history`, one row for each epoch, `reports`, one for each finished phase, and `seconds` are part of the checkpoint: files are written anew from them, so
    that a resumed run leaves the same files as one that was left alone.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], *, write: bool, history: list[dict[str, Any]], reports: dict[str, dict[str, Any]], seconds: float
    ) -> None:
        self.path, self.config, self.write = path, config, write
        self.history, self.reports = history, reports
        self._started = time.monotonic() - seconds
        self.board: Any = None
        if not write:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"--out: the folder {path} cannot be written ({error.strerror}); choose another one") from error
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(path), purge_step=len(history))

    @property
    def seconds(self) -> float:
        """What the run has taken, with the time before it was resumed."""
        return time.monotonic() - self._started

    def log(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        self.history.append(row)
        if not self.write:
            return
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        write_text(self.path / "metrics.csv", text.getvalue())
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['phase']}/{name}", value, len(self.history) - 1)

    def save(self, name: str, state: dict[str, Any]) -> None:
        if self.write:
            save_checkpoint(self.path / name, state)


def describe(run: RunFolder, data: DataSplits, phases: Sequence[Phase], model: str, device: torch.device) -> str:
    """What a run is going to do: data, network and the settings of every phase."""
    groups = ", ".join(f"{len(classes)} {name}-shot" for name, classes in data.groups.items())
    held = "" if data.holdout is None else f", {len(data.holdout)} held out"
    lines = [
        f"{data.name}: {len(data.train)} training images{held}, {len(data.test)} test images",
        f"{data.num_classes} classes of {max(data.class_counts)} to {min(data.class_counts)} training images ({groups})",
        f"{model} on {device}, results in {run.path}",
    ]
    for phase in phases:
        if not phase.epochs:
            lines.append(f"{phase.name}: {phase.trains}, which takes no training")
            continue
        parts = [phase.title, f"{phase.epochs} epochs", f"batch {phase.batch_size}"]
        parts += [f"lr {phase.lr:g} {phase.schedule.kind}", f"weight decay {phase.weight_decay:g}", f"{phase.sampler} sampler"]
        parts += [f"mixup {phase.mixup:g}"] if phase.mixup else []
        parts += [] if phase.trains == "all" else [f"trains the {phase.trains.replace('-', ' ')}"]
        lines.append(", ".join(parts))
    return "\n".join(lines)


def conclude(run: RunFolder, data: DataSplits, device: torch.device, phases: Sequence[Phase], *, amp: torch.dtype | None, pictures: bool) -> None:
    """Print the table, write the summary and draw the pictures, from what is on the disk: a resumed run has its earlier phases only there."""
    alone = Ranks.alone(device)
    if data.holdout is not None and (run.path / "best.pt").exists():
        run.reports["best on held-out"] = measure(load_network(load_checkpoint(run.path / "best.pt"), data, device), data.test, data, alone, amp).as_dict()
    reports = {name: _from_dict(report) for name, report in run.reports.items()}
    print(format_table(list(reports.items())))  # noqa: T201 (what the run is for)
    summary = {
        "reports": run.reports, "phases": [asdict(phase) for phase in phases], "class_names": data.class_names, "class_counts": data.class_counts,
        "groups": data.groups, "config": run.config, "seconds": round(run.seconds, 1),
    }  # fmt: skip
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if run.board is not None:
        run.board.close()
    if pictures:
        done = [phase for phase in phases if phase.name in reports]
        found = {phase.name: predict(load_network(load_checkpoint(run.path / f"{phase.name}.pt"), data, device), data.test, alone, amp=amp)
                 for phase in (*compared(done), done[-1])}  # fmt: skip
        draw_pictures(run.path, reports, done, found, data)
    print(f"{run.path}: metrics.csv, summary.json, checkpoints" + (", pictures" if pictures else ""))  # noqa: T201


def compared(phases: Sequence[Phase]) -> list[Phase]:
    """The first and the last phase whose embeddings are their own: re-training the classifier leaves them as they are."""
    own = [phase for phase in phases if phase.trains in ("all", "last-block", "backbone")] or list(phases)
    return own[:1] + own[1:][-1:]


def draw_pictures(folder: Path, reports: dict[str, Report], phases: Sequence[Phase], found: dict[str, tuple[Tensor, Tensor]], data: DataSplits) -> None:
    """The run's pictures, from the reports of its phases and from (logits, features) on the test set."""
    from gclkern import plots  # needs packages of the extra `train`

    last = phases[-1].name
    if (folder / "metrics.csv").exists():  # a re-training without gradients leaves none
        plots.plot_curves(folder / "metrics.csv", folder / "curves.png")
    plots.plot_class_accuracy(reports, data.class_counts, folder / "class-accuracy.png", class_names=data.class_names)
    plots.plot_group_confusion(found[last][0].argmax(1).cpu(), data.test.labels, data.groups, folder / "group-confusion.png", name=last)
    embeddings = {phase.title: found[phase.name][1].cpu() for phase in compared(phases)}
    if data.test.labels.numel() >= plots.FEWEST_POINTS:
        plots.plot_tsne(embeddings, data.test.labels, folder / "tsne.png", class_counts=data.class_counts, class_names=data.class_names)


def _from_dict(report: dict[str, Any]) -> Report:
    """The inverse of :meth:`Report.as_dict`."""
    return Report(**report | {"per_class": [math.nan if share is None else share for share in report["per_class"]]})


def report_columns(report: Report) -> dict[str, float]:
    """A report as columns of the metrics."""
    return {"top1": report.top1, **report.groups, "ece": report.ece}
