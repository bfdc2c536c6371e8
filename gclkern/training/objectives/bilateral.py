"""BBN: two branches, each with its own batch, whose shares of the loss shift from the usual batch to the reversed one."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.losses import FocalLoss
from gclkern.training.composed_backbones import TwoBranchBackbone
from gclkern.training.network import Network
from gclkern.training.objectives.base import Batch, Objective


class BilateralBranch(Objective):
    r"""The loss of BBN (Zhou, Cui, Wei and Chen, CVPR 2020, section 4.3) on a backbone with two branches.

        f = 2 [a f_c, (1 - a) f_r],    z = classifier(f),    loss = a CE(z, y_c) + (1 - a) CE(z, y_r),    a = 1 - (epoch / period)^2

    f_c are branch 0's features of the batch, f_r branch 1's of the second batch, whose sampler is reversed. Both labels are targets of the same logits: the
    loss with two targets in one pass. The trunk runs once for each batch, so its batch normalisation has the statistics of each, and its running statistics
    average over both. Prediction passes one image through both branches, with a = 1/2 and so without a factor.

    Args:
        period: in units of the phase's epochs. It is 1, but 10/9 for the release's schedules of 90 and 180 epochs, where a ends near 0.2.
    """

    share: Tensor  # () a

    def __init__(self, period: float = 1.0) -> None:
        super().__init__()
        self.loss = FocalLoss(gamma=0.0)
        self.period = period
        self.register_buffer("share", torch.ones(()))  # a buffer, because a captured step would keep a number

    def set_epoch(self, network: Network, epoch: int, epochs: int, rate: float) -> None:
        self.share.fill_(1.0 - (epoch / (self.period * epochs)) ** 2)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        assert isinstance(network.backbone, TwoBranchBackbone)
        assert batch.second_images is not None
        first, second = network.backbone.branch(batch.images, 0), network.backbone.branch(batch.second_images, 1)
        features = 2.0 * torch.cat([self.share * first, (1.0 - self.share) * second], 1)
        loss: Tensor = self.loss(network.classify(features), batch.target, target_b=batch.second_target, lam=self.share)
        return loss
