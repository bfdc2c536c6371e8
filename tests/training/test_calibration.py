"""The temperature against a search of its own, and what no temperature can improve."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gclkern.training import calibration
from gclkern.training.calibration import fit_temperature, held_out_temperature
from gclkern.training.data import DataSplits, DeviceImages
from gclkern.training.evaluation import Report, evaluate_logits, format_table
from gclkern.training.network import Network, build_head
from gclkern.training.processes import Processes


def losses(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy of each image with Platt's targets, written out."""
    count, num_classes = logits.shape
    target = torch.full((count, num_classes), 1 / (count + 2) / (num_classes - 1), dtype=torch.float64)
    target[range(count), labels] = (count + 1) / (count + 2)
    return F.cross_entropy(logits.double() / temperature, target, reduction="none")


@pytest.mark.parametrize("factor", [0.05, 1.0, 30.0])
def test_the_temperature_has_the_least_loss(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 7, generator=generator)
    labels = torch.distributions.Categorical(logits=2 * logits).sample()
    temperature = fit_temperature(factor * logits, labels)
    best = losses(factor * logits, labels, temperature).mean()
    for other in (0.9, 0.99, 1.01, 1.1):
        assert best < losses(factor * logits, labels, other * temperature).mean()
    # the temperature takes a factor on the logits out again
    torch.testing.assert_close(temperature / factor, fit_temperature(logits, labels), rtol=1e-6, atol=0)


def test_classes_of_any_size_count_nearly_equally() -> None:
    """Class 3 has no image, and does not count."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 4]).repeat_interleave(torch.tensor([300, 60, 10, 1]))
    logits = torch.randn(371, 5, generator=generator) + 2 * F.one_hot(labels, 5) * torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0])[labels, None]

    def loss(temperature: float) -> float:
        return sum(float(losses(logits, labels, temperature)[labels == label].sum()) / (int((labels == label).sum()) + 2) for label in labels.unique())

    temperature = fit_temperature(logits, labels, class_balanced=True)
    for other in (0.9, 0.99, 1.01, 1.1):
        assert loss(temperature) < loss(other * temperature)
    assert temperature > 1.2 * fit_temperature(logits, labels), "rare classes, which are predicted worse, count more"


@pytest.mark.parametrize("like_train", [False, True])
def test_the_fit_has_the_class_frequencies_of_the_test_images(like_train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prediction has a probability of 0.9; right are 90 percent of the frequent class and half of the rare one."""
    labels = torch.tensor([0] * 900 + [1] * 100)
    logits = torch.zeros(1000, 2)
    logits[:, 0] = math.log(9) * torch.tensor([1.0] * 810 + [-1.0] * 90 + [1.0, -1.0] * 50)
    held_out = DeviceImages(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), labels, mean=[0.0], std=[1.0], augment="none")
    data = DataSplits("made up", held_out, held_out, held_out, [900, 100], {}, 2, None, 1, 2, test_like_train=like_train)
    monkeypatch.setattr(calibration, "predict", lambda *_, **__: (logits, None))
    network = Network(nn.Identity(), build_head("linear", 4, 2))
    found = held_out_temperature(network, data, Processes.single(torch.device("cpu")))
    share = 0.86 if like_train else 0.7  # of right predictions, over images or over classes
    assert found == pytest.approx(math.log(9) / math.log(share / (1 - share)), rel=0.02)  # the smoothing of 1000 images


def test_extreme_rows_do_not_overflow() -> None:
    logits = torch.tensor([[1e6, 0.0, 0.0], [0.0, 1e6, 0.0], [0.0, 1e6, 0.0]])
    assert fit_temperature(logits, torch.tensor([0, 1, 1])) > 1  # one step of log(4 * 2) at most, not a million
    assert fit_temperature(logits[:, :2], torch.tensor([1, 0, 0])) == pytest.approx(math.exp(7))  # all wrong: as flat as the range allows


def test_a_network_that_is_always_right_is_not_made_certain() -> None:
    """With plain labels the best temperature would be 0, and one wrong image later would cost everything."""
    labels = torch.arange(70) % 10
    logits = 5.0 * F.one_hot(labels, 10)
    confidence = (logits / fit_temperature(logits, labels)).softmax(1).amax(1)
    torch.testing.assert_close(confidence, torch.full((70,), 71 / 72), rtol=1e-5, atol=0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="logits must be finite"):
        fit_temperature(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels \(M,\)"):
        fit_temperature(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


def test_a_report_has_the_calibration_before_and_after() -> None:
    """Five times too confident logits: the fitted temperature takes the factor out, and accuracies stay."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    temperature = fit_temperature(5 * logits, labels)
    report = evaluate_logits(5 * logits, labels, {"many": [0, 1]}, 5, temperature=temperature)
    assert report.calibrated is not None
    assert 4.5 < temperature < 5.5
    assert report.calibrated.ece < 0.03 < 0.2 < report.ece
    plain = evaluate_logits(logits, labels, {"many": [0, 1]}, 5)
    assert (report.top1, report.per_class) == (plain.top1, plain.per_class)
    assert report.calibrated.nll == pytest.approx(plain.nll, abs=2e-3)
    assert Report.from_dict(report.as_dict()) == report
    table = format_table([("before", plain), ("after", report)])
    assert "ECE/T" in table and table.splitlines()[1].split()[-2:] == ["-", "-"]
