"""The batch of all ranks, for losses that compare samples with each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gclkern.distributed.ranks import Ranks, untraced
from gclkern.distributed.shards import agree
from gclkern.validation import check_labels, check_matrix


class _AllRows(torch.autograd.Function):
    """The rows of all ranks. Every rank computes the same loss of them, so the gradient of its own rows is complete without another exchange."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, factor: int) -> Tensor:
        ctx.mine, ctx.factor = slice(ranks.rank * rows.shape[0], (ranks.rank + 1) * rows.shape[0]), factor
        return ranks.gather_rows(rows, "gathering the features of the batch")

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * grad_rows[ctx.mine], None, None


def gather_batch(
    features: Tensor,  # (n, D)
    target: Tensor,  # (n,)
    *,
    group: dist.ProcessGroup | None = None,
    averaged_gradients: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The samples of all ranks, in the order of the ranks, with gradients; a collective call.

    A loss that compares the samples of a batch with each other, such as :class:`gclkern.SupConLoss`, is then that of one process with the whole batch::

        loss = criterion(*gather_batch(features, target, averaged_gradients=True))

    Every rank computes the loss of all N = world * n samples: (N, D) is in its memory, and its time grows with N^2. In return backward needs no exchange. All
    ranks must compute the same loss from what this function returns, and give it the same upstream gradient: use the reduction "mean" or "sum".

    Args:
        features: this rank's samples (n, D), as many on every rank. May require a gradient.
        target: their classes (n,), int64.
        group: the ranks; None is the default group, or one process.
        averaged_gradients: False returns the gradient of the loss. True multiplies the gradient of `features` by the number of ranks, for a network in
            DistributedDataParallel or FSDP, which average gradients over the ranks instead of summing them. The gradient of other inputs of the loss, such as
            prototypes, is complete on every rank and needs no averaging.

    Returns:
        features (N, D) and target (N,); in one process the arguments themselves.

    Raises:
        ValueError, TypeError: `features` is not a floating-point matrix, or `target` does not fit.
        ShardError: the ranks do not agree on the shapes, or one has died.

    Example:
        >>> import torch
        >>> from gclkern import SupConLoss
        >>> from gclkern.distributed import gather_batch
        >>> SupConLoss(temperature=1.0)(*gather_batch(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])))
        tensor(0.5514)
    """
    gather = untraced(_gathered) if torch.compiler.is_compiling() else _gathered
    return gather(features, target, group, averaged_gradients)


def _gathered(features: Tensor, target: Tensor, group: dist.ProcessGroup | None, averaged_gradients: bool) -> tuple[Tensor, Tensor]:
    ranks = Ranks(group)
    problem: Exception | None = None
    try:
        check_matrix("features", features)
        target = check_labels("target", target, features.shape[0], "features", features)
    except (ValueError, TypeError) as error:
        problem = error
    _, verdict = agree(ranks, features, features, ("gather", averaged_gradients), problem)
    if ranks.world == 1:
        return features, target
    whole: Tensor = _AllRows.apply(features, ranks, ranks.world if averaged_gradients else 1)
    return whole if verdict is None else whole * verdict, ranks.gather_rows(target, "gathering the labels of the batch")
