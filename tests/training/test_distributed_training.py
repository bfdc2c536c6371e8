"""Two processes train as one does: the same batches, the same noise, the same losses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, start_train, train

SHORT = ["--epochs", "3", "--batch-size", "64", "--no-baseline", "--no-pictures", "--device", "cpu"]


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One process that accumulates two parts deals its draws out as two processes do: samples, augmentation, mixup, noise and running statistics agree."""
    settings = ["--epochs", "1", *SHORT[2:], "--retrain", "none"]
    train(*settings, "--accumulate", "2", "--out", tmp_path / "one")
    train(*settings, "--out", tmp_path / "two", ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["reports"]["stage-1"]["nll"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_sharded_classes_equal_whole_ones(tmp_path: Path) -> None:
    """Both stages, with the classes of the classifier spread over the processes or held by each, an average of the weights and checkpoints in between."""
    settings = [*SHORT, "--retrain-epochs", "2", "--ema", "0.9", "--checkpoint-seconds", "0.1"]
    train(*settings, "--out", tmp_path / "whole", ranks=2)
    train(*settings, "--shard-classes", "--out", tmp_path / "sharded", ranks=2)
    # sums in another order, whose rounding 35 steps of a high learning rate carry along
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
    whole, sharded = (json.loads((tmp_path / name / "summary.json").read_text())["reports"] for name in ("whole", "sharded"))
    assert {name: report["top1"] for name, report in sharded.items()} == pytest.approx({name: report["top1"] for name, report in whole.items()}, abs=0.01)


@pytest.mark.slow
def test_a_sharded_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """In the middle of stage 1, with its optimizer's state: the rest of the run is bitwise that of a run left alone."""
    settings = [*SHORT, "--retrain", "none", "--shard-classes", "--checkpoint-seconds", "0"]
    train(*settings, "--out", tmp_path / "whole", ranks=2)
    start_train(*settings, "--out", tmp_path / "stopped", ranks=2).kill_after_checkpoint(tmp_path / "stopped")
    train("--resume", tmp_path / "stopped", ranks=2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_both_stages_print_one_table(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--retrain-epochs", "1", "--method", "gcl+dro-lt", "--holdout", "0.2"]
    output = train(*SHORT[2:], *options, "--out", tmp_path, ranks=2)
    assert output.count("top-1") == output.count("stage-2: gcl") == 1
    assert set(json.loads((tmp_path / "summary.json").read_text())["reports"]) == {"stage-1", "stage-1-robust", "stage-2", "best on held-out"}


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command of the documentation; the runs of other tests are forks, which find each other without it."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")]
    options = [*SHORT, "--epochs", "1", "--method", "ce", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("top-1") == 1
    assert (tmp_path / "stage-1.pt").exists()
