"""Losses of cosines or logits without noise: margins, priors, smoothing and focusing by class."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from gclkern.losses.base import _LogitLoss
from gclkern.options import Backend, LossOptions, Reduction, SmoothingShape
from gclkern.validation import ClassCounts, check_number
from gclkern.weights import label_aware_smoothing, ldam_margins, log_prior


class LDAMLoss(_LogitLoss):
    r"""Label-distribution-aware margins (Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019, section 3.2).

        loss = cross_entropy(scale * (cosine - margin_j * [j == target]), target),    margin_j = max_margin * (n_min / n_j)^(1/4)

    For LDAM-DRW see :class:`gclkern.DeferredReweighting`.

    Args:
        class_counts: training samples of each class (C,), all positive.
        max_margin: margin of the rarest class; 0.5 is the released code's.
        scale: factor on the cosines; 30 is the released code's.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import torch
        >>> criterion = LDAMLoss([160000, 10000, 16])
        >>> criterion.margin
        tensor([0.0500, 0.1000, 0.5000])
        >>> criterion(torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([0])).shape
        torch.Size([])
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        **options: Unpack[LossOptions],
    ) -> None:
        margin = ldam_margins(class_counts, max_margin)
        super().__init__(margin.numel(), margin=margin, scale=scale, **options)


class LogitAdjustedLoss(_LogitLoss):
    r"""Logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10).

    With tau = 1 it is the balanced softmax (Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020, Theorem 1).

        loss = cross_entropy(scale * logits + tau * log prior, target),    prior_j = n_j / sum_k n_k

    The loss includes the prior in eval mode too; predict from the unchanged logits.

    Args:
        class_counts: training samples of each class (C,), all positive.
        tau: strength of the adjustment; 1 is consistent for the balanced error.
        scale: factor on the logits: 1 for those of a linear layer, about 30 for cosines.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import torch
        >>> criterion = LogitAdjustedLoss([75, 25])
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3863)
    """

    _takes_cosines = False

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        tau: float = 1.0,
        scale: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        bias = check_number("tau", tau) * log_prior(class_counts)
        super().__init__(bias.numel(), bias=bias, scale=scale, **options)


class LabelAwareSmoothingLoss(_LogitLoss):
    r"""Label-aware smoothing: cross entropy that smooths the labels of frequent classes more, the loss of MiSLAS's second stage.

    (Zhong et al., "Improving calibration for long-tailed recognition", CVPR 2021, section 3.2.)

        loss_i = (1 - eps) (-log p_target) + eps * mean_j(-log p_j),    eps = label_aware_smoothing(class_counts, head, tail)_target

    This is the released code's form. The paper gives the target 1 - eps and each other class eps / (C - 1), so its eps is (C - 1) / C times this one.

    Args:
        class_counts: training samples of each class (C,), all positive.
        head, tail: smoothing of the most frequent and of the rarest class, in [0, 1]. The release's: 0.3 and 0 (CIFAR-10-LT at imbalance 100, ImageNet-LT,
            iNaturalist), 0.4 and 0.1 (CIFAR-100-LT at imbalance 100, Places-LT).
        shape: how the smoothing depends on the class count between the two, see :func:`gclkern.label_aware_smoothing`.
        scale: factor on the logits: 1 for those of a linear layer, about 30 for cosines.
        weight, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import torch
        >>> criterion = LabelAwareSmoothingLoss([500, 50, 5], head=0.4, tail=0.1)
        >>> criterion.label_smoothing
        tensor([0.4000, 0.1427, 0.1000])
        >>> criterion(torch.zeros(1, 3), torch.tensor([0]))
        tensor(1.0986)
    """

    _takes_cosines = False

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        head: float = 0.3,
        tail: float = 0.0,
        shape: SmoothingShape = "concave",
        scale: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        smoothing = label_aware_smoothing(class_counts, head, tail, shape)
        super().__init__(
            smoothing.numel(), label_smoothing=smoothing, weight=weight, scale=scale, ignore_index=ignore_index, reduction=reduction, backend=backend
        )


class CosFaceLoss(_LogitLoss):
    r"""Large margin cosine loss (Wang et al., "CosFace: large margin cosine loss for deep face recognition", CVPR 2018, Eq. 4).

        loss = cross_entropy(scale * (cosine - margin * [j == target]), target)

    With margin = 0 it is NormFace, a cosine softmax.

    Args:
        margin: subtracted from the target's cosine, a number or (C,); 0.35 is the paper's.
        scale: factor on the cosines; 64 is the paper's, for faces. Long-tailed recognition usually
            takes 30, as LDAM and GCL do.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import torch
        >>> CosFaceLoss(margin=0.5, scale=2.0)(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))
        tensor(0.6931)
    """

    def __init__(
        self,
        *,
        margin: Tensor | float = 0.35,
        scale: float = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(None, margin=margin, scale=scale, **options)


class FocalLoss(_LogitLoss):
    r"""Focal loss (Lin et al., "Focal loss for dense object detection", ICCV 2017, Eq. 4) over a softmax; the gradient goes through the factor, too.

        loss = (1 - exp(-l))^gamma * l,    l = cross_entropy(scale * logits, target)

    Without `weight` and smoothing exp(-l) is the target's probability. With them the factor is computed from the weighted l, as in LDAM's released code; the
    paper's alpha is outside of the factor. The mean divides by the number of samples, and only with gamma 0 by the sum of their weights, as torch's.

    Args:
        gamma: exponent, at least 0; 2 is the paper's.
        scale: factor on the logits: 1 for those of a linear layer, about 30 for cosines.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import torch
        >>> FocalLoss(gamma=1.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.3466)
    """

    _takes_cosines = False

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        scale: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(None, scale=scale, gamma=gamma, focal_detach=False, **options)
