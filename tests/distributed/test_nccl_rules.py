"""What NCCL refuses and gloo takes, and reads that make the host wait for the device: none in a step of several ranks.

The tensors are on the meta device, whose numbers nobody can read, so a read raises. The collective calls do nothing but look at what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import gclkern
from gclkern.distributed import (
    ShardedClassCentroids,
    ShardedCosineLinear,
    ShardedLinearGCLLoss,
    gather_batch,
    sharded_dro_lt_loss,
    sharded_linear_gcl_cross_entropy,
)
from gclkern.distributed.shards import Shards, _known
from gclkern.training.evaluation import epoch_centroids, predict
from gclkern.training.network import Network, build_head, shard_classifier
from gclkern.training.objectives import Samples, build_objective
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan
from gclkern.training.trainer import Trainer, TrainingStep

WORLD, RANK = 2, 1
ROWS, CLASSES, WIDTH = 4, 10, 6
COUNTS = list(range(50, 50 - CLASSES, -1))
META = torch.device("meta")
# what torch hands to NCCL, as far as it occurs here; int16 for one it refuses
DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool}


def check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.device.type == "meta", "not on the device"
        assert not tensor.is_sparse
        assert tensor.is_contiguous()
        assert tensor.dtype in DTYPES
        assert tensor.dtype == tensors[0].dtype


class Done:
    def wait(self) -> None:
        pass


class Rules:
    """Collective calls that check what NCCL checks. `calls` are their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "all_reduce", "broadcast"):
            monkeypatch.setattr(dist, name, self._noted(name, getattr(self, name)))

    def _noted(self, name: str, rule: Any) -> Any:
        def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Done | None:
            self.calls.append(name)
            kwargs.pop("group", None)
            rule(*args, **kwargs)
            return Done() if async_op else None

        return call

    def all_gather_into_tensor(self, out: Tensor, rows: Tensor) -> None:
        check(out, rows)
        assert out.numel() == WORLD * rows.numel()

    def all_gather(self, parts: list[Tensor], rows: Tensor) -> None:
        check(*parts, rows)
        assert [part.shape for part in parts] == [rows.shape] * WORLD

    def reduce_scatter_tensor(self, out: Tensor, rows: Tensor) -> None:
        check(out, rows)
        assert rows.numel() == WORLD * out.numel()

    def all_reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        check(values)
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)
        assert values.dtype is not torch.bool

    def broadcast(self, value: Tensor, src: int = 0, group_src: int = 0) -> None:
        check(value)
        assert src == group_src == 0


class Agreed(dict[Any, Any]):
    """Every call has been agreed on before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Shards, Tensor]:
        return Shards(RANK, (key[2],) * WORLD), torch.zeros(WORLD, len(key) + 1, dtype=torch.int64, device=META)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rules]:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    assert dist.group.WORLD is not None
    _known[dist.group.WORLD] = Agreed()
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # the meta device has none
    yield Rules(monkeypatch)
    dist.destroy_process_group()


def labels() -> Tensor:
    return torch.zeros(ROWS, dtype=torch.int64, device=META)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=META, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sharded_loss(rules: Rules, reduction: str, dtype: torch.dtype) -> None:
    features, bias = leaf(WIDTH, ROWS, dtype=dtype).t(), leaf(CLASSES)  # not contiguous
    weight = leaf(CLASSES // WORLD, WIDTH, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss = sharded_linear_gcl_cross_entropy(
        features, weight, labels(), gclkern.cloud_sizes(COUNTS).to(META), bias=bias, target_b=labels(), lam=torch.ones((), device=META), label_smoothing=0.1,
        reduction=reduction,
    )  # fmt: skip
    loss.sum().backward()
    assert weight.grad is not None and bias.grad is not None
    assert set(rules.calls) == {"all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor"}


def test_sampled_classes(rules: Rules) -> None:
    weight = nn.Parameter(leaf(CLASSES // WORLD, WIDTH))
    ShardedLinearGCLLoss(COUNTS, sample_rate=0.5).to(META)(leaf(ROWS, WIDTH), weight, labels()).backward()
    assert weight.grad is not None and weight.grad.is_sparse


def test_the_batch_of_all_ranks(rules: Rules) -> None:
    features = leaf(WIDTH, ROWS).t()
    whole, target = gather_batch(features, labels(), averaged_gradients=True)
    gclkern.BalancedContrastiveLoss(backend="torch")(whole, leaf(CLASSES, WIDTH), target).backward()
    assert set(rules.calls) == {"all_gather_into_tensor"}


def test_predictions_and_centroids(rules: Rules) -> None:
    features = leaf(WIDTH, ROWS).t()
    assert ShardedCosineLinear(WIDTH, CLASSES, device=META)(features).shape == (ROWS, CLASSES)
    means = ShardedClassCentroids(CLASSES, WIDTH).to(META)
    means.update(features, labels())
    centroids, counts = means.compute()
    sharded_dro_lt_loss(features, labels(), centroids, leaf(CLASSES), CLASSES, class_weight=(counts > 0).float()).backward()
    whole = gclkern.ClassCentroids(CLASSES, WIDTH).to(META)
    whole.update(features, labels())
    assert whole.compute()[0].shape == (CLASSES, WIDTH)


class Backbone(nn.Module):
    feature_dim = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class Images:
    """As many as a rank's batch and one more, so that ranks repeat an image."""

    def __init__(self) -> None:
        self.labels, self.augment = torch.zeros(ROWS + 1, dtype=torch.int64), "none"

    def __len__(self) -> int:
        return ROWS + 1

    def subset(self, indices: Tensor) -> NoReturn:
        raise NotImplementedError

    def loader(self, batches: Any, *, device: torch.device, epoch: object = None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield torch.randn(len(batch), 3, 8, 8, device=device), torch.zeros(len(batch), dtype=torch.int64, device=device)


@pytest.mark.parametrize("sharded", [False, True])
def test_training_and_evaluation(rules: Rules, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step without DistributedDataParallel, which is torch's, and the calls between steps."""
    monkeypatch.setattr("gclkern.training.trainer.parallel", lambda module: module)
    ranks = Processes.single(META)
    ranks.world, ranks.rank = WORLD, RANK
    phase = plan("gcl+dro-lt", None, "cifar10-lt", COUNTS)[1]
    network = Network(Backbone(), build_head("cosine", WIDTH, CLASSES)).to(META).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if sharded:
        shard_classifier(network)
    step = TrainingStep(network, build_objective(phase, COUNTS, WIDTH, sharded=sharded).to(META))
    trainer = Trainer(step, ranks, weight_decay=1e-4, mixup=0.2, accumulate=2, ema=0.9, channels_last=True)
    centroids = epoch_centroids(network, Images().loader([range(ROWS)], device=META), CLASSES, ranks)
    step.train()
    samples: Samples = {"images": torch.randn(2 * ROWS, 3, 8, 8, device=META), "target": torch.zeros(2 * ROWS, dtype=torch.int64, device=META)}
    loss = trainer.step(samples, 3, 0, **centroids)
    assert ranks.mean(loss).device == META
    logits, features = predict(trainer.eval_network, Images(), ranks, batch_size=2)
    assert (logits.shape, features.shape) == ((ROWS + 1, CLASSES), (ROWS + 1, WIDTH))
    state = trainer.state_dict()
    assert state["average"]["head.weight"].shape == (CLASSES, WIDTH)


@pytest.mark.parametrize("method", ["bcl", "proco", "hybrid-sc", "hybrid-psc"])
def test_contrastive_methods(rules: Rules, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gclkern.training.trainer.parallel", lambda module: module)
    ranks = Processes.single(META)
    ranks.world, ranks.rank = WORLD, RANK
    phase = plan(method, None, "cifar10-lt", COUNTS)[0]
    network = Network(Backbone(), build_head("linear", WIDTH, CLASSES)).to(META)
    step = TrainingStep(network, build_objective(phase, COUNTS, WIDTH).to(META))
    trainer = Trainer(step, ranks, weight_decay=1e-4)
    step.objective.set_epoch(network, 0, 2, 0.1)
    step.objective.begin_epoch(network, 0, {})
    step.train()
    samples: Samples = {"images": torch.randn(ROWS, 3, 8, 8, device=META), "target": labels()}
    if phase.views:
        samples["views"] = torch.randn(ROWS, len(phase.views), 3, 8, 8, device=META)
    if phase.second_sampler:
        samples["second_images"], samples["second_target"] = samples["images"], labels()
    assert trainer.step(samples, 3, 0).device == META
    assert rules.calls.count("all_reduce") == 1  # of running statistics
    assert set(rules.calls) - {"all_reduce"} == (set() if method == "hybrid-psc" else {"all_gather_into_tensor"})
