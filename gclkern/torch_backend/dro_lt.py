"""The DRO-LT bound (Samuel and Chechik, "Distributional robustness loss for long-tail learning", ICCV 2021) in torch: one softmax row for each class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import implements, shapes_of
from gclkern.torch_backend.centroids import is_on_cpu


def _anchors(target: Tensor, class_weight: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """The classes that have a term, ascending, (min(N, C),), and each sample's class (N,).

    The size does not depend on how many classes have a term, because reading that from a GPU would synchronise: unused entries and samples without a term hold
    num_classes.
    """
    inside = target.clamp(0, num_classes - 1)
    absent = inside != target
    if class_weight is not None:
        absent |= class_weight.index_select(0, inside) == 0
    label = target.masked_fill(absent, num_classes)
    in_order = label.sort().values
    place = torch.zeros_like(in_order)
    torch.cumsum(in_order[1:] != in_order[:-1], 0, out=place[1:])
    return torch.full_like(target, num_classes).scatter_(0, place, in_order)[:num_classes].clone(), label


class _Rows(NamedTuple):
    """The rows of the softmax, R of them, over the batch's samples."""

    classes: Tensor  # (R,)
    unused: Tensor | None  # (R, 1) whether the row has no class; None if all rows have one
    own: Tensor  # (R, N) whether the sample belongs to the row's class
    centroids: Tensor  # (R, D), 0 where unused
    distance: Tensor  # (R, N)
    stats: Tensor  # (4, R): peak, around, rest, share, as in gclkern.kernels.dro_lt

    @classmethod
    def of(cls, saved: list[Tensor], centroids: Tensor) -> _Rows:
        """On a CPU, a row for each class of the batch; on a GPU, where reading their number would synchronise, min(N, C) rows, some of them unused."""
        distance, stats, classes, label = saved
        unused = (classes == centroids.shape[0])[:, None]
        if is_on_cpu(classes):
            count = classes.shape[0] - int(unused.sum())
            classes = classes[:count]
            return cls(classes, None, label == classes[:, None], centroids.index_select(0, classes), distance[:count], stats[:, :count])
        own = (label == classes[:, None]).masked_fill_(unused, False)
        classes = classes.clamp(max=centroids.shape[0] - 1)
        return cls(classes, unused, own, centroids.index_select(0, classes).masked_fill_(unused, 0.0), distance, stats)

    def used(self, values: Tensor) -> Tensor:
        """The values (R, ...), set to 0 in place where the row is unused."""
        return values if self.unused is None else values.masked_fill_(self.unused if values.dim() == 2 else self.unused[:, 0], 0.0)

    def logits(self, epsilon: Tensor, temperature: float) -> Tensor:
        radius = 2.0 * (epsilon if epsilon.dim() == 0 else epsilon.index_select(0, self.classes)[:, None])
        return torch.where(self.own, self.distance + radius, self.distance).div_(-temperature)


def _saved(features: Tensor, target: Tensor, centroids: Tensor) -> list[Tensor]:
    """Buffers for distances (R, N), statistics (4, R), classes (R,) and labels (N,); rows that are not used are never written."""
    samples = features.shape[0]
    rows = torch.sym_min(samples, centroids.shape[0])
    return [centroids.new_empty((rows, samples)), centroids.new_empty((4, rows)), target.new_empty(rows), target.new_empty(samples)]


@implements("dro_lt_forward", "torch")
def dro_lt_forward(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.dro_lt.dro_lt_forward."""
    num_classes = centroids.shape[0]
    distance, stats, *_ = _saved(features, target, centroids)
    saved = [distance, stats, *_anchors(target, class_weight, num_classes)]
    rows = _Rows.of(saved, centroids)
    # this mode computes differences; the other one expands the square, which loses digits to cancellation
    rows.distance.copy_(torch.cdist(rows.centroids, features.to(centroids.dtype), compute_mode="donot_use_mm_for_euclid_dist"))
    logits = rows.logits(epsilon, temperature)
    peak = logits.amax(1, keepdim=True)
    at_peak = logits == peak
    exponential = (logits - peak).exp_()
    around = exponential.masked_fill(at_peak, 0.0).sum(1, keepdim=True) + (at_peak.sum(1, keepdim=True) - 1)
    rest = exponential.masked_fill_(rows.own, 0.0).sum(1)
    weight = rows.used(torch.ones_like(rest) if class_weight is None else class_weight.index_select(0, rows.classes))
    share = weight / rows.own.sum(1).clamp(min=1)
    terms = (peak - logits).add_(around.log1p()).mul_(share[:, None]).masked_fill_(~rows.own, 0.0).sum(0)
    terms = terms.masked_fill_(target.clamp(0, num_classes - 1) != target, float("nan"))
    denominator = weight.sum() if reduction == "mean" else 1.0
    rows.stats.copy_(torch.stack((peak[:, 0], around[:, 0], rest, share / denominator)))
    return terms if reduction == "none" else terms.sum() / denominator, saved


@shapes_of("dro_lt_forward", "torch")
def _(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    return centroids.new_empty((features.shape[0],) if reduction == "none" else ()), _saved(features, target, centroids)


@implements("dro_lt_backward", "torch")
def dro_lt_backward(
    grad_loss: Tensor, features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, saved: list[Tensor],
    temperature: float, reduction: str, features_grad: bool, epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as gclkern.kernels.dro_lt.dro_lt_backward."""
    num_classes = centroids.shape[0]
    rows = _Rows.of(saved, centroids)
    peak, around, rest, share = rows.stats[:, :, None]
    logits = rows.logits(epsilon, temperature)
    total = 1.0 + around
    probability = (logits - peak).exp_().div_(total)
    upstream = torch.where(rows.own, grad_loss * share, 0.0)
    mass = upstream.sum(1, keepdim=True)
    grad_features, grad_epsilon = features.new_empty(0), epsilon.new_empty(0)
    if features_grad:
        label = target.clamp(0, num_classes - 1)
        missed = torch.where(logits == peak, around / total, 1.0 - probability)
        # for the only sample of a class, mass - upstream is exactly 0, so its gradient is -missed without cancellation
        grad_logits = (mass - upstream).mul_(probability).sub_(upstream * missed)
        pull = rows.used(grad_logits.div_(rows.distance).div_(-temperature).masked_fill_(rows.distance == 0.0, 0.0))
        grad_features = _features_gradient(features.to(centroids.dtype), rows, pull, centroids.index_select(0, label))
        grad_features = grad_features.masked_fill_((label != target)[:, None], float("nan")).to(features.dtype)
    if epsilon_grad:
        per_row = rows.used((2.0 / temperature * mass * (rest / total))[:, 0])
        # rows that are not used add 0 to the last class
        grad_epsilon = per_row.sum() if epsilon.dim() == 0 else torch.zeros_like(epsilon).index_add_(0, rows.classes, per_row)
    return grad_features, grad_epsilon


def _features_gradient(features: Tensor, rows: _Rows, pull: Tensor, own_centroids: Tensor) -> Tensor:
    """sum over rows r of pull_rj * (z_j - mu_r).

    A sample may be arbitrarily close to its own centroid, so that difference is computed directly. The other rows are one matrix product, with coordinates
    relative to the mean of the centroids, which limits cancellation to the ratio of the centroids' spread to the distance from another class's centroid.
    """
    own_pull = torch.where(rows.own, pull, 0.0).sum(0)
    pull = pull.masked_fill(rows.own, 0.0)
    origin = rows.centroids.sum(0) / (max(rows.classes.shape[0], 1) if rows.unused is None else (~rows.unused).sum().clamp(min=1))
    centred = rows.used(rows.centroids - origin)
    grad = (features - origin).mul_(pull.sum(0)[:, None]).sub_(pull.T @ centred)
    return grad.add_(torch.where((own_pull != 0.0)[:, None], own_pull[:, None] * (features - own_centroids), 0.0))
