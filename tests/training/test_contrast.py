"""BCL, ProCo and hybrid networks: what they minimise, their settings, and that two processes train as one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.losses import GCLLoss
from gclkern.training.network import Network, build_head
from gclkern.training.objectives import Batch, Samples, build_objective
from gclkern.training.objectives.bcl import BalancedContrast
from gclkern.training.objectives.hybrid import Hybrid, PrototypeContrast
from gclkern.training.objectives.proco import ProbabilisticContrast
from gclkern.training.processes import Processes
from gclkern.training.recipes import Phase, plan
from gclkern.training.trainer import Trainer, TrainingStep
from tests.support import oracle
from tests.support.processes import run_ranks, start_train, train

METHODS = ("bcl", "gcl+bcl", "proco", "hybrid-sc", "hybrid-psc")
COUNTS = [40, 12, 5]
SMALL: dict[str, dict[str, Any]] = {  # projection heads of a size that a test can afford
    "bcl": {"hidden": 12, "dim": 16},
    "gcl+bcl": {"hidden": 12, "dim": 16},
    "proco": {"hidden": 12, "dim": 16},
    "hybrid-sc": {"dim": 16},
    "hybrid-psc": {"dim": 16},
}


class Backbone(nn.Module):
    """Without batch normalisation, whose statistics are those of one process."""

    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 6)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.flatten(1)).tanh()
        return features


def small_phase(method: str) -> Phase:
    phase = plan(method, None, "digits-lt", COUNTS)[0]
    return replace(phase, options=phase.options | SMALL[method])


def problem(method: str) -> tuple[Network, Any]:
    torch.manual_seed(0)
    phase = small_phase(method)
    return Network(Backbone(), build_head(phase.head, 6, 3)), build_objective(phase, COUNTS, 6)


def samples(method: str, rows: int = 8, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    phase = small_phase(method)
    made: Samples = {"images": torch.randn(rows, 1, 3, 3, generator=generator), "target": torch.randint(3, (rows,), generator=generator)}
    if phase.views:
        made["views"] = torch.randn(rows, len(phase.views), 1, 3, 3, generator=generator)
    if phase.second_sampler:
        made["second_images"] = torch.randn(rows, 1, 3, 3, generator=generator)
        made["second_target"] = torch.randint(3, (rows,), generator=generator)
    return made


def batch(given: Samples) -> Batch:
    return Batch(seed=torch.tensor(0), **given)


def adjusted(network: Network, images: Tensor, target: Tensor) -> Tensor:
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    return F.cross_entropy(network.classify(network.backbone(images)) + prior.log(), target)


@pytest.mark.parametrize("method", ["bcl", "gcl+bcl"])
def test_bcl_is_a_loss_of_one_view_and_balanced_contrast_of_others(method: str) -> None:
    network, objective = problem(method)
    assert isinstance(objective, BalancedContrast)
    given = samples(method)
    first, second = (network.backbone(given["views"][:, place]) for place in range(2))
    keys, target = objective.project(torch.cat([first, second])), given["target"].repeat(2)
    prototypes = objective.project_classes(network.head.weight)
    counts = target.bincount(minlength=3) + 1.0
    contrast = oracle.supervised_contrastive(keys.double(), target, prototypes.double(), counts.double(), temperature=0.1)
    if method == "bcl":
        classification = adjusted(network, given["images"], given["target"])
    else:
        criterion = GCLLoss(COUNTS, noise_mul=0.5, scale=30.0)
        classification = criterion(network.classify(network.backbone(given["images"])), given["target"], seed=3, row_offset=8)
    expected = 2.0 * classification + 0.6 * contrast
    found = objective(network, batch(given)._replace(seed=torch.tensor(3), row_offset=8))
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_proco_is_logit_adjustment_of_logits_and_of_the_contrast() -> None:
    network, objective = problem("proco")
    assert isinstance(objective, ProbabilisticContrast)
    given = samples("proco")
    views = given["views"]
    keys, target = objective.project(network.backbone(torch.cat([views[:, 0], views[:, 1]]))), given["target"].repeat(2)
    objective.begin_epoch(network, 0, {})
    loss = objective(network, batch(given))
    assert objective.contrast.counts[1].sum() == 16
    contrast = objective.contrast.eval()(keys, target)  # around the distributions that the step has estimated
    torch.testing.assert_close(loss, adjusted(network, given["images"], given["target"]) + contrast)
    objective.begin_epoch(network, 1, {})
    assert objective.contrast.counts[0].sum() == 16
    assert objective.contrast.counts[1].sum() == 0


@pytest.mark.parametrize("method", ["hybrid-sc", "hybrid-psc"])
def test_the_contrast_of_hybrid_networks_fades_out(method: str) -> None:
    network, objective = problem(method)
    assert isinstance(objective, Hybrid)
    given = samples(method)
    images, target = given["images"], given["target"]
    if method == "hybrid-sc":
        images, target = torch.cat([images, given["views"][:, 0]]), target.repeat(2)
    keys = objective.project(network.backbone(images)).double()
    if isinstance(objective.contrast, PrototypeContrast):
        options = {"include_samples": False, "include_own_class": False}
        contrast = oracle.supervised_contrastive(keys, target, objective.contrast.prototypes.weight.double(), temperature=1.0, **options)
    else:
        contrast = oracle.supervised_contrastive(keys, target, temperature=0.1)
    plain = F.cross_entropy(network.classify(network.backbone(given["second_images"])), given["second_target"])
    for epoch, share in ((0, 1.0), (5, 0.75), (8, 0.36)):
        objective.set_epoch(network, epoch, 10, 0.1)
        expected = share * contrast + (1 - share) * plain
        torch.testing.assert_close(objective(network, batch(given)).double(), expected, rtol=1e-5, atol=1e-5)


def test_published_settings() -> None:
    """Typed from the releases; the projection heads of the large sets have 2048 hidden units and 1024 outputs."""
    found = {}
    for method, dataset in itertools.product(METHODS, ("cifar100-lt", "imagenet-lt", "inat18")):
        phase = plan(method, None, dataset, COUNTS)[0]
        found[method, dataset] = (phase.epochs, phase.batch_size, phase.lr, phase.weight_decay, phase.head, phase.options.get("temperature"))
    assert found["bcl", "cifar100-lt"] == (200, 256, 0.15, 5e-4, "linear", None)
    assert found["proco", "cifar100-lt"] == (200, 256, 0.3, 2e-4, "linear", None)
    assert found["hybrid-sc", "cifar100-lt"] == found["hybrid-psc", "cifar100-lt"] == (200, 512, 0.5, 1e-4, "linear", None)
    assert found["bcl", "imagenet-lt"] == found["proco", "imagenet-lt"] == (90, 256, 0.1, 5e-4, "cosine", 0.07)
    assert found["bcl", "inat18"] == (100, 256, 0.2, 1e-4, "cosine", 0.07)
    assert found["proco", "inat18"] == (90, 256, 0.2, 1e-4, "cosine", 0.07)
    assert plan("hybrid-psc", None, "cifar10-lt", COUNTS)[0].options == {"temperature": 1.0}
    for dataset in ("cifar100-lt", "imagenet-lt"):
        both, bcl, gcl = (plan(method, "none", dataset, COUNTS)[0] for method in ("gcl+bcl", "bcl", "gcl"))
        assert both == replace(bcl, loss="gcl+bcl", head="cosine", options=gcl.options | bcl.options)
    rates = [plan("bcl", None, "cifar10-lt", COUNTS)[0].schedule.rate(1.0, epoch, 200) for epoch in (0, 4, 159, 160, 179, 180)]
    assert rates == pytest.approx([0.2, 1.0, 1.0, 0.1, 0.1, 0.01])
    rates = [plan("hybrid-sc", None, "cifar10-lt", COUNTS)[0].schedule.rate(1.0, epoch, 200) for epoch in (0, 119, 120, 159, 160)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    large = build_objective(plan("bcl", None, "imagenet-lt", COUNTS)[0], COUNTS, 10)
    assert large.scale == 30.0
    assert isinstance(large, BalancedContrast)
    assert [layer.out_features for layer in large.project if isinstance(layer, nn.Linear)] == [2048, 1024]


def trained(method: str, processes: Processes, rows: slice) -> dict[str, Tensor]:
    """Weights after two steps of a network without batch normalisation."""
    network, objective = problem(method)
    for module in objective.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.Identity())
    objective.set_epoch(network, 1, 3, 0.1)
    trainer = Trainer(TrainingStep(network, objective), processes, weight_decay=1e-3)
    trainer.set_rate(0.1)
    trainer.module.train()
    for step in range(2):
        # In blocks: GCL's noise is that of a row of the whole batch. (The samplers interleave, so that there other rows have it.)
        given: Any = {name: value[rows] for name, value in samples(method, seed=step).items()}  # type: ignore[index]
        trainer.step(given, seed=step, count=step)
    return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


def in_two_processes(rank: int, world: int) -> None:
    alone, together = Processes.single(torch.device("cpu")), Processes.single(torch.device("cpu"))
    together.world, together.rank = world, rank
    for method in METHODS:
        shared = trained(method, together, slice(4 * rank, 4 * rank + 4))
        whole = in_one_process(method, alone)
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-6)


def in_one_process(method: str, alone: Processes) -> dict[str, Tensor]:
    """As without torch.distributed: gather_batch would wait for the other process."""
    initialized = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False  # type: ignore[assignment]
    try:
        return trained(method, alone, slice(None))
    finally:
        torch.distributed.is_initialized = initialized  # type: ignore[assignment]


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    run_ranks(2, in_two_processes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gcl+bcl", "proco", "hybrid-sc"])
def test_two_killed_processes_go_on(method: str, tmp_path: Path) -> None:
    """Bitwise as a run left alone."""
    settings = ["--epochs", "2", "--batch-size", "64", "--no-baseline", "--no-pictures", "--device", "cpu", "--method", method]
    settings += ["--checkpoint-seconds", "0"]
    train(*settings, "--out", tmp_path / "whole", ranks=2)
    start_train(*settings, "--out", tmp_path / "killed", ranks=2).kill_after_checkpoint(tmp_path / "killed")
    train("--resume", tmp_path / "killed", ranks=2)
    assert (tmp_path / "killed" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
