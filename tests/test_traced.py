"""Graphs in which a share of mixup or a number of rows is a symbol. What every operation promises of graphs: test_operations.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gclkern import GCLLoss
from gclkern.functional import gcl_cross_entropy
from tests.support.cases import cosines, labels

CLASSES = 9


def compiled(function: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def test_one_graph_for_every_mixing_share() -> None:
    """Mixup draws a new share for every batch, which must not compile a new graph."""
    step, counter = compiled(lambda x, target, lam: gcl_cross_entropy(x, target, target_b=target.flip(0), lam=lam))
    cosine, target = cosines(6, CLASSES), labels(6, CLASSES)
    graphs = []
    for lam in (0.3, 0.5, 0.7, 0.11):
        assert step(cosine, target, lam).equal(gcl_cross_entropy(cosine, target, target_b=target.flip(0), lam=lam))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1, "the first graph is that of its number, the second of any"


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_batch(strict: bool) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = GCLLoss([100] * (CLASSES - 1) + [10])

        def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
            loss: Tensor = self.criterion(cosine, target, seed=3)
            return loss

    step, rows = Step(), torch.export.Dim("rows")
    cosine, target = cosines(4, CLASSES), labels(4, CLASSES)
    program = torch.export.export(step, (cosine, target), dynamic_shapes={"cosine": {0: rows}, "target": {0: rows}}, strict=strict)
    cosine, target = cosines(7, CLASSES), labels(7, CLASSES)
    assert program.module()(cosine, target).equal(step(cosine, target))
