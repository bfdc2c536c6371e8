"""Running statistics of a step in parts; in two processes, see test_distributed_training.py and test_every_method.py."""

from __future__ import annotations

import math

import torch
from torch import nn

from gclkern.training.processes import Processes
from gclkern.training.running_statistics import RunningStatistics


def test_a_step_moves_them_by_the_mean_of_its_parts() -> None:
    """By the momentum of batch normalisation once, to the mean of the parts' statistics. Buffers that do not move keep their bits, infinity too."""
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("mask", torch.tensor([0.1, -math.inf]))
    statistics = RunningStatistics(norm, Processes.single(torch.device("cpu")), 3)
    samples = torch.randn(2, 3, 5, 3)  # steps, parts, rows, columns
    expected = torch.zeros(3)
    for step in samples:
        statistics.begin_step()
        for part in step:
            norm(part)
            statistics.end_part()
        statistics.end_step()
        expected = 0.9 * expected + 0.1 * step.mean((0, 1))
        torch.testing.assert_close(norm.running_mean, expected)
    assert norm.get_buffer("mask").tolist() == [torch.tensor(0.1).item(), -math.inf]


def test_a_step_of_one_part_is_left_alone() -> None:
    norm, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    statistics = RunningStatistics(norm, Processes.single(torch.device("cpu")), 1)
    rows = torch.randn(5, 3)
    statistics.begin_step()
    norm(rows)
    statistics.end_part()
    statistics.end_step()
    plain(rows)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in norm.state_dict().items())


def test_a_network_without_buffers_has_none_to_move() -> None:
    """Such as a vision transformer."""
    statistics = RunningStatistics(nn.Linear(3, 2), Processes.single(torch.device("cpu")), 2)
    statistics.begin_step()
    statistics.end_part()
    statistics.end_step()
