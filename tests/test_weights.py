"""Class weights, margins and priors against their formulas in exact or plain arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclkern.losses import GCLLoss, LDAMLoss
from gclkern.weights import DeferredReweighting, cben_weights, effective_number_weights, inverse_frequency_weights, ldam_margins, log_prior

CIFAR = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def exact_weights(counts: list[int], beta: float) -> list[float]:
    """The weights in rational numbers, so that beta^n is not rounded."""
    exact = Fraction(beta)
    values = [(1 - exact) / (1 - exact**n) for n in counts]
    return [float(len(counts) * value / sum(values)) for value in values]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-9, 1 - 1e-15])
def test_effective_number_weights(beta: float) -> None:
    counts = [500, 120, 7, 1]
    weights = effective_number_weights(counts, beta)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(exact_weights(counts, beta), rel=1e-6)


def test_beta_0_gives_ones() -> None:
    assert torch.equal(effective_number_weights(CIFAR, 0.0), torch.ones(10))


@given(counts=st.lists(st.integers(1, 10**7), min_size=1, max_size=40), beta=st.floats(0.0, 1.0, exclude_max=True))
def test_effective_number_weights_sum_to_the_classes(counts: list[int], beta: float) -> None:
    weights = effective_number_weights(counts, beta)
    assert float(weights.double().sum()) == pytest.approx(len(counts), rel=1e-5)
    assert bool((weights > 0).all())
    assert int(weights.argmax()) == int(torch.tensor(counts).argmin()) or weights.max() == weights[counts.index(min(counts))]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.2, 2.0])
def test_inverse_frequency_weights(exponent: float) -> None:
    counts = [1280, 120, 7, 5]
    values = [(sum(counts) / n) ** exponent for n in counts]
    weights = inverse_frequency_weights(counts, exponent)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([4 * value / sum(values) for value in values], rel=1e-6)


def test_inverse_frequency_weights_of_imagenet_lt_span_776_to_1() -> None:
    """Classes of 1280 to 5 images and DisAlign's exponent 1.2."""
    weights = inverse_frequency_weights([1280, 5], 1.2)
    assert float(weights[1] / weights[0]) == pytest.approx(776, abs=1)
    assert bool(torch.isfinite(inverse_frequency_weights([10**9, 1], 100.0)).all())
    with pytest.raises(ValueError, match="exponent must be"):
        inverse_frequency_weights([2, 1], -1.0)


def test_cben_weights() -> None:
    for count, weight in zip(CIFAR, cben_weights(torch.tensor(CIFAR, dtype=torch.float64)).tolist(), strict=True):
        beta = Fraction(0.9999 + 1e-5 * math.log(5000 / count) / math.log(100))
        # the cloud is float32, which moves beta by less than 1e-12
        assert weight == pytest.approx(float((1 - beta) / (1 - beta**count)), rel=1e-7)


@pytest.mark.parametrize("make", [lambda: LDAMLoss(CIFAR), lambda: GCLLoss(CIFAR), lambda: torch.nn.CrossEntropyLoss()])
def test_weights_are_deferred(make: Any) -> None:
    """Weights are written in place, because a captured step reads this memory. Epochs may come in any order, as in a resumed run."""
    criterion = make()
    reweighting = DeferredReweighting(criterion, CIFAR, 3, beta=0.9)
    memory = criterion.weight.data_ptr()
    for epoch, expected in ((0, torch.ones(10)), (3, effective_number_weights(CIFAR, 0.9)), (2, torch.ones(10)), (9, effective_number_weights(CIFAR, 0.9))):
        reweighting.set_epoch(epoch)
        assert torch.equal(criterion.weight, expected)
    assert criterion.weight.data_ptr() == memory
    assert not criterion.state_dict(), "weights follow from the epoch"


def test_ldam_margins() -> None:
    margins = ldam_margins(CIFAR)
    assert margins.tolist() == pytest.approx([0.5 * (50 / n) ** 0.25 for n in CIFAR], rel=1e-6)
    assert margins[-1] == 0.5
    assert torch.equal(ldam_margins(CIFAR, 0.0), torch.zeros(10))


def test_log_prior() -> None:
    prior = log_prior(CIFAR)
    assert prior.tolist() == pytest.approx([math.log(n / sum(CIFAR)) for n in CIFAR], rel=1e-6)
    assert float(prior.exp().sum()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: effective_number_weights([3, 0]), ValueError, ["class_counts[1]", "0"]),
        (lambda: effective_number_weights([3, 2], 1.0), ValueError, ["beta", "1.0"]),
        (lambda: effective_number_weights([3, 2], -0.1), ValueError, ["beta", "-0.1"]),
        (lambda: effective_number_weights([3, 2], "0.99"), TypeError, ["beta", "'0.99'"]),  # type: ignore[arg-type]
        (lambda: DeferredReweighting(LDAMLoss([3, 2]), [3, 2], 1).set_epoch(-1), ValueError, ["epoch", "-1"]),
        (lambda: DeferredReweighting(LDAMLoss([3, 2]), [3, 2], 1).set_epoch(1.5), TypeError, ["epoch", "1.5"]),  # type: ignore[arg-type]
        (lambda: DeferredReweighting(LDAMLoss([3, 2]), [3, 2], -2), ValueError, ["start", "-2"]),
        (lambda: DeferredReweighting(LDAMLoss([3, 2], weight=torch.ones(2)), [3, 2], 1), ValueError, ["already has class weights", "without weight"]),
        (lambda: DeferredReweighting(torch.nn.MSELoss(), [3, 2], 1), TypeError, ["class weights", "MSELoss"]),
        (lambda: ldam_margins([3, 2], -0.5), ValueError, ["max_margin", "-0.5"]),
        (lambda: ldam_margins([]), ValueError, ["class_counts", "empty"]),
        (lambda: log_prior([1, 0]), ValueError, ["class_counts[1]", "0"]),
    ],
)
def test_refusals(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
