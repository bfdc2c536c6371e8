"""What a run sends to TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from gclkern.training.config import RunConfig
from gclkern.training.loggers import LOGGERS, LoggerError, TensorBoard, open_loggers
from gclkern.training.run_folder import RunFolder

SETTINGS = RunConfig(lr=0.5, augment="crop,flip").to_dict()
RESULTS = {"top1": 0.75, "ece": 0.25}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "curves.png")
    return tmp_path


def test_tensorboard(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(folder, 0)
    board.log({"stage-1/loss": 1.5}, 3)
    board.finish(folder, SETTINGS, RESULTS)
    assert all(path.parent == folder for path in folder.rglob("events*")), "not a run of its own"
    found: dict[str, float] = {}
    images: list[str] = []
    settings = b""
    for path in folder.glob("events*"):
        events = EventAccumulator(str(path)).Reload()
        images += events.Tags()["images"]
        found |= {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
        settings += path.read_bytes()
    assert images == ["curves"]
    assert found == {"stage-1/loss": 1.5, "final/top1": 0.75, "final/ece": 0.25}
    assert b"crop,flip" in settings


@pytest.mark.slow  # it starts a service
def test_wandb_without_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = LOGGERS["wandb"](folder, SETTINGS)
    logger.log({"stage-1/loss": 1.5}, 0)
    logger.finish(folder, SETTINGS, RESULTS)
    (written,) = folder.rglob("*.wandb")
    assert b"stage-1/loss" in written.read_bytes()
    again = LOGGERS["wandb"](folder, SETTINGS)
    assert again._run.id == (folder / "wandb-run.txt").read_text()  # type: ignore[attr-defined]
    again.finish(folder, SETTINGS, {})


@pytest.mark.slow  # it makes a database
def test_mlflow_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "store").as_uri())
    logger = LOGGERS["mlflow"](folder, SETTINGS)
    logger.log({"stage-1/loss": 1.5}, 0)
    logger.finish(folder, SETTINGS, RESULTS)
    run = mlflow.get_run((folder / "mlflow-run.txt").read_text())
    assert run.data.metrics == {"stage-1/loss": 1.5, "final/top1": 0.75, "final/ece": 0.25}
    assert run.data.params["augment"] == "crop,flip"
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == ["curves.png"]


def test_a_run_tells_its_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Fake:
        def __init__(self, folder: Path, config: dict[str, Any]) -> None:
            told.append((folder, config["lr"]))

        def log(self, values: dict[str, float], step: int) -> None:
            told.append((values, step))

        def finish(self, folder: Path, config: dict[str, Any], results: dict[str, float]) -> None:
            told.append(results)

    monkeypatch.setitem(LOGGERS, "wandb", Fake)
    run = RunFolder(tmp_path, RunConfig(lr=0.5, logger="wandb"), write=True)
    run.log({"phase": "stage-1", "epoch": 1, "loss": 1.5})
    run.log({"phase": "stage-1", "epoch": 2, "loss": 1.25, "top1": 0.5})
    run.finish(RESULTS)
    run.close()
    assert told == [(tmp_path, 0.5), ({"stage-1/loss": 1.5}, 0), ({"stage-1/loss": 1.25, "stage-1/top1": 0.5}, 1), RESULTS]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="`logger=wandb` needs wandb, which is not installed; run: pip install wandb"):
        open_loggers("wandb", tmp_path, SETTINGS, 0)


def test_what_a_logger_refuses_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, folder: Path, config: dict[str, Any]) -> None:
            if config["lr"] is None:
                raise Exception("Use `wandb login` to log in.")

        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("no answer")

        def finish(self, folder: Path, config: dict[str, Any], results: dict[str, float]) -> None:
            raise ConnectionError("no answer")

    monkeypatch.setitem(LOGGERS, "wandb", Refusing)
    with pytest.raises(LoggerError, match=r"`logger=wandb` failed \(Use `wandb login` to log in\.\); put that right, or pass `logger=none`") as refused:
        RunFolder(tmp_path, RunConfig(logger="wandb"), write=True)
    assert refused  # its traceback still holds the first object, which must have unlocked the folder
    run = RunFolder(tmp_path, RunConfig(lr=0.5, logger="wandb"), write=True)
    with pytest.raises(LoggerError, match=r"failed \(no answer\)"):
        run.log({"phase": "stage-1", "epoch": 1, "loss": 1.5})
    with pytest.raises(LoggerError, match=r"failed \(no answer\)"):
        run.finish(RESULTS)
    run.close()
