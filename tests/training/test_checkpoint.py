"""Checkpoints: whole or refused, and never executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gclkern.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"epoch": 3, "rate": 0.1, "name": "stage-1", "none": None, "flag": True, "rows": [{"a": (1, 2)}], "weight": torch.arange(6.0).view(2, 3).T}


def load(path: Path) -> Any:
    """A checkpoint of any content."""
    return load_checkpoint(path)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    found = load(path)
    assert torch.equal(found.pop("weight"), STATE["weight"])
    assert found == {name: value for name, value in STATE.items() if name != "weight"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 1)])
def test_tensors_of_every_kind(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    save_checkpoint(tmp_path / "last.pt", {"value": torch.ones(shape, dtype=dtype)})
    assert torch.equal(load(tmp_path / "last.pt")["value"], torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    content = torch.load(path, weights_only=True)
    content["state"]["weight"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_foreign(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of gclkern"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_other_version(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    torch.save(torch.load(path, weights_only=True) | {"version": 1}, path)
    with pytest.raises(CheckpointError, match="of version 1 of the checkpoint format, this gclkern reads version 2"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "gclkern.training.checkpoint", "version": 2, "state": Evil()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="more than plain data"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


def test_objects_are_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    with pytest.raises(TypeError, match="got Evil"):
        save_checkpoint(path, {"object": Evil()})
    assert load(path)["epoch"] == 3


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.pt")
