"""Networks of a run: built, taken over by the next phase, and stored in and loaded from checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gclkern.checkpoint import CheckpointError
from gclkern.data import DataSplits
from gclkern.distributed import ShardedCosineLinear
from gclkern.engine import Network, build_head, derive_seed
from gclkern.layers import CosineLinear
from gclkern.methods import Phase, default_model
from gclkern.models import build_backbone
from gclkern.retrain import replace_head


def build_network(head: str, data: DataSplits, config: dict[str, Any], device: torch.device, *, pretrained: bool = False) -> Network:
    """A fresh network by the arguments of a run; its weights depend on their seed alone."""
    torch.manual_seed(derive_seed(config["seed"], "weights"))
    model = config["model"] or default_model(config["data"])
    backbone: Any = build_backbone(model, image_size=data.image_size, in_channels=data.channels, pretrained=pretrained)
    network = Network(backbone, build_head(head, backbone.feature_dim, data.num_classes)).to(device)
    return network.to(memory_format=torch.channels_last) if config["channels_last"] else network  # type: ignore[call-overload]


def prepare(phase: Phase, network: Network | None, data: DataSplits, config: dict[str, Any], device: torch.device) -> Network:
    """The network that a phase starts from: a fresh one, or the last phase's with its classifier, another kind of it or a new one."""
    if network is None or phase.start == "fresh":
        pretrained = config["data"] == "places-lt" if config["pretrained"] is None else config["pretrained"]
        return build_network(phase.head, data, config, device, pretrained=pretrained)
    torch.manual_seed(derive_seed(config["seed"], "new head"))
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
    """The weights of a network, with all classes of its classifier; a collective call where those are spread over processes."""
    state = network.state_dict()
    if isinstance(network.head, ShardedCosineLinear):
        state["head.weight"] = network.head.gather(network.head.weight)
    return state


def network_state(config: dict[str, Any], phase: Phase, network: Network) -> dict[str, Any]:
    """What a checkpoint of a network holds."""
    return {"kind": "network", "config": config, "name": phase.name, "head": phase.head, "network": whole_state(network)}


def load_network(state: dict[str, Any], data: DataSplits, device: torch.device, *, averaged: bool = False) -> Network:
    """The network of a checkpoint; with `averaged` that of its averaged weights, where it has them.

    Raises:
        CheckpointError: the data set has another number of classes, or the network is another one.
    """
    weights = state["average"] if averaged and state.get("average") else state["network"]
    classes = weights["head.weight"].shape[0]
    if classes != data.num_classes:
        raise CheckpointError(f"the checkpoint has {classes} classes, {data.name} has {data.num_classes}; evaluate it on its own data set")
    network = build_network(state["head"], data, state["config"], device)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its network on images of {data.name}; evaluate it on its own data set") from error
    return network
