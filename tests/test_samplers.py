"""The samplers: what they draw (chi-square at fixed seeds), and that an epoch is one fixed list however it is split over ranks, steps and workers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from gclkern.samplers import (
    CBENSampler,
    ClassAwareSampler,
    ClassBalancedSampler,
    EffectiveNumberSampler,
    InstanceBalancedSampler,
    ProgressiveSampler,
    ReversedSampler,
    SquareRootSampler,
)

# Labels out of order and with gaps, as a data set may give them.
COUNTS = {7: 400, 0: 90, 3: 40, 12: 9, 5: 1}
LABELS = torch.tensor([label for label, count in COUNTS.items() for _ in range(count)])[torch.randperm(540, generator=torch.Generator().manual_seed(0))]

SAMPLERS: dict[str, Callable[..., Any]] = {
    "instance-balanced": InstanceBalancedSampler,
    "class-balanced": ClassBalancedSampler,
    "square-root": SquareRootSampler,
    "progressive": lambda labels, **options: ProgressiveSampler(labels, epochs=8, **options),
    "reversed": ReversedSampler,
    "effective-number": EffectiveNumberSampler,
    "cben": CBENSampler,
    "class-aware": ClassAwareSampler,
    "class-aware 4": lambda labels, **options: ClassAwareSampler(labels, samples_per_class=4, **options),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())


# ---- what is drawn


def weight(count: int, beta: float) -> float:
    return (1 - beta) / (1 - beta**count)


def cben_beta(count: int) -> float:
    return float(0.9999 + 1e-5 * (np.log(400) - np.log(count)) / np.log(400))


SHARES: dict[str, tuple[Callable[..., Any], Callable[[int], float]]] = {
    "class-balanced": (ClassBalancedSampler, lambda count: 1.0),
    "square-root": (SquareRootSampler, lambda count: count**0.5),
    "progressive": (lambda labels, **options: ProgressiveSampler(labels, epochs=4, **options), lambda count: count / 540),
    "reversed": (ReversedSampler, lambda count: 1 / count),
    "effective-number": (EffectiveNumberSampler, lambda count: count * weight(count, 0.9999)),
    "effective-number 0.99": (lambda labels, **options: EffectiveNumberSampler(labels, beta=0.99, **options), lambda count: count * weight(count, 0.99)),
    "effective-number 0": (lambda labels, **options: EffectiveNumberSampler(labels, beta=0.0, **options), lambda count: float(count)),
    "cben": (CBENSampler, lambda count: count * weight(count, cben_beta(count))),
}


@pytest.mark.parametrize("name", SHARES)
def test_samples_come_with_their_probabilities(name: str) -> None:
    make, share = SHARES[name]
    draws = torch.tensor(list(make(LABELS, num_samples=200_000, seed=3)))
    total = sum(share(count) for count in COUNTS.values())
    expected = torch.tensor([200_000 * share(COUNTS[int(label)]) / COUNTS[int(label)] / total for label in LABELS], dtype=torch.float64)
    seen = draws.bincount(minlength=len(LABELS))
    assert scipy.stats.chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-3
    by_class = {label: float(seen[label == LABELS].sum()) for label in COUNTS}
    assert scipy.stats.chisquare(list(by_class.values()), [200_000 * share(count) / total for count in COUNTS.values()]).pvalue > 1e-3


@pytest.mark.parametrize(("epoch", "done"), [(1, 0.25), (3, 0.75), (4, 1.0), (7, 1.0)])
def test_progressive_sampling_ends_class_balanced(epoch: int, done: float) -> None:
    sampler = ProgressiveSampler(LABELS, epochs=4, num_samples=50_000, seed=2)
    sampler.set_epoch(epoch)
    seen = Counter(LABELS[torch.tensor(list(sampler))].tolist())
    expected = [50_000 * ((1 - done) * count / 540 + done / len(COUNTS)) for count in COUNTS.values()]
    assert scipy.stats.chisquare([seen[label] for label in COUNTS], expected).pvalue > 1e-3


def test_successive_draws_are_independent() -> None:
    labels = LABELS[torch.tensor(list(ClassBalancedSampler(LABELS, num_samples=100_000, seed=5)))]
    pairs = Counter(zip(labels[:-1:2].tolist(), labels[1::2].tolist(), strict=True))
    assert scipy.stats.chisquare([pairs[first, second] for first in COUNTS for second in COUNTS]).pvalue > 1e-3


def test_epochs_are_independent() -> None:
    """The p-values of many seeds are uniform."""
    pvalues = []
    for seed in range(20):
        sampler = ClassBalancedSampler(LABELS, num_samples=3000, seed=seed)
        first = LABELS[torch.tensor(list(sampler))]
        sampler.set_epoch(1)
        pairs = Counter(zip(first.tolist(), LABELS[torch.tensor(list(sampler))].tolist(), strict=True))
        pvalues.append(scipy.stats.chisquare([pairs[first, second] for first in COUNTS for second in COUNTS]).pvalue)
    assert scipy.stats.kstest(pvalues, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("num_samples", [100, 540, 700])
def test_instance_balanced_passes_over_all(num_samples: int) -> None:
    """Epochs go on where the last one left the shuffled list, so 540 draws in a row from the first on are every sample once."""
    sampler = InstanceBalancedSampler(LABELS, num_samples=num_samples)
    draws = []
    for epoch in range(12):
        sampler.set_epoch(epoch)
        draws += list(sampler)
    for start in range(0, len(draws) - 539, 540):
        assert sorted(draws[start : start + 540]) == list(range(540))
    assert draws[:540] != draws[540:1080]


def test_every_place_of_a_shuffle_is_uniform() -> None:
    orders = torch.tensor(list(InstanceBalancedSampler([0] * 8, num_samples=8 * 4000, seed=1))).view(4000, 8)
    for place in range(8):
        assert scipy.stats.chisquare(orders[:, place].bincount(minlength=8).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("each", [1, 4])
def test_class_aware_takes_classes_in_turn(each: int) -> None:
    turn = each * len(COUNTS)
    sampler = ClassAwareSampler(LABELS, samples_per_class=each, num_samples=30 * turn)
    labels = LABELS[torch.tensor(list(sampler))].view(30, len(COUNTS), each)
    assert bool((labels == labels[:, :, :1]).all()), "samples of one class are not in a row"
    orders = {tuple(order) for order in labels[:, :, 0].tolist()}
    assert all(sorted(order) == sorted(COUNTS) for order in orders)
    assert len(orders) > 15, "the order of the classes does not change"


@pytest.mark.parametrize("each", [1, 4])
def test_class_aware_exhausts_a_class_before_it_repeats(each: int) -> None:
    sampler = ClassAwareSampler(LABELS, samples_per_class=each, num_samples=20 * each * len(COUNTS))
    draws = []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        draws += list(sampler)
    drawn = LABELS[torch.tensor(draws)]
    for label, count in COUNTS.items():
        of_class = torch.tensor(draws)[drawn == label].tolist()
        assert len(of_class) == 1000 * each
        passes = [of_class[start : start + count] for start in range(0, len(of_class) - count + 1, count)]
        assert all(len(set(one)) == count for one in passes)
        assert count <= 2 or passes[0] != passes[1]


# ---- an epoch is one list


@every_sampler
def test_epochs_and_seeds(make: Callable[..., Any]) -> None:
    sampler = make(LABELS, seed=4)
    first = list(sampler)
    assert list(sampler) == first, "iterating changed the sampler"
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(make(LABELS, seed=4)) == first
    assert list(make(LABELS, seed=5)) != first
    assert set(first) <= set(range(540))
    assert all(type(index) is int for index in first)


@every_sampler
def test_torch_generators_are_left_alone(make: Callable[..., Any]) -> None:
    state = torch.get_rng_state()
    list(make(LABELS))
    assert torch.equal(torch.get_rng_state(), state)


@every_sampler
def test_the_default_device_does_not_matter(make: Callable[..., Any]) -> None:
    labels = LABELS.tolist()
    with torch.device("meta"):
        order = list(make(labels))
    assert order == list(make(labels))


# First draws of seed 2^40 + 5, epoch 3, by sampler: they hold on every platform and version. The weighted samplers map the same random words, and here
# their probabilities differ by less than 2%.
FIRST_DRAWS = {
    "instance-balanced": [370, 400, 150, 1, 309, 145, 93, 202],
    "class-balanced": [416, 404, 76, 525, 315, 213, 309, 171],
    "square-root": [416, 404, 76, 525, 315, 213, 309, 171],
    "progressive": [416, 350, 48, 525, 315, 213, 309, 76],
    "reversed": [76, 76, 76, 525, 76, 76, 226, 76],
    "effective-number": [416, 404, 76, 525, 315, 213, 309, 171],
    "cben": [416, 404, 76, 525, 315, 213, 309, 171],
    "class-aware": [292, 395, 303, 76, 50, 179, 338, 76],
    "class-aware 4": [76, 76, 76, 76, 303, 179, 371, 475],
}


@pytest.mark.parametrize("name", FIRST_DRAWS)
def test_known_draws(name: str) -> None:
    sampler = SAMPLERS[name](LABELS, seed=2**40 + 5)
    sampler.set_epoch(3)
    assert list(sampler)[:8] == FIRST_DRAWS[name]


@every_sampler
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_ranks_share_one_process_draws(make: Callable[..., Any], num_replicas: int) -> None:
    alone = make(LABELS, num_samples=541, seed=1)
    ranks = [make(LABELS, num_samples=541, seed=1, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    for epoch in (0, 5):
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in ranks]
        assert {len(part) for part in parts} == {len(sampler) for sampler in ranks} == {-(-541 // num_replicas)}
        joined = [index for together in zip(*parts, strict=True) for index in together]
        whole = list(alone)
        assert joined[:541] == whole
        assert joined[541:] == whole[: len(joined) - 541]


@given(rows=st.integers(1, 9), num_samples=st.integers(1, 20), num_replicas=st.integers(1, 6), seed=st.integers(0, 2**64 - 1), position=st.integers(0, 20))
def test_any_sizes(rows: int, num_samples: int, num_replicas: int, seed: int, position: int) -> None:
    labels = [row % 4 for row in range(rows)]
    for make in SAMPLERS.values():
        parts = []
        for rank in range(num_replicas):
            sampler = make(labels, num_samples=num_samples, seed=seed, num_replicas=num_replicas, rank=rank)
            sampler.set_epoch(1)
            parts.append(list(sampler))
            done = min(position, len(sampler))
            sampler.set_epoch(1, position=done)
            assert list(sampler) == parts[-1][done:]
        assert {len(part) for part in parts} == {-(-num_samples // num_replicas)}
        assert {index for part in parts for index in part} <= set(range(rows))


@every_sampler
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_resume_in_mid_epoch(make: Callable[..., Any], num_replicas: int) -> None:
    for rank in range(num_replicas):
        sampler = make(LABELS, num_replicas=num_replicas, rank=rank)
        sampler.set_epoch(2)
        whole = list(sampler)
        resumed = make(LABELS, num_replicas=num_replicas, rank=rank)
        for position in (0, 1, 37, len(whole) - 1, len(whole)):
            resumed.set_epoch(2, position=position)
            assert list(resumed) == whole[position:]
            assert len(resumed) == len(whole)
        resumed.set_epoch(3)
        assert len(list(resumed)) == len(whole), "a new epoch begins at its beginning"


@every_sampler
def test_resume_with_another_number_of_ranks(make: Callable[..., Any]) -> None:
    whole = list(make(LABELS))
    before = [list(make(LABELS, num_replicas=4, rank=rank))[:30] for rank in range(4)]
    after = []
    for rank in range(2):
        sampler = make(LABELS, num_replicas=2, rank=rank)
        sampler.set_epoch(0, position=60)
        after.append(list(sampler))
    seen = [index for part in (before, after) for together in zip(*part, strict=True) for index in together]
    assert seen == whole


@every_sampler
@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_resumes_by_steps(make: Callable[..., Any], workers: int) -> None:
    sampler = make(LABELS)
    loader = DataLoader(TensorDataset(torch.arange(540)), batch_size=50, sampler=sampler, num_workers=workers)
    sampler.set_epoch(1)
    batches = [batch for (batch,) in loader]
    assert len(batches) == len(loader) == 11
    assert torch.cat(batches).tolist() == list(sampler)
    sampler.set_epoch(1, position=4 * 50)
    assert torch.equal(torch.cat([batch for (batch,) in loader]), torch.cat(batches[4:]))


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ranks_come_from_the_process_group(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = CBENSampler(LABELS)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    # a sampler may be older than the process group
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    assert (sampler.num_replicas, sampler.rank) == (4, 3)
    assert list(sampler) == list(CBENSampler(LABELS, num_replicas=4, rank=3))
    sampler = CBENSampler(LABELS, num_replicas=2, rank=1)
    assert (sampler.num_replicas, sampler.rank) == (2, 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 1\], got 2"):
        list(CBENSampler(LABELS, num_replicas=2))


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("labels", [[0] * 90 + [1] * 10, [0] * 2**16], ids=["two classes", "one class"])
def test_the_largest_draw_is_the_last_sample(name: str, labels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest random words give the last sample of the last class: no number of draws can go beyond it."""
    sampler = SHARES[name][0](labels, num_samples=2)
    words = torch.tensor([[0] * 4, [2**32 - 1] * 4])
    monkeypatch.setattr(sampler, "_words", lambda *_: words)
    assert list(sampler) == [0, len(labels) - 1]


def test_every_sample_of_a_large_class_can_be_drawn() -> None:
    """float32 would leave out every other sample of a class of more than 2^24."""
    sampler = ClassBalancedSampler([0], num_samples=20_000, seed=1)
    size = 2**25
    sampler._groups = sampler._groups._replace(members=torch.arange(size), counts=torch.tensor([size]))  # to sort as many labels would take seconds
    drawn = torch.tensor(list(sampler))
    assert abs(float((drawn % 2).double().mean()) - 0.5) < 0.02  # 5 standard deviations


@pytest.mark.parametrize(("num_samples", "epoch", "index"), [(167_107, 7, 99), (616_556, 72, 99)])
def test_draws_that_float32_rounds_up_to_one(num_samples: int, epoch: int, index: int) -> None:
    sampler = ClassBalancedSampler([0] * 90 + [1] * 10, num_samples=num_samples, seed=0)
    sampler.set_epoch(epoch)
    assert max(sampler) == index


def test_a_large_data_set() -> None:
    """iNaturalist 2018 has 437,513 samples of 8142 classes."""
    labels = torch.arange(437_513) % 8142
    for name in ("instance-balanced", "cben", "class-aware 4"):
        assert len(list(SAMPLERS[name](labels))) == 437_513


# ---- labels and refusals


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda labels: np.array(labels, dtype=np.uint8), torch.tensor, lambda labels: torch.tensor(labels).int()]
)
def test_kinds_of_labels(kind: Callable[[list[int]], Any]) -> None:
    labels = LABELS.tolist()
    assert list(CBENSampler(kind(labels))) == list(CBENSampler(LABELS))


@every_sampler
def test_one_class(make: Callable[..., Any]) -> None:
    assert set(make([3, 3], num_samples=50)) == {0, 1}


@pytest.mark.parametrize(
    ("make", "arguments", "error", "words"),
    [
        (CBENSampler, {"labels": []}, ValueError, ["labels", "empty"]),
        (CBENSampler, {"labels": [[0, 1]]}, ValueError, ["labels", "(1, 2)"]),
        (CBENSampler, {"labels": [0.0, 1.0]}, TypeError, ["labels", "float"]),
        (CBENSampler, {"labels": [0, 1, -100]}, ValueError, ["labels[2]", "-100"]),
        (CBENSampler, {"labels": ["cat", "dog"]}, TypeError, ["labels", "list"]),
        (CBENSampler, {"num_samples": 0}, ValueError, ["num_samples", "0"]),
        (CBENSampler, {"num_samples": 10.0}, TypeError, ["num_samples", "10.0"]),
        (CBENSampler, {"seed": None}, TypeError, ["seed", "None"]),
        (CBENSampler, {"samples": 3}, TypeError, ["'samples'", "Sampler.__init__()"]),
        (CBENSampler, {"seed": 2**64}, ValueError, ["seed", str(2**64)]),
        (CBENSampler, {"num_replicas": 0}, ValueError, ["num_replicas", "0"]),
        (CBENSampler, {"num_replicas": 2, "rank": 2}, ValueError, ["rank", "2"]),
        (CBENSampler, {"num_replicas": 2, "rank": -1}, ValueError, ["rank", "-1"]),
        (EffectiveNumberSampler, {"beta": 1.0}, ValueError, ["beta", "1.0"]),
        (ClassAwareSampler, {"samples_per_class": 0}, ValueError, ["samples_per_class", "0"]),
    ],
)
def test_refusals(make: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        make(**{"labels": [0, 1, 1], **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"epoch": -1}, ValueError, ["epoch", "-1"]),
        ({"epoch": 2**31}, ValueError, ["epoch", str(2**31)]),
        ({"epoch": 1.0}, TypeError, ["epoch", "1.0"]),
        ({"epoch": 0, "position": 4}, ValueError, ["position", "4", "[0, 3]"]),
        ({"epoch": 0, "position": -1}, ValueError, ["position", "-1"]),
    ],
)
def test_refused_places(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        CBENSampler([0, 1, 1]).set_epoch(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@every_sampler
def test_the_last_epoch(make: Callable[..., Any]) -> None:
    sampler = make(LABELS, num_samples=10)
    sampler.set_epoch(2**31 - 1)
    assert len(list(sampler)) == 10


@every_sampler
def test_the_default_seed_is_0(make: Callable[..., Any]) -> None:
    assert list(make(LABELS)) == list(make(LABELS, seed=0))


@pytest.mark.parametrize(("words", "drawn"), [(0xFFFFFFFF, 2), (0xFFFFFFFF - 128, 1)])
def test_a_draw_has_all_of_its_53_bits(words: int, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of ones are 1 - 2^-53, which reaches a class of probability 2^-52; two steps of 2^-53 less do not."""
    sampler = ClassBalancedSampler([0, 1, 2], num_samples=1)
    monkeypatch.setattr(sampler, "_class_mass", lambda counts: torch.tensor([2.0**-52, 1.0 - 2.0**-51, 2.0**-52], dtype=torch.float64))
    monkeypatch.setattr(sampler, "_words", lambda use, high, low: torch.tensor([[0xFFFFFFFF, words, 0, 0]]))
    assert list(sampler) == [drawn]
