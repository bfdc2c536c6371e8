"""The cosine classifier whose classes are spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.distributed.ranks import Ranks
from gclkern.distributed.shards import ShardedModule, Shards, agree, even_sizes
from gclkern.layers import unit_rows
from gclkern.validation import check_int

_BLOCK = 2**22  # elements of the weight that are initialised at a time


class ShardedCosineLinear(ShardedModule):
    r""":class:`gclkern.CosineLinear` whose classes are spread over the ranks of a process group: each holds ceil(C / ranks) of them, the last ones fewer.

        cosine_ij = <f_i, w_j> / (\|f_i\| \|w_j\|)

    Train with :func:`sharded_linear_gcl_cross_entropy` or :class:`ShardedLinearGCLLoss`, which take its `weight`; call it to predict. Its parameters differ
    between ranks: wrap only the backbone in DistributedDataParallel or FSDP, which would make them equal.

    `state_dict` holds the weight as a DTensor of shape (C, D), so that ``torch.distributed.checkpoint`` writes each rank's part and loads it on any other
    number of ranks. Wrap an optimizer's tensors in the same way by :func:`sharded_optimizer_state`. In one process it is a plain tensor.

    Args:
        in_features: dimensions D of a feature.
        num_classes: classes C of all ranks.
        group: the ranks; None is the default group, or one process without torch.distributed.
        device, dtype: of the weight, as in torch's layers.

    Attributes:
        weight: (classes of this rank, D), learned; rows start as uniform(-1, 1) scaled to unit norm. If all ranks' generators have the same seed, the
            weight equals that of one process.
        shards: which classes each rank holds; ``shards.mine`` is this rank's slice of [0, C).

    Shapes: features (n, D) of this rank, n equal on every rank -> cosine (n, C), without gradients; a collective call.

    Raises:
        ValueError: too few classes, so that a rank would have none; features whose last dimension is not D.
        ShardError: the ranks do not agree on the features' shape, or one has died.

    Example:
        >>> import torch
        >>> classifier = ShardedCosineLinear(16, 10)
        >>> classifier(torch.randn(4, 16)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self, in_features: int, num_classes: int, *, group: dist.ProcessGroup | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = check_int("in_features", in_features, 1)
        self.ranks = Ranks(group)
        self.shards = Shards(self.ranks.rank, even_sizes(num_classes, self.ranks.world))
        self.num_classes = self.shards.num_classes
        self.weight = nn.Parameter(torch.empty(self.shards.sizes[self.ranks.rank], in_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weight again: every rank draws all rows, a block at a time, and keeps its own."""
        mine = self.shards.mine
        step = max(1, _BLOCK // self.in_features)
        for first in range(0, self.num_classes, step):
            last = min(first + step, self.num_classes)
            rows = torch.empty((last - first, self.in_features), dtype=self.weight.dtype, device=self.weight.device).uniform_(-1.0, 1.0)
            start, stop = max(first, mine.start), min(last, mine.stop)
            if start < stop:
                self.weight[start - mine.start : stop - mine.start] = unit_rows(rows[start - first : stop - first]).to(self.weight.dtype)

    @torch.no_grad()
    def forward(
        self,
        features: Tensor,  # (n, D)
    ) -> Tensor:  # (n, C)
        problem = None
        if features.dim() != 2 or features.shape[1] != self.in_features:
            problem = ValueError(f"features must have shape (n, {self.in_features}), got {tuple(features.shape)}")
        agree(self.ranks, features, self.weight, "predict", problem)
        whole = self.ranks.gather_rows(unit_rows(features).to(features.dtype), "gathering the features to predict")
        cosine = F.linear(whole, unit_rows(self.weight).to(features.dtype))
        columns = self.ranks.gather_parts(cosine.t(), self.shards.sizes, "gathering the cosines of all classes")
        rows = features.shape[0]
        return columns[:, self.ranks.rank * rows : (self.ranks.rank + 1) * rows].t()

    def extra_repr(self) -> str:
        mine = self.shards.mine
        return f"in_features={self.in_features}, num_classes={self.num_classes}, here {mine.start} to {mine.stop - 1}"

    def gather(self, rows: Tensor) -> Tensor:
        """Gather values or rows of each rank's classes, (classes of this rank, ...), into those of all classes, (C, ...), on each rank; a collective call."""
        return self.ranks.gather_parts(rows.detach(), self.shards.sizes, "gathering the values of all classes")
