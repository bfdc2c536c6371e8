"""A run that is killed at any moment and resumed ends with the metrics of one left alone, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gclkern.training.recipes import METHODS
from tests.support.processes import ROOT, finish, start_train

TINY = ["--epochs-scale", "0.001", "--batch-size", "128", "--no-baseline", "--no-pictures", "--device", "cpu", "--checkpoint-seconds", "0"]
SHORT = ["--epochs", "3", "--retrain-epochs", "2", "--no-baseline", "--no-pictures", "--device", "cpu", "--checkpoint-seconds", "0"]


def outcome(folder: Path) -> tuple[str, object]:
    return (folder / "metrics.csv").read_text(), json.loads((folder / "summary.json").read_text())["reports"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start_train(*SHORT, "--out", folder))
    return outcome(folder)


@pytest.mark.slow
def test_killed(tmp_path: Path, undisturbed: tuple[str, object]) -> None:
    """SIGKILL after a checkpoint."""
    folder = tmp_path / "run"
    process = start_train(*SHORT, "--out", folder)
    while not (folder / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(start_train("--resume", folder))
    assert outcome(folder) == undisturbed


def check(module: str, *arguments: object) -> None:
    """Run a module of tests.support on the shortest run that has both stages."""
    command = [sys.executable, "-m", f"tests.support.{module}", *map(str, arguments), *TINY]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "ranks", "every"),
    [
        pytest.param(["--holdout", "0.2"], 1, 30, id="some"),
        pytest.param(["--method", "gcl+dro-lt", "--ema", "0.9"], 1, 40, id="some of three phases", marks=pytest.mark.slow),
        pytest.param(["--method", "gcl+dro-lt"], 2, 40, id="some of two processes", marks=pytest.mark.slow),
        pytest.param(["--holdout", "0.2"], 1, 1, id="all", marks=pytest.mark.exhaustive),
        pytest.param(["--method", "gcl+dro-lt", "--ema", "0.9"], 1, 1, id="all of three phases", marks=pytest.mark.exhaustive),
        pytest.param(["--method", "gcl+dro-lt"], 2, 1, id="all of two processes", marks=pytest.mark.exhaustive),
    ],
)
def test_crashed_at_every_change_of_a_file(settings: list[str], ranks: int, every: int, tmp_path: Path) -> None:
    check("crash_points", tmp_path / "runs", "--ranks", ranks, "--every", every, *settings)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(method: str, tmp_path: Path) -> None:
    """200 times in all; with a checkpoint after each step, many fall into the middle of a write."""
    check("random_kills", tmp_path / "runs", -(-200 // len(METHODS)), "--method", method)


def test_interrupted(tmp_path: Path, undisturbed: tuple[str, object]) -> None:
    """Ctrl-C ends the step, leaves a checkpoint and says how to go on."""
    folder = tmp_path / "run"
    process = start_train(*SHORT[:-1], "1000", "--out", folder)
    while not (folder / "metrics.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert f"--resume {folder}" in finish(process)
    assert (folder / "last.pt").exists()
    assert not (folder / "summary.json").exists()
    finish(start_train("--resume", folder))
    assert outcome(folder) == undisturbed


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """A checkpoint is replaced by a whole one or not at all."""
    script = """
import os, sys, torch
from gclkern.training import checkpoint
checkpoint.save_checkpoint(sys.argv[1], {"value": torch.zeros(1000)})
save = torch.save
def half(content, file):
    save(content, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os.kill(os.getpid(), 9)
torch.save = half
checkpoint.save_checkpoint(sys.argv[1], {"value": torch.ones(1000)})
"""
    path = tmp_path / "last.pt"
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "last.pt.partial").exists()
    from gclkern.training.checkpoint import load_checkpoint

    assert not load_checkpoint(path)["value"].any()  # type: ignore[typeddict-item]
