"""Temperatures by cross-validation: every image is judged once, by networks that were not trained on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from gclkern.training import cross_validation
from gclkern.training.config import RunConfig
from gclkern.training.cross_validation import cross_validated_temperatures
from gclkern.training.data import load_data
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan_run

ALONE = Processes.single(torch.device("cpu"))


def test_no_image_is_judged_by_a_network_that_was_trained_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = load_data("digits-lt"), RunConfig(method="gcl", baseline=False)
    trained: list[Any] = []
    judged: list[Any] = []

    def predict(network: object, images: Any, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        judged.append(images)
        wrong = F.one_hot((images.labels + 1) % 10, 10)
        return 4 * (F.one_hot(images.labels, 10) - 0.1 * wrong).float(), None

    monkeypatch.setattr(cross_validation, "_train", lambda phase, network, part, *_: trained.append(part.train))
    monkeypatch.setattr(cross_validation, "predict", predict)
    found = cross_validated_temperatures(plan_run(config, data.class_counts, 1), data, config, ALONE)
    assert list(found) == ["stage-1", "stage-2"]
    assert all(temperature < 1 for temperature in found.values()), "logits that are right for every image, if the labels are in their order, are too small"
    for first, second in zip(trained, judged, strict=True):
        rows = [{row.numpy().tobytes() for row in images.images} for images in (first, second)]
        assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == len(data.train)
        assert len(first.labels.unique()) == len(second.labels.unique()) == 10


def test_classes_count_nearly_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for the five frequent classes, 84 percent of the images, wrong for the others, with logits of 4."""
    data, config = load_data("digits-lt"), RunConfig(method="ce", baseline=False)
    monkeypatch.setattr(cross_validation, "_train", lambda *_: None)
    wrong = lambda labels: torch.where(labels < 5, labels, (labels + 1) % 10)  # noqa: E731
    monkeypatch.setattr(cross_validation, "predict", lambda _, images, *__, **___: (4 * F.one_hot(wrong(images.labels), 10).float(), None))
    found = cross_validated_temperatures(plan_run(config, data.class_counts, 1), data, config, ALONE)
    weights = [count / (count + 2) for count in data.class_counts]
    right = sum(weights[:5]) / sum(weights)
    assert right < 0.55 and found["stage-1"] == pytest.approx(4 / math.log(right / ((1 - right) / 9)), rel=0.02)


def test_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = load_data("digits-lt", imbalance=10), RunConfig(method="ce", baseline=False, epochs=2)
    phases = plan_run(config, data.class_counts, 1)
    found = cross_validated_temperatures(phases, data, config, ALONE)
    assert found == cross_validated_temperatures(phases, data, config, ALONE)
    assert 0.1 < found["stage-1"] < 10


def test_a_class_of_one_image_has_no_halves() -> None:
    data, config = load_data("digits-lt", imbalance=140), RunConfig(method="ce", imbalance=140)
    assert cross_validated_temperatures(plan_run(config, data.class_counts, 1), data, config, ALONE) == {}
