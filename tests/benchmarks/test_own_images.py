"""The benchmark of the defaults for images of one's own: its runs, the calibration by one temperature and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from benchmarks import own_images
from benchmarks.drawn_photos import SHAPES
from benchmarks.own_images import COMPARED, FOLDERS, OwnRun, one_temperature, tables, write_folder
from gclkern.training.data import DataSplits, DeviceImages, load_data
from gclkern.training.recipes import plan_run


def test_methods_differ_in_nothing_but_the_loss() -> None:
    counts = FOLDERS["subset"].counts
    settings = set()
    for method in COMPARED:
        config = train.parse_arguments([*OwnRun("folder", 50.0, method, 1, 1.0, (), 24, 32).arguments, "--data-dir", "pictures"]).config
        assert config.holdout == 0, "trained on all images"
        first = plan_run(config, counts, 1)[0]
        settings.add((first.epochs, first.batch_size, first.lr, first.weight_decay, first.schedule, first.mixup, first.sampler))
    assert len(settings) == 1 and next(iter(settings))[0] == 24


def test_one_temperature() -> None:
    """Logits that are five times too large: the right temperature brings back their calibration."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 4, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    found = one_temperature(5 * logits, labels)
    assert abs(found["nll"] - float(F.cross_entropy(logits, labels))) < 0.02  # a fifth of the standard error of 2000 samples
    assert found["ece"] < 0.04  # chance alone gives 15 bins of 1000 samples about 0.025


def test_sizes_of_the_folders() -> None:
    assert [(len(images.counts), sum(images.counts), images.counts[0] / images.counts[-1]) for images in FOLDERS.values()] == [
        (40, 2757, 54.0),
        (100, 10847, 100.0),
        (12, 600, 160 / 6),
    ]


def _splits(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    """In place of CIFAR-100-LT: four images of class 0 and two of class 1 in both parts."""
    part = DeviceImages(images, torch.tensor([0, 0, 1, 0, 1, 0]), mean=(0.5,) * 3, std=(0.5,) * 3, augment="none")
    splits = DataSplits("cifar100-lt", part, part, None, [4, 2], {}, 2, None, 3, 2)
    monkeypatch.setattr(own_images, "load_cifar", lambda *arguments, **options: splits)
    monkeypatch.setitem(FOLDERS, "subset", own_images.Images("", [3, 1]))


def test_the_first_training_images_of_the_long_tailed_set_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second random choice would take images that are not in the set that the papers use."""
    images = torch.arange(6 * 12, dtype=torch.uint8).view(6, 3, 2, 2)
    _splits(monkeypatch, images)
    write_folder("subset", tmp_path, tmp_path / "folder", 2)
    loaded = load_data("folder", data_dir=tmp_path / "folder")
    assert isinstance(loaded.train, DeviceImages) and isinstance(loaded.test, DeviceImages)
    assert torch.equal(loaded.train.images, images[[0, 1, 3, 2]]) and torch.equal(loaded.test.images, images[[0, 1, 3, 5, 2, 4]])


def test_an_image_that_is_blank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Incomplete files have blank images in place of those that they lack."""
    images = torch.arange(6 * 12, dtype=torch.uint8).view(6, 3, 2, 2)
    images[3] = 0
    _splits(monkeypatch, images)
    with pytest.raises(ValueError, match="train image 3 of class 0 has one colour: these CIFAR files are incomplete; give the official ones by --cifar"):
        write_folder("subset", tmp_path, tmp_path / "folder", 2)
    assert not (tmp_path / "folder").exists()


def test_drawn_photos_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_images, "COUNTS", (3, *(2,) * 11))
    monkeypatch.setattr(own_images, "TEST_IMAGES", 1)
    loaded = []
    for name in ("a", "b"):
        write_folder("drawn", tmp_path, tmp_path / name, 16)
        loaded.append(load_data("folder", data_dir=tmp_path / name))
    first, second = loaded
    assert first.class_names == sorted(SHAPES) and first.class_counts == [3 if name == "circle" else 2 for name in sorted(SHAPES)]
    for images, again in zip((first.train, first.test), (second.train, second.test), strict=True):
        assert isinstance(images, DeviceImages) and isinstance(again, DeviceImages)
        assert torch.equal(images.images, again.images)  # the seed alone decides
        assert len(images.images.unique(dim=0)) == len(images.labels)


def test_tables(tmp_path: Path) -> None:
    def result(seed: int, top1: float, images: str = "subset") -> dict[str, Any]:
        report = {"top1": top1, "groups": {"many": 0.5, "medium": 0.25, "few": 0.125}, "ece": 0.1, "nll": 2.0}
        calibrated = {"ece": 0.03, "nll": 1.5}
        return {"pixels": 16, "epochs": 24, "method": "gcl", "seed": seed, "reports": {"stage-1": report, "stage-2": report},
                "calibrated": {"stage-1": calibrated, "stage-2": calibrated}, "class_counts": FOLDERS[images].counts[::-1]}  # fmt: skip

    for seed, top1 in enumerate((0.25, 0.35)):
        (tmp_path / f"{seed}.json").write_text(json.dumps(result(seed, top1)))
    (tmp_path / "drawn.json").write_text(json.dumps(result(0, 0.5, "drawn")))
    *_, first, second, _, title, _, _, _, _, drawn = tables(tmp_path).splitlines()
    assert first == "| 16 | 24 | GCL, stage 1 | 2 | 30.0 ± 7.1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 | 10.0 ± 0.0 | 3.0 ± 0.0 | 2.00 ± 0.00 | 1.50 ± 0.00 |"
    assert "| GCL | 2 |" in second
    assert title == "**Drawn photos of 12 classes**: 160 to 6 training images of each class, 600 in all."
    assert "| GCL | 1 | 50.0 |" in drawn
