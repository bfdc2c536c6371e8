"""How large the cloud around each class's logit is: the rarer the class, the larger."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from gclkern.options import Strategy
from gclkern.validation import ClassCounts, check_choice, check_class_counts, check_number, device_of

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
DEFAULT_EXPONENT = 0.25


def cloud_sizes(class_counts: ClassCounts, strategy: Strategy = "log", exponent: float | None = None) -> Tensor:
    r"""Cloud size of each class, d_j / max_k d_k (Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022, Eq. 9).

        log      d_j = log n_max - log n_j
        power    d_j = n_max^exponent - n_j^exponent
        cosine   d_j = cos(pi/2 * n_j / n_max)

    The rarest class has 1, the most frequent 0; if all counts are equal, all sizes are 0. Multiply by `noise_mul` for the `cloud` of a loss. The paper compares
    these strategies in Table 3. The formulas of power and cosine are our interpretation; they were not checked against that table.

    Args:
        class_counts: training samples of each class (C,), all positive: a sequence, a numpy array, a tensor, or a dict, Counter or pandas Series with the
            classes 0 to C - 1 as keys.
        strategy: "log" (the paper's choice and best on CIFAR-10-LT), "power" or "cosine".
        exponent: for "power" only, positive; None takes 1/4, the better of the paper's 1/4 and 1/3.

    Returns:
        (C,) float32 in [0, 1], on the device of `class_counts` if it is a tensor, else on the CPU. Computed in float64.

    Raises:
        TypeError: counts or exponent that are not numbers.
        ValueError: a count that is not positive, no counts, an unknown strategy, an exponent out of range or beside another strategy than "power".

    Example:
        >>> cloud_sizes([1000, 100, 10])
        tensor([0.0000, 0.5000, 1.0000])
        >>> cloud_sizes([16, 81, 256], "power", exponent=0.5)
        tensor([1.0000, 0.5833, 0.0000])
    """
    counts = check_class_counts(class_counts)
    check_choice("strategy", strategy, STRATEGIES)
    if exponent is not None and strategy != "power":
        raise ValueError(f'exponent is {exponent!r}, but strategy="{strategy}" has none; leave it out, or use strategy="power"')
    # n_max cancels in d_j / max d, so each strategy is a function of n_j / n_max, written so that it is exactly 0 at 1.
    share = counts / counts.max()
    if strategy == "log":
        sizes = share.log().abs()
    elif strategy == "power":
        exponent = check_number("exponent", DEFAULT_EXPONENT if exponent is None else exponent, 0.0, open_low=True)
        sizes = torch.expm1(exponent * share.log()).abs()
    else:
        sizes = torch.sin(math.pi / 2 * (1 - share))
    largest = sizes.max()
    if largest > 0:
        sizes = sizes / largest
    return sizes.clamp_(0, 1).to(device_of(class_counts), torch.float32)
