"""What contrastive objectives share: the features of several views, and the layers that turn features into keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gclkern.training.network import Network


def features_of(network: Network, *images: Tensor) -> tuple[Tensor, ...]:
    """Features (N, D) of each of several batches (N, C, H, W), by one pass through the backbone, so that batch normalisation sees all of them together."""
    return network.backbone(torch.cat(images)).split([len(part) for part in images])


def flat_views(views: Tensor) -> Tensor:
    """Views (N, V, C, H, W) one below the other: (V * N, C, H, W), with the samples of the first view first."""
    return views.transpose(0, 1).flatten(0, 1)


def projection_head(feature_dim: int, hidden: int, dim: int, *, batch_norm: bool) -> nn.Sequential:
    """Two linear layers with a ReLU between them, from features (N, feature_dim) to keys (N, dim), which are not normalised."""
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(feature_dim, hidden), *between, nn.Linear(hidden, dim))
