"""De-confound-TDE's objective: cross entropy, and what it sets in its classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gclkern.training.network import build_network
from gclkern.training.objectives import Batch, build_objective
from gclkern.training.recipes import plan

COUNTS = [50, 20, 5]


def test_the_loss_is_cross_entropy_and_the_mean_feature_moves() -> None:
    torch.manual_seed(0)
    network = build_network("two-branch:small-cnn", "tde", 3, in_channels=1, image_size=8)
    objective = build_objective(plan("tde", None, "digits-lt", COUNTS)[0], COUNTS, 128)
    objective.set_epoch(network, 0, 80, 0.1)
    images, target, other = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor([1, 1, 0, 2, 2, 0])
    network.backbone.eval()
    loss = objective(network, Batch(images, target, torch.tensor(1), target_b=other, lam=torch.tensor(0.3)))
    features = network.backbone(images)
    torch.testing.assert_close(network.head.mean_feature, features.mean(0))
    logits = network.head(features)
    torch.testing.assert_close(loss, 0.3 * F.cross_entropy(logits, target) + 0.7 * F.cross_entropy(logits, other))


@pytest.mark.parametrize(("dataset", "alpha", "rate", "momentum"), [
    ("cifar10-lt", 1.0, 0.001, 0.9),
    ("cifar100-lt", 1.5, 0.2, 0.9),
    ("imagenet-lt", 3.0, 0.2, 0.9),
    ("places-lt", 3.0, 0.01, 0.95),
    ("inat18", 3.0, 0.0, 1.0),
    ("digits-lt", 1.0, 0.01, 0.9),
    ("folder", 1.0, 0.01, 0.9),
])  # fmt: skip
def test_settings_of_the_classifier(dataset: str, alpha: float, rate: float, momentum: float) -> None:
    network = build_network("small-cnn", "tde", 3, in_channels=1, image_size=8)
    objective = build_objective(plan("tde", None, dataset, COUNTS)[0], COUNTS, 64)
    objective.set_epoch(network, 7, 90, rate)
    assert float(network.head.alpha) == alpha
    assert float(network.head.momentum) == pytest.approx(momentum)
