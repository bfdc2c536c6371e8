"""The sharded classifier around its loss: layer, class sampling, optimizer, centroids, checkpoints, bytes between ranks, and ranks that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

import gclkern
from gclkern.distributed import (
    RowSGD,
    ShardedClassCentroids,
    ShardedCosineLinear,
    ShardedLinearGCLLoss,
    ShardError,
    sharded_dro_lt_loss,
    sharded_linear_gcl_cross_entropy,
    sharded_optimizer_state,
)
from gclkern.distributed.ranks import Ranks
from gclkern.distributed.sampling import TakeRows, draw_classes, places_of
from gclkern.distributed.shards import Shards, even_sizes
from gclkern.functional import class_centroids, dro_lt_loss, linear_gcl_cross_entropy
from tests.support.cases import labels, vector
from tests.support.processes import run_ranks

ROWS, CLASSES, WIDTH = 4, 50, 12
COUNTS = [200 - 3 * j for j in range(CLASSES)]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums in another order


def features_of(world: int) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS * world, WIDTH, generator=torch.Generator().manual_seed(3)), labels(ROWS * world, CLASSES)


def mine_of(rank: int) -> slice:
    return slice(rank * ROWS, (rank + 1) * ROWS)


def classifiers() -> tuple[gclkern.CosineLinear, ShardedCosineLinear]:
    torch.manual_seed(5)
    whole = gclkern.CosineLinear(WIDTH, CLASSES)
    torch.manual_seed(5)
    return whole, ShardedCosineLinear(WIDTH, CLASSES)


# ---- in one process


@pytest.mark.parametrize(("classes", "world", "expected"), [(10, 4, (3, 3, 3, 1)), (8, 4, (2, 2, 2, 2)), (5, 1, (5,))])
def test_classes_are_dealt_out_as_torch_does(classes: int, world: int, expected: tuple[int, ...]) -> None:
    assert even_sizes(classes, world) == expected == tuple(len(part) for part in torch.arange(classes).chunk(world))


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="leave rank 3 of 4 without any; use fewer ranks"):
        even_sizes(5, 4)


def test_one_process_equals_the_ordinary_layer_and_loss() -> None:
    whole, sharded = classifiers()
    features, target = features_of(1)
    assert torch.equal(whole.weight, sharded.weight)
    assert torch.equal(whole(features), sharded(features))
    assert sharded.state_dict()["weight"].shape == (CLASSES, WIDTH)
    ours = ShardedLinearGCLLoss(COUNTS)(features, sharded.weight, target, seed=1)
    torch.testing.assert_close(ours, gclkern.LinearGCLLoss(COUNTS)(features, whole.weight, target, seed=1), **CLOSE)


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Ranks(object())  # type: ignore[arg-type]


def test_a_second_derivative_is_refused() -> None:
    features, target = features_of(1)
    weight = torch.randn(CLASSES, WIDTH)
    (grad,) = torch.autograd.grad(sharded_linear_gcl_cross_entropy(features.requires_grad_(), weight, target), features, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_drawn_classes(rate: float) -> None:
    """All labels are drawn, no class is drawn twice, the share is right, and another seed draws other classes."""
    ranks, shards, target = Ranks(), Shards(0, (CLASSES,)), torch.tensor([3, 49, 3, 0, -100])

    def draw(seed: int) -> Tensor:
        return draw_classes(ranks, shards, [target], rate, torch.tensor(seed))[0]

    drawn = draw(1)
    assert set(target[:4].tolist()) <= set(drawn.tolist())
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == max(round(rate * CLASSES), 5)
    assert torch.equal(drawn, draw(1))
    assert rate == 1.0 or not torch.equal(drawn, draw(2))
    assert torch.equal(drawn[places_of(target, drawn, -100)[:4]], target[:4])


def test_every_class_is_drawn_equally_often() -> None:
    """2000 draws of 5 of 50 classes: a class comes 200 times, give or take 5 standard deviations of 13.4."""
    ranks, shards, nothing = Ranks(), Shards(0, (CLASSES,)), torch.empty(0, dtype=torch.int64)
    times = torch.zeros(CLASSES)
    for seed in range(2000):
        times[draw_classes(ranks, shards, [nothing], 0.1, torch.tensor(seed))[0]] += 1
    assert (times - 200).abs().max() < 67


def test_places_of_labels_that_are_no_class() -> None:
    classes = torch.tensor([1, 4, 7])
    assert places_of(torch.tensor([4, 255, 1, 2, 99]), classes, 255).tolist() == [1, -1, 0, 3, 3]


# Options of a loss with sampling of classes.
SAMPLED: dict[str, dict[str, Any]] = {
    "clouds, margins and weights": {"margin": vector(CLASSES, 0.0, 0.3, seed=4), "weight": vector(CLASSES, 0.5, 2.0), "label_smoothing": 0.1},
    "agcl": {"angular": True, "noise_mul": 0.5, "margin": vector(CLASSES, 0.0, 0.3, seed=4), "gamma": 1.0},
    "agcl with an easy margin": {"angular": True, "noise_mul": 0.5, "easy_margin": True, "margin": 0.2},
    "arcface": {"angular": True, "noise_mul": 0.0, "margin": 0.5},
    "dbm with clouds": {"difficulty_margin": True, "noise_mul": 0.5, "margin": gclkern.ldam_margins(COUNTS, 0.7, 1.0), "tau": 1.0},
}


def check_sampled(rank: int, world: int, options: dict[str, Any]) -> None:
    """Compared with the ordinary head of one process on only the drawn rows; the gradient has those rows and no others."""
    whole, sharded = classifiers()
    features, target = features_of(world)
    second = labels(ROWS * world, CLASSES, seed=8)
    criterion = ShardedLinearGCLLoss(COUNTS, sample_rate=0.3, scale=8.0, **options)
    mine = features[mine_of(rank)].clone().requires_grad_()
    loss = criterion(mine, sharded.weight, target[mine_of(rank)], target_b=second[mine_of(rank)], lam=0.3, seed=9)
    loss.backward()
    drawn, held = draw_classes(Ranks(), sharded.shards, [target, second], 0.3, torch.tensor(9))
    arguments = {
        name: value[drawn] if isinstance(value, Tensor) and value.dim() else value
        for name, value in criterion._arguments().items()
    }  # fmt: skip
    rows, inputs = whole.weight.detach()[drawn].requires_grad_(), features.clone().requires_grad_()
    expected = linear_gcl_cross_entropy(
        inputs, rows, torch.searchsorted(drawn, target), target_b=torch.searchsorted(drawn, second), lam=0.3, seed=9, **arguments
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert inputs.grad is not None and rows.grad is not None and sharded.weight.grad is not None and sharded.weight.grad.is_sparse
    torch.testing.assert_close(mine.grad, inputs.grad[mine_of(rank)], **CLOSE)
    grad = sharded.weight.grad.coalesce()
    assert torch.equal(grad.indices()[0] + sharded.shards.mine.start, drawn[held.mine])
    torch.testing.assert_close(grad.values(), rows.grad[held.mine], **CLOSE)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_loss_is_that_of_the_drawn_classes(name: str) -> None:
    check_sampled(0, 1, SAMPLED[name])


def test_a_sampled_loss_refuses_labels_that_are_no_class() -> None:
    features, target = features_of(1)
    with pytest.raises(ValueError, match="labels must be in"):
        ShardedLinearGCLLoss(COUNTS, sample_rate=0.3)(features, torch.randn(CLASSES, WIDTH), target + CLASSES, seed=9)


def test_row_sgd_is_sgd_on_the_rows_of_a_step() -> None:
    """Compared with torch's SGD on a weight that only has the rows of a step; row 2 is in two of three steps, and rows of no step do not change."""
    weight, dense = torch.nn.Parameter(torch.randn(6, 3)), torch.nn.Parameter(torch.zeros(6, 3))
    start = weight.detach().clone()
    dense.data.copy_(start)
    ours, theirs = RowSGD([weight], lr=0.1, weight_decay=0.01), torch.optim.SGD([dense], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        rows, values = torch.tensor([0, 2] if step else [0]), torch.randn(2 if step else 1, 3)
        weight.grad = None
        (TakeRows.apply(weight, rows) * values).sum().backward()
        ours.step()
        dense.grad = torch.zeros(6, 3).index_add(0, rows, values)
        theirs.step()
    torch.testing.assert_close(weight[0], dense[0], **CLOSE)
    assert torch.equal(weight[[1, 3, 4, 5]], start[[1, 3, 4, 5]])
    assert not torch.equal(weight[2], start[2])


def test_row_sgd_on_dense_gradients_is_sgd() -> None:
    ours, theirs = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizers = RowSGD([ours], lr=0.1, weight_decay=0.1), torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.full((3, 2), 0.5)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_two_sampled_gradients_add_up() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 1))
    optimizer = RowSGD([weight], lr=1.0, momentum=0.0)
    for rows in ([0, 2], [2, 3]):
        TakeRows.apply(weight, torch.tensor(rows)).sum().backward()
    optimizer.step()
    assert weight.flatten().tolist() == [-1.0, 0.0, -2.0, -1.0]


def test_row_sgd_takes_parameters_that_come_later() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = RowSGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.add_param_group({"params": [weight], "lr": 0.5})
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -0.5


@pytest.mark.parametrize("wrong", [{"epsilon": torch.rand(ROWS)}, {"class_weight": torch.rand(CLASSES + 1)}])
def test_dro_lt_refuses_vectors_of_another_length(wrong: dict[str, Tensor]) -> None:
    """Without the check, looking them up by label would succeed with the values of another class."""
    features, target = features_of(1)
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        sharded_dro_lt_loss(features, target, torch.zeros(CLASSES, WIDTH), **{"epsilon": 0.1, **wrong}, num_classes=CLASSES)


def test_row_sgd_refuses_a_negative_rate() -> None:
    with pytest.raises(ValueError, match="lr must be"):
        RowSGD([torch.nn.Parameter(torch.zeros(1))], lr=-1.0)


# ---- on several ranks: one start of the processes for all that they share


class CountedBytes:
    """The bytes that this rank passes to collective calls, by the kind of call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        for name, place in (("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1), ("all_reduce", 0), ("broadcast", 0)):
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name), place))

    def _counting(self, name: str, call: Any, place: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.bytes[name] = self.bytes.get(name, 0) + args[place].nbytes
            return call(*args, **kwargs)

        return counted


def check_layer(rank: int, world: int) -> None:
    whole, sharded = classifiers()
    features, _ = features_of(world)
    held = sharded.shards.mine
    assert torch.equal(sharded.weight, whole.weight[held])
    torch.testing.assert_close(sharded(features[mine_of(rank)]), whole(features[mine_of(rank)]), **CLOSE)
    saved = sharded.state_dict()["weight"]
    assert saved.shape == (CLASSES, WIDTH)
    torch.testing.assert_close(saved.full_tensor(), whole.weight.detach(), rtol=0, atol=0)
    # a DTensor as the weight of the function
    target = features_of(world)[1][mine_of(rank)]
    weight = torch.nn.Parameter(saved.clone())
    loss = sharded_linear_gcl_cross_entropy(features[mine_of(rank)], weight, target)
    loss.backward()
    grad: Any = weight.grad
    assert grad.shape == (CLASSES, WIDTH)
    plain = sharded.weight.detach().clone().requires_grad_()
    sharded_linear_gcl_cross_entropy(features[mine_of(rank)], plain, target).backward()
    torch.testing.assert_close(grad.full_tensor()[held], plain.grad, rtol=0, atol=0)
    modules = [ShardedLinearGCLLoss(COUNTS)(features[mine_of(rank)], rows, target, seed=1) for rows in (saved, sharded.weight)]
    torch.testing.assert_close(*modules, rtol=0, atol=0)


def check_training(rank: int, world: int) -> None:
    """A backbone under DistributedDataParallel or FSDP2 with the sharded head trains as in one process; if seeds differ, the first rank's is used."""
    for wrap in (torch.nn.parallel.DistributedDataParallel, fully_shard):
        check_training_beside(wrap, rank, world)


def check_training_beside(wrap: Any, rank: int, world: int) -> None:
    whole, sharded = classifiers()
    inputs, target = features_of(world)
    torch.manual_seed(0)
    backbone = torch.nn.Linear(WIDTH, WIDTH)
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, WIDTH)
    parallel = wrap(layer)
    alone = torch.optim.SGD([*backbone.parameters(), *whole.parameters()], lr=0.5, momentum=0.9)
    together = torch.optim.SGD([*parallel.parameters(), *sharded.parameters()], lr=0.5, momentum=0.9)
    plain = gclkern.LinearGCLLoss(COUNTS)
    ours = ShardedLinearGCLLoss(COUNTS, averaged_gradients=True)
    for step in range(3):
        losses = (
            plain(backbone(inputs), whole.weight, target, seed=step),
            ours(parallel(inputs[mine_of(rank)]), sharded.weight, target[mine_of(rank)], seed=step + 100 * rank),
        )
        for loss, optimizer in zip(losses, (alone, together), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)  # three steps of SGD carry rounding along
    learned: Any = layer.weight.detach()
    learned = learned.full_tensor() if hasattr(learned, "full_tensor") else learned
    torch.testing.assert_close(learned, backbone.weight.detach(), rtol=1e-4, atol=1e-4)


def check_sampling(rank: int, world: int) -> None:
    """The labels of all ranks are among the drawn classes, only drawn rows have a gradient, and the same seed draws the same classes."""
    _, sharded = classifiers()
    features, target = features_of(world)
    criterion = ShardedLinearGCLLoss(COUNTS, sample_rate=0.2)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        sharded.zero_grad()
        loss = criterion(features[mine_of(rank)], sharded.weight, target[mine_of(rank)], seed=seed)
        loss.backward()
        assert sharded.weight.grad is not None
        return loss.detach(), sharded.weight.grad.coalesce().indices()[0]

    (loss, rows), (again, same), (_, other) = run(1), run(1), run(2)
    assert torch.equal(loss, again) and torch.equal(rows, same) and not torch.equal(rows, other)
    held = sharded.shards.mine
    assert {label - held.start for label in target.tolist() if held.start <= label < held.stop} <= set(rows.tolist())
    assert len(rows) == min(held.stop - held.start, max(-(-(held.stop - held.start) // 5), len(target)))
    whole = Ranks().broadcast_(loss.clone(), "comparing")
    assert torch.equal(whole, loss)


def check_centroids(rank: int, world: int) -> None:
    features, target = features_of(world)
    plain, sharded = gclkern.ClassCentroids(CLASSES, WIDTH), ShardedClassCentroids(CLASSES, WIDTH)
    plain.update(features[mine_of(rank)], target[mine_of(rank)])
    sharded.update(features[mine_of(rank)], target[mine_of(rank)])
    (expected, expected_counts), (centroids, counts) = plain.compute(), sharded.compute()
    whole, whole_counts = class_centroids(features, target, CLASSES)
    torch.testing.assert_close(expected, whole)
    assert torch.equal(expected_counts, whole_counts)
    assert int(plain.counts.sum()) == ROWS, "each rank keeps its own sums"
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(centroids, expected[sharded.shards.mine])
    seen = (counts > 0).float() * vector(CLASSES, 0.5, 1.0)
    results = []
    for epsilon in (0.2, vector(CLASSES, 0.1, 0.5, seed=5)):
        for reduction in ("mean", "none"):
            batches = [features[mine_of(rank)].clone().requires_grad_() for _ in range(2)]
            radii = [epsilon.clone().requires_grad_() if isinstance(epsilon, Tensor) else epsilon for _ in range(2)]
            options = {"class_weight": seen, "reduction": reduction}
            label = target[mine_of(rank)]
            losses = (
                dro_lt_loss(batches[0], label, expected, radii[0], **options),
                sharded_dro_lt_loss(batches[1], label, centroids, radii[1], CLASSES, **options),
            )
            for loss in losses:
                loss.sum().backward()
            results += [losses, [batch.grad for batch in batches]]
            if isinstance(epsilon, Tensor):
                results.append([radius.grad for radius in radii])  # type: ignore[union-attr]
    for found in results:
        torch.testing.assert_close(found[1], found[0], **CLOSE)


def check_bytes(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas of docs/scaling.md, forward and backward, with noise."""
    _, sharded = classifiers()
    features, target = features_of(world)
    mine = features[mine_of(rank)].clone().requires_grad_()
    total = ROWS * world
    with monkeypatch.context() as patch:
        counted = CountedBytes(patch)
        loss = sharded_linear_gcl_cross_entropy(mine, sharded.weight, target[mine_of(rank)], gclkern.cloud_sizes(COUNTS), seed=1)
        loss.backward()
    description = 9 * 8  # nine numbers of 8 bytes that describe the call
    expected = {
        "all_gather_into_tensor": ROWS * 4 * WIDTH + ROWS * 8 + description,
        "reduce_scatter_tensor": total * 4 * WIDTH,
        "all_reduce": total * 4 * 3,  # the largest logit; the sum of the others; the target's
        "broadcast": 8,
    }
    assert counted.bytes == expected, counted.bytes


def save_checkpoint(folder: Path) -> None:
    """A head after one step, whose momentum is no longer 0."""
    _, sharded = classifiers()
    optimizer = RowSGD(sharded.parameters(), lr=0.1)
    sharded.weight.grad = torch.ones_like(sharded.weight)
    optimizer.step()
    state = {"head": sharded.state_dict(), "optimizer": sharded_optimizer_state(optimizer, sharded), "centroids": counted_centroids().state_dict()}
    save(state, checkpoint_id=folder)


def counted_centroids() -> ShardedClassCentroids:
    """Of one sample on each of three ranks: class 0 twice, the last class once."""
    centroids = ShardedClassCentroids(CLASSES, WIDTH)
    centroids.update(torch.ones(1, WIDTH), torch.tensor([(CLASSES - 1, 0, 0)[Ranks().rank]]))
    return centroids


def check_loaded(folder: Path) -> None:
    expected, _ = classifiers()
    torch.manual_seed(6)
    sharded = ShardedCosineLinear(WIDTH, CLASSES)
    optimizer = RowSGD(sharded.parameters(), lr=0.1)
    means = ShardedClassCentroids(CLASSES, WIDTH)
    state = {"head": sharded.state_dict(), "optimizer": sharded_optimizer_state(optimizer, sharded), "centroids": means.state_dict()}
    load(state, checkpoint_id=folder)
    means.load_state_dict(state["centroids"])
    assert means.compute()[1].tolist() == [2, *[0] * (CLASSES - 2), 1]
    sharded.load_state_dict(state["head"])
    held = sharded.shards.mine
    assert torch.equal(sharded.weight, expected.weight[held] - 0.1)
    assert torch.equal(optimizer.state[sharded.weight]["momentum"], torch.ones_like(sharded.weight))
    features, _ = features_of(1)
    expected.weight.data.sub_(0.1)
    torch.testing.assert_close(sharded(features), expected(features), **CLOSE)


def three_ranks(rank: int, world: int, folder: Path) -> None:
    check_layer(rank, world)
    check_training(rank, world)
    check_sampling(rank, world)
    for options in SAMPLED.values():
        check_sampled(rank, world, options)
    check_centroids(rank, world)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_bytes(rank, world, monkeypatch)
    save_checkpoint(folder)


def check_the_device_s_own_comparison(rank: int, features: Tensor, target: Tensor, sharded: ShardedCosineLinear) -> None:
    """As on a GPU, where calls that were agreed on before are not read again: ranks that then make different ones of them get a NaN, never a number."""
    for scale in (25.0, 15.0):
        sharded_linear_gcl_cross_entropy(features, sharded.weight, target, scale=scale)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("gclkern.distributed.shards.host_waits", lambda device: True)
        # what was agreed on over another device does not count: its numbers lie there
        with pytest.raises(ShardError, match="do not agree on the options"):
            sharded_linear_gcl_cross_entropy(features, sharded.weight, target, scale=(25.0, 15.0)[rank])

        def loss(scale: float, row_offset: int = 0) -> Tensor:
            mine = features.clone().requires_grad_()
            found = sharded_linear_gcl_cross_entropy(mine, sharded.weight, target, scale=scale, row_offset=row_offset)
            found.backward()
            assert mine.grad is not None and bool(mine.grad.isnan().any()) is bool(found.isnan())
            return found.detach()

        first = {scale: loss(scale) for scale in (30.0, 20.0)}
        assert all(torch.equal(loss(scale), expected) for scale, expected in first.items())
        assert torch.equal(loss(30.0, row_offset=7), first[30.0])
        assert bool(loss((30.0, 20.0)[rank]).isnan())
        assert bool(loss(30.0, row_offset=rank).isnan())
        assert torch.equal(loss(30.0), first[30.0])

        def bound(classes: int) -> Tensor:
            return sharded_dro_lt_loss(features, target % classes, torch.ones(even_sizes(classes, 2)[rank], WIDTH), 0.1, classes)

        assert all(bool(bound(classes).isfinite()) for classes in (CLASSES, CLASSES - 1, CLASSES))
        assert bool(bound(CLASSES - rank).isnan())


def two_ranks(rank: int, world: int, folder: Path) -> None:
    check_loaded(folder)
    _, sharded = classifiers()
    features, target = features_of(world)
    features, target = features[mine_of(rank)], target[mine_of(rank)]
    wrong: dict[str, dict[str, Any]] = {
        "do not agree on the rows of features": {"features": features[: ROWS - rank], "target": target[: ROWS - rank]},
        "do not agree on the columns of features: they are \\[12, 11\\]": {
            "features": features[:, : WIDTH - rank], "linear_weight": sharded.weight[:, : WIDTH - rank],
        },
        "do not agree on the dtype of features": {"features": features.to((torch.float32, torch.bfloat16)[rank])},
        "do not agree on the options": {"scale": 30.0 - rank},
        "do not agree on the options: they": {"cloud": torch.rand(CLASSES + rank)},
        "do not agree on the row_offset: they are \\[0, 4\\]": {"row_offset": rank * ROWS},
    }  # fmt: skip
    for message, changed in wrong.items():
        with pytest.raises(ShardError, match=message):
            sharded_linear_gcl_cross_entropy(**{"features": features, "linear_weight": sharded.weight, "target": target, **changed})
    # the same of every other collective call: a rank that has fewer samples, or makes another call
    fewer, means = slice(0, ROWS - rank), ShardedClassCentroids(CLASSES, WIDTH)
    calls: list[Callable[[], object]] = [
        lambda: sharded(features[fewer]),
        lambda: ShardedLinearGCLLoss(COUNTS, sample_rate=0.5)(features[fewer], sharded.weight, target[fewer]),
        lambda: means.update(features[fewer], target[fewer]),
        lambda: sharded_dro_lt_loss(features[fewer], target[fewer], means.sums.float(), 0.1, CLASSES),
        lambda: ShardedLinearGCLLoss(COUNTS, sample_rate=1.0 - rank / 2)(features, sharded.weight, target),
    ]
    for call in calls:
        with pytest.raises(ShardError, match="do not agree on the"):
            call()
    # a seed without noise is nobody's, a mixing share each rank's own
    second = target.flip(0)
    sharded_linear_gcl_cross_entropy(features, sharded.weight, target, target_b=second, lam=0.25 * (rank + 1), seed=None if rank else torch.tensor(1))
    # one rank's argument is wrong: that rank says so, the other one does not wait
    with pytest.raises(ValueError if rank else ShardError, match="linear_weight must have shape" if rank else "rank 1 of 2 refused its arguments"):
        sharded_linear_gcl_cross_entropy(features, sharded.weight[:, rank:], target)
    # a label of one rank is no class: both ranks name it
    with pytest.raises(ValueError, match=f"target\\[{ROWS}\\] is {CLASSES}"):
        sharded_linear_gcl_cross_entropy(features, sharded.weight, target.index_fill(0, torch.tensor(0), CLASSES) if rank else target)
    check_the_device_s_own_comparison(rank, features, target, sharded)
    if rank:
        os._exit(0)  # dies without a word
    with pytest.raises(ShardError, match=r"rank 0 of 2 failed while comparing the arguments of all ranks.*died"):
        sharded_linear_gcl_cross_entropy(features, sharded.weight, target)
    os._exit(0)  # the group cannot be closed in order any more


def test_ranks_together(tmp_path: Path) -> None:
    run_ranks(3, three_ranks, tmp_path)
    run_ranks(2, two_ranks, tmp_path)
    check_loaded(tmp_path)
