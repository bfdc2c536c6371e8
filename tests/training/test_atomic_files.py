"""Files on a disk that refuses."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gclkern.training.atomic_files import WriteError, replace_text
from gclkern.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 10,000 bytes: writes fail in the operating system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(WriteError, match=r"last\.pt cannot be written \(File too large\); free space on its disk$"):
        save_checkpoint(path, {"epoch": 2, "weight": torch.ones(10_000)})
    with pytest.raises(WriteError, match=r"metrics\.csv cannot be written"):
        replace_text(tmp_path / "metrics.csv", "1,2\n" * 10_000)
    assert list(tmp_path.iterdir()) == [path], "what a failed write leaves would fill the disk"
    assert dict(load_checkpoint(path)) == {"epoch": 1}


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "free space"), (errno.EROFS, "make this one writable")])
def test_the_remedy_fits_the_cause(number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=remedy):
        replace_text(tmp_path / "notes.txt", "one line")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file or directory"):
        replace_text(tmp_path / "nowhere" / "notes.txt", "one line")
