"""What contrastive objectives share: the features of several views, and the layers that turn features into keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gclkern.distributed import gather_batch
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch


def features_of(network: Network, *images: Tensor) -> tuple[Tensor, ...]:
    """Features (N, D) of each of several batches (N, C, H, W), by one pass through the backbone, so that batch normalisation sees all of them together."""
    return network.backbone(torch.cat(images)).split([len(part) for part in images])


def flat_views(views: Tensor) -> Tensor:
    """Views (N, V, C, H, W) as one batch (V * N, C, H, W), with the samples of the first view first."""
    return views.transpose(0, 1).flatten(0, 1)


def contrasted_views(network: Network, project: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) of the batch's own images; keys and classes of its further views, of all processes."""
    assert batch.views is not None
    first, others = features_of(network, batch.images, flat_views(batch.views))
    return first, *gather_batch(project(others), batch.target.repeat(batch.views.shape[1]), averaged_gradients=True)


def projection_head(feature_dim: int, hidden: int, dim: int, *, batch_norm: bool) -> nn.Sequential:
    """Two linear layers with a ReLU between them, from features (N, feature_dim) to keys (N, dim), which are not normalised."""
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(feature_dim, hidden), *between, nn.Linear(hidden, dim))
