"""Backbones made from others: with two last blocks (BBN, De-confound-TDE), or with an embedding and attention on the last map (OLTR).

Their names are a kind and the name of the network they are made from, such as "two-branch:resnet32".

    two-branch           the last block twice; features of both, side by side
    embedded             a linear layer to 512 features and a ReLU after the network
    modulated            attention on the last map, and after the network a linear layer of the same width and a ReLU
    embedded-modulated   attention on the last map of an embedded network
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gclkern.oltr import ModulatedAttention

KINDS = ("two-branch", "embedded", "modulated", "embedded-modulated")
_EMBEDDED_DIM = 512  # of OLTR's features of a ResNet-152


def split_last_block(backbone: Any, name: str) -> tuple[nn.Module, nn.Module]:
    """The network without its last block, and that block: the features are the mean of the block's map over its pixels.

    Raises:
        ValueError: the network is not known to end so.
    """
    if hasattr(backbone, "split"):
        trunk, block = backbone.split()
        return trunk, block
    layers = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    if [child for child, _ in backbone.named_children()] != layers:
        known = "small-cnn, resnet32 and torchvision's ResNets"
        raise ValueError(f"this method changes the last block of the network, which is known for {known}, not for {name}; choose one of them by `model`")
    trunk = nn.Sequential(*(getattr(backbone, layer) for layer in layers[:7]), backbone.layer4[:-1])
    return trunk, backbone.layer4[-1]


class TwoBranchBackbone(nn.Module):
    """A shared trunk and two branches, each a last block with weights of its own (Zhou et al., "BBN", CVPR 2020, section 4.1).

    Args:
        first, second: two networks of the same kind with their own random weights, of which the trunk of the first is used.
        name: of the networks, for errors.
    """

    def __init__(self, first: Any, second: Any, name: str) -> None:
        super().__init__()
        self.trunk, block = split_last_block(first, name)
        self.branches = nn.ModuleList([block, split_last_block(second, name)[1]])
        self.feature_dim = 2 * first.feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of images (B, C, H, W): those of branch 0, then those of branch 1."""
        maps = self.trunk(images)
        return torch.cat([branch(maps).mean((2, 3)) for branch in self.branches], 1)

    def branch(self, images: Tensor, place: int) -> Tensor:
        """Features (B, feature_dim / 2) of one branch, 0 or 1."""
        return self.branches[place](self.trunk(images)).mean((2, 3))  # type: ignore[no-any-return]


class EmbeddedBackbone(nn.Module):
    """A network with a linear layer and a ReLU on its features, and perhaps attention on its last map.

    Args:
        trunk: from images to the last map.
        embedding: the linear layer, from the channels of the map.
        attention: on the map; None for none.
    """

    def __init__(self, trunk: nn.Module, embedding: nn.Linear, attention: ModulatedAttention | None = None) -> None:
        super().__init__()
        self.trunk, self.embedding, self.attention = trunk, embedding, attention
        self.feature_dim = embedding.out_features
        self.fewest_images = 1

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of images (B, C, H, W)."""
        maps = self.trunk(images)
        if self.attention is not None:
            maps = self.attention(maps)
        return torch.relu(self.embedding(maps.mean((2, 3))))


def embed(backbone: Any, name: str) -> EmbeddedBackbone:
    """The network with 512 features behind a new linear layer."""
    return EmbeddedBackbone(nn.Sequential(*split_last_block(backbone, name)), nn.Linear(backbone.feature_dim, _EMBEDDED_DIM))


@torch.no_grad()
def modulate(backbone: Any, name: str, images: Tensor) -> EmbeddedBackbone:
    """The network with new attention on its last map; if it has no embedding, with a new one of the same width.

    Args:
        images: (1, C, H, W), of the shape that the network will see; the weights of attention depend on it.
    """
    if isinstance(backbone, EmbeddedBackbone):
        trunk, embedding = backbone.trunk, backbone.embedding
    else:
        trunk, embedding = nn.Sequential(*split_last_block(backbone, name)), nn.Linear(backbone.feature_dim, backbone.feature_dim)
    training = trunk.training
    channels, height, width = trunk.eval()(images).shape[1:]
    trunk.train(training)
    modulated = EmbeddedBackbone(trunk, embedding, ModulatedAttention(channels, height, width)).to(images.device)
    modulated.fewest_images = getattr(backbone, "fewest_images", 1)
    return modulated
