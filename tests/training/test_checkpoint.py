"""Checkpoints: whole or refused, and never executed."""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gclkern.training.checkpoint import CheckpointError, last_checkpoint, load_checkpoint, save_checkpoint

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


class Point(NamedTuple):
    x: int
    y: float


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(("value", "plain"), [
    (np.float64(0.5), 0.5),
    (np.str_("cat"), "cat"),
    (Point(1, 2.5), (1, 2.5)),
    (defaultdict(list, {"a": [Level.LOW]}), {"a": [1]}),
    (OrderedDict(a=1), OrderedDict(a=1)),
    ({Level.LOW: True}, {1: True}),
])  # fmt: skip
def test_subclasses_are_stored_as_plain_values(tmp_path: Path, value: object, plain: object) -> None:
    save_checkpoint(tmp_path / "last.pt", {"value": value})
    found = load(tmp_path / "last.pt")["value"]
    assert found == plain
    assert type(found) is type(plain)


def test_state_dicts_keep_the_versions_of_modules(tmp_path: Path) -> None:
    """By which some modules tell old weights from new ones."""
    state = torch.nn.BatchNorm1d(2).state_dict()
    save_checkpoint(tmp_path / "last.pt", {"network": state, "parameter": torch.nn.Parameter(torch.ones(2))})
    found = load(tmp_path / "last.pt")
    assert found["network"]._metadata == {"": {"version": 2}}
    assert torch.equal(found["parameter"], torch.ones(2))


@pytest.mark.parametrize("value", [np.int64(1), np.float32(1), np.ones(2), {1}, b"bytes", torch.ones(2).to_sparse(), torch.ones(2, device="meta"), 1j])
def test_what_could_not_be_read_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"but it\['rows'\]\[1\] is a"):
        save_checkpoint(tmp_path / "last.pt", {"rows": [0, value]})
    assert not list(tmp_path.iterdir())


def test_objects_are_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    with pytest.raises(TypeError, match="is a Evil"):
        save_checkpoint(path, {"object": Evil()})
    assert load(path)["epoch"] == 3


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last.pt; give the folder of a run, or a checkpoint in it such as stage-1\.pt"):
        load_checkpoint(tmp_path / "last.pt")


def test_what_a_run_continues_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last.pt; give the folder of a run or its last\.pt"):
        last_checkpoint(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} ended before its first checkpoint; start it again with --out {tmp_path}"):
        last_checkpoint(tmp_path)
    (tmp_path / "summary.json").touch()
    with pytest.raises(FileNotFoundError, match="has finished without training; there is nothing to continue"):
        last_checkpoint(tmp_path)
    (tmp_path / "last.pt").touch()
    assert last_checkpoint(tmp_path) == last_checkpoint(tmp_path / "last.pt") == tmp_path / "last.pt"
