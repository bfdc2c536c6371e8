"""Two processes train as one does: the same batches, the same noise, the same losses."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
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


def test_sharded_classes_equal_whole_ones(tmp_path: Path) -> None:
    """Both stages, with the classes of the classifier spread over the processes or held by each, an average of the weights and checkpoints in between."""
    settings = [*SHORT, "--retrain-epochs", "2", "--ema", "0.9", "--checkpoint-seconds", "0.1"]
    run([*TWO, *settings, "--out", str(tmp_path / "whole")])
    run([*TWO, *settings, "--shard-classes", "--out", str(tmp_path / "sharded")])
    # sums in another order, whose rounding 35 steps of a high learning rate carry along
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
    whole, sharded = (json.loads((tmp_path / name / "summary.json").read_text())["reports"] for name in ("whole", "sharded"))
    assert {name: report["top1"] for name, report in sharded.items()} == pytest.approx({name: report["top1"] for name, report in whole.items()}, abs=0.01)


def test_a_sharded_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """In the middle of stage 1, with its optimizer's state: the rest of the run is bitwise that of a run left alone."""
    settings = [*SHORT, "--retrain", "none", "--shard-classes", "--checkpoint-seconds", "0"]
    run([*TWO, *settings, "--out", str(tmp_path / "whole")])
    command = [*TWO, *settings, "--out", str(tmp_path / "stopped")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while not (tmp_path / "stopped" / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run([*TWO, "--resume", str(tmp_path / "stopped")])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_both_stages_print_one_table(tmp_path: Path) -> None:
    output = run([*TWO, *SHORT[2:], "--epochs", "1", "--retrain-epochs", "1", "--method", "gcl+dro-lt", "--holdout", "0.2", "--out", str(tmp_path)])
    assert output.count("top-1") == output.count("stage-2: gcl") == 1
    assert set(json.loads((tmp_path / "summary.json").read_text())["reports"]) == {"stage-1", "stage-1-robust", "stage-2", "best on held-out"}
