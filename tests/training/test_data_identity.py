"""What a data set is recognised by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gclkern.training.data import DataSplits, DeviceImages, class_difference, data_difference
from gclkern.training.data.files import ImageFiles


def splits(*, names: list[str] | None = None, value: int = 0, labels: tuple[int, ...] = (0, 0, 1), name: str = "made up") -> DataSplits:
    images = torch.full((len(labels), 1, 2, 2), value, dtype=torch.uint8)
    part = DeviceImages(images, torch.tensor(labels), mean=[0.0], std=[1.0], augment="none")
    return DataSplits(name, part, part, None, part.labels.bincount().tolist(), {"many": [0, 1]}, 2, names, 1, 2)


def test_equal_data_has_no_difference() -> None:
    assert data_difference(splits(names=["cat", "dog"]).identity, splits(names=["cat", "dog"]).identity) is None


@pytest.mark.parametrize(("then", "now", "message"), [
    (splits(names=["cat", "dog"]), splits(names=["cat", "fox"]), "class 1 is 'dog' in the checkpoint and 'fox' in made up"),
    (splits(names=["cat", "dog"]), splits(names=["dog", "cat"]), "class 0 is 'cat' in the checkpoint and 'dog' in made up"),
    (splits(), splits(labels=(0, 1, 2)), "the checkpoint has 2 classes, made up has 3"),
    (splits(), splits(labels=(0, 1, 1)), "class 0 has 2 training images in the checkpoint and 1 in made up"),
])  # fmt: skip
def test_other_classes(then: DataSplits, now: DataSplits, message: str) -> None:
    assert class_difference(then.identity, now.identity) == data_difference(then.identity, now.identity) == message


@pytest.mark.parametrize(("now", "message"), [
    (splits(names=["cat", "dog"], value=1), "the test images of made up are not those of the checkpoint, or have other labels"),
    (splits(names=["cat", "dog"], labels=(0, 1, 0)), "the test images of made up are not those of the checkpoint, or have other labels"),
    (replace(splits(names=["cat", "dog"]), holdout=splits().train), "the checkpoint was trained with 0 held-out images, made up has 3"),
    (splits(names=["cat", "dog"], labels=(0, 0, 0, 1)), "class 0 has 2 training images in the checkpoint and 3 in made up"),
])  # fmt: skip
def test_other_images_of_the_same_classes(now: DataSplits, message: str) -> None:
    then = splits(names=["cat", "dog"]).identity
    assert class_difference(then, now.identity) is None, "a network may be evaluated on them"
    assert data_difference(then, now.identity) == message


@pytest.mark.parametrize(("change", "same"), [
    (lambda folder: folder.rename(folder.with_name("moved")), True),
    (lambda folder: (folder / "a.png").rename(folder / "c.png").parent, False),
    (lambda folder: (folder / "a.png").write_text("other") and folder, False),
])  # fmt: skip
def test_files_may_move_but_not_change(tmp_path: Path, change: Callable[[Path], Path], same: bool) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "train" / name).write_text("some")

    def digest(folder: Path) -> str:
        return ImageFiles([str(file) for file in sorted(folder.iterdir())], torch.tensor([0, 1])).digest()

    before = digest(tmp_path / "train")
    assert (digest(change(tmp_path / "train")) == before) is same
