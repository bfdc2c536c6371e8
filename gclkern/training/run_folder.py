"""The folder of a run: its configuration, metrics as CSV and TensorBoard, and checkpoints."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

from gclkern.training.checkpoint import Checkpoint, save_checkpoint
from gclkern.training.config import RunConfig

COLUMNS = ("phase", "epoch", "lr", "loss", "top1", "balanced", "many", "medium", "few", "ece", "nll", "holdout")


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

    `history`, one row for each epoch, `reports`, one for each finished phase, and `seconds` are part of the checkpoint: files are written anew from them, so
    that a resumed run leaves the same files as one that was left alone.
    """

    def __init__(self, path: Path, config: RunConfig, *, write: bool, checkpoint: Checkpoint | None = None) -> None:
        self.path, self.config, self.write = path, config, write
        self.history: list[dict[str, Any]] = checkpoint["history"] if checkpoint else []
        self.reports: dict[str, dict[str, Any]] = checkpoint["reports"] if checkpoint else {}
        self._started = time.monotonic() - (checkpoint["seconds"] if checkpoint else 0.0)
        self.board: Any = None
        if not write:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise OSError(f"the folder of the run, {path}, cannot be written ({error.strerror}); choose another one") from error
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(path), purge_step=len(self.history))

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

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        if self.write:
            save_checkpoint(self.path / name, checkpoint)
