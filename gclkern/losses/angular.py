"""Losses whose margins add to the angle between a feature and its class: ArcFace, AGCL and DBM.

Each is a choice of options of :func:`gclkern.functional.gcl_cross_entropy`. From features and a classifier's weight, in one process or with the classes spread
over many, the same options of :class:`gclkern.LinearGCLLoss` and :class:`gclkern.distributed.ShardedLinearGCLLoss` serve:

    ArcFace   LinearGCLLoss(class_counts, noise_mul=0.0, angular=True, margin=0.5, scale=64.0)
    AGCL      LinearGCLLoss(class_counts, noise_mul=0.5, angular=True)
    DBM       LinearGCLLoss(class_counts, noise_mul=0.0, difficulty_margin=True, margin=ldam_margins(class_counts, 0.1, 1.0), scale=32.0, tau=1.0)
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from gclkern.losses.base import _LogitLoss
from gclkern.losses.gcl import GCLLoss
from gclkern.options import LossOptions
from gclkern.validation import ClassCounts
from gclkern.weights import ldam_margins


class ArcFaceLoss(_LogitLoss):
    r"""Additive angular margin (Deng et al., "ArcFace: additive angular margin loss for deep face recognition", CVPR 2019, Eq. 3).

        z_ij = scale * cos(theta_ij + margin * [j == target_i]),    cosine_ij = cos(theta_ij),    loss_i = cross_entropy(z_i, target_i)

    Where theta + margin would pass pi the target's cosine is cosine - margin sin(margin), as in the released code.

    Args:
        margin: added to the target's angle, in radians, in [0, pi/2]: a number, or (C,). 0.5 is the paper's.
        scale: factor on the cosines; 64 is the paper's, for faces.
        weight, label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`, without `seed` and `row_offset`.

    Example:
        >>> import math, torch
        >>> from gclkern import ArcFaceLoss
        >>> ArcFaceLoss(margin=math.pi / 6, scale=1.0)(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))  # cos(60 + 30 degrees) is 0
        tensor(0.6931)
    """

    def __init__(self, *, margin: Tensor | float = 0.5, scale: float = 64.0, **options: Unpack[LossOptions]) -> None:
        super().__init__(None, margin=margin, scale=scale, angular=True, **options)


class AGCLLoss(GCLLoss):
    r"""Angular Gaussian clouded logits: GCL whose cloud and margin add to the angle.

    (Li, Cheung, Lu, Hu, Lan and Huang, "Adjusting logit in Gaussian form for long-tailed visual recognition", IEEE TAI 2024.)

        z_ij = scale * cos(theta_ij + pi/2 * cloud_j * e_ij + margin * [j == target_i]),    cloud_j = noise_mul * cloud_sizes(class_counts)_j

    with e_ij = min(\|N(0, 1/3)\|, 1), where 1/3 is the standard deviation, one draw for each sample and class; the loss is cross entropy, as in GCL:

        loss_i = l_i (1 - exp(-l_i))^gamma,    l_i = cross_entropy(z_i, target_i)

    In eval mode there is no noise, and the margin stays. Where theta_ij + a would pass pi, with a the angle added, cosine - a sin(a) takes the place of
    cos(theta + a), as in ArcFace's release; the release of AGCL has cosine - sin(a).

    Args:
        class_counts: training samples of each class (C,), all positive.
        noise_mul: size of the rarest class's cloud in units of a right angle, in [0, 1]. 0.5 is the release's for Places-LT; there is none for CIFAR.
        margin: added to the target's angle, in radians, in [0, pi/2]: a number, or (C,). 0 is the release's for Places-LT.
        easy_margin: add angles only where the cosine is positive. The release does so for Places-LT; False is its function's default.
        scale, gamma, focal_detach: as in :class:`gclkern.GCLLoss`; stage 2 has gamma=1.
        weight, label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`.

    Example:
        >>> import math, torch
        >>> from gclkern import AGCLLoss
        >>> criterion = AGCLLoss([9, 1], margin=math.pi / 6, scale=1.0).eval()  # no noise in eval mode
        >>> criterion(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))  # cos(60 + 30 degrees) is 0
        tensor(0.6931)
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        noise_mul: float = 0.5,
        margin: Tensor | float = 0.0,
        easy_margin: bool = False,
        scale: float = 30.0,
        gamma: float = 0.0,
        focal_detach: bool = True,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(
            class_counts, noise_mul=noise_mul, margin=margin, scale=scale, gamma=gamma, focal_detach=focal_detach, angular=True, easy_margin=easy_margin,
            **options,
        )  # fmt: skip


class DBMLoss(GCLLoss):
    r"""Difficulty-aware balancing margins over a balanced softmax: angular margins that are larger for rarer classes, and larger still for hard samples.

    (Son, Koo, Park and Kim, "Difficulty-aware balancing margin loss for long-tailed recognition", AAAI 2025.)

        m_i = margin * (n_min / n_y)^exponent * (1 + hard_i * (1 - cosine_iy) / 2),    hard_i = 1 where another class has a larger cosine than y, else 0
        z_ij = scale * (cos(theta_ij + m_i * [j == y]) - cloud_j * e_ij) + tau * log prior_j,    y = target_i,    loss_i = cross_entropy(z_i, y)

    The gradient goes through the sample's margin, as in the released code. Predict by plain cosines. `noise_mul` above 0 adds
    GCL's clouds, which the paper does not have.

    Args:
        class_counts: training samples of each class (C,), all positive.
        margin: of the rarest class, in radians, in [0, pi/4]; 0.1 is the paper's.
        exponent: how fast margins shrink with the class count, at least 0; 1 is the paper's.
        scale: factor on the cosines; the paper's is 32 for CIFAR-LT and 30 for the large sets.
        tau: strength of the logit adjustment; 1 is the balanced softmax, 0 the loss without it, as DBM with deferred re-weighting has it.
        noise_mul: size of the rarest class's cloud, see :class:`gclkern.GCLLoss`.
        weight, label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`.

    Example:
        >>> import torch
        >>> from gclkern import DBMLoss
        >>> criterion = DBMLoss([500, 50, 5])
        >>> criterion.margin
        tensor([0.0010, 0.0100, 0.1000])
        >>> cosine = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, -0.1]], requires_grad=True)
        >>> criterion(cosine, torch.tensor([0, 1])).backward()
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        margin: float = 0.1,
        exponent: float = 1.0,
        scale: float = 32.0,
        tau: float = 1.0,
        noise_mul: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        margins = ldam_margins(class_counts, margin, exponent)
        super().__init__(class_counts, noise_mul=noise_mul, margin=margins, scale=scale, difficulty_margin=True, tau=tau, **options)
