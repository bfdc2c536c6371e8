"""Per-class vectors that re-balance a loss, computed from class counts: effective-number weights and their schedule, LDAM's margins, log priors."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from gclkern.clouds import cloud_sizes
from gclkern.options import SmoothingShape
from gclkern.validation import ClassCounts, check_choice, check_class_counts, check_int, check_number, device_of


def inverse_effective_number(counts: Tensor, beta: Tensor) -> Tensor:
    """(1 - beta) / (1 - beta^n) of float64 counts (C,) and betas () or (C,) in [0, 1): the weight of one sample of a class.

    1 - beta^n as -expm1(n log beta) keeps its digits where beta^n is close to 1.
    """
    return (1 - beta) / -torch.expm1(counts * beta.log())


def cben_weights(counts: Tensor) -> Tensor:
    """The weight of one sample of a class in class-based effective-number sampling (GCL, CVPR 2022, Eq. 13 and 14), from float64 counts (C,)."""
    return inverse_effective_number(counts, 0.9999 + 1e-5 * cloud_sizes(counts).double())


def check_beta(beta: object) -> float:
    value = check_number("beta", beta, 0.0, 1.0)
    if value == 1.0:
        raise ValueError("beta must be below 1, got 1.0; for weights proportional to 1 / n take a beta close to 1, such as 1 - 1e-9")
    return value


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    r"""Class weights by the effective number of samples (Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, section 4).

        w_j = C * v_j / sum_k v_k,    v_j = (1 - beta) / (1 - beta^n_j)

    Args:
        class_counts: training samples of each class (C,): a sequence, a numpy array or a tensor, all positive.
        beta: in [0, 1); 0 gives every class weight 1, towards 1 the weights become proportional to 1 / n_j. 0.9999 is what LDAM-DRW trains with.

    Returns:
        (C,) float32 of sum C, on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError, ValueError: counts that are not positive numbers, or beta out of range.

    Example:
        >>> effective_number_weights([5000, 500, 50])
        tensor([0.0341, 0.2752, 2.6907])
    """
    counts = check_class_counts(class_counts)
    values = inverse_effective_number(counts, counts.new_tensor(check_beta(beta)))
    return (values * (values.numel() / values.sum())).to(device_of(class_counts), torch.float32)


def inverse_frequency_weights(class_counts: ClassCounts, exponent: float = 1.0) -> Tensor:
    r"""Class weights proportional to a power of the inverse class frequency: the generalized re-weighting of DisAlign.

        w_j = C * v_j / sum_k v_k,    v_j = (N / n_j)^exponent

    (Zhang et al., "Distribution alignment: a unified framework for long-tail visual recognition", CVPR 2021, section 3.3.)

    Args:
        class_counts: training samples of each class (C,), all positive.
        exponent: rho, at least 0; 0 gives every class weight 1. DisAlign's release has 1.2 for ImageNet-LT.

    Returns:
        (C,) float32 of sum C, on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError, ValueError: counts that are not positive numbers, or a negative exponent.

    Example:
        >>> inverse_frequency_weights([100, 50, 25])
        tensor([0.4286, 0.8571, 1.7143])
    """
    counts = check_class_counts(class_counts)
    # relative to the rarest class, so that no power overflows
    values = (counts.min() / counts) ** check_number("exponent", exponent, 0.0)
    return (values * (values.numel() / values.sum())).to(device_of(class_counts), torch.float32)


class DeferredReweighting:
    r"""Class weights that a loss has from an epoch on (Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019,
    Algorithm 1).

        w_j = 1 while epoch < start,    effective_number_weights(class_counts, beta)_j from start on

    The loss holds a vector of weights from the beginning, and :meth:`set_epoch` writes into it: shapes, a compiled graph and a CUDA graph stay as they are.
    The weights follow from the epoch alone, so a resumed run needs no state of this object.

    Args:
        criterion: a loss with class weights, such as :class:`gclkern.LDAMLoss`, built without any.
        class_counts: training samples of each class (C,), all positive.
        start: first epoch with weights, counted from 0; the paper has 160 of 200, where the learning rate first drops.
        beta: as in :func:`effective_number_weights`.

    Raises:
        TypeError, ValueError: a criterion that takes no class weights or has its own, counts as in :func:`effective_number_weights`, or a start below 0.

    Example:
        >>> from gclkern import LDAMLoss
        >>> criterion = LDAMLoss([5000, 500, 50])
        >>> reweighting = DeferredReweighting(criterion, [5000, 500, 50], start=160)
        >>> criterion.weight
        tensor([1., 1., 1.])
        >>> reweighting.set_epoch(160)
        >>> criterion.weight
        tensor([0.0341, 0.2752, 2.6907])
    """

    def __init__(self, criterion: nn.Module, class_counts: ClassCounts, start: int, beta: float = 0.9999) -> None:
        buffers = dict(criterion.named_buffers(recurse=False)) | {name: None for name, value in criterion._buffers.items() if value is None}
        if "weight" not in buffers:
            raise TypeError(f"criterion must be a loss with class weights, such as LDAMLoss, got {type(criterion).__name__}")
        if buffers["weight"] is not None:
            raise ValueError(f"criterion already has class weights, which would be overwritten; build {type(criterion).__name__} without weight")
        self.criterion = criterion
        self.start = check_int("start", start, 0)
        self._weights = effective_number_weights(class_counts, beta)
        device = next((value.device for value in buffers.values() if value is not None), self._weights.device)
        criterion.register_buffer("weight", torch.ones_like(self._weights, device=device), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Write the weights of the epoch that begins, counted from 0.

        Raises:
            TypeError, ValueError: an epoch that is not an int of at least 0.
        """
        weight = self.criterion.get_buffer("weight")
        if check_int("epoch", epoch, 0) < self.start:
            weight.fill_(1.0)
        else:
            weight.copy_(self._weights)


def ldam_margins(class_counts: ClassCounts, max_margin: float = 0.5, exponent: float = 0.25) -> Tensor:
    r"""Label-distribution-aware margins (Cao et al., NeurIPS 2019, section 3.2), scaled so that the rarest class has the largest.

        m_j = max_margin * (n_min / n_j)^exponent

    Args:
        class_counts: training samples of each class (C,), all positive.
        max_margin: margin of the rarest class, at least 0; in units of cosine, 0.5 is the released code's value. DBM's is 0.1, in radians.
        exponent: how fast margins shrink with the class count, at least 0: 1/4 is LDAM's, 1 is DBM's.

    Returns:
        (C,) float32, on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError, ValueError: counts that are not positive numbers, or a margin below 0.

    Example:
        >>> ldam_margins([160000, 10000, 16])
        tensor([0.0500, 0.1000, 0.5000])
    """
    counts = check_class_counts(class_counts)
    margins = check_number("max_margin", max_margin, 0.0) * (counts.min() / counts) ** check_number("exponent", exponent, 0.0)
    return margins.to(device_of(class_counts), torch.float32)


def label_aware_smoothing(class_counts: ClassCounts, head: float = 0.3, tail: float = 0.0, shape: SmoothingShape = "concave") -> Tensor:
    r"""Label smoothing of each class, larger for frequent classes.

    (Zhong et al., "Improving calibration for long-tailed recognition", CVPR 2021, section 3.2.)

        rho_j = (n_j - n_min) / (n_max - n_min)
        concave  eps_j = tail + (head - tail) sin(pi/2 rho_j)        linear  eps_j = tail + (head - tail) rho_j
        convex   eps_j = head + (head - tail) sin(3 pi/2 + pi/2 rho_j)

    Args:
        class_counts: training samples of each class (C,), all positive.
        head, tail: eps of the most frequent and of the rarest class, in [0, 1]; 0.3 and 0 are MiSLAS's for CIFAR-10-LT at imbalance 100, ImageNet-LT and
            iNaturalist 2018. With equal counts all have `head`.
        shape: "concave", which every release of MiSLAS takes, "linear" or "convex".

    Returns:
        (C,) float32, the `label_smoothing` of a loss, on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError, ValueError: counts that are not positive numbers, head or tail out of range, an unknown shape.

    Example:
        >>> label_aware_smoothing([100, 55, 10], head=0.4, tail=0.1, shape="linear")
        tensor([0.4000, 0.2500, 0.1000])
    """
    counts = check_class_counts(class_counts)
    head, tail = check_number("head", head, 0.0, 1.0), check_number("tail", tail, 0.0, 1.0)
    check_choice("shape", shape, get_args(SmoothingShape))
    spread = counts.max() - counts.min()
    share = (counts - counts.min()) / spread if spread > 0 else torch.ones_like(counts)
    if shape == "concave":
        share = torch.sin(math.pi / 2 * share)
    elif shape == "convex":
        share = 1 - torch.cos(math.pi / 2 * share)
    smoothing = (tail + (head - tail) * share).clamp_(0, 1)
    return smoothing.to(device_of(class_counts), torch.float32)


def log_prior(class_counts: ClassCounts) -> Tensor:
    r"""Logarithm of each class's share of the training set, for logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10).

        log prior_j = log n_j - log sum_k n_k

    Args:
        class_counts: training samples of each class (C,), all positive.

    Returns:
        (C,) float32, at most 0, on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError, ValueError: counts that are not positive numbers.

    Example:
        >>> log_prior([75, 25])
        tensor([-0.2877, -1.3863])
    """
    counts = check_class_counts(class_counts)
    return (counts.log() - counts.sum().log()).to(device_of(class_counts), torch.float32)
