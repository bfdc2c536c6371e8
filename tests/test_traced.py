"""The losses where sizes and numbers are symbols, or tensors have no values: graphs that serve every batch, torch.export, fake and meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from gclkern import GCLLoss
from gclkern.functional import dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy

CLASSES, DIM = 9, 5
PLANS = ["materialised", "chunked", "recompute"]
Loss = Callable[..., Tensor]


def batch(rows: int, columns: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Features or cosines (rows, columns) that want a gradient, and targets."""
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, columns, generator=generator).to(device).requires_grad_()
    return features, torch.randint(CLASSES, (rows,), generator=generator).to(device)


def losses(device: torch.device | str = "cpu") -> dict[str, tuple[int, Loss]]:
    """By name, the columns of its matrix and the loss of that, targets and a place in the global batch."""
    cloud = torch.linspace(0, 0.5, CLASSES, device=device)
    anchors = torch.linspace(-1, 1, CLASSES * DIM, device=device).sin().view(CLASSES, DIM)

    def logits(x: Tensor, target: Tensor, row_offset: int, **options: Any) -> Tensor:
        return gcl_cross_entropy(x, target, cloud, seed=5, row_offset=row_offset, margin=0.1, **options)

    def head(plan: str) -> Loss:
        def loss(x: Tensor, target: Tensor, row_offset: int, **options: Any) -> Tensor:
            return linear_gcl_cross_entropy(x, anchors, target, cloud, seed=5, row_offset=row_offset, gamma=1.0, plan=plan, **options)

        return loss

    def bound(x: Tensor, target: Tensor, row_offset: int, **options: Any) -> Tensor:
        return dro_lt_loss(x, target, anchors, 0.3, temperature=2.0, **options)

    return {"logits": (CLASSES, logits), **{plan: (DIM, head(plan)) for plan in PLANS}, "dro_lt": (DIM, bound)}


def compiled(function: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


@pytest.mark.parametrize("name", losses())
def test_dynamic_shapes(name: str, backend: str, device: torch.device) -> None:
    """dynamic=True makes symbols of everything: of sizes and offsets, and of the numbers that are a function's defaults."""
    columns, loss = losses(device)[name]
    step, counter = compiled(lambda *args: loss(*args, backend=backend), dynamic=True)
    graphs = []
    for rows, row_offset in ((4, 2), (7, 6), (13, 20), (5, 3)):
        features, target = batch(rows, columns, device)
        expected = torch.autograd.grad(loss(features, target, row_offset, backend=backend), features)[0]
        gradient = torch.autograd.grad(step(features, target, row_offset), features)[0]
        assert gradient.equal(expected)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, "no batch after the first is traced"


def test_one_graph_for_every_mixing_share() -> None:
    """Mixup draws another number for every batch."""
    step, counter = compiled(lambda x, target, lam: gcl_cross_entropy(x, target, target_b=target.flip(0), lam=lam))
    features, target = batch(6, CLASSES)
    graphs = []
    for lam in (0.3, 0.5, 0.7, 0.11):
        assert step(features, target, lam).equal(gcl_cross_entropy(features, target, target_b=target.flip(0), lam=lam))
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
    cosine, target = batch(4, CLASSES)
    program = torch.export.export(step, (cosine.detach(), target), dynamic_shapes={"cosine": {0: rows}, "target": {0: rows}}, strict=strict)
    features, target = batch(7, CLASSES)
    assert program.module()(features, target).equal(step(features, target))


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("name", losses())
def test_tensors_without_values(name: str, mode: str) -> None:
    with FakeTensorMode() if mode == "fake" else contextlib.nullcontext():
        device = "meta" if mode == "meta" else "cpu"
        columns, loss = losses(device)[name]
        features = torch.empty(4, columns, device=device, requires_grad=True)
        value = loss(features, torch.empty(4, dtype=torch.int64, device=device), 0)
        value.backward()
    assert value.shape == ()
    assert features.grad is not None and features.grad.shape == features.shape
