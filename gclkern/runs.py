"""The folder of a run: its configuration, metrics as CSV and TensorBoard, checkpoints, the summary and the pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclkern.checkpoint import load_checkpoint, save_checkpoint
from gclkern.data import DataSplits
from gclkern.engine import Ranks, predict
from gclkern.extras import need
from gclkern.methods import Phase
from gclkern.metrics import Report, evaluate_logits, format_table
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

    `history`, one row for each epoch, and `reports`, one for each finished phase, are part of the checkpoint: files are written anew from them, so that a
    resumed run leaves the same files as one that was left alone.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, write: bool, history: list[dict[str, Any]], reports: dict[str, dict[str, Any]]) -> None:
        self.path, self.config, self.write = path, config, write
        self.history, self.reports = history, reports
        self.board: Any = None
        if not write:
            return
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(path), purge_step=len(history))

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


def conclude(
    run: RunFolder, data: DataSplits, device: torch.device, phases: Sequence[Phase], *, compare: Sequence[str], seconds: float, pictures: bool
) -> None:
    """Print the table, write the summary and draw the pictures, from what is on the disk: a resumed run has its earlier phases only there.

    `compare` names the phases whose embeddings are drawn side by side; the last one's predictions make the picture of confusions.
    """
    alone = Ranks.alone(device)

    def found(name: str) -> tuple[Tensor, Tensor]:
        return predict(load_network(load_checkpoint(run.path / f"{name}.pt"), data, device), data.test, alone)

    if data.holdout is not None and (run.path / "best.pt").exists():
        best = evaluate_logits(found("best")[0], data.test.labels, data.groups, data.num_classes)
        run.reports["best on held-out"] = best.as_dict()
    reports = {name: _from_dict(report) for name, report in run.reports.items()}
    print(format_table(list(reports.items())))  # noqa: T201 (what the run is for)
    summary = {
        "reports": run.reports, "phases": [asdict(phase) for phase in phases], "class_counts": data.class_counts, "groups": data.groups,
        "config": run.config, "seconds": round(seconds, 1),
    }  # fmt: skip
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if run.board is not None:
        run.board.close()
    if pictures:
        draw_pictures(run.path, reports, {name: found(name) for name in compare}, data)
    print(f"{run.path}: metrics.csv, summary.json, checkpoints" + (", pictures" if pictures else ""))  # noqa: T201


def draw_pictures(folder: Path, reports: dict[str, Report], found: dict[str, tuple[Tensor, Tensor]], data: DataSplits) -> None:
    """The run's pictures, from the reports of its phases and from (logits, features) on the test set of the first and the last one."""
    from gclkern import plots  # needs packages of the extra `train`

    last = list(found)[-1]
    plots.plot_curves(folder / "metrics.csv", folder / "curves.png")
    plots.plot_class_accuracy(reports, data.class_counts, folder / "class-accuracy.png")
    plots.plot_group_confusion(found[last][0].argmax(1).cpu(), data.test.labels, data.groups, folder / "group-confusion.png")
    plots.plot_tsne({name: features.cpu() for name, (_, features) in found.items()}, data.test.labels, folder / "tsne.png")


def _from_dict(report: dict[str, Any]) -> Report:
    """The inverse of :meth:`Report.as_dict`."""
    return Report(**report | {"per_class": [math.nan if share is None else share for share in report["per_class"]]})


def report_columns(report: Report) -> dict[str, float]:
    """A report as columns of the metrics."""
    return {"top1": report.top1, **report.groups, "ece": report.ece}
