"""CosineLinear against the cosine's definition; gradients by finite differences, rows without a direction, dtypes and autocast."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern.layers import AdaptiveCalibration, CosineLinear


def features(rows: int = 5, width: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_weight_starts_with_unit_rows() -> None:
    torch.manual_seed(0)
    weight = CosineLinear(64, 500).weight.detach()
    assert weight.shape == (500, 64)
    assert torch.allclose(weight.norm(dim=1), torch.ones(500), atol=1e-6)
    # a uniform(-1, 1) row of 64 has norm sqrt(64 / 3), so no entry is far beyond its inverse
    assert 0.1 < float(weight.abs().max()) < 0.3
    assert abs(float(weight.mean())) < 0.005


def test_reset_draws_anew() -> None:
    layer = CosineLinear(6, 4)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight)
    assert torch.allclose(layer.weight.norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_cosine(dtype: torch.dtype) -> None:
    layer = CosineLinear(7, 3, dtype=dtype)
    batch = features(dtype=dtype)
    expected = F.cosine_similarity(batch.double()[:, None], layer.weight.double()[None], dim=2)
    cosine = layer(batch)
    assert cosine.dtype == dtype
    assert torch.allclose(cosine.double(), expected, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (0, 7)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = CosineLinear(7, 3)
    batch = torch.randn(shape)
    assert layer(batch).shape == (*shape[:-1], 3)
    assert torch.allclose(layer(batch).view(-1, 3), layer(batch.view(-1, 7)), atol=1e-6)


def test_lengths_do_not_matter() -> None:
    layer = CosineLinear(7, 3)
    batch = features()
    expected = layer(batch)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[1e-6], [3.0], [1e6]]))
    assert torch.allclose(layer(1e3 * batch), expected, atol=1e-6)


def test_large_float16_features() -> None:
    layer = CosineLinear(7, 3, dtype=torch.float16)
    assert torch.allclose(layer(1e4 * features(dtype=torch.float16)), layer(features(dtype=torch.float16)), atol=4e-3)


def test_gradients() -> None:
    layer = CosineLinear(7, 3, dtype=torch.float64)
    batch = features(dtype=torch.float64).requires_grad_()

    def cosine(batch: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (batch,))

    assert torch.autograd.gradcheck(cosine, (batch, layer.weight))
    assert torch.autograd.gradgradcheck(cosine, (batch, layer.weight))


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-30])
def test_rows_without_a_direction(length: float) -> None:
    layer = CosineLinear(7, 3)
    with torch.no_grad():
        layer.weight[1] = length / 7**0.5
    batch = features()
    batch[2] = length / 7**0.5
    batch.requires_grad_()
    cosine = layer(batch)
    assert not cosine[2].any()
    assert not cosine[:, 1].any()
    cosine.square().sum().backward()
    assert batch.grad is not None and layer.weight.grad is not None
    assert not batch.grad[2].any()
    assert not layer.weight.grad[1].any()
    assert batch.grad[0].any()
    assert layer.weight.grad.isfinite().all()
    assert batch.grad.isfinite().all()


def test_a_broken_row_spoils_no_other() -> None:
    layer = CosineLinear(7, 3)
    batch = features()
    batch[1] = float("nan")
    cosine = layer(batch)
    assert cosine[1].isnan().all()
    assert torch.equal(cosine[[0, 2, 3, 4]], layer(features())[[0, 2, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = CosineLinear(7, 3)
    batch = features().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        cosine = layer(batch)
        from_rounded = layer(batch.to(dtype))
    assert cosine.dtype == from_rounded.dtype == dtype
    assert torch.allclose(cosine.float(), layer(batch), atol=4 * torch.finfo(dtype).eps)
    cosine.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert batch.grad is not None and batch.grad.dtype == torch.float32


def test_state() -> None:
    layer = CosineLinear(7, 3)
    assert list(layer.state_dict()) == ["weight"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, layer.weight)
    assert repr(layer) == "CosineLinear(in_features=7, num_classes=3)"
    assert CosineLinear(7, 3, device="meta").weight.is_meta


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CosineLinear(0, 3), ValueError, ["in_features", "0"]),
        (lambda: CosineLinear(7, -3), ValueError, ["num_classes", "-3"]),
        (lambda: CosineLinear(7.0, 3), TypeError, ["in_features", "7.0"]),  # type: ignore[arg-type]
        (lambda: CosineLinear(7, 3)(torch.zeros(2, 6)), ValueError, ["features", "7", "[2, 6]"]),
        (lambda: CosineLinear(7, 3)(torch.zeros(())), ValueError, ["features", "[]"]),
    ],
)
def test_refusals(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_calibration_is_the_papers_formula() -> None:
    layer = AdaptiveCalibration(7, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    logits, batch = torch.randn(5, 3, generator=generator, dtype=torch.float64), features(dtype=torch.float64)
    v, d = layer.confidence.weight[0], layer.confidence.bias[0]
    for i, row in enumerate(layer(logits, batch)):
        confidence = 1 / (1 + torch.exp(-(sum(v[k] * batch[i, k] for k in range(7)) + d)))
        for j in range(3):
            moved = layer.scale[j] * logits[i, j] + layer.offset[j]
            torch.testing.assert_close(row[j], confidence * moved + (1 - confidence) * logits[i, j])

    def calibrated(logits: Tensor, batch: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (logits, batch))

    assert torch.autograd.gradcheck(calibrated, (logits.requires_grad_(), batch.requires_grad_(), *layer.parameters()))


def test_calibration_starts_as_the_identity_and_learns_from_there() -> None:
    """The confidence has no gradient at first, while scale and offset do not change the logits; after one step of scale and offset it has one."""
    layer = AdaptiveCalibration(7, 3)
    logits, target = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 2, 2])
    assert torch.equal(layer(logits, features()), logits)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for moving in (False, True):
        optimizer.zero_grad()
        F.cross_entropy(layer(logits, features()), target).backward()
        assert layer.scale.grad is not None and layer.confidence.weight.grad is not None
        assert bool(layer.scale.grad.any())
        assert bool(layer.confidence.weight.grad.any()) is moving
        optimizer.step()


@pytest.mark.parametrize(("logits", "width", "message"), [((5, 4), 7, "logits must have shape"), ((5, 3), 6, "features must have shape")])
def test_calibration_refuses_other_shapes(logits: tuple[int, int], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveCalibration(7, 3)(torch.zeros(logits), torch.zeros(5, width))
