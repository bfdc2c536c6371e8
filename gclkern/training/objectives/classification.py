"""A classification loss on one batch, to which the DRO-LT bound may be added."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gclkern.distributed import ShardedLinearGCLLoss
from gclkern.losses import GCLLoss, LinearGCLLoss
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective
from gclkern.training.objectives.robust import RobustLayers
from gclkern.weights import DeferredReweighting


class Classification(Objective):
    """A loss of logits, cosines, or features and the classifier's weight, which :func:`gclkern.training.recipes.build_loss` builds.

    Args:
        loss: the loss.
        robust: the DRO-LT bound of some layers, None for none. Its epsilon has weight decay, since all parameters of an objective do.
        robust_weight: factor on it.
        reweighting: sets class weights in the loss from an epoch on, None for none.
    """

    loss: Any
    takes_mixup = True

    def __init__(
        self, loss: nn.Module, *, robust: RobustLayers | None = None, robust_weight: float = 0.0, reweighting: DeferredReweighting | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.robust = loss, robust
        self.robust_weight, self.reweighting = robust_weight, reweighting
        self.scale = self.loss.scale

    def set_epoch(self, network: Network, epoch: int, epochs: int, rate: float) -> None:
        if self.reweighting is not None:
            self.reweighting.set_epoch(epoch)

    def needs_centroids(self, epoch: int) -> bool:
        return self.robust is not None

    def centroid_features(self, network: Network, images: Tensor) -> Tensor:
        return super().centroid_features(network, images) if self.robust is None else self.robust.joined(network.backbone, images)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        outputs: list[Tensor] = []
        if self.robust is None:
            features = network.backbone(batch.images)
        else:
            features, outputs = self.robust.outputs(network.backbone, batch.images)
        loss = self.loss_of(network, features, batch)
        if self.robust is not None:
            assert batch.centroids is not None
            loss = loss + self.robust_weight * self.robust(outputs, batch.target, batch.centroids, batch.counts)
        return loss

    def loss_of(self, network: Network, features: Tensor, batch: Batch) -> Tensor:
        """The loss of the batch, whose features (N, D) are given."""
        mixed: dict[str, Any] = {"target_b": batch.target_b, "lam": batch.lam}
        if isinstance(self.loss, GCLLoss | LinearGCLLoss):
            row_offset = batch.row_offset
            if isinstance(self.loss, ShardedLinearGCLLoss):
                row_offset -= self.loss.ranks.rank * len(batch.target)  # the sharded loss counts rows from those of the first process
            mixed |= {"seed": batch.seed, "row_offset": row_offset}
        if isinstance(self.loss, LinearGCLLoss):
            loss: Tensor = self.loss(features, network.head.weight, batch.target, **mixed)
        else:
            loss = self.loss(network.classify(features), batch.target, **mixed)
        return loss
