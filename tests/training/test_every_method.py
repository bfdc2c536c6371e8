"""Every method on digits at a fortieth of its epochs: it runs and prints its table, goes on bitwise where it was killed, and trains alike in two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from gclkern.training import load_classifier
from gclkern.training.recipes import METHODS
from tests.support.processes import finish, start_train

SHORT = ["--epochs-scale", "0.025", "--no-baseline", "--no-pictures", "--device", "cpu", "--holdout", "0.1"]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    settings = [*SHORT, "--method", method]
    output = finish(start_train(*settings, "--accumulate", "2", "--out", tmp_path / "whole"))
    assert output.count("top-1") == 1
    reports = json.loads((tmp_path / "whole" / "summary.json").read_text())["reports"]
    assert all(report["calibrated"] for report in reports.values())

    process = start_train(*settings, "--accumulate", "2", "--checkpoint-seconds", "0", "--out", tmp_path / "killed")
    until = time.monotonic() + 120
    while not (tmp_path / "killed" / "last.pt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # some steps further on, perhaps in a later phase
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if not (tmp_path / "killed" / "summary.json").exists():
        finish(start_train("--resume", tmp_path / "killed"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")

    finish(start_train(*settings, "--out", tmp_path / "two", ranks=2))
    # The first phase alone: later ones may start from centroids, and the running statistics of batch normalisation behind them are those of one process.
    one, two = ([float(row["loss"]) for row in metrics(tmp_path / name) if row["phase"] == "stage-1"] for name in ("whole", "two"))
    assert two == pytest.approx(one, rel=2e-3)  # rounding, which the steps carry along

    for name in reports:
        if (checkpoint := tmp_path / "whole" / f"{name}.pt").exists():
            assert not load_classifier(checkpoint).training
