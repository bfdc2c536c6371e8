"""A classifier that outgrows one GPU: its classes spread over the ranks of a torch.distributed process group.

ShardedCosineLinear                 the layer, of which each rank holds some classes
sharded_linear_gcl_cross_entropy    the loss as a function: that of one process, to rounding
"""

from __future__ import annotations

from gclkern.distributed.head import sharded_linear_gcl_cross_entropy
from gclkern.distributed.layers import ShardedCosineLinear
from gclkern.distributed.ranks import ShardError

__all__ = ["ShardError", "ShardedCosineLinear", "sharded_linear_gcl_cross_entropy"]
