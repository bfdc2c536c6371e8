"""Probabilistic contrastive learning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gclkern.distributed import gather_batch
from gclkern.losses import LogitAdjustedLoss
from gclkern.proco import ProCoLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective
from gclkern.training.objectives.views import features_of, flat_views, projection_head


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
        assert batch.views is not None
        first, others = features_of(network, batch.images, flat_views(batch.views))
        keys, target = gather_batch(self.project(others), batch.target.repeat(batch.views.shape[1]), averaged_gradients=True)
        return self.classification(network.classify(first), batch.target) + self.contrast_weight * self.contrast(keys, target)
