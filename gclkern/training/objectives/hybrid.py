"""Hybrid networks: a contrastive branch that fades out beside a classifier on class-balanced batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gclkern.distributed import gather_batch
from gclkern.layers import CosineLinear
from gclkern.losses import FocalLoss, PrototypicalContrastiveLoss, SupConLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective
from gclkern.training.objectives.views import features_of, flat_views, projection_head


class SampleContrast(nn.Module):
    """Supervised contrast of the samples of all processes, within each part of an accumulated batch."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.loss = SupConLoss(temperature=temperature)

    def forward(self, keys: Tensor, target: Tensor) -> Tensor:
        return self.loss(*gather_batch(keys, target, averaged_gradients=True))


class PrototypeContrast(nn.Module):
    """Contrast of samples with a learned prototype of each class."""

    def __init__(self, temperature: float, dim: int, num_classes: int) -> None:
        super().__init__()
        self.loss = PrototypicalContrastiveLoss(temperature=temperature)
        self.prototypes = CosineLinear(dim, num_classes)

    def forward(self, keys: Tensor, target: Tensor) -> Tensor:
        return self.loss(keys, self.prototypes.weight, target)


class Hybrid(Objective):
    """Hybrid-SC and Hybrid-PSC (Wang et al., "Contrastive learning based hybrid networks for long-tailed image classification", CVPR 2021).

        loss = share * contrast(project(features), y) + (1 - share) * cross_entropy(logits of the second batch, its y),    share = 1 - (epoch / epochs)^2

    with epochs counted from 0. The contrast runs over instance-balanced batches; the classifier learns from class-balanced ones, which `Phase.second_sampler`
    draws. Both go through the backbone together. The projection head is not part of the network: it does not take part in evaluation.

    Args:
        class_counts: training images of each class.
        feature_dim: dimensions of the features.
        prototypes: False contrasts samples with each other, which needs a second view: Hybrid-SC. True contrasts them with learned prototypes: Hybrid-PSC.
        dim: dimensions of the keys. The hidden layer of the projection head has those of the features.
        temperature: of the contrast.
    """

    share: Tensor

    def __init__(self, class_counts: list[int], feature_dim: int, *, prototypes: bool, dim: int = 128, temperature: float = 0.1) -> None:
        super().__init__()
        self.classification = FocalLoss(gamma=0.0)
        self.contrast = PrototypeContrast(temperature, dim, len(class_counts)) if prototypes else SampleContrast(temperature)
        self.project = projection_head(feature_dim, feature_dim, dim, batch_norm=False)
        self.register_buffer("share", torch.ones(()), persistent=False)

    def set_epoch(self, network: Network, epoch: int, epochs: int, rate: float) -> None:
        self.share.fill_(1 - (epoch / epochs) ** 2)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        assert batch.second_images is not None
        assert batch.second_target is not None
        images, target = batch.images, batch.target
        if batch.views is not None:
            images, target = torch.cat([images, flat_views(batch.views)]), target.repeat(1 + batch.views.shape[1])
        features, second = features_of(network, images, batch.second_images)
        contrast = self.contrast(self.project(features), target)
        return self.share * contrast + (1 - self.share) * self.classification(network.classify(second), batch.second_target)
