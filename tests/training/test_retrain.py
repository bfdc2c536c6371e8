"""Second stages: their classifiers, and those without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gclkern.training.data import DataSplits, DeviceImages
from gclkern.training.network import Network, build_head, replace_head
from gclkern.training.processes import Processes
from gclkern.training.retrain import retrain_without_gradients, tau_normalise

ALONE = Processes.single(torch.device("cpu"))


class Pixels(nn.Module):
    feature_dim = 4

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def data() -> DataSplits:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    centres = torch.tensor([[200, 10, 10, 10], [10, 200, 10, 10], [10, 10, 200, 10]])
    images = (centres[labels] + torch.randint(0, 40, (60, 4), generator=generator)).to(torch.uint8).view(-1, 1, 2, 2)
    train, held = (DeviceImages(images[part::2], labels[part::2], mean=[0.0], std=[1.0], augment="none") for part in (0, 1))
    return DataSplits("made up", train, held, held, [10, 10, 10], {"many": [0, 1, 2]}, 3, None, 1, 2)


def network(head: str) -> Network:
    torch.manual_seed(0)
    return Network(Pixels(), build_head(head, 4, 3))


def test_nearest_class_means_of_centred_and_normalised_features() -> None:
    """Against distances computed one by one in float64; the mean that is subtracted is that of the samples, of which class 0 has most."""
    model, splits = network("linear"), data()
    kept = torch.cat([torch.arange(30)[splits.train.labels == label][: (10, 6, 2)[label]] for label in range(3)])
    splits.train, splits.class_counts = splits.train.subset(kept), [10, 6, 2]
    retrain_without_gradients("ncm", model, splits, ALONE, None)
    images, _ = next(splits.train.loader([range(18)], device=ALONE.device))
    features = images.flatten(1).double()
    normalised = features - features.mean(0)
    normalised /= normalised.norm(dim=1, keepdim=True)
    means = torch.stack([normalised[splits.train.labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(model.head.weight.detach().double(), means, rtol=1e-5, atol=1e-5)  # float32 means of 0 to 255
    others, _ = next(splits.test.loader([range(30)], device=ALONE.device))
    seen = others.flatten(1).double() - features.mean(0)
    distances = ((seen / seen.norm(dim=1, keepdim=True))[:, None] - means).square().sum(2)
    assert torch.equal(model(others).argmax(1), distances.argmin(1))
    torch.testing.assert_close(model(others).double().log_softmax(1), (-30 * distances / 2).log_softmax(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head", "scale"), [("linear", 1.0), ("cosine", 30.0)])
def test_post_hoc_adjustment_subtracts_the_log_prior(head: str, scale: float) -> None:
    model, splits = network(head), data()
    splits.holdout, splits.class_counts = None, [60, 30, 10]
    model.scale.fill_(scale)
    images = torch.randn(5, 1, 2, 2)
    before = model(images)
    replace_head(model, "adjusted cosine" if head == "cosine" else "linear", keep=True)
    torch.testing.assert_close(model(images), before)
    retrain_without_gradients("post-hoc-la", model, splits, ALONE, 1.5)
    torch.testing.assert_close(model(images), before - 1.5 * torch.tensor([0.6, 0.3, 0.1]).log(), rtol=1e-5, atol=1e-5)


def test_tau_of_post_hoc_adjustment_is_searched() -> None:
    """With logits that favour a class by 1.3 log prior, tau 1.3 is right for all; the search starts from the unadjusted classifier at every tau."""
    model, splits = network("linear"), data()
    splits.class_counts = [90, 9, 1]
    prior = torch.tensor([0.9, 0.09, 0.01]).log()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(4)[:3] / 400)
        model.head.bias.copy_(1.3 * prior)
    retrain_without_gradients("post-hoc-la", model, splits, ALONE, None)
    assert splits.holdout is not None
    images, labels = next(splits.holdout.loader([range(30)], device=ALONE.device))
    assert torch.equal(model(images).argmax(1), labels)
    assert float((model.head.bias.detach() - 1.3 * prior).div(prior).mean()) == pytest.approx(-1.3, abs=0.15)


@pytest.mark.parametrize("kind", ["calibrated linear", "calibrated cosine", "scaled linear", "scaled cosine"])
def test_a_second_stage_starts_as_the_first_one_ended(kind: str) -> None:
    model = network(kind.split()[1])
    model.scale.fill_(30.0)
    images = torch.randn(5, 1, 2, 2)
    before = model(images)
    replace_head(model, kind, keep=True)
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_factors_and_calibration_of_logits(kind: str) -> None:
    """Both are of the whole logit, with its bias; the confidence of a sample is that of the features that the classifier sees."""
    features = torch.randn(5, 4)
    heads: list[Any] = [build_head(f"{what} {kind}", 4, 3) for what in ("scaled", "calibrated")]
    scaled, calibrated = heads
    for parameter in (*scaled.parameters(), *calibrated.parameters()):
        nn.init.normal_(parameter)

    def seen(rows: Tensor) -> Tensor:
        return nn.functional.normalize(rows) if kind == "cosine" else rows

    outputs = [seen(features) @ seen(head.weight).T + (0.0 if head.bias is None else head.bias) for head in heads]
    torch.testing.assert_close(scaled(features), scaled.factor * outputs[0])
    confidence = calibrated.calibration.confidence(seen(features)).sigmoid()
    expected = confidence * (calibrated.calibration.scale * outputs[1] + calibrated.calibration.offset) + (1 - confidence) * outputs[1]
    torch.testing.assert_close(calibrated(features), expected)
    assert (scaled.bias is None, calibrated.bias is None) == (kind == "cosine", kind == "cosine")


@pytest.mark.parametrize("tau", [0.0, 0.7, 2.0])
def test_tau_normalisation_of_a_linear_classifier(tau: float) -> None:
    model = network("linear")
    weight = model.head.weight.detach().clone()
    replace_head(model, "scaled linear", keep=True)
    tau_normalise(model, tau)
    features = torch.randn(5, 4)
    torch.testing.assert_close(model.classify(features), features @ (weight / weight.norm(dim=1, keepdim=True) ** tau).T)


def test_tau_one_keeps_a_cosine_classifier() -> None:
    model = network("cosine")
    features = torch.randn(5, 4)
    before = model.classify(features)
    replace_head(model, "scaled cosine", keep=True)
    tau_normalise(model, 1.0)
    torch.testing.assert_close(model.classify(features), before)


def test_tau_is_searched_on_the_held_out_part() -> None:
    model = network("linear")
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[50.0, 0, 0, 0], [0, 0.2, 0, 0], [0, 0, 1.0, 0]]))
    replace_head(model, "scaled linear", keep=True)
    splits = data()
    retrain_without_gradients("tau-norm", model, splits, ALONE, None)
    assert splits.holdout is not None
    images, labels = next(splits.holdout.loader([range(30)], device=ALONE.device))
    assert torch.equal(model(images).argmax(1), labels)
    factor = model.head.factor.detach().clone()
    tau_normalise(model, 1.0)
    assert torch.equal(model.head.factor, factor)
