"""Long-tailed subsets of balanced data sets, and stratified splits. The stream of numpy's RandomState is frozen, so a seed always gives the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gclkern.validation import check_choice, check_int, check_number

PROFILES = ("exp", "step")


def profile_counts(num_classes: int, largest: int, imbalance: float, profile: str = "exp") -> list[int]:
    """Training samples of each class, class 0 the most frequent (Cui et al., CVPR 2019; Cao et al., NeurIPS 2019).

        exp     n_i = floor(largest * (1 / imbalance)^(i / (C - 1)))
        step    n_i = largest for the first half of the classes, floor(largest / imbalance) for the rest

    Args:
        num_classes: C.
        largest: samples of class 0.
        imbalance: ratio of the largest to the smallest class, at least 1.
        profile: "exp" or "step".

    Raises:
        ValueError: an unknown profile, an imbalance below 1, or one so large that a class would be empty.

    Example:
        >>> profile_counts(10, 5000, 100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> profile_counts(4, 500, 10, "step")
        [500, 500, 50, 50]
    """
    check_int("num_classes", num_classes, 1)
    check_choice("profile", profile, PROFILES)
    ratio = 1 / check_number("imbalance", imbalance, 1.0)
    if profile == "exp":
        counts = [int(largest * ratio ** (i / max(num_classes - 1, 1))) for i in range(num_classes)]
    else:
        counts = [largest if i < num_classes // 2 else int(largest * ratio) for i in range(num_classes)]
    if min(counts) == 0:
        raise ValueError(f"imbalance {imbalance:g} leaves classes without a sample, since the largest class has {largest}; take at most {largest}")
    return counts


def choose_subset(labels: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Indices of the samples in the long-tailed set, (sum of counts,), class after class.

    The reference subset of CIFAR-LT: seed numpy, then for each class in ascending order shuffle the indices of its samples and take the first n.
    """
    random = np.random.RandomState(check_int("seed", seed, 0, 2**32 - 1))
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels.numpy() == label)
        if len(members) < count:
            raise ValueError(f"class {label} has {len(members)} training samples, but the long-tailed set needs {count}")
        random.shuffle(members)
        chosen.append(members[:count])
    return torch.from_numpy(np.concatenate(chosen))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, taken), each in ascending order: `fraction` of every class is taken, rounded, at least one sample, but never a class's last one."""
    check_number("fraction", fraction, 0.0, 1.0, open_low=True)
    random = np.random.RandomState(check_int("seed", seed, 0, 2**32 - 1))
    taken = torch.zeros(labels.numel(), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        random.shuffle(members)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken[torch.from_numpy(members[:count])] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()
