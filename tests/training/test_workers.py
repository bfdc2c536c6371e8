"""Processes that read images and fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gclkern.training.data import FileImages, files
from gclkern.training.data.files import ImageFiles, WorkerError


@pytest.fixture
def images(tmp_path: Path) -> FileImages:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    return FileImages(ImageFiles([str(tmp_path / "a.png")], torch.tensor([0])), mean=[0.0] * 3, std=[1.0] * 3, image_size=8, workers=1, augment="none")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def without_memory(*_: object) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(("where", "fail", "cause"), [
    ((files, "open_image"), killed, "exited unexpectedly|is killed by signal"),
    ((torch.Tensor, "share_memory_"), without_memory, "No space left on device"),
])  # fmt: skip
def test_a_failed_worker_is_an_error_and_no_hang(
    where: tuple[object, str], fail: Callable[..., None], cause: str, images: FileImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*where, fail)
    with pytest.raises(WorkerError, match=f"a process that reads images has failed .*({cause}).*; take `workers=0`"):
        list(images.loader([[0]], device=torch.device("cpu")))
