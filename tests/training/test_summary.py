"""What a run leaves in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("PIL")

from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from gclkern.training.config import RunConfig
from gclkern.training.evaluation import Report
from gclkern.training.summary import show_on_board


def test_settings_results_and_pictures_are_on_the_board(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "curves.png")
    board = SummaryWriter(str(tmp_path))
    show_on_board(board, tmp_path, RunConfig(lr=0.5, augment="crop,flip").to_dict(), Report(0.75, {}, [0.5, 1.0], 0.25, 1.5))
    board.close()
    assert all(path.parent == tmp_path for path in tmp_path.rglob("events*")), "not a run of its own"
    found: dict[str, float] = {}
    images: list[str] = []
    settings = b""
    for path in tmp_path.glob("events*"):
        events = EventAccumulator(str(path)).Reload()
        images += events.Tags()["images"]
        found |= {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
        settings += path.read_bytes()
    assert images == ["curves"]
    assert found == {"final/top1": 0.75, "final/balanced": 0.75, "final/ece": 0.25, "final/nll": 1.5}
    assert b"crop,flip" in settings
