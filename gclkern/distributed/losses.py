"""The sharded loss as a module, with sampling of classes."""

from __future__ import annotations

from typing import Any, Unpack

import torch.distributed as dist
from torch import Tensor

from gclkern.distributed.head import local_shard, sharded_linear_gcl_cross_entropy, sharded_loss
from gclkern.distributed.ranks import Ranks
from gclkern.distributed.sampling import TakeRows, draw_classes, places_of
from gclkern.distributed.shards import Shards, agree, even_sizes
from gclkern.losses import LinearGCLLoss
from gclkern.losses.base import VECTORS
from gclkern.options import LinearGCLOptions
from gclkern.validation import ClassCounts, check_labels, check_matrix, check_number, check_target, hard_labels, holds_soft_labels, num_classes_of, resolve_seed


class ShardedLinearGCLLoss(LinearGCLLoss):
    """:class:`gclkern.LinearGCLLoss` for a :class:`ShardedCosineLinear`: each rank passes its own samples and the weights of its own classes.

    With `sample_rate` below 1 a training step uses a part of the classes (PartialFC: An, Deng et al., CVPR 2022): those of all ranks' labels and, on each
    rank, random others: in all that share of its classes, or as many as the step has labels on all ranks (with mixup twice the samples) if that is more. The
    softmax runs over the sampled classes, the gradient of the weight is sparse, and :class:`RowSGD` updates only these rows. The classes are a pure function of
    the step's `seed` and labels, so a step that is repeated after a restart uses the same ones. The noise of a sampled step depends on a class's index among
    the sampled classes. Eval mode uses all classes.

    Args:
        class_counts: training samples of each class (C,), all of them on every rank.
        group: the ranks that share the classes; None is the default group, or one process.
        sample_rate: share of a rank's classes in a step, in (0, 1]; a step never takes fewer classes than it has labels, unless the rank
            holds fewer. PartialFC's 0.1 loses little accuracy with a hundred thousand or more classes.
        averaged_gradients: see :func:`sharded_linear_gcl_cross_entropy`; True with DistributedDataParallel or FSDP.
        options: the other arguments of :class:`gclkern.LinearGCLLoss`.

    Shapes: features (n, D), linear_weight (classes of this rank, D) or a DTensor (C, D), target (n,) as in :func:`sharded_linear_gcl_cross_entropy`.

    Raises:
        TypeError, ValueError: as :class:`gclkern.LinearGCLLoss`; a weight of another number of rows than this rank's classes.
        ShardError: the ranks do not agree, or one has died.

    Example:
        >>> import torch
        >>> from gclkern.distributed import ShardedCosineLinear
        >>> classifier = ShardedCosineLinear(16, 1000)
        >>> criterion = ShardedLinearGCLLoss([100] * 1000, sample_rate=0.1)
        >>> loss = criterion(torch.randn(8, 16), classifier.weight, torch.randint(1000, (8,)), seed=0)
        >>> loss.backward()
        >>> classifier.weight.grad.is_sparse, classifier.weight.grad.coalesce().values().shape
        (True, torch.Size([100, 16]))
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        group: dist.ProcessGroup | None = None,
        sample_rate: float = 1.0,
        averaged_gradients: bool = False,
        **options: Unpack[LinearGCLOptions],
    ) -> None:
        super().__init__(class_counts, **options)
        self.ranks = Ranks(group)
        self.shards = Shards(self.ranks.rank, even_sizes(num_classes_of(class_counts), self.ranks.world))
        self.sample_rate = check_number("sample_rate", sample_rate, 0.0, 1.0, open_low=True)
        self.averaged_gradients = averaged_gradients

    def forward(
        self,
        features: Tensor,  # (n, D)
        linear_weight: Tensor,  # (classes of this rank, D)
        target: Tensor,  # (n,)
        *,
        target_b: Tensor | None = None,  # (n,)
        lam: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        loss: Tensor = self._loss(features, linear_weight, target, target_b, lam, seed, row_offset, with_top1=False)
        return loss

    def with_top1(
        self,
        features: Tensor,  # (n, D)
        linear_weight: Tensor,  # (classes of this rank, D)
        target: Tensor,  # (n,)
        *,
        target_b: Tensor | None = None,  # (n,)
        lam: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and 1 or 0 for each of this rank's samples that the classifier predicts right or wrong (n,), as :meth:`gclkern.LinearGCLLoss.with_top1`.

        The ranks exchange three numbers a sample more. A step with a sample of the classes compares these alone, so its accuracy is too high.

        Example:
            >>> import torch
            >>> from gclkern.distributed import ShardedCosineLinear
            >>> classifier, target = ShardedCosineLinear(16, 3), torch.tensor([0, 1, 2, 0])
            >>> loss, top1 = ShardedLinearGCLLoss([500, 50, 5]).with_top1(classifier.weight[target], classifier.weight, target)
            >>> top1.mean()
            tensor(1.)
        """
        loss, top1 = self._loss(features, linear_weight, target, target_b, lam, seed, row_offset, with_top1=True)
        return loss, top1

    def _loss(
        self, features: Tensor, linear_weight: Tensor, target: Tensor, target_b: Tensor | None, lam: Tensor | float | None, seed: Tensor | int | None,
        row_offset: int, *, with_top1: bool,
    ) -> Any:  # fmt: skip
        linear_weight, _ = local_shard(linear_weight, self.ranks.group)
        arguments, ignore_index = self._arguments(), self.ignore_index
        if holds_soft_labels(target):
            target, target_b, lam, ignore_index = hard_labels(target, target_b, lam, ignore_index)
        labels = [labels for labels in (target, target_b) if labels is not None]
        held = self.shards.sizes[self.shards.rank]
        sampled = self.training and self.sample_rate < 1.0
        problem: Exception | None = None
        try:
            if linear_weight.shape[0] != held:
                raise ValueError(f"linear_weight must have the {held} rows of this rank's classes, got shape {tuple(linear_weight.shape)}")
            if sampled:
                check_matrix("features", features)
                check_matrix("linear_weight", linear_weight)
                for name, mine in zip(("target", "target_b"), labels, strict=False):
                    check_labels(name, mine, features.shape[0], "features", features, or_soft=True)
                seed = resolve_seed(seed, features.device)
        except (ValueError, TypeError) as error:
            problem = error
        if sampled or problem is not None:
            agree(self.ranks, features, linear_weight, ("sample", self.sample_rate, len(labels)), problem)
        if sampled:
            assert isinstance(seed, Tensor)
            seed = self.ranks.broadcast_(seed.clone(), "sharing the seed")
            gathered = [self.ranks.gather_rows(mine, "gathering the labels") for mine in labels]
            for name, whole in zip(("target", "target_b"), gathered, strict=False):
                check_target(name, whole, whole.shape[0], self.shards.num_classes, ignore_index, "features", whole)
            classes, drawn = draw_classes(self.ranks, self.shards, gathered, self.sample_rate, seed)
            linear_weight = TakeRows.apply(linear_weight, classes[drawn.mine] - self.shards.mine.start)
            target, *second = (places_of(mine, classes, ignore_index) for mine in labels)
            target_b = second[0] if second else None
            ignore_index = -1
            for name in VECTORS:
                if isinstance(arguments.get(name), Tensor):
                    arguments[name] = arguments[name][classes]
        return sharded_loss(
            features, linear_weight, target, target_b=target_b, lam=lam, seed=seed, row_offset=row_offset, plan=self.plan, group=self.ranks.group,
            averaged_gradients=self.averaged_gradients, with_top1=with_top1, **{**arguments, "ignore_index": ignore_index},
        )  # fmt: skip

    def _cross_entropy(self, *inputs: Any, **options: Any) -> Tensor:
        return sharded_linear_gcl_cross_entropy(*inputs, plan=self.plan, group=self.ranks.group, averaged_gradients=self.averaged_gradients, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sample_rate={self.sample_rate:g}, ranks={self.ranks.world}"
