"""Balanced contrastive learning, beside logit adjustment or another loss of the classifier."""

from __future__ import annotations

from torch import Tensor

from gclkern.losses import BalancedContrastiveLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective
from gclkern.training.objectives.classification import Classification
from gclkern.training.objectives.views import contrasted_views, projection_head

# Options of a phase that are arguments of BalancedContrast; the others are those of the classifier's loss.
OPTIONS = ("hidden", "dim", "temperature", "weight", "contrast_weight")


class BalancedContrast(Objective):
    """BCL (Zhu et al., CVPR 2022): a loss of the first view, and balanced contrast of the others with each other and with a key of each class.

        loss = weight * classification(features, y) + contrast_weight * balanced_contrast(project(features), project_classes(classifier's weight), y)

    The contrast runs over the samples of all processes, within each part of an accumulated batch. The projection heads are not part of the network: they do not
    take part in evaluation.

    Args:
        classification: the loss of the first view; logit adjustment in BCL.
        feature_dim: dimensions of the features.
        hidden, dim: width of the projection heads, and dimensions of the keys.
        temperature: of the contrast.
        weight, contrast_weight: factors on the two losses.
    """

    def __init__(
        self, classification: Classification, feature_dim: int, *, hidden: int = 512, dim: int = 128, temperature: float = 0.1, weight: float = 2.0,
        contrast_weight: float = 0.6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classification = classification
        self.contrast = BalancedContrastiveLoss(temperature=temperature)
        self.project = projection_head(feature_dim, hidden, dim, batch_norm=True)
        self.project_classes = projection_head(feature_dim, hidden, dim, batch_norm=True)
        self.weight, self.contrast_weight, self.scale = weight, contrast_weight, classification.scale

    def forward(self, network: Network, batch: Batch) -> Tensor:
        first, keys, target = contrasted_views(network, self.project, batch)
        contrast = self.contrast(keys, self.project_classes(network.head.weight), target)
        return self.weight * self.classification.loss_of(network, first, batch) + self.contrast_weight * contrast
