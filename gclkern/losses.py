"""The losses as modules: each holds its per-class vectors and options, and calls one function of gclkern.functional.

Per-class vectors (`cloud`, `margin`, `bias`, `weight`) are buffers, so they follow ``.to(device)``, but they stay float32 whatever dtype the module is given.
They are not in the state_dict: they follow from the arguments, and a checkpoint with them would silently override the arguments of the stage that loads it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, get_args

import torch
from torch import Tensor, nn

from gclkern.buffers import PreciseBuffers
from gclkern.clouds import cloud_sizes
from gclkern.devices import refuse_transforms, values_may_be_read
from gclkern.dispatch import BACKENDS, PLANS
from gclkern.functional import dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy, linear_gcl_cross_entropy_with_top1
from gclkern.options import Backend, GCLOptions, LearnedEpsilon, LossOptions, Plan, Reduction, SmoothingShape, Strategy
from gclkern.validation import (
    REDUCTIONS,
    ClassCounts,
    check_choice,
    check_class_counts,
    check_number,
    check_values,
    class_vector,
    device_of,
    loss_terms,
)
from gclkern.weights import label_aware_smoothing, ldam_margins, log_prior

_INITIAL_EPSILON = 0.5
VECTORS = ("cloud", "margin", "bias", "weight", "label_smoothing")  # arguments that may have one value for each class


if TYPE_CHECKING:
    Function = TypeVar("Function", bound=Callable[..., Any])

    def same_signature(forward: Function) -> Callable[[Any], Function]:
        """Give `__call__` of a module the signature of its `forward`, for type checkers; nn.Module's accepts any arguments."""


class _ClassLoss(PreciseBuffers):
    """Holds the arguments of :func:`gclkern.functional.gcl_cross_entropy` that stay the same from batch to batch."""

    cloud: Tensor | None
    margin: Tensor | float | None
    bias: Tensor | None
    weight: Tensor | None
    label_smoothing: Tensor | float
    _takes_cosines = True
    _seen = False

    def __init__(
        self,
        num_classes: int | None,  # of class_counts; None for a loss that has none
        *,
        cloud: Tensor | None = None,
        margin: Tensor | float | None = None,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        scale: float,
        gamma: float = 0.0,
        focal_detach: bool = True,
        angular: bool = False,
        difficulty_margin: bool = False,
        easy_margin: bool = False,
        label_smoothing: Tensor | float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.angular = angular
        self.difficulty_margin = difficulty_margin
        self.easy_margin = easy_margin
        self.scale = scale
        self.gamma = gamma
        self.focal_detach = focal_detach
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        vectors = {"cloud": cloud, "margin": margin, "bias": bias, "weight": weight, "label_smoothing": label_smoothing}
        self.num_classes = num_classes
        self._check(vectors)
        for name, value in sorted(vectors.items(), key=lambda item: item[1] is None):  # torch.export miscounts buffers behind one that is None
            if value is None:
                self.register_buffer(name, None)
            elif isinstance(value, Tensor):
                # a copy, so that weights written into the buffer for a new epoch only change this loss
                self.register_buffer(name, value.detach().to(torch.float32, copy=True), persistent=False)
            else:
                setattr(self, name, value)

    def _check(self, vectors: dict[str, Any]) -> None:
        """Check the arguments now, so that errors are raised on construction and not by the first batch."""
        check_choice("backend", self.backend, BACKENDS)
        vectors = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vectors.items()}
        num_classes = self.num_classes or next((value.numel() for value in vectors.values() if isinstance(value, Tensor)), 1)
        loss_terms(
            "the class counts", torch.zeros(1, num_classes, device="cpu"), num_classes, torch.zeros(1, dtype=torch.int64, device="cpu"), target_b=None,
            lam=None, seed=0, row_offset=0, class_offset=0, **vectors, **self._options(),
        )  # fmt: skip

    def _check_classes(self, name: str, matrix: object, dim: int) -> None:
        """Check that `matrix` has one row or column for each class. The error names class_counts, which the user gave, not the vectors made of it."""
        if isinstance(matrix, Tensor):
            refuse_transforms(name, matrix)
        if self.num_classes is not None and isinstance(matrix, Tensor) and matrix.dim() == 2 and matrix.shape[dim] != self.num_classes:
            what = "columns" if dim == 1 else "rows"
            raise ValueError(f"{name} must have {self.num_classes} {what}, one for each of class_counts, got shape {tuple(matrix.shape)}")

    def _check_cosines(self, cosine: Tensor) -> None:
        """Warn if a loss of cosines is given logits, which raise no error. Only the first batch is checked."""
        if self._takes_cosines and not self._seen and isinstance(cosine, Tensor) and values_may_be_read(cosine):
            self._seen = True
            largest = float(cosine.detach().abs().max()) if cosine.numel() > 0 else 0.0
            if 1.05 < largest < math.inf:
                warnings.warn(
                    f"{type(self).__name__} takes cosines in [-1, 1], but the largest here is {largest:.3g}; if these are the logits of a linear layer, "
                    f"use a gclkern.CosineLinear classifier instead",
                    stacklevel=3,
                )

    def _options(self) -> dict[str, Any]:
        angles = [name for name in ("angular", "difficulty_margin", "easy_margin") if getattr(self, name) is not False]
        return {name: getattr(self, name) for name in ("scale", "gamma", "focal_detach", "ignore_index", "reduction", *angles)}

    def _arguments(self) -> dict[str, Any]:
        """The keywords that this loss passes to the functional layer."""
        vectors = {name: getattr(self, name) for name in VECTORS}
        if not self.training:
            vectors["cloud"] = None
        return {**vectors, "backend": self.backend, **self._options()}

    def plain_cross_entropy(self, *inputs: Tensor) -> Tensor:
        """The cross entropy of the prediction, softmax(scale * cosine): without noise, margins, bias, class weights, smoothing and focal factor.

        Training and validation losses by this name can be compared, in both modes of the module and between losses of the same scale.

        Args:
            inputs: those of the loss itself: (cosine, target), or (features, linear_weight, target).

        Example:
            >>> import torch
            >>> from gclkern import GCLLoss
            >>> cosine, target = torch.tensor([[0.5, 0.25]]), torch.tensor([0])
            >>> loss = GCLLoss([9, 1], margin=0.1, scale=4.0).plain_cross_entropy(cosine, target)
            >>> torch.allclose(loss, torch.nn.functional.cross_entropy(4 * cosine, target))
            True
        """
        return self._cross_entropy(*inputs, **{name: getattr(self, name) for name in ("scale", "ignore_index", "reduction", "backend")})

    def predict_proba(
        self,
        cosine: Tensor,  # (..., C)
    ) -> Tensor:  # (..., C)
        """The probability of each class, softmax(scale * cosine), in float32 or better: what :meth:`plain_cross_entropy` is the cross entropy of.

        Without the scale, the softmax of cosines is nearly uniform: of 10 classes, none has a probability above 0.46.

        Args:
            cosine: what the classifier returns for images, also for :class:`LinearGCLLoss`; logits for a loss of logits, whose scale is 1.

        Example:
            >>> import torch
            >>> from gclkern import GCLLoss
            >>> cosine = torch.tensor([[0.5, 0.25]])
            >>> GCLLoss([9, 1], scale=30.0).predict_proba(cosine), cosine.softmax(1)
            (tensor([[9.9945e-01, 5.5278e-04]]), tensor([[0.5622, 0.4378]]))
        """
        return (self.scale * (cosine.float() if cosine.element_size() < 4 else cosine)).softmax(-1)

    def _cross_entropy(self, *inputs: Any, **options: Any) -> Tensor:
        return gcl_cross_entropy(*inputs, **options)

    def extra_repr(self) -> str:
        parts = []
        for name in VECTORS:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                parts.append(f"{name}=({value.numel()},)" if value.is_meta else f"{name}=({value.min():.4g} to {value.max():.4g})")
            elif value is not None:
                parts.append(f"{name}={value}")
        parts += [f"{name}={value!r}" for name, value in self._options().items()]
        return ", ".join([*parts, f"backend={self.backend!r}"])


_ClassLoss.__init__.__qualname__ = "GCLLoss.__init__"  # a misspelt argument is refused in this name


class _LogitLoss(_ClassLoss):
    """A loss of cosines or logits without noise."""

    def forward(
        self,
        cosine: Tensor,  # (N, C)
        target: Tensor,  # (N,)
        *,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | float | None = None,
    ) -> Tensor:
        self._check_classes("cosine", cosine, 1)
        self._check_cosines(cosine)
        return gcl_cross_entropy(cosine, target, target_b=target_b, lam=lam, **self._arguments())

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...


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

    In training mode every sample and class gets its noise e; eval mode has no noise, but keeps the margin. The released recipes:

        CIFAR       stage 1: noise_mul=0.5                 stage 2: noise_mul=0.5, margin=0.1, scale=20, gamma=1
        Places-LT   stage 1: noise_mul=1.0                 stage 2: noise_mul=1.0, margin=0.1, scale=15

    Args:
        class_counts: training samples of each class (C,): a sequence, a numpy array or a tensor, all positive.
        noise_mul: size of the rarest class's cloud, in units of cosine, at least 0. 1 is the release's value for the large data sets, 0.5 for CIFAR.
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
    """:class:`GCLLoss` computed from features and a classifier's weight, without the (N, C) intermediates of a chain of torch operators.

    The weight is an argument, not a parameter of this module: pass that of a :class:`gclkern.CosineLinear`, which then also predicts.

    Args:
        class_counts: training samples of each class (C,).
        plan: "auto", "materialised", "chunked" or "recompute", see :func:`gclkern.functional.linear_gcl_cross_entropy`; "auto" chooses by size.
        options: the other arguments of :class:`GCLLoss`.

    Shapes: features (N, D), linear_weight (C, D), the rest as in :class:`GCLLoss`.

    Raises:
        TypeError, ValueError: as :class:`GCLLoss`.

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

    Shapes and errors: as :class:`GCLLoss`, without `seed` and `row_offset`.

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

    Shapes and errors: as :class:`GCLLoss`, without `seed` and `row_offset`.

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

    Shapes and errors: as :class:`GCLLoss`, without `seed` and `row_offset`.

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
        scale: factor on the cosines; 64 is the paper's, for faces. GCL's relatives use 30.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`GCLLoss`, without `seed` and `row_offset`.

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
    r"""Focal loss (Lin et al., "Focal loss for dense object detection", ICCV 2017, Eq. 4) over a softmax, with the gradient of its factor.

        loss = (1 - exp(-l))^gamma * l,    l = cross_entropy(scale * logits, target)

    Without `weight` and smoothing exp(-l) is the target's probability. With them the factor is computed from the weighted l, as in LDAM's released code; the
    paper's alpha is outside of the factor. The mean divides by the number of samples, whatever the weights.

    Args:
        gamma: exponent, at least 0; 2 is the paper's.
        scale: factor on the logits: 1 for those of a linear layer, about 30 for cosines.
        weight: class weights (C,), as in torch's cross entropy.
        label_smoothing, ignore_index, reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes and errors: as :class:`GCLLoss`, without `seed` and `row_offset`.

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


class DROLTLoss(PreciseBuffers):
    r"""The DRO-LT bound (Samuel and Chechik, "Distributional robustness loss for long-tail learning", ICCV 2021) as a module.

        l_cj   = -(\|mu_c - z_j\|_2 + 2 epsilon_c [y_j == c]) / temperature
        loss_c = mean over i in B with y_i = c of (logsumexp_{j in B} l_cj - l_ci)
        loss   = sum_{c in B} w_c loss_c / sum_{c in B} w_c

    with the features z and labels y of a batch B, and class centroids mu; see :func:`gclkern.functional.dro_lt_loss`. It is added to a cross entropy: the paper
    weights the two by lam and 1 - lam, the released recipe by 1 and 1.

    It follows the paper. Differences from the released code:

    - The paper's bound has 2 epsilon; the release subtracts epsilon once. So the learned epsilon starts at 0.5 here, and at 1 in the release.
    - max(epsilon, 0) is used. The release lets epsilon go negative, where the bound no longer holds.
    - Each sample gets the epsilon of its class. The release applies epsilons in batch order to rows in class order, so samples get those of other classes.
    - The logarithm of the sum of exponentials is stable. The release takes log(sum(exp)), which is -inf for distances over about 100 temperatures.
    - Class weights are normalised over the classes of the batch; the release includes absent classes.
    - Centroids are an argument, computed for example once per epoch by :class:`gclkern.ClassCentroids`. The release computes them from all features in every
      batch.

    The gradient of a learned epsilon is never negative, 2 / temperature times a sum of probabilities, so gradient descent can only decrease it, down to 0.
    Weight decay, which also decreases it, is part of the recipe: put this parameter in the optimizer's group with weight decay, although it is a vector.

    Args:
        class_counts: training images of each class (C,), all positive.
        epsilon: "learned", one parameter for each class (the module then owns a parameter: give it to an optimizer); "sqrt", the constants
            base_epsilon / sqrt(class_counts); or a number >= 0 for all classes.
        temperature: T > 0; 1 in the paper.
        base_epsilon: initial value of "learned", or the numerator of "sqrt"; None is 0.5, which with the factor 2 equals the release's 1.
        class_weight: weight of each class (C,), >= 0; None gives all the same weight.
        reduction: "mean", "sum" or "none", see :func:`gclkern.functional.dro_lt_loss`.
        backend: "auto", "triton", "cpu" or "torch".

    Shapes: features (N, D), target (N,) int64, centroids (C, D), counts (C,) or None -> loss () for "mean" and "sum", (N,) for "none".

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit. Messages name the argument and the value.

    Example:
        >>> import torch
        >>> from gclkern import ClassCentroids, DROLTLoss
        >>> features, target = torch.randn(8, 16, requires_grad=True), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        >>> centroids = ClassCentroids(num_classes=3, dim=16)
        >>> centroids.update(features, target)
        >>> loss = DROLTLoss([500, 50, 5])(features, target, *centroids.compute())
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([8, 16])
    """

    class_weight: Tensor | None
    epsilon: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        epsilon: LearnedEpsilon | float = "learned",
        temperature: float = 1.0,
        base_epsilon: float | None = None,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        counts = check_class_counts(class_counts).to(device_of(class_counts))
        if isinstance(epsilon, str):
            check_choice("epsilon", epsilon, get_args(LearnedEpsilon))
            base = _INITIAL_EPSILON if base_epsilon is None else check_number("base_epsilon", base_epsilon, 0.0)
        elif base_epsilon is not None:
            raise ValueError(f'base_epsilon is given ({base_epsilon}) but serves only epsilon="learned" or "sqrt", and epsilon is {epsilon}')
        if epsilon == "learned":
            self._base = base
            self.epsilon = nn.Parameter(torch.empty_like(counts, dtype=torch.float32))
            self.reset_parameters()
        else:
            value = base / counts.sqrt() if epsilon == "sqrt" else counts.new_tensor(check_number("epsilon", epsilon, 0.0))
            self.register_buffer("epsilon", value.to(torch.float32), persistent=False)
        weight = class_vector("class_weight", class_weight, counts.numel(), "class_counts", counts, torch.float32)
        if weight is not None:
            check_values("class_weight", weight, 0.0)
        self.register_buffer("class_weight", None if weight is None else weight.detach().clone(), persistent=False)
        self.mode = epsilon if isinstance(epsilon, str) else "constant"
        self.num_classes = counts.numel()
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        check_choice("backend", backend, BACKENDS)
        self.backend = backend

    def reset_parameters(self) -> None:
        """Let a learned epsilon start again. Call it after ``.to_empty()``, as for torch's layers."""
        if isinstance(self.epsilon, nn.Parameter):
            nn.init.constant_(self.epsilon, self._base)

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        centroids: Tensor,  # (C, D)
        counts: Tensor | None = None,  # (C,)
    ) -> Tensor:
        """The loss of a batch. With `counts`, the sample counts of the centroids, classes without samples are left out of the loss."""
        if isinstance(centroids, Tensor) and centroids.dim() == 2 and centroids.shape[0] != self.num_classes:
            raise ValueError(f"centroids must have {self.num_classes} rows, one for each of class_counts, got shape {tuple(centroids.shape)}")
        weight = self.class_weight
        if counts is not None:
            if not isinstance(counts, Tensor):
                raise TypeError(f"counts must be a tensor or None, got {type(counts).__name__}")
            if counts.shape != (self.num_classes,):
                raise ValueError(f"counts must have shape ({self.num_classes},), one for each class, got {tuple(counts.shape)}")
            seen = counts > 0
            weight = seen.to(torch.float32) if weight is None else torch.where(seen, weight, 0.0)
        epsilon = self.epsilon.clamp(min=0.0)
        return dro_lt_loss(
            features, target, centroids, epsilon, temperature=self.temperature, class_weight=weight, reduction=self.reduction, backend=self.backend
        )

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        epsilon = f"{float(self.epsilon):g}" if self.mode == "constant" else repr(self.mode)
        return f"num_classes={self.num_classes}, epsilon={epsilon}, temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"
