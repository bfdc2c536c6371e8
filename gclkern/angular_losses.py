"""Losses whose margins add to the angle between a feature and its class: ArcFace, AGCL and DBM.

They change the cosines by torch operators, in one pass over (N, C), and pass them to :func:`gclkern.functional.gcl_cross_entropy`. With theta the angle of a
cosine c,

    cos(theta + a) = c cos a - sqrt(1 - c^2) sin a

whose gradient is unbounded towards c = 1 and -1. There 1 - c^2 is replaced by 1e-6, so the gradient stays finite.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from gclkern.clouds import cloud_sizes
from gclkern.functional import gcl_cross_entropy
from gclkern.kernels.terms import statistics_dtype
from gclkern.losses import _ClassLoss
from gclkern.noise import cloud_noise
from gclkern.options import LossOptions
from gclkern.validation import ClassCounts, check_class_counts, check_matrix, check_number, check_target, device_of, hard_labels, resolve_seed
from gclkern.weights import log_prior

if TYPE_CHECKING:
    from gclkern.losses import same_signature

_SMALLEST_SQUARE = 1e-6  # of the sine


def _turned(cosine: Tensor, angle: Tensor, beyond: Tensor, *, easy: bool) -> Tensor:
    """cos(theta + angle); c - beyond where that would pass pi, or with `easy` the cosine itself where it is not positive."""
    sine = (1.0 - cosine.square()).clamp(min=_SMALLEST_SQUARE).sqrt()
    turned = cosine * angle.cos() - sine * angle.sin()
    return torch.where(cosine > 0.0, turned, cosine) if easy else torch.where(cosine > -angle.cos(), turned, cosine - beyond)


class _AngularLoss(_ClassLoss):
    """A loss of cosines of which those of the targets, or all, are turned first."""

    def _all_turned(self, cosine: Tensor, noise: Tensor | None) -> Tensor:
        """The cosines of classes that are no target."""
        return cosine

    def _target_turned(self, cosine: Tensor, own: Tensor, label: Tensor, noise: Tensor | None) -> Tensor:
        """The target's cosine (N, 1) from the bare one."""
        raise NotImplementedError

    def _noise(self, cosine: Tensor, seed: Tensor | int | None, row_offset: int) -> Tensor | None:
        """The noise of angles, where this loss has some."""
        return None

    def forward(
        self,
        cosine: Tensor,  # (N, C)
        target: Tensor,  # (N,)
        *,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        check_matrix("cosine", cosine)
        self._check_classes("cosine", cosine, 1)
        self._check_cosines(cosine)
        rows, num_classes = cosine.shape
        target, target_b, lam, ignore_index = hard_labels(target, target_b, lam, self.ignore_index)
        if (target_b is None) != (lam is None):
            raise ValueError("target_b and lam are given together, or neither is; two targets need both")
        options = {**self._arguments(), "margin": None, "ignore_index": ignore_index, "row_offset": row_offset}
        labels = [check_target("target", target, rows, num_classes, ignore_index, "cosine", cosine)]
        if target_b is not None:
            labels.append(check_target("target_b", target_b, rows, num_classes, ignore_index, "cosine", cosine))
        exact = cosine.to(statistics_dtype(cosine))
        options["seed"] = None if options["cloud"] is None else resolve_seed(seed, cosine.device)
        noise = self._noise(exact, seed, row_offset)
        if noise is not None:
            options["cloud"] = options["seed"] = None
        others = self._all_turned(exact, noise)
        turned = []
        for label in labels:
            place = label.clamp(0, num_classes - 1)[:, None]
            own = self._target_turned(exact, exact.gather(1, place), place, None if noise is None else noise.gather(1, place))
            turned.append(others.scatter(1, place, own))
        if lam is None:
            return gcl_cross_entropy(turned[0], labels[0], **options)
        return self._mixed(turned, labels, lam, options)

    def _mixed(self, turned: list[Tensor], labels: list[Tensor], lam: Tensor | float, options: dict[str, Any]) -> Tensor:
        """Each target has a margin of its own, and so a softmax of its own; the noise is the same."""
        ignored = (labels[0] == options["ignore_index"]) | (labels[1] == options["ignore_index"])
        labels = [label.masked_fill(ignored, options["ignore_index"]) for label in labels]
        reduction, options["reduction"] = options["reduction"], "none"
        first, second = (gcl_cross_entropy(cosine, label, **options) for cosine, label in zip(turned, labels, strict=True))
        share = lam.to(first) if isinstance(lam, Tensor) else check_number("lam", lam, 0.0, 1.0)
        losses = share * first + (1 - share) * second
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        weights: Tensor = torch.ones_like(losses)
        if self.weight is not None and self.gamma == 0.0:
            of_first, of_second = (self.weight[label.clamp(0, self.weight.numel() - 1)].to(losses) for label in labels)
            weights = share * of_first + (1 - share) * of_second
        return losses.sum() / weights.masked_fill(ignored, 0.0).sum()

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...


class ArcFaceLoss(_AngularLoss):
    r"""Additive angular margin (Deng et al., "ArcFace: additive angular margin loss for deep face recognition", CVPR 2019, Eq. 3).

        z_ij = scale * cos(theta_ij + margin * [j == target_i]),    cosine_ij = cos(theta_ij)

    Where theta + margin would pass pi the target's cosine is cosine - margin sin(margin), as in the released code.

    Args:
        margin: added to the target's angle, in radians, in [0, pi/2]; 0.5 is the paper's.
        scale: factor on the cosines; 64 is the paper's, for faces.
        weight, label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`. `seed` and `row_offset` have no effect.

    Example:
        >>> import math, torch
        >>> from gclkern import ArcFaceLoss
        >>> ArcFaceLoss(margin=math.pi / 6, scale=1.0)(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))  # cos(60 + 30 degrees) is 0
        tensor(0.6931)
    """

    def __init__(self, *, margin: float = 0.5, scale: float = 64.0, **options: Unpack[LossOptions]) -> None:
        super().__init__(None, margin=check_number("margin", margin, 0.0, math.pi / 2), scale=scale, **options)

    def _target_turned(self, cosine: Tensor, own: Tensor, label: Tensor, noise: Tensor | None) -> Tensor:
        angle = torch.full_like(own, self.margin)  # type: ignore[arg-type]
        return _turned(own, angle, angle * angle.sin(), easy=False)


class AGCLLoss(_AngularLoss):
    r"""Angular Gaussian clouded logits (Li, Cheung and Lu, IEEE Transactions on Artificial Intelligence 2024): GCL whose cloud and margin add to the angle.

        z_ij = scale * cos(theta_ij + pi/2 * cloud_j * e_ij + margin * [j == target_i]),    cloud_j = noise_mul * cloud_sizes(class_counts)_j

    with e_ij = min(\|N(0, 1/3)\|, 1), one draw for each sample and class. In eval mode there is no noise, and the margin stays. Where the angle would pass pi,
    the cosine is cosine - sin(angle added), as in the released code.

    Args:
        class_counts: training samples of each class (C,), all positive.
        noise_mul: size of the rarest class's cloud in units of a right angle, in [0, 1]. 0.5 is the release's for Places-LT; there is none for CIFAR.
        margin: added to the target's angle, in radians, in [0, pi/2]. 0 is the release's for Places-LT.
        easy_margin: turn positive cosines alone, as the release does for Places-LT.
        scale, gamma, focal_detach: as in :class:`gclkern.GCLLoss`; stage 2 has gamma=1.
        weight, label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`gclkern.GCLLoss`.

    Example:
        >>> import torch
        >>> from gclkern import AGCLLoss
        >>> cosine = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, -0.1]], requires_grad=True)
        >>> AGCLLoss([500, 50, 5])(cosine, torch.tensor([0, 1])).backward()
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        noise_mul: float = 0.5,
        margin: float = 0.0,
        easy_margin: bool = False,
        scale: float = 30.0,
        gamma: float = 0.0,
        focal_detach: bool = True,
        **options: Unpack[LossOptions],
    ) -> None:
        cloud = check_number("noise_mul", noise_mul, 0.0, 1.0) * cloud_sizes(class_counts)
        if not isinstance(easy_margin, bool):
            raise TypeError(f"easy_margin must be True or False, got {easy_margin!r}")
        margin = check_number("margin", margin, 0.0, math.pi / 2)
        super().__init__(cloud.numel(), cloud=cloud, margin=margin, scale=scale, gamma=gamma, focal_detach=focal_detach, **options)
        self.easy_margin = easy_margin

    def _noise(self, cosine: Tensor, seed: Tensor | int | None, row_offset: int) -> Tensor | None:
        assert self.cloud is not None
        if not self.training:
            return torch.zeros_like(cosine)
        noise = cloud_noise(resolve_seed(seed, cosine.device), *cosine.shape, row_offset=row_offset)
        return noise.to(cosine.dtype) * (math.pi / 2 * self.cloud)

    def _all_turned(self, cosine: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return _turned(cosine, noise, noise.sin(), easy=self.easy_margin) if self.training else cosine

    def _target_turned(self, cosine: Tensor, own: Tensor, label: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None and isinstance(self.margin, float)
        angle = noise + self.margin
        return _turned(own, angle, angle.sin(), easy=self.easy_margin)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, easy_margin={self.easy_margin}"


class DBMLoss(_AngularLoss):
    r"""Difficulty-balanced margins (DBM, AAAI 2025) over a balanced softmax: rarer classes have larger angular margins, and hard samples larger ones still.

        m_i = margin * (n_min / n_y)^exponent * (1 + hard_i * (1 - cosine_iy) / 2),    hard_i = 1 where another class has a larger cosine than y, else 0
        z_ij = scale * (cos(theta_ij + m_i * [j == y]) - cloud_j * e_ij) + log prior_j,    y = target_i

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
        counts = check_class_counts(class_counts)
        largest, power = check_number("margin", margin, 0.0, math.pi / 4), check_number("exponent", exponent, 0.0)
        margins = (largest * (counts.min() / counts) ** power).to(device_of(class_counts), torch.float32)
        cloud = check_number("noise_mul", noise_mul, 0.0) * cloud_sizes(class_counts)
        bias = check_number("tau", tau) * log_prior(class_counts)
        super().__init__(margins.numel(), cloud=cloud if bool(cloud.any()) else None, margin=margins, bias=bias, scale=scale, **options)

    def _target_turned(self, cosine: Tensor, own: Tensor, label: Tensor, noise: Tensor | None) -> Tensor:
        assert isinstance(self.margin, Tensor)
        others = cosine.detach().scatter(1, label, -torch.inf).amax(1, keepdim=True)
        margin = self.margin.to(own)[label]
        angle = torch.where(others > own.detach(), margin * (1.0 + (1.0 - own) / 2), margin)
        return _turned(own, angle, angle * angle.sin(), easy=False)
