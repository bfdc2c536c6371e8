"""The estimate of a run's time: its arithmetic, and that measuring changes nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gclkern.training.estimate import estimated_seconds, seconds_per_image, step_seconds
from gclkern.training.recipes import plan


def test_measuring_leaves_network_and_generator_alone() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    before, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    forward, both = seconds_per_image(backbone, (1, 8, 8), torch.device("cpu"))
    assert 0 < forward < both
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters()) and backbone.training


def test_estimate() -> None:
    """Stage 1 trains the backbone, stage 2 the head, which needs a forward pass of the backbone alone; both are evaluated 20 times."""
    phases = plan("gcl", None, "cifar100-lt", [100, 28])
    steps = 128 // phases[0].batch_size
    drawn = [phase.epochs * steps * phase.batch_size for phase in phases]
    evaluated = 1000 * (phases[0].epochs / (phases[0].epochs // 20) + phases[1].epochs / max(1, phases[1].epochs // 20))
    assert estimated_seconds(phases, 128, 1000, (0.5, 2.0), None) == 2.0 * drawn[0] + 0.5 * drawn[1] + 0.5 * evaluated
    assert step_seconds(phases, 128, (0.5, 2.0)) == 2.0 * drawn[0] + 0.5 * drawn[1]
    assert estimated_seconds(phases[:1], 128, 1000, (0.5, 2.0), phases[0].epochs) == 2.0 * drawn[0] + 500
