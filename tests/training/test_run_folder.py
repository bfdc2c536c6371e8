"""What a run leaves behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gclkern.training import run_folder
from gclkern.training.config import RunConfig
from gclkern.training.recipes import plan
from gclkern.training.run_folder import RunFolder, new_folder
from gclkern.training.summary import compared
from tests.support.processes import Run

COUNTS = [50, 20, 5]


@pytest.mark.parametrize(("method", "retrain", "baseline", "expected"), [
    ("gcl", "gcl", True, ["baseline", "stage-1"]),
    ("gcl", "gcl", False, ["stage-1"]),
    ("dro-lt", "none", False, ["stage-1", "stage-1-robust"]),
    ("ce", "ncm", True, ["baseline", "stage-1"]),
])  # fmt: skip
def test_embeddings_are_those_of_phases_that_train_them(method: str, retrain: str, baseline: bool, expected: list[str]) -> None:
    """Stage 2 leaves the backbone as it is: beside stage 1 it would be the same picture twice."""
    assert [phase.name for phase in compared(plan(method, retrain, "cifar10-lt", COUNTS, baseline=baseline))] == expected


def test_embeddings_of_a_run_that_only_retrains() -> None:
    second = plan("gcl", "gcl", "cifar10-lt", COUNTS)[1:]
    assert compared(second) == second


def test_embeddings_of_a_phase_that_trains_a_layer_behind_a_frozen_network() -> None:
    phases = plan("oltr", None, "places-lt", COUNTS)
    assert phases[1].trains == "embedding"
    assert compared(phases) == phases


def test_runs_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs", "digits-lt-gcl"), range(8)))
    assert {folder.name for folder in folders} == {"digits-lt-gcl", *(f"digits-lt-gcl-{number}" for number in range(2, 9))}
    assert all(folder.is_dir() for folder in folders)


def _hold(folder: Path) -> None:
    run = RunFolder(folder, RunConfig(), write=True)
    (run.path / "held").touch()
    time.sleep(60)


def test_a_folder_belongs_to_one_run_as_long_as_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.0)
    other = Run(_hold, tmp_path)
    while not (tmp_path / "held").exists() and other.is_running:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is writing to"):
        RunFolder(tmp_path, RunConfig(), write=True)
    other.kill()
    RunFolder(tmp_path, RunConfig(), write=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="runs cannot be written"):
        new_folder(tmp_path / "runs", "digits-lt-gcl")
