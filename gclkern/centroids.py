"""Class centroids accumulated over an epoch: the mean feature of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.buffers import RankState
from gclkern.dispatch import call_operator, resolve_backend
from gclkern.validation import check_int, check_matrix, check_target


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums over counts, in float32; 0 for a class without samples. Overwrites the sums."""
    return sums.div_(counts.clamp(min=1)[:, None]).to(torch.float32)


class ClassCentroids(RankState):
    """Class centroids over many batches, as running sums and counts, without storing features.

    The sums are float64: float32 sums would lose the last digits of frequent classes over an epoch, and unlike compensated sums, float64 sums can be
    added over ranks by one all-reduce. They stay float64 under ``.half()`` and ``.to(dtype)``, move with
    ``.to(device)`` and are part of the state dict, so an epoch can be resumed.

    With ``torch.distributed`` initialised, each rank updates with its own samples, and :meth:`compute` is a collective call of all ranks: it returns the
    centroids of all samples and does not change each rank's own sums. The sums are not buffers, so DistributedDataParallel does not overwrite them.

    Args:
        num_classes: C.
        dim: D, columns of the features.

    Raises:
        TypeError, ValueError: a size that is not a positive int; in :meth:`update`, features or labels that do not fit.

    Example:
        >>> import torch
        >>> from gclkern import ClassCentroids
        >>> centroids = ClassCentroids(num_classes=2, dim=3)
        >>> centroids.update(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
        >>> centroids.update(torch.zeros(1, 3), torch.tensor([0]))
        >>> centroids.compute()
        (tensor([[0.7500, 0.7500, 0.7500],
                [1.0000, 1.0000, 1.0000]]), tensor([4, 1]))
    """

    sums: Tensor  # (C, D)
    counts: Tensor  # (C,)

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        check_int("num_classes", num_classes, 1)
        check_int("dim", dim, 1)
        self.add_state("sums", torch.zeros((num_classes, dim), dtype=torch.float64))
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: features (N, D), which are detached, and target (N,) int64 in [0, C)."""
        self._check_features(features)
        self._add(features, check_target("target", target, features.shape[0], self.sums.shape[0], None, "features", features))

    def _check_features(self, features: Tensor) -> None:
        check_matrix("features", features)
        dim = self.sums.shape[1]
        if features.shape[1] != dim:
            raise ValueError(f"features must have {dim} columns, got shape {tuple(features.shape)}")
        if features.device != self.sums.device:
            raise ValueError(f"features are on {features.device} but these centroids are on {self.sums.device}; move one of them")

    def _add(self, features: Tensor, target: Tensor) -> None:
        """Add a batch without checking it. Samples whose label is out of range are left out."""
        features = features.detach()
        sums, counts = call_operator("segment_sums", resolve_backend("auto", features), features, target, self.sums.shape[0])
        self.sums += sums
        self.counts += counts

    @torch.no_grad()
    def compute(self) -> tuple[Tensor, Tensor]:
        """Centroids (C, D) float32, 0 for classes never seen, and counts (C,) int64, over all ranks."""
        sums, counts = self.sums.clone(), self.counts.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        return class_means(sums, counts), counts

    def reset(self) -> None:
        """Set all sums and counts to 0."""
        self.sums.zero_()
        self.counts.zero_()

    def extra_repr(self) -> str:
        return f"num_classes={self.sums.shape[0]}, dim={self.sums.shape[1]}"
