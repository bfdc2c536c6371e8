"""OLTR's objective: its loss from the parts, and a memory that starts from class means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gclkern import MemoryLoss
from gclkern.training.batches import plain_batches
from gclkern.training.config import RunConfig
from gclkern.training.data import load_data
from gclkern.training.network import build_network, prepare
from gclkern.training.objectives import Batch, build_objective
from gclkern.training.phase_training import PhaseTraining
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan
from gclkern.training.trainer import TrainingStep

COUNTS = [50, 20, 5]
FIRST, SECOND = plan("oltr", None, "digits-lt", COUNTS)


def setting() -> tuple[Any, Any, Batch]:
    torch.manual_seed(0)
    network = build_network("modulated:small-cnn", "meta-embedding", 3, in_channels=1, image_size=8)
    return network, build_objective(SECOND, COUNTS, 64), Batch(torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor(1))


def test_the_memory_starts_from_class_means() -> None:
    """Once: later epochs leave it to the optimizer. A class without samples has none."""
    network, objective, _ = setting()
    assert [objective.needs_centroids(epoch) for epoch in range(3)] == [True, False, False]
    means = torch.randn(3, 64)
    means[1] = float("nan")
    centroids = {"centroids": means, "counts": torch.tensor([4, 0, 2])}
    objective.begin_epoch(network, 0, centroids)
    expected = means.clone()
    expected[1] = 0.0
    assert torch.equal(network.head.memory, expected)
    objective.begin_epoch(network, 1, {"centroids": torch.randn(3, 64), "counts": torch.ones(3)})
    assert torch.equal(network.head.memory, expected)


def test_the_first_memory_is_that_of_all_training_images_without_augmentation() -> None:
    data, processes = load_data("digits-lt"), Processes.single(torch.device("cpu"))
    config, phase = RunConfig(method="oltr"), plan("oltr", None, "digits-lt", data.class_counts)[1]
    network: Any = build_network("modulated:small-cnn", "meta-embedding", 10, in_channels=1, image_size=8)
    PhaseTraining(phase, network, data, config, processes).begin_epoch()
    network.eval()
    features = torch.cat([network.backbone(images) for images, _ in plain_batches(data.train, processes)]).double()
    means = torch.stack([features[data.train.labels == label].mean(0) for label in range(10)])
    torch.testing.assert_close(network.head.memory.double(), means, rtol=1e-5, atol=1e-6)


def test_the_loss_is_cross_entropy_and_a_hundredth_of_the_memory_s() -> None:
    network, objective, batch = setting()
    network.head.memory.data.normal_()
    network.eval()
    loss = objective(network, batch)
    features = network.backbone(batch.images)
    torch.testing.assert_close(loss, F.cross_entropy(network.head(features), batch.target) + 0.01 * MemoryLoss()(features, batch.target, network.head.memory))
    loss.backward()
    memory = network.head.memory.grad.clone()
    network.zero_grad()
    (0.01 * objective.memory_loss(features, batch.target, network.head.memory)).backward()
    torch.testing.assert_close(network.head.memory.grad, memory)


def test_the_second_phase_begins_as_the_first_one_ended() -> None:
    """Attention starts as the identity, and the classifier that fills in from the memory is stage 1's."""
    data = load_data("digits-lt")
    config = RunConfig(method="oltr")
    first, second = plan("oltr", None, "digits-lt", data.class_counts)
    network: Any = prepare(first, None, data, config, torch.device("cpu"))
    weight, images = network.head.weight.detach().clone(), torch.randn(4, 1, 8, 8)
    features = network.eval().backbone(images)
    network = prepare(second, network, data, config, torch.device("cpu")).eval()
    torch.testing.assert_close(network.backbone(images), torch.relu(network.backbone.embedding(features)))
    assert torch.equal(network.head.hallucinator.weight, weight)


def test_rates_of_the_second_phase() -> None:
    """The classifier's is ten times that of the network, the memory's is the network's."""
    network, objective, _ = setting()
    groups = {group["factor"]: {id(parameter) for parameter in group["params"]} for group in TrainingStep(network, objective).learn(SECOND.lr_factors)}
    assert groups.keys() == {1.0, 10.0}
    assert groups[10.0] == {id(parameter) for name, parameter in network.head.named_parameters() if name != "memory"}


def test_places_trains_attention_embedding_and_classifier() -> None:
    phase = plan("oltr", None, "places-lt", COUNTS)[1]
    torch.manual_seed(0)
    network: Any = build_network("embedded-modulated:small-cnn", "meta-embedding", 3, in_channels=1, image_size=8)
    step = TrainingStep(network, build_objective(phase, COUNTS, 512), trains=phase.trains)
    learned = {id(parameter) for group in step.learn(phase.lr_factors) for parameter in group["params"]}
    parts = (network.backbone.attention, network.backbone.embedding, network.head)
    assert learned == {id(parameter) for part in parts for parameter in part.parameters()}
    step.train()
    assert not network.backbone.trunk.training, "its batch normalisation keeps its statistics"


def test_other_re_trainings_are_refused() -> None:
    with pytest.raises(ValueError, match="`retrain=lws`: the classifier of oltr cannot be re-trained this way; take `retrain=none`"):
        plan("oltr", "lws", "cifar10-lt", COUNTS)
    with pytest.raises(ValueError, match="`retrain=tau-norm`: the classifier of tde cannot be re-trained this way; take `retrain=crt` or `retrain=gcl` or"):
        plan("tde", "tau-norm", "cifar10-lt", COUNTS)
