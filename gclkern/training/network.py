"""The network of a run: building it, preparing it for the next phase, and storing it in and loading it from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gclkern.devices import without_autocast
from gclkern.distributed import ShardedCosineLinear
from gclkern.layers import CosineLinear
from gclkern.oltr import MetaEmbeddingClassifier
from gclkern.tde import TDEClassifier
from gclkern.training.backbones import build_backbone, renew_last_block
from gclkern.training.checkpoint import Checkpoint, CheckpointError, check_same_data, load_checkpoint
from gclkern.training.composed_backbones import modulate
from gclkern.training.config import STAGE_1_IGNORES, RunConfig
from gclkern.training.data import DataSplits
from gclkern.training.heads import CalibratedClassifier, NearestClassMean, ScaledClassifier
from gclkern.training.recipes import METHODS, Phase, default_model, family
from gclkern.training.seeds import derive_seed

# Classifiers by the name that Phase.head has; "adjusted cosine" is a cosine classifier with a bias.
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "cosine": CosineLinear,
    "nearest mean": NearestClassMean,
    "tde": TDEClassifier,
    "meta-embedding": MetaEmbeddingClassifier,
    "scaled linear": partial(ScaledClassifier, normalize=False, bias=True),
    "scaled cosine": partial(ScaledClassifier, normalize=True, bias=False),
    "adjusted cosine": partial(ScaledClassifier, normalize=True, bias=True),
    "calibrated linear": partial(CalibratedClassifier, normalize=False),
    "calibrated cosine": partial(CalibratedClassifier, normalize=True),
}


def build_head(kind: str, in_features: int, num_classes: int) -> nn.Module:
    """A new classifier; `kind` is one of HEADS."""
    return HEADS[kind](in_features, num_classes)


class Network(nn.Module):
    """A backbone, a classifier, and the scale that turns the classifier's output into logits."""

    backbone: Any  # a module with an attribute feature_dim
    head: Any
    scale: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.classify(self.backbone(images))

    def classify(self, features: Tensor) -> Tensor:
        """Cosines or logits in float32, also under autocast, because bfloat16 would round them to 8 significant bits."""
        with without_autocast(features.device.type):
            output: Tensor = self.head(features.float())
        return output


def replace_head(network: Network, kind: str, *, keep: bool) -> None:
    """Replace the classifier by one of `kind`, with new weights or, with `keep`, those of the old classifier."""
    old = network.head
    features = network.backbone.feature_dim
    new = build_head(kind, features, old.weight.shape[0]).to(old.weight.device)
    if keep:
        part = new.hallucinator if isinstance(new, MetaEmbeddingClassifier) else new  # OLTR's begins as stage 1's classifier
        part.load_state_dict(old.state_dict(), strict=False)
    network.head = new


def model_name(config: RunConfig, data: DataSplits) -> str:
    """The backbone of a run: that of the settings, or the default of the method or the data set."""
    return config.model or METHODS[config.method].models.get(family(config.data)) or default_model(config.data, data.image_size, len(data.train))


def backbone_name(phase: Phase, config: RunConfig, data: DataSplits) -> str:
    """The backbone of a phase by the name that `build_backbone` takes, such as "two-branch:resnet32"."""
    name = model_name(config, data)
    return f"{phase.backbone}:{name}" if phase.backbone else name


def build_network(
    model: str, head: str, num_classes: int, *, in_channels: int, image_size: int, channels_last: bool = False, pretrained: bool = False
) -> Network:  # fmt: skip
    """A network on the CPU, with random weights or a pretrained backbone."""
    backbone: Any = build_backbone(model, image_size=image_size, in_channels=in_channels, pretrained=pretrained)
    network = Network(backbone, build_head(head, backbone.feature_dim, num_classes))
    return network.to(memory_format=torch.channels_last) if channels_last else network  # type: ignore[call-overload]


def prepare(phase: Phase, network: Network | None, data: DataSplits, config: RunConfig, device: torch.device) -> Network:
    """The network that a phase starts from: a new one, or the previous phase's, whose classifier is kept, converted or replaced."""
    if network is None or phase.start == "fresh":
        torch.manual_seed(derive_seed(config.seed, "weights"))
        pretrained = phase.pretrained if config.pretrained is None else config.pretrained
        network = build_network(
            backbone_name(phase, config, data), phase.head, data.num_classes, in_channels=data.channels, image_size=data.image_size,
            channels_last=config.channels_last, pretrained=pretrained,
        )  # fmt: skip
        if phase.trains == "new-last-block":
            renew_last_block(network.backbone)
        return network.to(device)
    torch.manual_seed(derive_seed(config.seed, "new head"))
    if phase.backbone.endswith("modulated") and getattr(network.backbone, "attention", None) is None:
        network.backbone = modulate(network.backbone, model_name(config, data), torch.zeros(1, data.channels, data.image_size, data.image_size, device=device))
    replace_head(network, phase.head, keep=phase.start == "previous")
    return network


def shard_classifier(network: Network) -> None:
    """Spread the classes of a cosine classifier over the processes."""
    whole = network.head
    network.head = ShardedCosineLinear(whole.in_features, whole.num_classes, device=whole.weight.device)
    network.head.load_state_dict({"weight": whole.weight})


def gather_classifier(network: Network) -> None:
    """Undo :func:`shard_classifier`; a collective call."""
    if isinstance(network.head, ShardedCosineLinear):
        parts = network.head
        network.head = CosineLinear(parts.in_features, parts.num_classes, device=parts.weight.device)
        network.head.load_state_dict({"weight": parts.gather(parts.weight)})


def whole_state(network: Network) -> dict[str, Tensor]:
    """The state dict of a network, with all classes of its classifier; a collective call if the classes are spread over processes."""
    state = network.state_dict()
    if isinstance(network.head, ShardedCosineLinear):
        state["head.weight"] = network.head.gather(network.head.weight)
    return state


def network_checkpoint(network: Network, phase: Phase, data: DataSplits, config: RunConfig, temperature: float | None = None) -> Checkpoint:
    """The contents of a checkpoint of a network; a collective call."""
    return {
        "kind": "network", "name": phase.name, "config": config.to_dict(), "network": whole_state(network), "model": backbone_name(phase, config, data),
        "head": phase.head, "in_channels": data.channels, "image_size": data.image_size, "transform": data.test.evaluation_transform(),
        "temperature": temperature,
        "groups": data.groups, "data": data.identity,
    }  # fmt: skip


def load_network(checkpoint: Checkpoint, device: torch.device, *, averaged: bool = False) -> Network:
    """The network of a checkpoint; with `averaged`, with its averaged weights if it has any.

    Raises:
        CheckpointError: the weights do not fit the network that the checkpoint names.
    """
    average = checkpoint["trainer"]["average"] if averaged and "trainer" in checkpoint else None
    weights = average or checkpoint["network"]
    network = build_network(
        checkpoint["model"], checkpoint["head"], len(checkpoint["data"]["class_counts"]), in_channels=checkpoint["in_channels"],
        image_size=checkpoint["image_size"], channels_last=checkpoint["config"]["channels_last"],
    )  # fmt: skip
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        name = checkpoint["model"]
        raise CheckpointError(f"the weights of the checkpoint do not fit {name}; use the versions of gclkern and of {name}'s library that wrote it") from error
    return network.to(device)


def load_stage1(config: RunConfig, name: str, data: DataSplits, device: torch.device) -> Network:
    """The network of the finished phase `name`, the last before stage 2, from the checkpoint `config.stage1`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is the checkpoint of another phase, or was trained on other data.
        ValueError: it was trained with settings that this run's stage 1 does not have.
    """
    assert config.stage1 is not None
    if not Path(config.stage1).is_file():
        raise FileNotFoundError(f"`stage1`: there is no checkpoint at {config.stage1}; give {name}.pt of a finished run with the method {config.method}")
    checkpoint = load_checkpoint(config.stage1)
    if (checkpoint["kind"], checkpoint["name"]) != ("network", name):
        found = f"{checkpoint['name']} of kind {checkpoint['kind']}"
        raise CheckpointError(f"`stage1`: {config.stage1} holds {found}; give {name}.pt of a finished run with the method {config.method}")
    theirs = RunConfig.from_dict(checkpoint["config"])
    for setting in config.changed_from(theirs):
        if setting not in STAGE_1_IGNORES:
            old, new = getattr(theirs, setting), getattr(config, setting)
            raise ValueError(f"`stage1`: {config.stage1} was trained with `{setting}={old}`, this run has {new}; give the same")
    check_same_data(checkpoint, data)
    return load_network(checkpoint, device)


def start(
    phases: Sequence[Phase], checkpoint: Checkpoint | None, data: DataSplits, config: RunConfig, device: torch.device
) -> tuple[Sequence[Phase], Network]:  # fmt: skip
    """The phases that are still to come, and the network that the first of them trains: from a checkpoint, on a given stage 1, or from the beginning.

    Raises:
        CheckpointError, ValueError: the checkpoint or the given stage 1 belongs to other data or settings.
    """
    if checkpoint is not None:
        check_same_data(checkpoint, data)
        return phases[[phase.name for phase in phases].index(checkpoint["name"]) :], load_network(checkpoint, device)
    if config.stage1:
        return phases[-1:], prepare(phases[-1], load_stage1(config, phases[-2].name, data, device), data, config, device)
    return phases, prepare(phases[0], None, data, config, device)
