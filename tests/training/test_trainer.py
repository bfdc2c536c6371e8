"""What a training step trains, on what."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gclkern.training.backbones import build_backbone
from gclkern.training.batches import check_part_size, step_batches
from gclkern.training.config import RunConfig
from gclkern.training.network import Network, build_head
from gclkern.training.objectives import Batch, Classification, Objective, Samples, build_objective
from gclkern.training.processes import Processes
from gclkern.training.recipes import build_loss, plan
from gclkern.training.trainer import CapturedStep, Trainer, TrainingStep, mixup
from gclkern.weights import DeferredReweighting
from tests.training import test_contrast

COUNTS = [50, 20, 5]


class Backbone(torch.nn.Module):
    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(images)
        return features


def cross_entropy() -> Objective:
    return build_objective(plan("ce", None, "cifar10-lt", COUNTS)[0], COUNTS, 4)


def plain_step(backbone: torch.nn.Module) -> TrainingStep:
    """Cross entropy of a linear classifier."""
    return TrainingStep(Network(backbone, build_head("linear", 4, 3)), cross_entropy())


@pytest.mark.parametrize(("trains", "head", "learned"), [
    ("all", "linear", {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias", "weight", "bias"}),
    ("backbone", "linear", {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias"}),
    ("head", "linear", {"weight", "bias"}),
    ("scale", "scaled linear", {"factor"}),
    ("scale", "scaled cosine", {"factor"}),
    ("head-and-scale", "scaled linear", {"weight", "bias", "factor"}),
    ("head-and-scale", "scaled cosine", {"weight", "factor"}),
    ("calibration", "calibrated linear", {"calibration.scale", "calibration.offset", "calibration.confidence.weight", "calibration.confidence.bias"}),
])  # fmt: skip
def test_what_learns(trains: str, head: str, learned: set[str]) -> None:
    torch.manual_seed(0)
    network = Network(Backbone(), build_head(head, 4, 3))
    if head != "linear":
        torch.nn.init.normal_(network.head.weight)
    if trains == "calibration":
        torch.nn.init.ones_(network.head.calibration.offset)  # where it is the identity its confidence has no gradient
    step = TrainingStep(network, cross_entropy(), trains=trains)
    optimizer = torch.optim.SGD(step.learn(), lr=0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step.train()
    step(0, images=torch.randn(6, 1, 2, 2), target=torch.tensor([0, 1, 2, 0, 1, 0]), seed=torch.tensor(1)).backward()
    optimizer.step()
    changed = {name.partition(".")[2] for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {"layers.2.running_mean", "layers.2.running_var", "layers.2.num_batches_tracked"}
    # A linear layer's bias before batch normalisation has no gradient, but for rounding.
    assert changed - {"layers.1.bias"} == learned - {"layers.1.bias"} | (statistics if trains in ("all", "backbone") else set())


def test_clouds_of_a_scaled_classifier_are_those_of_the_plain_one() -> None:
    """LWS after GCL: at factors of 1 it starts from the loss, and so from the noise, that the classifier alone would have."""
    torch.manual_seed(0)
    backbone, weight = Backbone(), torch.randn(3, 4)
    images, target, other = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor([2, 1, 0, 1, 0, 0])
    found = []
    for retrain in ("gcl", "lws"):
        phase = plan("gcl", retrain, "cifar10-lt", COUNTS)[-1]
        network = Network(backbone, build_head(phase.head, 4, 3))
        network.head.weight.data.copy_(weight)
        step = TrainingStep(network, build_objective(phase, COUNTS, 4), trains=phase.trains)
        found.append(step.train()(5, images=images, target=target, seed=torch.tensor(7), target_b=other, lam=torch.tensor(0.25)))
    torch.testing.assert_close(*found)  # float32, and the products are summed alike up to their order


def test_all_that_learns_has_weight_decay() -> None:
    """The factors of MiSLAS, too, whose rate is another one than that of weights and bias."""
    phase = plan("mixup", "mislas", "cifar10-lt", [5000, 500, 50])[1]
    network = Network(Backbone(), build_head(phase.head, 4, 3))
    step = TrainingStep(network, build_objective(phase, [5000, 500, 50], 4), trains=phase.trains, batch_norm=phase.batch_norm)
    trainer = Trainer(step, Processes.single(torch.device("cpu")), weight_decay=phase.weight_decay, lr_factors=phase.lr_factors)
    trainer.set_rate(0.1)
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert sorted(found) == [(1, 0.1, 2e-4), (2, 0.05, 2e-4)]


def test_only_the_last_block_learns() -> None:
    network = Network(build_backbone("resnet18"), build_head("linear", 512, 3))
    step = TrainingStep(network, cross_entropy(), trains="last-block")
    assert plan("gcl", None, "places-lt", COUNTS)[0].trains == "new-last-block"
    learned = {id(parameter) for group in step.learn() for parameter in group["params"]}
    assert learned == {id(parameter) for module in (network.backbone.layer4[1], network.head) for parameter in module.parameters()}
    step.train()
    assert network.backbone.layer4[1].training
    assert not network.backbone.layer4[0].training
    with pytest.raises(ValueError, match="`train=all`"):
        TrainingStep(Network(Backbone(), build_head("linear", 4, 3)), step.objective, trains="last-block").learn()


def test_mixup_is_a_function_of_the_seed() -> None:
    images, target = torch.randn(8, 1, 2, 2), torch.arange(8)
    mixed, other, share = mixup(images, target, 0.5, seed=3, block=0)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[other])
    assert torch.equal(mixup(images, target, 0.5, seed=3, block=0)[0], mixed)
    _, order, same_share = mixup(images, target, 0.5, seed=3, block=1)
    assert same_share == share
    assert not torch.equal(order, other)


def test_batches_are_full() -> None:
    assert list(step_batches(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5]]


def test_the_average_is_what_is_evaluated() -> None:
    network = Network(Backbone(), build_head("linear", 4, 3))
    step = TrainingStep(network, cross_entropy())
    ranks = Processes.single(torch.device("cpu"))
    assert Trainer(step, ranks, weight_decay=0.0).eval_network is network
    trainer = Trainer(step, ranks, weight_decay=0.0, ema=0.9)
    before = network.head.weight.detach().clone()
    trainer.set_rate(0.1)
    trainer.step({"images": torch.randn(6, 1, 2, 2), "target": torch.tensor([0, 1, 2, 0, 1, 0])}, 0, 0)
    # in the first step the decay is (1 + 0) / (10 + 0)
    torch.testing.assert_close(trainer.eval_network.head.weight, 0.1 * before + 0.9 * network.head.weight)
    with pytest.raises(ValueError, match="`capture` needs a GPU"):
        Trainer(step, ranks, weight_decay=0.0, capture=True)


def test_a_captured_step_goes_on_from_a_run_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began on a CPU and is resumed on a GPU: its checkpoint has the rate as a number, the captured step reads it from one tensor."""
    step = plain_step(Backbone())
    ranks = Processes.single(torch.device("cpu"))
    plain, captured = Trainer(step, ranks, weight_decay=0.0), Trainer(step, ranks, weight_decay=0.0)
    plain.set_rate(0.3)
    monkeypatch.setattr(captured, "captured", object())
    plain.optimizer.param_groups[0]["fused"] = True  # whatever suits the other device
    captured.load_state_dict(plain.state_dict())
    captured.set_rate(0.2)
    (group,) = captured.optimizer.param_groups
    assert group["fused"] is False
    rate = group["lr"]
    captured.set_rate(0.1)
    assert group["lr"] is rate
    assert float(rate) == pytest.approx(0.1)
    plain.load_state_dict(captured.state_dict())
    plain.set_rate(0.05)
    assert plain.optimizer.param_groups[0]["lr"] == 0.05


class Recording(TorchDispatchMode):
    """What a CUDA graph is to its capture, on a CPU: the block's operators take effect when they are replayed, on the same tensors and Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # all: the schema of batch normalisation does not say that it writes its statistics
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """CUDA graphs that a CPU can hold; the options of each capture."""
    options: list[dict[str, Any]] = []

    def graph(recording: Recording, **given: Any) -> Recording:
        options.append(given)
        return recording

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext, "CUDAGraph": Recording, "graph": graph}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return options


def trained(*, captured: bool) -> tuple[Trainer, torch.Tensor]:
    """Eight steps of mixed batches, whose learning rate and class weights change on the way: the trainer, and its losses."""
    torch.manual_seed(0)
    network = Network(Backbone(), build_head("cosine", 4, 3))
    loss: Any = build_loss(plan("ldam-drw", None, "cifar10-lt", COUNTS)[0], COUNTS)
    DeferredReweighting(loss, COUNTS, 0)
    trainer = Trainer(TrainingStep(network, Classification(loss)).train(), Processes.single(torch.device("cpu")), weight_decay=1e-3, mixup=1.0)
    if captured:
        trainer.captured = CapturedStep(trainer.optimizer)
        trainer.optimizer.param_groups[0]["fused"] = True  # reads the rate from its tensor, as on a GPU
    losses = []
    for step in range(8):
        trainer.set_rate(0.1 / (1 + step))
        loss.weight.fill_(1.0).narrow(0, 0, 1).fill_(1.0 + step // 3)
        generator = torch.Generator().manual_seed(step)
        samples: Samples = {"images": torch.randn(6, 1, 2, 2, generator=generator), "target": torch.randint(3, (6,), generator=generator)}
        losses.append(trainer.step(samples, step, step))
    return trainer, torch.stack(losses)


def test_a_captured_step_trains_as_a_plain_one(captures: list[dict[str, Any]]) -> None:
    """Nothing that changes from step to step is frozen into the graph."""
    (captured, losses), (plain, expected) = trained(captured=True), trained(captured=False)
    assert len(captures) == 1
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(captured.module.state_dict(), plain.module.state_dict())


@pytest.mark.parametrize("method", ["bcl", "proco", "hybrid-sc"])
def test_a_captured_step_keeps_the_state_of_an_objective(method: str, captures: list[dict[str, Any]]) -> None:
    """Running sums and shares that change from epoch to epoch."""

    def run(*, captured: bool) -> tuple[Trainer, torch.Tensor]:
        network, objective = test_contrast.problem(method)
        trainer = Trainer(TrainingStep(network, objective), Processes.single(torch.device("cpu")), weight_decay=1e-3)
        if captured:
            trainer.captured = CapturedStep(trainer.optimizer)
            for group in trainer.optimizer.param_groups:
                group["fused"] = True  # reads the rate from its tensor, as on a GPU
        trainer.module.train()
        losses = []
        for step in range(9):
            trainer.set_rate(0.1 / (1 + step))
            objective.set_epoch(network, step // 3, 3, 0.1)
            if step % 3 == 0:
                objective.begin_epoch(network, step // 3, {})
            losses.append(trainer.step(test_contrast.samples(method, seed=step), step, step))
        return trainer, torch.stack(losses)

    (captured, losses), (plain, expected) = run(captured=True), run(captured=False)
    assert len(captures) == 1
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captured.module.state_dict(), plain.module.state_dict(), rtol=1e-3, atol=1e-5)


def test_a_loaders_thread_does_not_end_a_capture(captures: list[dict[str, Any]]) -> None:
    """In CUDA's global mode a thread that pins memory would."""
    trained(captured=True)
    assert captures == [{"capture_error_mode": "thread_local"}]


@pytest.mark.usefixtures("captures")
def test_a_graph_goes_with_its_trainer() -> None:
    """Not with the collector's next round: its memory may be most of a GPU's, and it must not be freed amid another capture."""
    trainer, _ = trained(captured=True)
    assert trainer.captured is not None
    graph = weakref.ref(trainer.captured.graph)
    del trainer
    assert graph() is None


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_scaler_skips_steps_itself() -> None:
    """A fused step that overflows is skipped by its kernel, which leaves the momentum unset."""
    step = plain_step(Backbone())
    ranks = Processes.single(torch.device("cuda"))  # to build a trainer takes none
    assert not Trainer(step, ranks, weight_decay=0.0, amp=torch.float16).optimizer.defaults["fused"]
    assert Trainer(step, ranks, weight_decay=0.0, amp=torch.bfloat16, capture=False).optimizer.defaults["fused"]


class Drawing(torch.nn.Module):
    """A backbone with a layer that draws, as dropout does."""

    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.drawn: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.drawn.append(float(torch.rand(())))
        features: torch.Tensor = self.layer(images.flatten(1))
        return features


def test_layers_that_draw_draw_anew_on_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of two processes is that of one which accumulates two parts, not twice the same."""
    monkeypatch.setattr("gclkern.training.trainer.parallel", lambda module: module)
    monkeypatch.setattr(Processes, "mean", lambda processes, value: value)

    def draws(world: int, rank: int, accumulate: int) -> list[float]:
        ranks, backbone = Processes.single(torch.device("cpu")), Drawing()
        ranks.world, ranks.rank = world, rank
        step = plain_step(backbone)
        Trainer(step, ranks, weight_decay=0.0, accumulate=accumulate).step(
            {"images": torch.randn(6, 1, 2, 2), "target": torch.tensor([0, 1, 2, 0, 1, 0])}, 7, 0
        )
        return backbone.drawn

    first, second = draws(2, 0, 1), draws(2, 1, 1)
    assert first != second
    assert draws(1, 0, 2) == [*first, *second]


def test_gradients_travel_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts it has: for all but the last one DistributedDataParallel is told to keep them."""
    parts: list[str] = []

    class Parallel(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            parts.append("kept:")
            yield

        def forward(self, **inputs: Any) -> Any:
            parts.append("part")
            return self.module(**inputs)

    monkeypatch.setattr("gclkern.training.trainer.parallel", Parallel)
    monkeypatch.setattr(Processes, "mean", lambda processes, value: value)
    ranks = Processes.single(torch.device("cpu"))
    ranks.world = 2
    step = plain_step(Backbone())
    Trainer(step, ranks, weight_decay=0.0, accumulate=3).step({"images": torch.randn(6, 1, 2, 2), "target": torch.tensor([0, 1, 2, 0, 1, 0])}, 7, 0)
    assert parts == ["kept:", "part", "kept:", "part", "part"]


def test_single_images_are_refused_where_batch_normalisation_cannot_take_them() -> None:
    network = Network(build_backbone("small-cnn", image_size=2), build_head("linear", 64, 3))
    phase = replace(plan("ce", None, "cifar10-lt", COUNTS)[0], batch_size=4)
    check_part_size(phase, network, RunConfig(accumulate=2), Processes("cpu"))
    with pytest.raises(ValueError, match=r"stage-1: batch normalisation cannot be trained on 1 image.*take a larger `batch_size`, a smaller `accumulate`"):
        check_part_size(phase, network, RunConfig(accumulate=4), Processes("cpu"))


class Views(Objective):
    """Reads all that a batch can hold, and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(4, 4)
        self.register_buffer("share", torch.zeros(()))
        self.seen: list[Batch] = []

    def forward(self, network: Network, batch: Batch) -> torch.Tensor:
        self.seen.append(batch)
        assert batch.views is not None
        features = self.project(network.backbone(batch.views.flatten(0, 1)))
        return network.classify(features).square().mean()


def test_an_objective_gets_its_views_and_its_second_batch_in_parts() -> None:
    """Every tensor is split along the samples alike, so that two processes train as one that accumulates two parts."""
    objective = Views()
    samples: Samples = {
        "images": torch.randn(6, 1, 2, 2), "target": torch.arange(6) % 3, "views": torch.randn(6, 2, 1, 2, 2), "second_images": torch.randn(6, 1, 2, 2),
        "second_target": torch.arange(6),
    }  # fmt: skip
    step = TrainingStep(Network(Backbone(), build_head("linear", 4, 3)), objective)
    trainer = Trainer(step, Processes.single(torch.device("cpu")), weight_decay=0.0, accumulate=2, lr_factors={"objective.": 0.5}, nesterov=True)
    before = {name: value.clone() for name, value in step.named_parameters()}
    trainer.set_rate(0.1)
    trainer.step(samples, 3, 0)
    for part, batch in enumerate(objective.seen):
        assert batch.row_offset == 3 * part
        for name, value in samples.items():
            torch.testing.assert_close(getattr(batch, name), value[part::2])  # type: ignore[index]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.05]
    for name, value in step.named_parameters():
        rate = 1.9 * (0.05 if name.startswith("objective.") else 0.1)  # the first step of Nesterov's momentum 0.9
        assert value.grad is not None
        torch.testing.assert_close(value.detach(), before[name] - rate * value.grad)
    again = Trainer(TrainingStep(step.network, Views()), trainer.processes, weight_decay=0.0, lr_factors={"objective.": 0.5}, nesterov=True)
    again.load_state_dict(trainer.state_dict())
    torch.testing.assert_close(again.module.objective.state_dict(), objective.state_dict())
    torch.testing.assert_close(again.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"])


@pytest.mark.parametrize(("batch_norm", "trains", "moves", "batch_statistics"), [
    ("train", "all", True, True), ("train", "head", False, False), ("frozen", "all", False, False), ("shifted", "head", True, True),
])  # fmt: skip
def test_batch_normalisation_is_trained_frozen_or_shifted(batch_norm: str, trains: str, moves: bool, batch_statistics: bool) -> None:
    network = Network(Backbone(), build_head("linear", 4, 3))
    norm: Any = network.backbone.layers[2]
    step = TrainingStep(network, cross_entropy(), trains=trains, batch_norm=batch_norm)
    trainer = Trainer(step, Processes.single(torch.device("cpu")), weight_decay=0.0)
    trainer.set_rate(0.1)
    step.train()
    assert norm.training is batch_statistics
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    trainer.step({"images": torch.randn(6, 1, 2, 2), "target": torch.tensor([0, 1, 2, 0, 1, 0])}, 0, 0)
    assert torch.equal(norm.running_mean, before["running_mean"]) is not moves
    assert torch.equal(norm.weight, before["weight"]) is (trains == "head")


def test_only_the_last_block_is_shifted() -> None:
    """MiSLAS on Places-LT: the classifier trains, statistics of the last block alone are those of the batch."""
    network = Network(build_backbone("resnet18"), build_head("scaled linear", 512, 3))
    step = TrainingStep(network, cross_entropy(), trains="head-and-scale", batch_norm="shifted-last-block").train()
    training = {name for name, module in network.backbone.named_modules() if isinstance(module, torch.nn.BatchNorm2d) and module.training}
    assert training == {name for name, module in network.backbone.named_modules() if isinstance(module, torch.nn.BatchNorm2d) and name.startswith("layer4.1.")}
    step.eval()
    assert not any(module.training for module in network.modules())
    phase = plan("ce", "mislas", "places-lt", COUNTS)[-1]
    assert (phase.batch_norm, phase.has_batch_statistics, phase.trains_backbone) == ("shifted-last-block", True, False)
    assert plan("ce", "mislas", "places-lt", COUNTS, stage1={"trains": "all"})[-1].batch_norm == "shifted"
    with pytest.raises(ValueError, match="last block"):
        TrainingStep(Network(Backbone(), build_head("linear", 4, 3)), step.objective, batch_norm="shifted-last-block").train()


def test_mixup_without_a_second_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gclkern.training.objectives.build.OBJECTIVES", {"views": lambda phase, class_counts, feature_dim: Views()})
    phase = replace(plan("ce", None, "cifar10-lt", COUNTS)[0], loss="views")
    assert isinstance(build_objective(phase, COUNTS, 4), Views)
    with pytest.raises(ValueError, match=r"stage-1: the loss views has no second target, which `mixup=0.5` needs"):
        build_objective(replace(phase, mixup=0.5), COUNTS, 4)
