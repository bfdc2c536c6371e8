"""A loss that compares samples, of the batch of all ranks, equals that of one process: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gclkern import BalancedContrastiveLoss, ProCoLoss, SupConLoss
from gclkern.distributed import ShardError, gather_batch
from tests.support.processes import run_ranks

ROWS, CLASSES, WIDTH = 5, 4, 16  # rows of each rank
# the same sums of the same rows on each rank, but for gradients of a network, which ranks add up in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def problem(world: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, prototypes = torch.randn(world * ROWS, WIDTH, generator=generator), torch.randn(CLASSES, WIDTH, generator=generator)
    return inputs, torch.arange(world * ROWS) % CLASSES, prototypes


class Model(nn.Module):
    """A network with a loss, as DistributedDataParallel wraps it."""

    def __init__(self, criterion: nn.Module, prototypes: Tensor | None, *, averaged_gradients: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.criterion, self.averaged_gradients = nn.Linear(WIDTH, WIDTH), criterion, averaged_gradients
        self.prototypes = None if prototypes is None else nn.Parameter(prototypes.clone())

    def forward(self, inputs: Tensor, target: Tensor, gather: bool = True) -> Tensor:
        features = self.network(inputs)
        if gather:
            features, target = gather_batch(features, target, averaged_gradients=self.averaged_gradients)
        loss: Tensor = self.criterion(features, target) if self.prototypes is None else self.criterion(features, self.prototypes, target)
        return loss


def as_one(rank: int, world: int) -> None:
    inputs, target, prototypes = problem(world)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    for criterion, keys in ((SupConLoss, None), (BalancedContrastiveLoss, prototypes), (lambda: ProCoLoss([9, 5, 3, 2], WIDTH), None)):
        whole = Model(criterion(), keys, averaged_gradients=False)
        expected = whole(inputs, target, gather=False)
        expected.backward()
        for averaged in (False, True):
            part = Model(criterion(), keys, averaged_gradients=averaged)
            run: Any = nn.parallel.DistributedDataParallel(part) if averaged else part
            loss = run(inputs[mine], target[mine])
            loss.backward()
            torch.testing.assert_close(loss, expected, **TOLERANCE)
            for name, parameter in part.named_parameters():
                assert parameter.grad is not None
                if not averaged and name != "prototypes":
                    torch.distributed.all_reduce(parameter.grad)
                torch.testing.assert_close(parameter.grad, dict(whole.named_parameters())[name].grad, **TOLERANCE)


def refusals(rank: int, world: int) -> None:
    inputs, target, _ = problem(world)
    with pytest.raises(ShardError, match="rows of features"):
        gather_batch(inputs[: 2 + rank], target[: 2 + rank])
    with pytest.raises(ShardError if rank == 0 else TypeError, match="refused" if rank == 0 else "int32"):
        gather_batch(inputs, target.int() if rank == 1 else target)


def two_ranks(rank: int, world: int) -> None:
    as_one(rank, world)
    refusals(rank, world)


def test_two_ranks_equal_one() -> None:
    run_ranks(2, two_ranks)


def test_one_process_keeps_its_batch() -> None:
    inputs, target, _ = problem(1)
    features, labels = gather_batch(inputs, target, averaged_gradients=True)
    assert features is inputs and labels.equal(target)
    assert torch.compile(lambda x: gather_batch(x, target)[0] * 2, backend="eager")(inputs).equal(2 * inputs)
    torch.compiler.reset()
    with pytest.raises(ValueError, match="target"):
        gather_batch(inputs, target[:-1])
