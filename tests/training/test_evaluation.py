"""Accuracy by group and class, calibration and the table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from gclkern.training.evaluation import Report, evaluate_logits, format_table, share_interval


def plain_report(logits: torch.Tensor, labels: torch.Tensor, groups: dict[str, list[int]]) -> Report:
    """The definitions, one sample at a time."""
    shares = np.exp(logits.double().numpy())
    shares /= shares.sum(1, keepdims=True)
    right = shares.argmax(1) == labels.numpy()
    confidence = shares.max(1)
    per_class = [float(right[labels.numpy() == c].mean()) if (labels == c).any() else math.nan for c in range(logits.shape[1])]
    gaps = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gaps += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    nll = -np.log(shares[np.arange(len(labels)), labels.numpy()]).mean()
    return Report(float(right.mean()), {name: float(np.nanmean([per_class[c] for c in cs])) for name, cs in groups.items()}, per_class, float(gaps), float(nll))


@pytest.mark.parametrize("samples", [7, 5000])
def test_evaluation_is_the_definition(samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(0, 5, (samples,), generator=generator)
    logits = 2 * torch.randn(samples, 6, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 6)
    groups = {"many": [0, 1], "medium": [2, 5], "few": [3, 4]}
    found, expected = evaluate_logits(logits, labels, groups, 6), plain_report(logits, labels, groups)
    assert math.isnan(found.per_class[5]), "no test samples"
    np.testing.assert_allclose(found.per_class, expected.per_class)
    assert found.groups == pytest.approx(expected.groups)
    assert (found.top1, found.ece, found.nll) == pytest.approx((expected.top1, expected.ece, expected.nll), rel=1e-5)


def test_a_group_counts_its_classes_alike() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 10)
    report = evaluate_logits(logits, torch.tensor([0] * 9 + [1]), {"many": [0, 1]}, 2)
    assert report.top1 == pytest.approx(0.9)
    assert report.groups == {"many": 0.5}


def test_a_group_without_test_samples_is_absent() -> None:
    report = evaluate_logits(torch.eye(3)[:2], torch.tensor([0, 1]), {"many": [0, 1], "few": [2]}, 3)
    assert report.groups == {"many": 1.0}
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["per_class"] == [1.0, 1.0, None]


def test_balanced_accuracy_counts_classes_alike_and_leaves_out_those_without_samples() -> None:
    report = evaluate_logits(torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]), {}, 3)
    assert (report.top1, report.balanced) == (0.75, 0.5)
    assert math.isnan(Report(0.5, {}, [math.nan], 0, 0).balanced)


@pytest.mark.parametrize("odd", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers(odd: list[float]) -> None:
    """Training that ran away is reported as such: the rows are wrong, and there is no calibration."""
    report = evaluate_logits(torch.tensor([[1.0, 0.0], odd, [-math.inf, 2.0]]), torch.tensor([0, 0, 1]), {"many": [0], "few": [1]}, 2)
    assert report.top1 == pytest.approx(2 / 3)
    assert report.groups == {"many": 0.5, "few": 1.0}
    assert math.isnan(report.ece)
    assert math.isnan(report.nll)
    again = Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
    np.testing.assert_equal(vars(again), vars(report))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), r"\(M, 4\)"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), r"labels \(M,\)"),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "no samples"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), r"\[0, 4\)"),
    ],
)
def test_evaluation_refuses(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_logits(logits, labels, {"many": [0]}, 4)


def test_table_shows_percent_and_a_dash_for_an_absent_group() -> None:
    header, first, second, _ = format_table(
        [("ce", Report(0.5, {"many": 1.0}, [0.5, 0.0], 0.25, 1.5)), ("gcl", Report(1.0, {"few": 0.125}, [], math.nan, math.nan))]
    ).splitlines()
    assert header.split() == ["top-1", "balanced", "many", "medium", "few", "ECE", "NLL"]
    assert first.split() == ["ce", "50.00", "25.00", "100.00", "-", "-", "25.00", "1.500"]
    assert second.split() == ["gcl", "100.00", "-", "-", "-", "12.50", "-", "nan"]


def test_interval_of_a_share() -> None:
    """Against scipy's interval of a binomial share, for one class; classes of unequal size count as the number of images with the same variance."""
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 10), (7, 10), (90, 100)):
        expected = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert share_interval(right / count, [count, 0]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert share_interval(0.5, [10, 40]) == pytest.approx(share_interval(0.5, [32]))  # 4 / (1/10 + 1/40)
