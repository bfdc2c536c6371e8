"""OLTR: cross entropy of meta-embeddings, and the loss of the memory that they draw on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gclkern.losses import FocalLoss
from gclkern.oltr import MemoryLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective

_MEMORY_WEIGHT = 0.01  # of the memory's loss beside cross entropy, in the release


class MemoryClassification(Objective):
    """The second stage of OLTR (Liu et al., CVPR 2019) on a network with a :class:`gclkern.MetaEmbeddingClassifier`.

    The memory starts from the class means of the features of all training images, taken in eval mode and without augmentation before the first step, and is
    then a parameter like others.
    """

    plain_centroids = True

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.memory_loss = FocalLoss(gamma=0.0), MemoryLoss()

    def needs_centroids(self, epoch: int) -> bool:
        return epoch == 0

    @torch.no_grad()
    def begin_epoch(self, network: Network, epoch: int, centroids: Mapping[str, Tensor]) -> None:
        if epoch == 0:
            network.head.memory.copy_(centroids["centroids"].where(centroids["counts"][:, None] > 0, 0.0))

    def forward(self, network: Network, batch: Batch) -> Tensor:
        features = network.backbone(batch.images)
        loss: Tensor = self.loss(network.classify(features), batch.target)
        return loss + _MEMORY_WEIGHT * self.memory_loss(features.float(), batch.target, network.head.memory)
