"""The DRO-LT bound on several layers at once."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gclkern.losses import DROLTLoss
from gclkern.training import load_classifier
from gclkern.training.backbones import build_backbone
from gclkern.training.config import RunConfig
from gclkern.training.data import load_data
from gclkern.training.evaluation import epoch_centroids
from gclkern.training.network import Network, build_head
from gclkern.training.objectives import Batch, build_objective, check_layers
from gclkern.training.objectives.robust import pooled
from gclkern.training.phase_training import PhaseTraining
from gclkern.training.processes import Processes
from gclkern.training.recipes import RETRAINS, Phase, plan, plan_run
from tests.support.processes import start_train, train
from tests.support.run_files import outcome

COUNTS = [50, 20, 5]
LAYERS = ("layers.2", "features", "layers.8")
TARGET = torch.tensor([0, 1, 2, 0, 1, 0])


def robust_phase(*layers: str) -> Phase:
    config = RunConfig(data="cifar10-lt", method="dro-lt", robust_layers=",".join(layers))
    return next(phase for phase in plan_run(config, COUNTS, 1) if phase.robust)


def test_each_layer_has_its_centroids_and_its_epsilon() -> None:
    """The mean of the bounds of pooled layers, from centroids of one pass, equals cross entropy plus the bounds one by one."""
    torch.manual_seed(0)
    network = Network(build_backbone("small-cnn", image_size=8, in_channels=1), build_head("linear", 64, 3))
    objective = build_objective(robust_phase(*LAYERS), COUNTS, 64)
    epsilons = [value for name, value in objective.named_parameters() if name.endswith("epsilon")]
    assert len(epsilons) == 3
    with torch.no_grad():
        for place, epsilon in enumerate(epsilons):
            epsilon.fill_(0.1 * (1 + place))
    images = torch.randn(6, 1, 8, 8)
    loader = iter([(images, TARGET)])
    centroids = epoch_centroids(network, loader, 3, Processes.single(torch.device("cpu")), objective.centroid_features)
    outputs: dict[str, Tensor] = {}
    network.eval()
    whole = network.backbone.layers
    outputs["layers.2"], outputs["layers.8"] = whole[:3](images).mean((2, 3)), whole[:9](images).mean((2, 3))
    outputs["features"] = network.backbone(images)
    expected = nn.functional.cross_entropy(network.head(outputs["features"]), TARGET, weight=torch.tensor([1.0, 0.4, 0.1]))
    for place, name in enumerate(LAYERS):
        means = torch.stack([outputs[name][label == TARGET].mean(0) for label in range(3)])
        expected = expected + DROLTLoss(COUNTS, epsilon=0.1 * (1 + place))(outputs[name], TARGET, means.detach()) / 3
    loss = objective(network, Batch(images, TARGET, torch.tensor(0), centroids=centroids["centroids"], counts=centroids["counts"]))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(epsilon.grad is not None and bool(epsilon.grad.any()) for epsilon in epsilons)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_centroids_are_of_features_as_training_computes_them(amp: str) -> None:
    """Under autocast where the steps are; their means are float32."""
    data, processes = load_data("digits-lt"), Processes.single(torch.device("cpu"))
    config = RunConfig(data="digits-lt", method="dro-lt", amp=amp)
    phase = next(phase for phase in plan_run(config, data.class_counts, 1) if phase.robust)
    network = Network(build_backbone("small-cnn", image_size=8, in_channels=1), build_head("linear", 64, 10))
    kinds = []
    network.backbone.layers[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    training = PhaseTraining(phase, network, data, config, processes)
    training.begin_epoch()
    assert set(kinds) == {torch.float32 if amp == "off" else torch.bfloat16}
    centroids = training.progress.centroids["centroids"]
    assert centroids.dtype == torch.float32 and bool(centroids.isfinite().all())


def test_the_features_alone_are_the_default() -> None:
    phase = plan("dro-lt", None, "cifar10-lt", COUNTS)[1]
    assert phase == robust_phase("features")
    assert [name for name, _ in build_objective(phase, COUNTS, 64).named_parameters()] == ["robust.losses.0.epsilon"]


def test_pooling() -> None:
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(pooled(tokens), tokens.mean(1))
    torch.testing.assert_close(pooled(torch.ones(2, 3, 4, 4)), torch.ones(2, 3))
    assert pooled(tokens[:, 0]).shape == (2, 3)


def test_unknown_layers_are_refused() -> None:
    backbone = build_backbone("small-cnn", image_size=8, in_channels=1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    check_layers(backbone.train(), LAYERS, torch.randn(1, 1, 8, 8))
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"`robust_layers`: SmallCNN has no layer 'layer9'; take one of features, layers, or a module within one"):
        check_layers(backbone, ["features", "layer9"], torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="names a layer twice"):
        robust_phase("features", "features")
    with pytest.raises(ValueError, match="the method gcl has no robust phase"):
        plan_run(RunConfig(method="gcl", robust_layers="features"), COUNTS, 1)


@pytest.mark.parametrize("retrain", [name for name in RETRAINS if name != "none"])
@pytest.mark.parametrize("method", ["dro-lt", "gcl+dro-lt"])
def test_robust_features_go_with_every_re_training(method: str, retrain: str) -> None:
    *first, robust, last = [phase for phase in plan(method, retrain, "cifar100-lt", COUNTS) if phase.name != "stage-1-classifier"]
    assert [phase.name for phase in first] == ["stage-1"]
    assert (robust.robust, last.robust, last.name) == (1.0, 0.0, "stage-2")
    assert not last.trains_backbone


SHORT = ["--epochs-scale", "0.02", "--no-baseline", "--no-pictures", "--device", "cpu", "--holdout", "0.1", "--robust-layers", "layers.2,features"]


@pytest.mark.slow
@pytest.mark.parametrize(("retrain", "finished"), list(zip([name for name in RETRAINS if name != "none"], cycle(("stage-1", "stage-1-robust")), strict=False)))
def test_a_run_with_robust_layers_and_a_re_training(retrain: str, finished: str, tmp_path: Path) -> None:
    """It trains all phases, and goes on bitwise where it was killed: in the phase after the `finished` one, the robust phase or the next."""
    settings = [*SHORT, "--method", "gcl+dro-lt" if retrain == "gcl" else "dro-lt", "--retrain", retrain, "--checkpoint-seconds", "0"]
    train(*settings, "--out", tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    phases = ["stage-1", "stage-1-robust", *(() if retrain == "gcl" else ("stage-1-classifier",)), "stage-2"]
    assert {f"{phase}.pt" for phase in phases} | {"last.pt", "best.pt"} == {name for name in whole if name.endswith(".pt")}
    start_train(*settings, "--out", tmp_path / "killed").kill_after_checkpoint(tmp_path / "killed", finished=finished)
    train("--resume", tmp_path / "killed")
    assert outcome(tmp_path / "killed") == whole
    assert not load_classifier(tmp_path / "killed" / "stage-2.pt").training


class Odd(nn.Module):
    """A module that is not called, and one whose output is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Identity()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.attention(images, images, images)[0].mean(1)
        return features


@pytest.mark.parametrize(("layer", "problem"), [("unused", "is not called in a forward pass"), ("attention", "gives a tuple, not a tensor")])
def test_layers_without_a_tensor_are_refused(layer: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"`robust_layers`: the layer {layer} {problem}; take another one"):
        check_layers(Odd(), [layer, "features"], torch.zeros(2, 3, 4))
