"""A run that is killed at any moment and resumed ends with the metrics of one left alone, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import IO

import pytest
import torch

from gclkern.training.checkpoint import load_checkpoint, save_checkpoint
from gclkern.training.recipes import METHODS
from tests.support import crash_points, random_kills
from tests.support.processes import Run, start_train, train

TINY = ["--epochs-scale", "0.001", "--batch-size", "128", "--no-baseline", "--no-pictures", "--device", "cpu", "--checkpoint-seconds", "0"]
SHORT = ["--epochs", "2", "--retrain-epochs", "1", "--no-baseline", "--no-pictures", "--device", "cpu", "--checkpoint-seconds", "0"]


def outcome(folder: Path) -> tuple[str, object]:
    return (folder / "metrics.csv").read_text(), json.loads((folder / "summary.json").read_text())["reports"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(*SHORT, "--out", folder)
    return outcome(folder)


@pytest.mark.slow
def test_killed(tmp_path: Path, undisturbed: tuple[str, object]) -> None:
    """SIGKILL after a checkpoint."""
    folder = tmp_path / "run"
    start_train(*SHORT, "--out", folder).kill_after_checkpoint(folder)
    train("--resume", folder)
    assert outcome(folder) == undisturbed


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
    assert not list(crash_points.differences(tmp_path, ranks, every, [*settings, *TINY]))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(method: str, tmp_path: Path) -> None:
    """200 times in all; with a checkpoint after each step, many fall into the middle of a write. Held-out images save training twice more for temperatures."""
    assert not list(random_kills.differences(tmp_path, -(-200 // len(METHODS)), ["--method", method, "--holdout", "0.2", *TINY]))


def test_interrupted(tmp_path: Path, undisturbed: tuple[str, object]) -> None:
    """Ctrl-C ends the step, leaves a checkpoint and says how to go on."""
    folder = tmp_path / "run"
    run = start_train(*SHORT[:-1], "1000", "--out", folder)
    while not (folder / "metrics.csv").exists() and run.is_running:
        time.sleep(0.01)
    run.signal(signal.SIGINT)
    assert f"--resume {folder}" in run.finish()
    assert (folder / "last.pt").exists()
    assert not (folder / "summary.json").exists()
    train("--resume", folder)
    assert outcome(folder) == undisturbed


def _half_of_a_checkpoint(path: Path) -> None:
    save_checkpoint(path, {"value": torch.zeros(1000)})
    save = torch.save

    def half(content: object, file: IO[bytes]) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half  # type: ignore[assignment]
    save_checkpoint(path, {"value": torch.ones(1000)})


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """A checkpoint is replaced by a whole one or not at all."""
    path = tmp_path / "last.pt"
    run = Run(_half_of_a_checkpoint, path)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == -signal.SIGKILL
    assert (tmp_path / "last.pt.partial").exists()
    assert not load_checkpoint(path)["value"].any()  # type: ignore[typeddict-item]
