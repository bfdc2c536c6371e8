"""OLTR's classifier, memory loss and attention against their formulas in float64, number by number, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gclkern import MemoryLoss, MetaEmbeddingClassifier, ModulatedAttention

ROWS, WIDTH, CLASSES = 5, 6, 4
TARGET = torch.tensor([0, 2, 0, 1, 2])  # class 3 has no sample


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classifier(dtype: torch.dtype = torch.float64) -> MetaEmbeddingClassifier:
    torch.manual_seed(2)
    layer = MetaEmbeddingClassifier(WIDTH, CLASSES, dtype=dtype)
    layer.memory.data.copy_(numbers(CLASSES, WIDTH, seed=3))
    return layer


def norm(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


def meta_logits(layer: MetaEmbeddingClassifier, features: Tensor) -> Tensor:
    """Section 3.1 of the paper, in Python's numbers."""
    memory, weight, hallucinate, select = (value.tolist() for value in (layer.memory, layer.weight, layer.hallucinator.weight, layer.selector.weight))
    bias_h, bias_s = layer.hallucinator.bias.tolist(), layer.selector.bias.tolist()
    result = []
    for x in features.tolist():
        scores = [sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in zip(hallucinate, bias_h, strict=True)]
        shares = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        m = [sum(share * row[d] for share, row in zip(shares, memory, strict=True)) for d in range(WIDTH)]
        e = [math.tanh(sum(a * b for a, b in zip(row, x, strict=True)) + bias) for row, bias in zip(select, bias_s, strict=True)]
        nearest = min(norm([a - b for a, b in zip(x, row, strict=True)]) for row in memory)
        v = [10 / nearest * (a + b * c) for a, b, c in zip(x, e, m, strict=True)]
        squash = norm(v) / (1 + norm(v))
        result.append([16 * squash * sum(a * b for a, b in zip(v, w, strict=True)) / norm(v) / norm(w) for w in weight])
    return torch.tensor(result, dtype=torch.float64)


def test_meta_embedding() -> None:
    layer, features = classifier(), numbers(ROWS, WIDTH)
    torch.testing.assert_close(layer(features).detach(), meta_logits(layer, features))


def test_meta_embedding_of_single_precision() -> None:
    layer, features = classifier(torch.float32), numbers(ROWS, WIDTH, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(features)
    torch.testing.assert_close(logits.detach().double(), meta_logits(layer, features), rtol=1e-5, atol=1e-5)
    assert classifier(torch.bfloat16)(features.bfloat16()).dtype == torch.float32


def test_gradients_of_the_classifier() -> None:
    layer = classifier()
    names = ["weight", "hallucinator.weight", "hallucinator.bias", "selector.weight", "selector.bias"]
    values = [layer.get_parameter(name) for name in names]

    def logits(features: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (features,))

    assert torch.autograd.gradcheck(logits, (numbers(ROWS, WIDTH).requires_grad_(), *values))
    layer(numbers(ROWS, WIDTH)).square().sum().backward()
    assert layer.memory.grad is None, "cross entropy does not train the memory"


def test_a_feature_that_is_its_centroid() -> None:
    layer, features = classifier(torch.float32), numbers(ROWS, WIDTH, dtype=torch.float32)
    features[1] = layer.memory[2].detach()
    features.requires_grad_()
    logits = layer(features)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def memory_loss(features: Tensor, memory: Tensor, *, margin: float, weight: float) -> tuple[float, float]:
    """The loss, and the mean over pairs, by a loop over pairs."""

    def distance(i: int, j: int) -> float:
        return sum((a - b) ** 2 for a, b in zip(features[i].tolist(), memory[j].tolist(), strict=True))

    attraction = sum(distance(i, label) for i, label in enumerate(TARGET.tolist())) / (2 * len(features))
    others = [distance(i, j) for i, label in enumerate(TARGET.tolist()) for j in range(len(memory)) if j != label]
    mean = sum(others) / (len(features) * len(memory))
    return attraction + weight * max(0.0, margin - mean), mean


@pytest.mark.parametrize("margin", [0.0, 10.0, 40.0])
def test_memory_loss(margin: float) -> None:
    features, memory = numbers(ROWS, WIDTH), numbers(CLASSES, WIDTH, seed=3)
    expected, mean = memory_loss(features, memory, margin=margin, weight=0.3)
    assert 0.0 < mean < 40.0, "the hinge is open for the largest margin and closed for the smallest"
    loss = MemoryLoss(margin=margin, repulsion_weight=0.3)(features, TARGET, memory)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_the_published_settings_are_the_defaults() -> None:
    assert (MemoryLoss().margin, MemoryLoss().repulsion_weight, MetaEmbeddingClassifier(2, 2).scale) == (10.0, 0.01, 16.0)


def test_memory_loss_far_from_the_origin() -> None:
    """Squares of 1e4 have an absolute error of 6 in float32: only sums about the memory's centre keep the digits of distances near 1."""
    features, memory = numbers(ROWS, WIDTH), numbers(CLASSES, WIDTH, seed=3)
    far = (1e4 + features).float(), (1e4 + memory).float()
    expected, _ = memory_loss(far[0].double(), far[1].double(), margin=40.0, weight=1.0)
    assert float(MemoryLoss(margin=40.0, repulsion_weight=1.0)(far[0], TARGET, far[1])) == pytest.approx(expected, rel=1e-5)


def test_gradients_of_the_memory_loss() -> None:
    """Of the features and of repulsion: the derivative. Of attraction for the memory: the release's, whose factor is 1 / (1 + count)."""
    loss, memory = MemoryLoss(margin=40.0, repulsion_weight=0.3), numbers(CLASSES, WIDTH, seed=3)
    assert torch.autograd.gradcheck(lambda x: loss(x, TARGET, memory), (numbers(ROWS, WIDTH).requires_grad_(),))
    features, gradients = numbers(ROWS, WIDTH), []
    for weight in (0.3, 0.0):
        memory = numbers(CLASSES, WIDTH, seed=3).requires_grad_()
        gradients.append(torch.autograd.grad(MemoryLoss(margin=40.0, repulsion_weight=weight)(features, TARGET, memory), memory)[0])
    released = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    for c in range(CLASSES):
        of_class = features[c == TARGET]
        released[c] = (memory[c].detach() - of_class).sum(0) / (1 + len(of_class)) / ROWS
    torch.testing.assert_close(gradients[1], released)
    repulsion = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    for i, label in enumerate(TARGET.tolist()):
        for j in range(CLASSES):
            if j != label:
                repulsion[j] -= 2 * (memory[j].detach() - features[i]) / (ROWS * CLASSES)
    torch.testing.assert_close(gradients[0] - gradients[1], 0.3 * repulsion)


def test_attention() -> None:
    """The definition, place by place."""
    torch.manual_seed(4)
    attention = ModulatedAttention(4, 2, 3).double()
    nn.init.normal_(attention.output.weight)
    nn.init.normal_(attention.get_parameter("output.bias"))
    maps = numbers(2, 4, 2, 3)
    theta, phi, g = (layer(maps).detach().flatten(2) for layer in (attention.theta, attention.phi, attention.g))
    weight, bias = attention.output.weight.detach()[:, :, 0, 0], attention.get_parameter("output.bias").detach()
    expected = maps.flatten(2).clone()
    for n in range(2):
        scores = attention.places.weight.detach() @ maps[n].flatten() + attention.places.bias.detach()
        for place in range(6):
            match = torch.stack([theta[n, :, place] @ phi[n, :, other] for other in range(6)]).softmax(0)
            answer = weight @ torch.stack([match[other] * g[n, :, other] for other in range(6)]).sum(0) + bias
            expected[n, :, place] += scores.softmax(0)[place] * answer
    torch.testing.assert_close(attention(maps).detach(), expected.view_as(maps))


def test_gradients_of_attention() -> None:
    attention = ModulatedAttention(4, 2, 2).double()
    nn.init.normal_(attention.output.weight)
    assert torch.autograd.gradcheck(attention, (numbers(2, 4, 2, 2).requires_grad_(),))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: MetaEmbeddingClassifier(0, 3), ValueError, ["in_features", "0"]),
    (lambda: MetaEmbeddingClassifier(8, 3, scale=-1.0), ValueError, ["scale", "-1"]),
    (lambda: MetaEmbeddingClassifier(8, 3)(torch.zeros(2, 6)), ValueError, ["features", "8", "[2, 6]"]),
    (lambda: MemoryLoss(margin=-1.0), ValueError, ["margin", "-1"]),
    (lambda: MemoryLoss(repulsion_weight="a"), TypeError, ["repulsion_weight", "a"]),  # type: ignore[arg-type]
    (lambda: MemoryLoss()(numbers(2, 3), torch.tensor([0, 1]), numbers(4, 2)), ValueError, ["memory", "3", "(4, 2)"]),
    (lambda: MemoryLoss()(numbers(2, 3), torch.tensor([0, 4]), numbers(4, 3)), ValueError, ["target[1]", "4"]),
    (lambda: ModulatedAttention(1, 2, 2), ValueError, ["channels", "1"]),
    (lambda: ModulatedAttention(4, 2, 2)(numbers(1, 4, 2, 3)), ValueError, ["maps", "4, 2, 2", "[1, 4, 2, 3]"]),
])  # fmt: skip
def test_refusals(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
