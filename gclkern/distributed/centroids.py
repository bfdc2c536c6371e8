"""Class centroids that are spread over ranks, and the DRO-LT bound around them."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from gclkern.centroids import ClassCentroids, class_means
from gclkern.distributed.ranks import Ranks
from gclkern.distributed.shards import ShardedModule, Shards, agree, even_sizes
from gclkern.functional import dro_lt_loss
from gclkern.options import DROLTOptions
from gclkern.validation import check_int, check_labels, check_matrix, check_same_device, check_target, check_values, class_vector, refuse_gradient


class ShardedClassCentroids(ShardedModule, ClassCentroids):
    """:class:`gclkern.ClassCentroids` whose classes are spread over the ranks of a process group, as those of :class:`ShardedCosineLinear`.

    Args:
        num_classes: classes C of all ranks.
        dim: D, columns of the features.
        group: the ranks; None is the default group, or one process.

    :meth:`update` is a collective call: each rank passes its own samples, the same number on every rank, and sums those of its own classes. `state_dict` holds
    DTensors of all classes, as that of :class:`ShardedCosineLinear`.

    Raises:
        TypeError, ValueError: as :class:`gclkern.ClassCentroids`; too few classes, so that a rank would have none.
        ShardError: the ranks do not agree on the shapes, or one has died.

    Example:
        >>> import torch
        >>> centroids = ShardedClassCentroids(num_classes=2, dim=3)
        >>> centroids.update(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
        >>> centroids.compute()
        (tensor([[1., 1., 1.],
                [1., 1., 1.]]), tensor([3, 1]))
    """

    def __init__(self, num_classes: int, dim: int, *, group: dist.ProcessGroup | None = None) -> None:
        ranks = Ranks(group)
        shards = Shards(ranks.rank, even_sizes(check_int("num_classes", num_classes, 1), ranks.world))
        super().__init__(shards.sizes[ranks.rank], dim)
        self.ranks, self.shards = ranks, shards

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: features (n, D) of this rank, which are detached, and target (n,) int64 in [0, C)."""
        problem: Exception | None = None
        try:
            self._check_features(features)
            check_labels("target", target, features.shape[0], "features", features)
        except (ValueError, TypeError) as error:
            problem = error
        agree(self.ranks, features, self.sums, "centroids", problem)
        whole = self.ranks.gather_rows(features.detach(), "gathering the features for the centroids")
        labels = self.ranks.gather_rows(target, "gathering the labels for the centroids")
        check_target("target", labels, whole.shape[0], self.shards.num_classes, None, "features", whole)
        self._add(whole, labels - self.shards.mine.start)

    @torch.no_grad()
    def compute(self) -> tuple[Tensor, Tensor]:
        """Centroids of this rank's classes (classes of this rank, D) float32, 0 for classes never seen, and counts of ALL classes (C,) int64; collective."""
        return class_means(self.sums.clone(), self.counts), self.ranks.gather_parts(self.counts, self.shards.sizes, "gathering the class counts")


def sharded_dro_lt_loss(
    features: Tensor,  # (n, D)
    target: Tensor,  # (n,)
    centroids: Tensor,  # (classes of this rank, D)
    epsilon: Tensor | float,  # (), (C,)
    num_classes: int,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[DROLTOptions],
) -> Tensor:
    """:func:`gclkern.functional.dro_lt_loss` of this rank's batch, with centroids that are spread over ranks; a collective call.

    Each sample's centroid is fetched from the rank that holds its class; the softmax runs over this rank's samples, as in data-parallel training. So the ranks
    exchange (N, D) numbers of the batch, never (C, D).

    Args:
        features: this rank's samples (n, D), the same number on every rank.
        target: their classes (n,), int64, in [0, C).
        centroids: those of this rank's classes, from :meth:`ShardedClassCentroids.compute`, spread as in :class:`ShardedCosineLinear`.
        num_classes: classes C of all ranks.
        group: the ranks; None is the default group, or one process.
        epsilon, class_weight: as in the functional API, of all classes on every rank. Weight 0 leaves out classes without a centroid: ``(counts > 0).float()``.
        temperature, reduction, backend: as in the functional API.

    Returns:
        The loss of this rank's samples: () for "mean" and "sum", (n,) for "none". The gradients of `features` and `epsilon` are those of this loss: average
        that of `epsilon` over the ranks, as DistributedDataParallel does for the parameters of the module that it wraps.

    Raises:
        ValueError, TypeError: as the functional API.
        ShardError: the ranks do not agree on the shapes, or one has died.

    Example:
        >>> import torch
        >>> from gclkern.distributed import ShardedClassCentroids, sharded_dro_lt_loss
        >>> features, target = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 2.0]]), torch.tensor([0, 0, 2])
        >>> means = ShardedClassCentroids(num_classes=3, dim=2)
        >>> means.update(features, target)
        >>> centroids, counts = means.compute()
        >>> loss = sharded_dro_lt_loss(features.requires_grad_(), target, centroids, 0.1, 3, class_weight=(counts > 0).float())
        >>> round(loss.item(), 4)  # that of gclkern.functional.dro_lt_loss on all samples and centroids
        0.3809
    """
    class_weight = options.get("class_weight")
    ranks = Ranks(group)
    shards = Shards(ranks.rank, even_sizes(num_classes, ranks.world))
    problem: Exception | None = None
    try:
        check_matrix("features", features)
        check_matrix("centroids", centroids)
        check_same_device("centroids", centroids, "features", features)
        refuse_gradient("centroids", centroids)
        held = shards.sizes[ranks.rank]
        if centroids.shape != (held, features.shape[1]):
            raise ValueError(f"centroids must have shape ({held}, {features.shape[1]}), this rank's classes, got {tuple(centroids.shape)}")
        check_target("target", target, features.shape[0], num_classes, None, "features", features)
        if isinstance(epsilon, Tensor) and epsilon.shape not in ((), (num_classes,)):
            raise ValueError(f"epsilon must be a number, or a tensor of shape () or ({num_classes},), got {tuple(epsilon.shape)}")
        weight = class_vector("class_weight", class_weight, num_classes, "features", features, torch.float32)
        if weight is not None:
            check_values("class_weight", weight, 0.0)
        if isinstance(epsilon, Tensor):
            check_values("epsilon", epsilon, 0.0)
    except (ValueError, TypeError) as error:
        problem = error
    _, verdict = agree(ranks, features, centroids, ("dro-lt", num_classes), problem)
    rows = torch.arange(features.shape[0], device=features.device)
    known = (target >= 0) & (target < num_classes)
    label = torch.where(known, target, 0)
    # Each class is renumbered by its first sample in the batch, so that the bound only needs the centroids of the batch's samples.
    first = torch.full((num_classes,), rows.numel(), device=features.device).scatter_reduce_(0, label, rows, "amin")[label]

    if isinstance(epsilon, Tensor) and epsilon.shape == (num_classes,):
        epsilon = epsilon[label]
    if class_weight is not None:
        options["class_weight"] = class_weight[label]
    loss = dro_lt_loss(features, torch.where(known, first, -1), _of_labels(ranks, shards, centroids, label), epsilon, **options)
    return loss if verdict is None else loss * verdict


def _of_labels(ranks: Ranks, shards: Shards, rows: Tensor, labels: Tensor) -> Tensor:
    """The rows (n, D) of this rank's labels, each from the rank that holds its class."""
    gathered = ranks.gather_rows(labels, "gathering the labels of the batch")
    mine = shards.mine
    here = (gathered >= mine.start) & (gathered < mine.stop)
    found = rows[torch.where(here, gathered - mine.start, 0)].masked_fill(~here[:, None], 0.0)
    return ranks.start_scatter(found, "fetching the centroids of the batch")()
