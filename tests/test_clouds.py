"""Cloud sizes: known values, the bounds that hold for any counts, and refusals that name the class."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclkern.clouds import STRATEGIES, cloud_sizes

# CIFAR-10-LT with imbalance 100
CIFAR = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def plain(counts: list[int], strategy: str, exponent: float = 0.25) -> list[float]:
    most = max(counts)
    sizes = {
        "log": [math.log(most) - math.log(n) for n in counts],
        "power": [most**exponent - n**exponent for n in counts],
        "cosine": [math.cos(math.pi / 2 * n / most) for n in counts],
    }[strategy]
    return [size / max(sizes) for size in sizes]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_definition(strategy: str) -> None:
    sizes = cloud_sizes(CIFAR, strategy)
    assert sizes.dtype == torch.float32
    assert sizes.shape == (10,)
    assert sizes.tolist() == pytest.approx(plain(CIFAR, strategy), abs=1e-7)
    assert sizes[0] == 0.0
    assert sizes[-1] == 1.0


def test_exponent() -> None:
    assert cloud_sizes(CIFAR, "power", 1 / 3).tolist() == pytest.approx(plain(CIFAR, "power", 1 / 3), abs=1e-7)
    assert torch.equal(cloud_sizes(CIFAR, "power"), cloud_sizes(CIFAR, "power", exponent=0.25))


def test_a_small_exponent_tends_to_log() -> None:
    assert torch.allclose(cloud_sizes(CIFAR, "power", 1e-12), cloud_sizes(CIFAR), atol=1e-6)


@given(counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=40), strategy=st.sampled_from(STRATEGIES))
def test_range_and_order(counts: list[int], strategy: str) -> None:
    sizes = cloud_sizes(counts, strategy).tolist()
    assert all(0.0 <= size <= 1.0 for size in sizes)
    assert sizes[counts.index(max(counts))] == 0.0
    if len(set(counts)) == 1:
        assert not any(sizes)
    else:
        assert sizes[counts.index(min(counts))] == 1.0
    by_count = [size for _, size in sorted(zip(counts, sizes, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert all(first >= second - 1e-7 for first, second in itertools.pairwise(by_count))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("classes", [1, 3, 67])
def test_equal_counts_have_no_clouds(strategy: str, classes: int) -> None:
    assert torch.equal(cloud_sizes([37] * classes, strategy), torch.zeros(classes))


def read_only() -> Any:
    counts = np.array([8, 4, 2])
    counts.flags.writeable = False
    return counts


@pytest.mark.parametrize(
    "counts",
    [(8, 4, 2), [8.0, 4.0, 2.0], read_only(), np.array([8, 4, 2], dtype=np.uint16), torch.tensor([8, 4, 2]), torch.tensor([8.0, 4.0, 2.0]), range(8, 2, -2)],
    ids=["tuple", "floats", "read-only array", "uint16", "int tensor", "float tensor", "range"],
)
@pytest.mark.filterwarnings("error")
def test_kinds_of_counts(counts: Any) -> None:
    expected = plain([int(count) for count in counts], "log")
    assert cloud_sizes(counts).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.gpu
def test_sizes_lie_beside_the_counts() -> None:
    assert cloud_sizes(torch.tensor([8, 4, 2], device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"class_counts": [3, 0, 2]}, ValueError, ["class_counts[1]", "0"]),
        ({"class_counts": [3, 2, -7]}, ValueError, ["class_counts[2]", "-7"]),
        ({"class_counts": [3.0, math.nan]}, ValueError, ["class_counts[1]", "nan"]),
        ({"class_counts": [math.inf, 3.0]}, ValueError, ["class_counts[0]", "inf"]),
        ({"class_counts": []}, ValueError, ["class_counts", "empty"]),
        ({"class_counts": [[3, 2]]}, ValueError, ["class_counts", "(1, 2)"]),
        ({"class_counts": 5}, ValueError, ["class_counts", "()"]),
        ({"class_counts": [True, False]}, TypeError, ["class_counts", "bool"]),
        ({"class_counts": "many"}, TypeError, ["class_counts", "str"]),
        ({"class_counts": {1: 3}}, ValueError, ["class_counts", "key 1", "0 to 0"]),
        ({"class_counts": [3, None]}, TypeError, ["class_counts", "list"]),
        ({"strategy": "exp"}, ValueError, ["strategy", "'exp'", "'log'", "'power'", "'cosine'"]),
        ({"exponent": 0.3}, ValueError, ["exponent", "0.3", '"log"', '"power"']),
        ({"strategy": "cosine", "exponent": 0.25}, ValueError, ["exponent", "0.25", '"cosine"']),
        ({"strategy": "power", "exponent": 0}, ValueError, ["exponent", "0"]),
        ({"strategy": "power", "exponent": -1.0}, ValueError, ["exponent", "-1"]),
        ({"strategy": "power", "exponent": "1/4"}, TypeError, ["exponent", "'1/4'"]),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        cloud_sizes(**{"class_counts": [3, 2], **arguments})
    for word in words:
        assert re.search(re.escape(word), str(caught.value)), (word, str(caught.value))
