"""Second stages without gradients."""

from __future__ import annotations

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


def test_nearest_class_means() -> None:
    model, splits = network("linear"), data()
    retrain_without_gradients("ncm", model, splits, ALONE, None)
    images, _ = next(splits.train.loader([range(30)], device=ALONE.device))
    features = images.flatten(1)
    means = torch.stack([features[splits.train.labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(model.head.weight.detach(), means)
    assert torch.equal(model(images).argmax(1), splits.train.labels)


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
