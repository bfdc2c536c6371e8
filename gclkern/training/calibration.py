"""Calibration: one temperature for all logits, fitted on images that the network was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gclkern.training.data import DataSplits
from gclkern.training.evaluation import predict
from gclkern.training.network import Network
from gclkern.training.processes import Processes

# The inverse temperature is searched in [e^-7, e^7], about 1/1100 to 1100: beyond it the probabilities are one-hot or uniform to float32.
_LIMIT = 7.0


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor, *, class_balanced: bool = False) -> float:
    r"""The temperature T for which softmax(logits / T) fits the labels best (Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2).

    It minimises the cross entropy with smoothed targets (Platt, "Probabilistic outputs for support vector machines", 1999, section 2.2):

        loss(b) = sum_i w_i [ logsumexp_j(b z_ij) - b sum_j t_ij z_ij ],    b = 1 / T,    t_iy = (M + 1) / (M + 2), the rest spread over the other classes

    Without the smoothing, a network that is right on all M images would get T = 0. The loss is convex in b, so bisection finds the root of its
    derivative. Dividing by T changes no prediction. The temperature suits images whose classes have the frequencies that the weights w_i give them.

    Args:
        logits: (M, C), finite, of images that were not in the training set; C of at least 2.
        labels: (M,) int64 in [0, C).
        class_balanced: w_i = 1 / (n_y + 2) for the n_y images of class y, instead of w_i = 1: nearly the same weight for each class, but less for one of
            which there are few images, whose logits say little.

    Returns:
        T, from e^-7 to e^7; e^7 for logits without information about the labels.

    Raises:
        ValueError: shapes that do not match, no rows, one class, or logits that are not finite.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]]).expand(400, 2)  # right 3 times of 4: the probability 0.75 is the logit ln 3
        >>> round(2.0 / fit_temperature(logits, torch.tensor([0, 0, 0, 1]).repeat(100)), 1) == round(math.log(3), 1)
        True
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or labels.numel() == 0:
        raise ValueError(f"logits must be (M, C) and labels (M,) with M >= 1 and C >= 2, got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite to fit a temperature")
    count, num_classes = logits.shape
    z = logits.double() - logits.double().amax(1, keepdim=True)
    own = z.gather(1, labels.to(z.device)[:, None]).squeeze(1)
    weight = 1 / (labels.bincount()[labels].to(z) + 2) if class_balanced else z.new_ones(count)
    aim = ((count + 1) * own + (z.sum(1) - own) / (num_classes - 1)) / (count + 2)

    def slope(log_b: float) -> float:
        return float(((math.exp(log_b) * z).softmax(1).mul(z).sum(1) - aim) @ weight)

    low, high = -_LIMIT, _LIMIT
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def temperature_of(logits: Tensor, labels: Tensor, data: DataSplits) -> float | None:
    """The temperature for test images, fitted on images of the training set; None for logits that are not finite, of a network that diverged.

    Test sets of long-tailed recognition are balanced, so classes count nearly equally. Where the test images were split off the training set, images do.
    """
    return fit_temperature(logits, labels, class_balanced=not data.test_like_train) if bool(logits.isfinite().all()) else None


def held_out_temperature(network: Network, data: DataSplits, processes: Processes, amp: torch.dtype | None = None) -> float | None:
    """The temperature of a network, fitted on the held-out images; None without such images, or if the network diverged. A collective call."""
    if data.holdout is None:
        return None
    return temperature_of(predict(network, data.holdout, processes, amp=amp)[0], data.holdout.labels, data)
