"""Class centroids: the mean feature of each class, of one batch or accumulated over an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.backend import resolve_backend
from gclkern.counts import check_int
from gclkern.precision import PreciseBuffers
from gclkern.validation import check_matrix, check_target, refuse_gradient

# Elements that are held in the dtype of the sums at one time. On a CPU they always lie in the same 8 MB: fresh memory would cost more than the sums.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**22


def class_centroids(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Mean feature of each class and number of its samples, in one pass over the features; bitwise repeatable on one device.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64, of any strides. Centroids are statistics: no gradient is defined, so pass detached
            features or call it under ``torch.no_grad()``.
        target: class of each sample (N,), int64, in [0, num_classes).
        num_classes: C.

    Returns:
        centroids (C, D), float32 (float64 for float64 features), 0 for classes without samples; counts (C,), int64. A class of count 0 has no centroid:
        :func:`gclkern.functional.dro_lt_loss` leaves it out when its weight is 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value. On a GPU labels are not read (that would synchronise): a sample
            whose label is out of range belongs to no class, which the sum of the counts shows. :func:`gclkern.set_debug` has labels read.

    Example:
        >>> import torch
        >>> from gclkern.functional import class_centroids
        >>> class_centroids(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0]]), torch.tensor([0, 0, 2]), num_classes=3)
        (tensor([[2., 3.],
                [0., 0.],
                [5., 5.]]), tensor([2, 0, 1]))
    """
    check_matrix("features", features)
    refuse_gradient("features", features)
    check_int("num_classes", num_classes, 1)
    target = check_target("target", target, features.shape[0], num_classes, None, "features", features)
    sums, counts = _segment_sums(features.detach(), target, num_classes)
    return sums.div_(counts.clamp(min=1)[:, None]), counts


def _segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    if resolve_backend("auto", features) == "triton":
        import gclkern.kernels.centroids  # noqa: F401 (registers the operator)

        return torch.ops.gclkern.segment_sums(features, target, num_classes)
    return torch.ops.gclkern.torch_segment_sums(features, target, num_classes)


@torch.library.custom_op("gclkern::torch_segment_sums", mutates_args=(), schema="(Tensor features, Tensor target, SymInt num_classes) -> (Tensor, Tensor)")
def torch_segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The twin of gclkern.kernels.centroids.segment_sums; sums are float64 for float64 features."""
    dim = features.shape[1]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    # one more class, in the end dropped, takes the rows whose label is none
    label = target.masked_fill(target.clamp(0, num_classes - 1) != target, num_classes)
    sums = torch.zeros((num_classes + 1, dim), dtype=torch.float64, device=features.device)
    on_cpu = features.device.type == "cpu"
    step = max(1, (_CPU_BLOCK if on_cpu else _DEVICE_BLOCK) // dim)
    room = torch.empty((min(step, features.shape[0]), dim), dtype=torch.float64, device=features.device)
    for rows, labels in zip(features.split(step), label.split(step), strict=True):
        block = room[: rows.shape[0]].copy_(rows)
        if on_cpu:
            sums.index_add_(0, labels, block)
        else:
            # index_add_ adds in no fixed order there; this sorts
            sums.index_put_((labels,), block, accumulate=True)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=features.device).scatter_add_(0, label, torch.ones_like(label))
    return sums[:num_classes].to(dtype, copy=True), counts[:num_classes].clone()


@torch_segment_sums.register_fake
def _(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((num_classes, features.shape[1]), dtype=dtype), target.new_empty(num_classes)


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums over counts, in float32, in the place of the sums; 0 for a class without samples."""
    return sums.div_(counts.clamp(min=1)[:, None]).to(torch.float32)


class ClassCentroids(PreciseBuffers):
    """Class centroids over many batches, without keeping their features: running sums and counts.

    The sums are float64: one rounding for each batch, in float32, would cost a common class its last digits over an epoch, and unlike
    compensated sums float64 ones can be added across ranks by one all-reduce. They stay float64 under ``.half()`` and ``.to(dtype)``, move with
    ``.to(device)`` and are part of the state dict, so an epoch can be resumed.

    With ``torch.distributed`` initialised, each rank updates with its own samples and :meth:`compute` is a collective call that all ranks make: it returns the
    centroids of all samples, and leaves each rank's own sums as they are.

    Args:
        num_classes: C.
        dim: D, columns of the features.

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
        self.register_buffer("sums", torch.zeros((num_classes, dim), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor) -> None:
        """Take in a batch: features (N, D), whose gradient is left alone, and target (N,) int64."""
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
        """Samples whose label is none of these classes stay out."""
        sums, counts = _segment_sums(features.detach(), target, self.sums.shape[0])
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
        """Forget everything."""
        self.sums.zero_()
        self.counts.zero_()

    def extra_repr(self) -> str:
        return f"num_classes={self.sums.shape[0]}, dim={self.sums.shape[1]}"
