"""Gaussian clouded logits: of cosines, and of a head's features and weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor

from gclkern.clouds import cloud_sizes
from gclkern.dispatch import PLANS
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy, linear_gcl_cross_entropy_with_top1
from gclkern.losses.base import _ClassLoss
from gclkern.options import GCLOptions, LossOptions, Plan, Strategy
from gclkern.validation import ClassCounts, check_choice, check_number
from gclkern.weights import log_prior

if TYPE_CHECKING:
    from gclkern.losses.base import same_signature


class _CloudedLoss(_ClassLoss):
    """The arguments of GCL, from cosines or from features."""

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        noise_mul: float = 1.0,
        strategy: Strategy = "log",
        exponent: float | None = None,
        scale: float = 30.0,
        margin: Tensor | float = 0.0,
        gamma: float = 0.0,
        focal_detach: bool = True,
        angular: bool = False,
        difficulty_margin: bool = False,
        easy_margin: bool = False,
        tau: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        # with `angular` the cloud is in units of a right angle, and at most 1
        cloud = check_number("noise_mul", noise_mul, 0.0, 1.0 if angular is True else math.inf) * cloud_sizes(class_counts, strategy, exponent)
        nonzero = cloud if bool(cloud.any()) else None  # a cloud of zeros needs no noise
        bias = check_number("tau", tau) * log_prior(class_counts) if tau != 0.0 else None
        super().__init__(
            cloud.numel(), cloud=nonzero, margin=margin, bias=bias, scale=scale, gamma=gamma, focal_detach=focal_detach, angular=angular,
            difficulty_margin=difficulty_margin, easy_margin=easy_margin, **options,
        )  # fmt: skip


_CloudedLoss.__init__.__qualname__ = "GCLLoss.__init__"


class GCLLoss(_CloudedLoss):
    r"""Gaussian clouded logits (Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022, Eq. 9 and 11).

        z_ij = scale * (cosine_ij - cloud_j * e_ij - margin * [j == target_i]),    cloud_j = noise_mul * cloud_sizes(class_counts)_j
        loss = cross_entropy(z, target) * (1 - exp(-cross_entropy(z, target)))^gamma,    e_ij = min(\|N(0, 1/3)\|, 1)

    In training mode every sample and class gets its noise e, where 1/3 is the standard deviation; eval mode has no noise, but keeps the margin. The released
    recipes:

        CIFAR       stage 1: noise_mul=0.5                 stage 2: noise_mul=0.5, margin=0.1, scale=20, gamma=1
        Places-LT   stage 1: noise_mul=1.0                 stage 2: noise_mul=1.0, margin=0.1, scale=15

    Args:
        class_counts: training samples of each class (C,), all positive: a sequence, a numpy array, a tensor, or a dict, Counter or pandas Series with the
            classes 0 to C - 1 as keys.
        noise_mul: size of the rarest class's cloud, in units of cosine, at least 0. 1, the default, is the release's value for Places-LT,
            0.5 that for CIFAR; the release has none for other data sets.
        strategy, exponent: how cloud sizes decrease with the class count, see :func:`gclkern.cloud_sizes`; "log" is the paper's choice.
        scale: factor on the cosines; 30 is the first stage's.
        margin: subtracted from the target's cosine, a number or (C,). 0 in stage 1.
        weight: class weights (C,), as in torch's cross entropy. None: the paper re-balances by sampling, in stage 2.
        gamma: focal exponent; 0 turns the factor off, as in stage 1.
        focal_detach: the focal factor counts as a constant in backward, as in the release; False is the standard focal loss.
        angular, difficulty_margin, easy_margin: the margin, and with `angular` the cloud, add to the angle; see
            :func:`gclkern.functional.gcl_cross_entropy`, :class:`gclkern.AGCLLoss` and :class:`gclkern.DBMLoss`.
        tau: strength of a logit adjustment: tau * log prior is added to the logits, in eval mode too; see :class:`gclkern.LogitAdjustedLoss`.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes: cosine (N, C), target (N,) int64 or soft labels (N, C), target_b (N,) int64, lam a number, () or (N,) -> () for "mean" and "sum", (N,) for "none";
    float32 (float64 for float64).

    `target_b` and `lam` are the second target of mixup and the weight of the first. Both targets share ONE draw of the noise; the released code calls its
    criterion twice, with two draws. `seed` and `row_offset` choose the noise, see :func:`gclkern.functional.gcl_cross_entropy`; eval mode ignores them.

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit. Messages name the argument and the value.

    Warns:
        UserWarning: once, if the first batch has values beyond 1.05 in magnitude, which are no cosines; on a GPU only with :func:`gclkern.set_debug`.

    Example:
        >>> import torch
        >>> criterion = GCLLoss([500, 50, 5], noise_mul=0.5)
        >>> criterion.cloud
        tensor([0.0000, 0.2500, 0.5000])
        >>> cosine = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, -0.1]], requires_grad=True)
        >>> loss = criterion(cosine, torch.tensor([0, 1]))
        >>> loss.backward()
    """

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
        self._check_classes("cosine", cosine, 1)
        self._check_cosines(cosine)
        return gcl_cross_entropy(cosine, target, target_b=target_b, lam=lam, seed=seed, row_offset=row_offset, **self._arguments())

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...


class LinearGCLLoss(_CloudedLoss):
    """:class:`gclkern.GCLLoss` computed from features and a classifier's weight, without the (N, C) intermediates of a chain of torch operators.

    The weight is an argument, not a parameter of this module: pass that of a :class:`gclkern.CosineLinear`, which then also predicts.

    Args:
        class_counts: training samples of each class (C,).
        plan: "auto", "materialised", "chunked" or "recompute", see :func:`gclkern.functional.linear_gcl_cross_entropy`; "auto" chooses by size.
        options: the other arguments of :class:`gclkern.GCLLoss`.

    Shapes: features (N, D), linear_weight (C, D), the rest as in :class:`gclkern.GCLLoss`.

    Raises:
        TypeError, ValueError: as :class:`gclkern.GCLLoss`.

    Example:
        >>> import torch, gclkern
        >>> classifier = gclkern.CosineLinear(16, 3)
        >>> criterion = LinearGCLLoss([500, 50, 5], noise_mul=0.5, margin=0.1, scale=20.0, gamma=1.0)
        >>> loss = criterion(torch.randn(8, 16), classifier.weight, torch.randint(3, (8,)))
        >>> loss.backward()
        >>> classifier.weight.grad.shape
        torch.Size([3, 16])
    """

    def __init__(self, class_counts: ClassCounts, *, plan: Plan = "auto", **options: Unpack[GCLOptions]) -> None:
        check_choice("plan", plan, PLANS)
        super().__init__(class_counts, **options)
        self.plan = plan

    def forward(
        self,
        features: Tensor,  # (N, D)
        linear_weight: Tensor,  # (C, D)
        target: Tensor,  # (N,)
        *,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        self._check_classes("linear_weight", linear_weight, 0)
        return linear_gcl_cross_entropy(
            features, linear_weight, target, target_b=target_b, lam=lam, seed=seed, row_offset=row_offset, plan=self.plan, **self._arguments()
        )

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...

    def with_top1(
        self,
        features: Tensor,  # (N, D)
        linear_weight: Tensor,  # (C, D)
        target: Tensor,  # (N,)
        *,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and 1 or 0 for each sample that the classifier predicts right or wrong (N,), without a second matrix product.

        Predictions are by cosines, without noise and margin, see :func:`gclkern.functional.linear_gcl_cross_entropy_with_top1`.

        Example:
            >>> import torch, gclkern
            >>> classifier, target = gclkern.CosineLinear(16, 3), torch.tensor([0, 1, 2, 0])
            >>> loss, top1 = gclkern.LinearGCLLoss([500, 50, 5]).with_top1(classifier.weight[target], classifier.weight, target)
            >>> top1.mean()
            tensor(1.)
        """
        self._check_classes("linear_weight", linear_weight, 0)
        return linear_gcl_cross_entropy_with_top1(
            features, linear_weight, target, target_b=target_b, lam=lam, seed=seed, row_offset=row_offset, plan=self.plan, **self._arguments()
        )

    def _cross_entropy(self, *inputs: Any, **options: Any) -> Tensor:
        return linear_gcl_cross_entropy(*inputs, plan=self.plan, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, plan={self.plan!r}"
