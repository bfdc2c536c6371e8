"""Probabilistic contrastive learning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gclkern.losses import LogitAdjustedLoss, ProCoLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective
from gclkern.training.objectives.views import contrasted_views, projection_head


class ProbabilisticContrast(Objective):
    """ProCo (Du et al., TPAMI 2024): logit adjustment of the first view, and contrast of the others with a distribution of each class.

        loss = logit_adjusted(logits, y) + contrast_weight * proco(project(features), y)

    The distributions are estimated from the samples of all processes. The projection head is not part of the network: it does not take part in evaluation.

    Args:
        class_counts: training images of each class.
        feature_dim: dimensions of the features.
        hidden, dim: width of the projection head, and dimensions of the keys.
        temperature: of the contrast.
        contrast_weight: factor on the contrast.
        scale: factor on the classifier's output: 1 for a linear one, 30 for a cosine classifier.
    """

    def __init__(
        self, class_counts: list[int], feature_dim: int, *, hidden: int = 512, dim: int = 128, temperature: float = 0.1, contrast_weight: float = 1.0,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classification = LogitAdjustedLoss(class_counts, scale=scale)
        self.contrast = ProCoLoss(class_counts, dim, temperature=temperature)
        self.project = projection_head(feature_dim, hidden, dim, batch_norm=True)
        self.contrast_weight, self.scale = contrast_weight, scale

    def begin_epoch(self, network: Network, epoch: int, centroids: Mapping[str, Tensor]) -> None:
        self.contrast.start_epoch()

    def forward(self, network: Network, batch: Batch) -> Tensor:
        first, keys, target = contrasted_views(network, self.project, batch)
        return self.classification(network.classify(first), batch.target) + self.contrast_weight * self.contrast(keys, target)
