"""TDEClassifier against its formulas, number by number in float64, in training and in prediction; its mean feature, its gradient and its fused form."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern import TDEClassifier
from gclkern.functional import linear_gcl_cross_entropy
from tests.support.cases import labels
from tests.support.processes import run_ranks

ROWS, WIDTH, CLASSES = 5, 12, 4


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features with a common part, as after a ReLU."""
    return (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7).to(dtype)


def classifier(heads: int = 2, gamma: float = 1 / 32, dtype: torch.dtype = torch.float64, **options: Any) -> TDEClassifier:
    torch.manual_seed(1)
    return TDEClassifier(WIDTH, CLASSES, num_heads=heads, gamma=gamma, dtype=dtype, **options)


def formula(x: Tensor, w: Tensor, mean: Tensor | None, heads: int, *, scale: float, gamma: float, alpha: float) -> Tensor:
    """The logits of training, or of prediction where there is a mean feature, as sums over numbers."""
    part = WIDTH // heads
    logits = torch.zeros(len(x), len(w), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(w)):
            for k in range(heads):
                at = range(k * part, (k + 1) * part)
                length = math.sqrt(sum(float(x[i, c]) ** 2 for c in at))
                unit = [float(x[i, c]) / length for c in at]
                if mean is not None:
                    d = [float(mean[c]) for c in at]
                    d = [value / math.sqrt(sum(other**2 for other in d)) for value in d]
                    cosine = sum(a * b for a, b in zip(unit, d, strict=True))
                    unit = [a - alpha * cosine * b for a, b in zip(unit, d, strict=True)]
                norm = math.sqrt(sum(float(w[j, c]) ** 2 for c in at))
                logits[i, j] += scale / heads * sum(a * float(w[j, c]) for a, c in zip(unit, at, strict=True)) / (norm + gamma)
    return logits


@pytest.mark.parametrize(("heads", "gamma"), [(1, 0.0), (2, 1 / 32), (3, 0.5), (WIDTH, 1 / 32)])
def test_training_and_prediction(heads: int, gamma: float) -> None:
    layer = classifier(heads, gamma, scale=9.0, alpha=2.5)
    x, w = features(), layer.weight.detach()
    torch.testing.assert_close(layer(x).detach(), formula(x, w, None, heads, scale=9.0, gamma=gamma, alpha=2.5))
    # the buffers are float32, so the mean feature is rounded once, to 6e-8 of its value
    expected = formula(features(1), w, x.mean(0), heads, scale=9.0, gamma=gamma, alpha=2.5)
    torch.testing.assert_close(layer.eval()(features(1)).detach(), expected, rtol=1e-6, atol=1e-6)


def test_the_published_settings_are_the_defaults() -> None:
    """Scale 16 over 2 heads: the factor 8 of the release."""
    layer = TDEClassifier(64, 10)
    assert (layer.num_heads, layer.scale, layer.gamma) == (2, 16.0, 1 / 32)
    assert float(layer.momentum) == pytest.approx(0.9)
    assert 0.98 / 8 < float(layer.weight.detach().abs().max()) <= 1 / 8


def test_momentum_of_the_mean_feature() -> None:
    """m <- momentum m + mean, without 1 - momentum; prediction and validation do not move it."""
    layer = classifier(momentum=0.8)
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    for seed in range(4):
        layer(features(seed))
        expected = 0.8 * expected + features(seed).mean(0)
    torch.testing.assert_close(layer.mean_feature.double(), expected, rtol=1e-6, atol=1e-6)
    layer.eval()(features(9))
    torch.testing.assert_close(layer.mean_feature.double(), expected, rtol=1e-6, atol=1e-6)


def test_only_the_direction_of_the_mean_feature_matters() -> None:
    layer = classifier()
    layer(features())
    predicted = layer.eval()(features(1))
    layer.mean_feature *= 100
    torch.testing.assert_close(layer(features(1)), predicted, rtol=1e-6, atol=1e-6)


def test_before_the_first_pass_nothing_is_subtracted() -> None:
    layer = classifier()
    expected = formula(features(), layer.weight.detach(), None, 2, scale=16.0, gamma=1 / 32, alpha=0.0)
    torch.testing.assert_close(layer.eval()(features()).detach(), expected)


def test_alpha_of_one_makes_predictions_orthogonal_to_the_mean() -> None:
    layer = classifier(alpha=1.0)
    layer(features())
    corrected = layer.eval().directions(features(1)).unflatten(1, (2, -1))
    common = layer.mean_feature.double().unflatten(0, (2, -1))
    assert float((corrected * common).sum(-1).abs().max()) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    layer = classifier()
    layer(features(3))
    layer.train(training)

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(logits, (features().requires_grad_(), layer.weight))


@pytest.mark.parametrize("training", [True, False])
def test_the_fused_loss_gives_the_same_value_and_gradients(training: bool) -> None:
    target = labels(ROWS, CLASSES)
    results = []
    for fused in (True, False):
        layer = classifier().train(training)
        layer.mean_feature.copy_(features(3).mean(0))
        x = features().requires_grad_()
        if fused:
            loss = linear_gcl_cross_entropy(layer.directions(x), layer.scaled_weight(), target, normalize=False, scale=1.0)
        else:
            loss = F.cross_entropy(layer(x), target)
        loss.backward()
        results.append((loss.detach(), x.grad, layer.weight.grad, layer.mean_feature.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_rows_without_a_direction() -> None:
    layer = classifier(gamma=0.0, dtype=torch.float32)
    with torch.no_grad():
        layer.weight[1] = 0.0
    x = features(dtype=torch.float32)
    x[2] = 0.0
    x.requires_grad_()
    logits = layer(x)
    assert not logits[2].any()
    assert not logits[:, 1].any()
    logits.square().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Logits of 16-bit features and weights are those of the rounded inputs: everything behind them is float32. Autocast does not round, either."""
    layer = classifier(dtype=torch.float32).to(dtype)
    x = features(dtype=dtype)
    expected = formula(x.double(), layer.weight.detach().double(), None, 2, scale=16.0, gamma=1 / 32, alpha=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
    assert logits.dtype == layer.mean_feature.dtype == layer.alpha.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="torch.compile overlooks changes of the mode on Python 3.13.0, of any module")
def test_compiled() -> None:
    """Without a graph break, in training, where the mean feature changes, and in prediction."""
    whole, compiled = classifier(dtype=torch.float32), classifier(dtype=torch.float32)
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    for mode in (True, False):
        whole.train(mode)
        compiled.train(mode)
        assert torch.equal(run(features(dtype=torch.float32)), whole(features(dtype=torch.float32)))
        assert torch.equal(compiled.mean_feature, whole.mean_feature)


def test_leading_dimensions() -> None:
    layer = classifier()
    x = features()
    expected = layer(x)
    mean = layer.mean_feature.clone()
    layer.mean_feature.zero_()
    torch.testing.assert_close(layer(x[:, None]), expected[:, None])
    torch.testing.assert_close(layer.mean_feature, mean)
    assert layer.eval()(x[0]).shape == (CLASSES,)


def _same_mean_on_all_ranks(rank: int, world: int) -> None:
    layer, expected = classifier(), torch.zeros(WIDTH, dtype=torch.float64)
    for seed in range(3):
        layer(features(seed)[rank : 2 * world : world])
        expected = 0.9 * expected + features(seed)[: 2 * world].mean(0)
    if rank == 0:
        layer.eval()(features(9))  # prediction is no collective call
    torch.testing.assert_close(layer.mean_feature.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_ranks_average_their_features() -> None:
    run_ranks(2, _same_mean_on_all_ranks)


def test_state() -> None:
    """A checkpoint is enough to predict: alpha and the mean feature are in it."""
    layer = classifier(alpha=3.0)
    layer(features())
    assert list(layer.state_dict()) == ["weight", "mean_feature", "alpha"]
    other = TDEClassifier(WIDTH, CLASSES, dtype=torch.float64)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other.eval()(features(1)), layer.eval()(features(1)))
    layer.reset_parameters()
    assert not layer.mean_feature.any()
    assert not torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: TDEClassifier(0, 3), ValueError, ["in_features", "0"]),
    (lambda: TDEClassifier(9, 3, num_heads=2), ValueError, ["in_features", "multiple of num_heads", "9", "2"]),
    (lambda: TDEClassifier(8, 3, scale=0.0), ValueError, ["scale", "0"]),
    (lambda: TDEClassifier(8, 3, gamma=-1.0), ValueError, ["gamma", "-1"]),
    (lambda: TDEClassifier(8, 3, alpha=float("nan")), ValueError, ["alpha", "nan"]),
    (lambda: TDEClassifier(8, 3, momentum=1.5), ValueError, ["momentum", "1.5"]),
    (lambda: TDEClassifier(8, 3)(torch.zeros(2, 6)), ValueError, ["features", "8", "[2, 6]"]),
])  # fmt: skip
def test_refusals(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
