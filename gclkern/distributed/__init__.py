"""Losses over the ranks of a torch.distributed process group: of a classifier too large for one GPU, and of samples that are compared with each other.

ShardedCosineLinear                 the layer; each rank holds a part of the classes
sharded_linear_gcl_cross_entropy    the loss as a function; equal to that of one process, up to rounding
ShardedLinearGCLLoss                the loss as a module, with sampling of classes
RowSGD                              SGD that updates only sampled rows
sharded_optimizer_state             an optimizer's tensors for torch.distributed.checkpoint
ShardedClassCentroids               class centroids; each rank holds those of its classes
sharded_dro_lt_loss                 the DRO-LT bound around these centroids
gather_batch                        the samples of all ranks with gradients, for contrastive losses
ShardError                          ranks do not agree, or one has died
"""

from __future__ import annotations

from gclkern.distributed.batches import gather_batch
from gclkern.distributed.centroids import ShardedClassCentroids, sharded_dro_lt_loss
from gclkern.distributed.head import sharded_linear_gcl_cross_entropy
from gclkern.distributed.layers import ShardedCosineLinear
from gclkern.distributed.losses import ShardedLinearGCLLoss
from gclkern.distributed.optim import RowSGD, sharded_optimizer_state
from gclkern.distributed.ranks import ShardError

__all__ = [
    "RowSGD",
    "ShardError",
    "ShardedClassCentroids",
    "ShardedCosineLinear",
    "ShardedLinearGCLLoss",
    "gather_batch",
    "sharded_dro_lt_loss",
    "sharded_linear_gcl_cross_entropy",
    "sharded_optimizer_state",
]
