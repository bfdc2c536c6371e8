"""What users give beside plain numbers and tensors: mappings and Series of counts, numpy's numbers, modules from the meta device, and mistakes."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gclkern
from gclkern import samplers
from gclkern.clouds import cloud_sizes
from gclkern.weights import ldam_margins, log_prior
from tests.support.cases import cosines, labels, vector
from tests.support.processes import run_ranks

COUNTS = [500, 120, 5]


class Series:
    """As much of a pandas Series as matters: values, and the keys they belong to."""

    def __init__(self, values: list[Any], keys: list[Any]) -> None:
        self.values, self.index = values, np.array(keys)

    def to_numpy(self) -> Any:
        return np.array(self.values)

    def __getitem__(self, key: Any) -> Any:
        return self.values[self.index.tolist().index(key)]

    def __len__(self) -> int:
        return len(self.values)


@pytest.mark.parametrize(
    "counts",
    [
        {2: 5, 0: 500, 1: 120}, Counter({1: 120, 0: 500, 2: 5}), Series([120, 500, 5], [1, 0, 2]), {np.int64(i): np.int32(n) for i, n in enumerate(COUNTS)},
        np.array(COUNTS), torch.tensor(COUNTS),
    ],
    ids=["dict", "Counter", "Series", "numpy keys", "array", "tensor"],
)  # fmt: skip
def test_counts_are_taken_by_class(counts: Any) -> None:
    for function in (cloud_sizes, ldam_margins, log_prior, gclkern.effective_number_weights):
        assert torch.equal(function(counts), function(COUNTS))
    expected = gclkern.GCLLoss(COUNTS)
    assert torch.equal(gclkern.GCLLoss(counts).cloud, expected.cloud)
    gclkern.DROLTLoss(counts)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"cat": 5, "dog": 3}, ["'cat'", "0 to 1", "class_name"]),
        ({1: 5, 2: 3}, ["key 2", "0 to 1"]),
        (Series([5, 3], ["cat", "dog"]), ["'cat'"]),
        (Series([5, 3], [0, 7]), ["key 7"]),
        ({True: 3, 0: 5}, ["True"]),
        ({}, ["empty"]),
        ([0, 0, 1, 0, 2, 1, 0], ["7 numbers from 0 to 2", "labels", "torch.bincount"]),
        (torch.zeros(3, device="meta"), ["meta"]),
    ],
)
def test_other_counts_are_refused(counts: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="class_counts") as caught:
        gclkern.GCLLoss(counts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_labels_are_taken_by_place() -> None:
    """Labels in a Series keep their order, whatever its index; shuffled or filtered tables have an index in another order."""
    names = Series([0, 0, 0, 1], [3, 1, 0, 2])
    assert list(samplers.ClassBalancedSampler(names, seed=1)) == list(samplers.ClassBalancedSampler([0, 0, 0, 1], seed=1))  # type: ignore[arg-type]


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.Series([1, 0, 0, 2, 0, 1])
    assert torch.equal(cloud_sizes(table.value_counts()), cloud_sizes([3, 2, 1]))
    assert torch.equal(cloud_sizes(table.value_counts(ascending=True)), cloud_sizes([3, 2, 1]))
    shuffled = table.sample(frac=1.0, random_state=0)
    assert list(samplers.CBENSampler(shuffled)) == list(samplers.CBENSampler(shuffled.tolist()))
    with pytest.raises(ValueError, match="class_counts has the key"):
        cloud_sizes(pandas.Series(["cat", "dog", "cat"]).value_counts())


def test_numbers_of_numpy() -> None:
    cosine, target = cosines(4, 3), labels(4, 3)
    plain = gclkern.functional.gcl_cross_entropy(
        cosine, target, torch.ones(3), scale=8.0, margin=0.5, gamma=1.0, label_smoothing=0.25, target_b=target, lam=0.5, seed=3, row_offset=2, ignore_index=-1
    )
    numpy = gclkern.functional.gcl_cross_entropy(
        cosine, target, torch.ones(3), scale=np.float32(8), margin=np.float64(0.5), gamma=np.int64(1), label_smoothing=np.float32(0.25), target_b=target,
        lam=np.float32(0.5), seed=np.int32(3), row_offset=np.int64(2), ignore_index=np.int16(-1),
    )  # fmt: skip
    assert torch.equal(plain, numpy)
    assert torch.equal(gclkern.cloud_noise(np.uint64(2**64 - 1), np.int64(2), np.int64(3)), gclkern.cloud_noise(-1, 2, 3))  # type: ignore[arg-type]
    gclkern.CosineLinear(np.int64(4), np.int32(3))  # type: ignore[arg-type]
    gclkern.ClassCentroids(np.int64(4), np.int32(3))  # type: ignore[arg-type]
    sampler = samplers.CBENSampler([0, 0, 1], num_samples=np.int64(5), seed=np.int64(3))  # type: ignore[arg-type]
    sampler.set_epoch(np.int64(2))  # type: ignore[arg-type]
    assert len(list(sampler)) == 5


def test_a_float_target_is_told_of_soft_labels() -> None:
    with pytest.raises(TypeError, match=r"target must be int64, got torch.float32 of shape \(4,\); call target.long\(\), or pass soft labels"):
        gclkern.GCLLoss(COUNTS)(cosines(4, 3), torch.zeros(4))


def test_one_hot_integers_are_told_of_soft_labels() -> None:
    one_hot = torch.eye(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target must have shape \(3,\), .* got \(3, 3\); soft labels are floating point: call target.float\(\)"):
        gclkern.GCLLoss(COUNTS)(cosines(3, 3), one_hot)
    gclkern.GCLLoss(COUNTS)(cosines(3, 3), one_hot.float())


def test_logits_instead_of_cosines_are_warned_of_once() -> None:
    criterion = gclkern.GCLLoss(COUNTS)
    with pytest.warns(UserWarning, match=r"GCLLoss takes cosines in \[-1, 1\], but the largest here is 7; .*CosineLinear"):
        criterion(torch.tensor([[7.0, 0.0, 0.0]]), torch.tensor([0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(torch.tensor([[7.0, 0.0, 0.0]]), torch.tensor([0]))
        gclkern.GCLLoss(COUNTS)(torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([0]))
        gclkern.LogitAdjustedLoss(COUNTS)(torch.tensor([[7.0, 0.0, 0.0]]), torch.tensor([0]))
        gclkern.FocalLoss()(torch.tensor([[7.0, 0.0, 0.0]]), torch.tensor([0]))


def test_a_dtensor_is_told_of_its_remedies() -> None:
    weight = cosines(3, 5)
    weight.full_tensor = lambda: weight  # type: ignore[attr-defined]  # by which the check knows a DTensor
    with pytest.raises(TypeError, match=r"linear_weight is a DTensor.*linear_weight.full_tensor\(\).*inside the forward"):
        gclkern.LinearGCLLoss(COUNTS)(cosines(4, 5), weight, labels(4, 3))


@pytest.mark.parametrize(
    ("tensor", "remedy"),
    [
        (torch.eye(3).to_sparse(), r"torch.sparse_coo; call features.to_dense\(\)"),
        (torch.nested.nested_tensor([torch.eye(3)], layout=torch.jagged), "a nested tensor; call torch.cat"),
    ],
    ids=["sparse", "nested"],
)
def test_tensors_without_strides_are_refused(tensor: Tensor, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"features must be a dense tensor, got {remedy}"):
        gclkern.LinearGCLLoss(COUNTS)(tensor, torch.eye(3), labels(3, 3))


def negated(values: Tensor) -> Tensor:
    """The same values in a tensor with torch's negative bit, whose memory holds them with the other sign."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg()
    return view


def results(cosine: Tensor, features: Tensor, epsilon: Tensor, upstream: Tensor) -> list[Tensor]:
    """Losses of all kinds, and their gradients for one upstream gradient."""
    target, centroids = torch.tensor([0, 1, 2, 1]), torch.eye(3, 5)
    cosine, features = cosine.detach().requires_grad_(), features.detach().requires_grad_()
    pairs = [
        (gclkern.GCLLoss(COUNTS, scale=4.0)(cosine, target, seed=1), cosine),
        (gclkern.LinearGCLLoss(COUNTS, scale=4.0)(features, centroids, target, seed=1), features),
        (gclkern.functional.dro_lt_loss(features, target, centroids, epsilon), features),
        (gclkern.SupConLoss()(features, target), features),
    ]
    means, _ = gclkern.functional.class_centroids(features.detach(), target, 3)
    return [means, *(loss.detach() for loss, _ in pairs), *(torch.autograd.grad(loss, leaf, upstream)[0] for loss, leaf in pairs)]


def test_negated_views_are_their_values() -> None:
    inputs = [cosines(4, 3), cosines(4, 5, seed=2), torch.tensor(0.3), torch.tensor(-2.0)]
    for plain, view in zip(results(*inputs), results(*map(negated, inputs)), strict=True):
        torch.testing.assert_close(view, plain, rtol=0, atol=1e-6)  # the products of the head may add in another order


@pytest.mark.parametrize("name", ["cloud", "margin", "bias", "lam", "features", "centroids"])
def test_contiguous_negated_views_are_their_values(name: str) -> None:
    """What is contiguous is not copied by the checks, so the call itself has to resolve it."""
    target = torch.tensor([0, 1, 2, 1])
    given = {"cosine": cosines(4, 3), "cloud": vector(3, 0.1, 1.0), "margin": vector(3, 0.1, 0.5), "bias": vector(3), "lam": vector(4, 0.1, 0.9)}
    given |= {"features": cosines(4, 5, seed=2), "centroids": cosines(3, 5, seed=3)}

    def found(given: dict[str, Tensor]) -> list[Tensor]:
        cosine, features, centroids = given["cosine"].detach().requires_grad_(), given["features"].detach().requires_grad_(), given["centroids"]
        vectors = {name: given[name] for name in ("cloud", "margin", "bias")}
        pair = {"target_b": target.flip(0), "lam": given["lam"]}
        losses = [
            (gclkern.functional.gcl_cross_entropy(cosine, target, seed=1, **vectors, **pair), cosine),
            (gclkern.functional.linear_gcl_cross_entropy(features, centroids, target, seed=1, **vectors, **pair), features),
            (gclkern.functional.dro_lt_loss(features, target, centroids, torch.full((3,), 0.3)), features),
        ]
        return [*(loss.detach() for loss, _ in losses), *(torch.autograd.grad(loss, leaf)[0] for loss, leaf in losses)]

    for plain, view in zip(found(given), found(given | {name: torch._neg_view(-given[name])}), strict=True):
        torch.testing.assert_close(view, plain, rtol=0, atol=1e-6)  # as above


def test_an_upstream_gradient_of_autograds_zeros() -> None:
    inputs = [cosines(4, 3), cosines(4, 5, seed=2), torch.tensor(0.3), torch._efficientzerotensor(())]
    assert not any(gradient.any() for gradient in results(*inputs)[-4:])


@pytest.mark.parametrize("kind", ["grad", "vmap", "is_grads_batched"])
def test_transforms_are_refused_by_name(kind: str) -> None:
    features, target = cosines(4, 5).requires_grad_(), labels(4, 3)
    weight = cosines(3, 5, seed=2)

    def losses(x: Tensor) -> list[Tensor]:
        return [gclkern.GCLLoss(COUNTS)(x @ weight.T, target), gclkern.LinearGCLLoss(COUNTS)(x, weight, target),
                gclkern.functional.dro_lt_loss(x, target, weight, 0.1), gclkern.SupConLoss()(x, target % 2)]  # fmt: skip

    def transformed(place: int) -> None:
        if kind == "grad":
            torch.func.grad(lambda x: losses(x)[place])(features.detach())
        elif kind == "vmap":
            torch.func.vmap(lambda x: losses(x)[place])(features.detach().expand(2, 4, 5))
        else:
            torch.autograd.grad(losses(features)[place], features, torch.ones(3), is_grads_batched=True)

    for place in range(4):
        with pytest.raises(RuntimeError, match=r"torch\.func transform .* of is_grads_batched=True, which the losses of gclkern do not support"):
            transformed(place)


# ---- modules that were on the meta device, or were emptied


@pytest.mark.parametrize("way", ["to_empty", "meta and back", "meta and to_empty"])
def test_what_follows_from_arguments_survives(way: str) -> None:
    made = [gclkern.GCLLoss(COUNTS, weight=torch.tensor([1.0, 2.0, 3.0])), gclkern.LDAMLoss(COUNTS), gclkern.LogitAdjustedLoss(COUNTS),
            gclkern.DROLTLoss(COUNTS, epsilon="sqrt", class_weight=torch.tensor([1.0, 2.0, 3.0])), gclkern.LabelAwareSmoothingLoss(COUNTS)]  # fmt: skip
    for criterion in made:
        expected = {name: value.clone() for name, value in criterion.named_buffers()}
        model = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(criterion))
        if way != "to_empty":
            model = model.to("meta")
        model = model.to_empty(device="cpu")
        found = dict(model[1].named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)


def test_written_weights_move_along() -> None:
    criterion = gclkern.LDAMLoss(COUNTS, weight=torch.ones(3))
    assert criterion.weight is not None
    criterion.weight.copy_(torch.tensor([3.0, 2.0, 1.0]))
    criterion.to(torch.float64).half()
    assert criterion.weight.tolist() == [3.0, 2.0, 1.0]


def test_learned_parameters_start_again_when_asked() -> None:
    criterion = gclkern.DROLTLoss(COUNTS, base_epsilon=0.25).to("meta").to_empty(device="cpu")
    criterion.reset_parameters()
    assert criterion.epsilon.tolist() == [0.25] * 3
    classifier = gclkern.CosineLinear(4, 3, device="meta").to_empty(device="cpu")
    classifier.reset_parameters()
    assert torch.allclose(classifier.weight.norm(dim=1), torch.ones(3))


def test_centroids_of_the_meta_device_start_at_zero() -> None:
    with torch.device("meta"):
        centroids = gclkern.ClassCentroids(2, 3)
    with pytest.raises(ValueError, match="meta"):
        centroids.update(torch.ones(1, 3), torch.tensor([0]))
    centroids = centroids.to_empty(device="cpu")
    centroids.update(torch.ones(2, 3), torch.tensor([0, 0]))
    assert centroids.compute()[1].tolist() == [2, 0]


def test_centroids_are_saved_and_loaded() -> None:
    one, other = gclkern.ClassCentroids(2, 3), nn.Sequential(gclkern.ClassCentroids(2, 3))
    one.update(torch.ones(2, 3), torch.tensor([0, 0]))
    state = nn.Sequential(one).state_dict()
    assert set(state) == {"0.sums", "0.counts"}
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other[0].sums, one.sums) and not list(other.buffers())
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({"0.sums": state["0.sums"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"0.sums": torch.zeros(3, 3), "0.counts": state["0.counts"]})


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("shared", torch.zeros(1))
        self.centroids = gclkern.ClassCentroids(2, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self.centroids.update(x.detach(), target)
        return self.layer(x).sum()


def _update_in_ddp(rank: int, world: int) -> None:
    model = DistributedDataParallel(_Counting())
    for _ in range(2):
        model(torch.full((2, 3), float(rank)), torch.full((2,), rank)).backward()
    centroids = model.module.centroids
    assert centroids.counts.tolist() == [4 * (rank == 0), 4 * (rank == 1)], centroids.counts
    means, counts = centroids.compute()
    assert counts.tolist() == [4, 4] and means[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_ddp_leaves_the_sums_of_a_rank_alone() -> None:
    run_ranks(2, _update_in_ddp)


# ---- compilers


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="inductor needs a C++ compiler")
def test_a_seed_for_every_step_under_inductor(device: torch.device) -> None:
    """Each step has its own noise, equal to that of an eager call, and a new seed does not compile again."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    cosine, target = cosines(4, 6, device=device), labels(4, 6).to(device)
    cloud = torch.linspace(0.1, 0.5, 6, device=device)

    def step(cosine: Tensor, seed: int) -> Tensor:
        return gclkern.functional.gcl_cross_entropy(cosine, target, cloud, seed=seed)

    try:
        compiled = torch.compile(step, fullgraph=True)
        compiled(cosine, 0)
    except Exception as error:
        if "compiler" in str(error).lower() and not isinstance(error, (TypeError, ValueError)):
            pytest.skip(f"no compiler: {str(error)[:100]}")
        raise
    compiled(cosine, 5)
    compiled(cosine, 6)
    frames = counters["stats"]["unique_graphs"]
    seen = set()
    for seed in [*range(7, 15), -1, -(2**63), 2**40 + 5, 2**63 - 1]:
        found = compiled(cosine, seed)
        torch.testing.assert_close(found, step(cosine, seed))
        seen.add(float(found))
    assert len(seen) == 12
    assert counters["stats"]["unique_graphs"] <= frames + 1, "a graph for each seed"


def test_the_classifier_in_place_of_its_weight() -> None:
    classifier: Any = gclkern.CosineLinear(4, 3)
    with pytest.raises(TypeError, match="linear_weight must be a tensor, got CosineLinear; pass its weight"):
        gclkern.LinearGCLLoss([3, 2, 1])(torch.randn(2, 4), classifier, torch.tensor([0, 1]))


def test_scripting_the_classifier() -> None:
    classifier = gclkern.CosineLinear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(classifier)
    x = torch.randn(2, 4)
    torch.testing.assert_close(scripted(x), classifier(x))


def test_no_name_is_lost() -> None:
    namespace = SimpleNamespace(**{name: getattr(gclkern, name) for name in gclkern.__all__})
    assert namespace.mixed_targets is gclkern.mixed_targets
