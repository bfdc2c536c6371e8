"""A run that is killed at any moment and resumed ends with the metrics of one left alone, bit by bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ROOT, finish, start_train

SHORT = ["--epochs", "3", "--retrain-epochs", "2", "--no-baseline", "--no-pictures", "--device", "cpu", "--checkpoint-seconds", "0"]


def outcome(folder: Path) -> tuple[str, object]:
    return (folder / "metrics.csv").read_text(), json.loads((folder / "summary.json").read_text())["reports"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start_train(*SHORT, "--out", folder))
    return outcome(folder)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills: int, tmp_path: Path, undisturbed: tuple[str, object]) -> None:
    """SIGKILL at random moments; with a checkpoint after each step, many fall into the middle of a write."""
    folder = tmp_path / "run"
    dice = random.Random(0)
    process = start_train(*SHORT, "--out", folder)
    for _ in range(kills):
        while not (folder / "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        before = (folder / "last.pt").stat().st_mtime_ns
        while (folder / "last.pt").stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        process = start_train("--resume", folder)
    finish(process)
    assert outcome(folder) == undisturbed


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
