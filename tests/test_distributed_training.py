"""Two processes train as one does: the same batches, the same noise, the same losses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = ["--epochs", "3", "--batch-size", "64", "--no-baseline", "--no-pictures", "--device", "cpu"]
ALONE = [sys.executable, "train.py"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]


def run(command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One process that accumulates two parts deals its draws out as two processes do: samples, augmentation, mixup and noise agree, and so do the losses."""
    run([*ALONE, *SHORT, "--retrain", "none", "--accumulate", "2", "--out", str(tmp_path / "one")])
    run([*TWO, *SHORT, "--retrain", "none", "--out", str(tmp_path / "two")])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_both_stages_print_one_table(tmp_path: Path) -> None:
    output = run([*TWO, *SHORT[2:], "--epochs", "1", "--retrain-epochs", "1", "--method", "gcl+dro-lt", "--holdout", "0.2", "--out", str(tmp_path)])
    assert output.count("stage-2") == 1
    assert set(json.loads((tmp_path / "summary.json").read_text())["reports"]) == {"stage-1", "stage-1-robust", "stage-2", "best on held-out"}
