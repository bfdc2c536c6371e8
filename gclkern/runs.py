"""The folder of a run: its configuration, metrics as CSV and TensorBoard, checkpoints, the summary and the pictures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gclkern.checkpoint import save_checkpoint
from gclkern.data import DataSplits
from gclkern.metrics import Report

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


class RunFolder:
    """Writes what a run leaves behind; on ranks but the first it writes nothing.

    `history`, one row for each epoch, and `reports`, one for each finished phase, are part of the checkpoint: files are written anew from them, so that a
    resumed run leaves the same files as one that was left alone.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, write: bool, history: list[dict[str, Any]], reports: dict[str, dict[str, Any]]) -> None:
        self.path, self.write = path, write
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

    def finish(self, summary: dict[str, Any]) -> None:
        if self.write:
            write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            if self.board is not None:
                self.board.close()


def draw_pictures(folder: Path, reports: dict[str, Report], found: dict[str, tuple[Tensor, Tensor]], data: DataSplits) -> None:
    """The run's pictures, from the reports of its phases and from (logits, features) on the test set of the first and the last one."""
    from gclkern import plots  # needs packages of the extra `train`

    last = list(found)[-1]
    plots.plot_curves(folder / "metrics.csv", folder / "curves.png")
    plots.plot_class_accuracy(reports, data.class_counts, folder / "class-accuracy.png")
    plots.plot_group_confusion(found[last][0].argmax(1).cpu(), data.test.labels, data.groups, folder / "group-confusion.png")
    plots.plot_tsne({name: features.cpu() for name, (_, features) in found.items()}, data.test.labels, folder / "tsne.png")


def report_columns(report: Report) -> dict[str, float]:
    """A report as columns of the metrics."""
    return {"top1": report.top1, **report.groups, "ece": report.ece}
