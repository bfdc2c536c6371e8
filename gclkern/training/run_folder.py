"""The folder of a run: its configuration, metrics, loggers and checkpoints."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gclkern.training.atomic_files import replace_text, write_errors
from gclkern.training.checkpoint import Checkpoint, save_checkpoint
from gclkern.training.config import RunConfig
from gclkern.training.loggers import Logger, open_loggers
from gclkern.training.printable import printable

COLUMNS = ("phase", "epoch", "lr", "loss", "top1", "balanced", "many", "medium", "few", "ece", "nll", "holdout")

_LOCK_SECONDS = 10.0  # workers check every five seconds whether their parent process is alive


def new_folder(parent: Path, name: str) -> Path:
    """Create a folder called `name`, or `name` with the first free number appended. Runs that start at the same time get different folders."""
    with write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise AssertionError("unreachable")


class RunFolder:
    """Writes what a run leaves behind; only the first rank writes. Other runs cannot write to the folder as long as this process lives.

    `history`, one row for each epoch, `reports`, one for each finished phase, and `seconds` are part of the checkpoint: files are rewritten from them, so
    that a resumed run leaves the same files as an uninterrupted one.
    """

    def __init__(self, path: Path, config: RunConfig, *, write: bool, checkpoint: Checkpoint | None = None) -> None:
        self.path, self.config, self.write = path, config, write
        self.history: list[dict[str, Any]] = checkpoint["history"] if checkpoint else []
        self.reports: dict[str, dict[str, Any]] = checkpoint["reports"] if checkpoint else {}
        self._started = time.monotonic() - (checkpoint["seconds"] if checkpoint else 0.0)
        self.loggers: list[Logger] = []
        if not write:
            return
        with write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._own()
            try:
                if checkpoint is None and (path / "last.pt").exists():
                    raise ValueError(f"{printable(str(path))} already holds a run; resume it, or choose another folder")
                replace_text(path / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
                self.loggers = open_loggers(config.logger, path, config.to_dict(), len(self.history))
            except BaseException:
                self.close()
                raise

    def _own(self) -> None:
        """Lock the folder. The system releases the lock when this process ends and, at most some seconds later, the workers that it has started."""
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise ValueError(f"another run is writing to {printable(str(self.path))}; wait until it ends, or choose another folder") from None

    @property
    def seconds(self) -> float:
        """Duration of the run, including the time before it was resumed."""
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
        replace_text(self.path / "metrics.csv", text.getvalue())
        values = {f"{row['phase']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        with write_errors(self.path):
            for logger in self.loggers:
                logger.log(values, len(self.history) - 1)

    def finish(self, results: Mapping[str, float]) -> None:
        """Give the loggers the results of the run, with its settings and pictures."""
        with write_errors(self.path):
            for logger in self.loggers:
                logger.finish(self.path, self.config.to_dict(), results)

    def close(self) -> None:
        """Unlock the folder for other runs."""
        if self.write:
            self._lock.release()

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        if self.write:
            save_checkpoint(self.path / name, checkpoint)
