"""The oracle against answers that are known from elsewhere: published words, torch's cross entropy, and arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import oracle


def test_philox_words_of_key_and_counter_zero() -> None:
    assert oracle.philox(0, (0, 0, 0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)


def test_philox_with_ten_rounds_gives_the_published_words() -> None:
    """Known answers of the authors' library (Random123, kat_vectors): the round function and the key schedule, at another number of rounds."""
    assert oracle.philox(0, (0, 0, 0, 0), rounds=10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert oracle.philox(2**64 - 1, (ones, ones, ones, ones), rounds=10) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_draws_of_a_seed_and_row_beyond_32_bits() -> None:
    draws = oracle.noise(2**40 + 5, 1, 4, row_offset=2**33 + 1)[0].tolist()
    assert draws == pytest.approx([0.0689661, 0.1897665, 0.3705992, 0.1379022], abs=5e-8)  # the answers are given to 7 digits


def test_plain_options_are_torch_cross_entropy() -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, -100, 1, 1])
    weight = torch.rand(5, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": 0.2, "reduction": reduction}
        torch.testing.assert_close(oracle.gcl_cross_entropy(logits, target, scale=1.0, **options), F.cross_entropy(logits, target, **options))


def test_cloud_margin_and_bias_by_hand() -> None:
    """Two classes: the loss is the softplus of the difference of two logits that are written out here."""
    cosine, target = torch.tensor([[0.5, 0.25]], dtype=torch.float64), torch.tensor([0])
    cloud, bias = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.tensor([0.1, -0.2], dtype=torch.float64)
    first, second = oracle.draw(7, 3, 0), oracle.draw(7, 3, 1)
    z0 = 10 * (0.5 - 0.3 * first - 0.1) + 0.1
    z1 = 10 * (0.25 - 0.6 * second) - 0.2
    loss = oracle.gcl_cross_entropy(cosine, target, cloud, scale=10.0, margin=0.1, bias=bias, seed=7, row_offset=3)
    assert loss.item() == pytest.approx(math.log1p(math.exp(z1 - z0)), rel=1e-12)


def test_mixed_and_focal_by_hand() -> None:
    logits, a, b = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]), torch.tensor([3, 1, -100])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    none_a, none_b = (F.cross_entropy(logits[:2], labels[:2], weight=weight, reduction="none") for labels in (a, b))
    mean = oracle.gcl_cross_entropy(logits, a, scale=1.0, weight=weight, target_b=b, lam=0.25)
    # Sample 2 is dropped, so the weights are 0.25 * 1 + 0.75 * 4 of sample 0 and 2 of sample 1.
    torch.testing.assert_close(mean, (0.25 * none_a + 0.75 * none_b).sum() / (3.25 + 2.0))
    focal = oracle.gcl_cross_entropy(logits[:2], a[:2], scale=1.0, weight=weight, gamma=2.0)
    torch.testing.assert_close(focal, (none_a * (1 - torch.exp(-none_a)) ** 2).sum() / 2)


def test_a_row_of_zeros_has_cosine_and_gradient_zero() -> None:
    features = torch.randn(3, 4, dtype=torch.float64)
    features[1] = 0
    features.requires_grad_()
    oracle.linear_gcl_cross_entropy(features, torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2])).backward()
    assert features.grad is not None and features.grad[1].eq(0).all() and features.grad[0].ne(0).all()
