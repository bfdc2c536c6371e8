"""The functions of the library. Each checks its arguments, lets dispatch.py choose the backend and the plan, and calls an autograd Function or operator.

gcl_cross_entropy          from cosines or logits (N, C)
linear_gcl_cross_entropy   from features (N, D) and classifier weights (C, D), fused: normalisation, product, noise and softmax;
                           linear_gcl_cross_entropy_with_top1 also says whether each sample is classified correctly
dro_lt_loss                the DRO-LT bound of features around their class centroids
supervised_contrastive     a softmax over samples and class prototypes: SupCon, BCL, PSC
class_centroids            the mean feature of each class
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from gclkern import ready
from gclkern.autograd import DROLTBound, HeadLoss, LogitLoss, LogitLossInOnePass, SupervisedContrast
from gclkern.cpu_backend.centroids import sums_or_means
from gclkern.cpu_backend.logit_loss import loss_and_gradient
from gclkern.dispatch import call_operator, calls_directly, resolve_backend, resolve_contrast_backend, resolve_plan
from gclkern.kernels.terms import statistics_dtype
from gclkern.options import Backend, LinearCrossEntropyOptions, Plan, Reduction
from gclkern.validation import (
    REDUCTIONS,
    check_choice,
    check_epsilon,
    check_head,
    check_int,
    check_labels,
    check_matrix,
    check_number,
    check_prototypes,
    check_same_device,
    check_target,
    check_temperature,
    check_values,
    class_vector,
    loss_terms,
    refuse_gradient,
)

__all__ = ["class_centroids", "dro_lt_loss", "gcl_cross_entropy", "linear_gcl_cross_entropy", "linear_gcl_cross_entropy_with_top1", "supervised_contrastive"]


def gcl_cross_entropy(
    cosine: Tensor,  # (N, C)
    target: Tensor,  # (N,)
    cloud: Tensor | None = None,  # (C,)
    *,
    scale: float = 30.0,
    margin: Tensor | float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    gamma: float = 0.0,
    focal_detach: bool = True,
    label_smoothing: Tensor | float = 0.0,
    angular: bool = False,
    difficulty_margin: bool = False,
    easy_margin: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    class_offset: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross entropy of clouded cosine logits (GCL, CVPR 2022, Eq. 11), with the margins, biases and weights of its relatives.

    With e_ij = min(\|N(0, 1/3)\|, 1), where 1/3 is the standard deviation, one draw for each sample and class, the logit of class j for a sample of class t is

        z_ij(t) = scale * (cosine_ij - cloud_j * e_ij - margin_j * [j == t]) + bias_j

    With `angular`, cloud and margin add to the angle theta_ij of the cosine instead (ArcFace; AGCL). With `difficulty_margin` only the margin does, and it is
    larger for samples whose largest cosine is that of another class (DBM):

        z_ij(t) = scale * cos(theta_ij + pi/2 * cloud_j * e_ij + margin_j * [j == t]) + bias_j
        z_ij(t) = scale * (cos(theta_ij + margin_j * [j == t] * (1 + hard_i * (1 - cosine_it) / 2)) - cloud_j * e_ij) + bias_j,
                  hard_i = 1 if some cosine_ij > cosine_it, else 0

    The loss of sample i is torch's cross entropy of z_i(t), with class weights and label smoothing, times
    (1 - exp(-loss))^gamma. With a second target (mixup) it is lam * loss(target) + (1 - lam) * loss(target_b), from one pass and ONE draw of the
    noise; GCL's released code calls its criterion twice, with two draws.

    Statistics and the loss are computed in float32 (float64 for float64 input), and the target's gradient without cancellation: it stays
    accurate where the target's probability is close to 1. Runs with the same seed are bitwise equal on one device.

    Args:
        cosine: cosines or logits (N, C), float32, bfloat16, float16 or float64, of any strides.
        target: class of each sample (N,), int64, in [0, C) or `ignore_index`; or soft labels (N, C), floating point, with at most two classes a row, see
            :func:`gclkern.mixed_targets`. Soft labels exclude `target_b` and `lam`, and no row of them is ignored, whatever `ignore_index`.
        cloud: size of each class's cloud (C,), at least 0; None adds no noise. :func:`gclkern.cloud_sizes` computes it from class counts.
        scale: factor s on the cosines; 30 is GCL's first stage. Use 1 for plain logits.
        margin: subtracted from the target's cosine: a number for CosFace, a vector (C,) for LDAM.
        bias: added to the logits (C,), for example tau * log prior (logit adjustment). May require a gradient.
        weight: class weights (C,), at least 0, as in torch's cross entropy.
        target_b: second target (N,) of a mixed sample; needs `lam`.
        lam: share of `target` in [0, 1]: a number, or a tensor () or (N,).
        gamma: focal exponent; 0 turns the focal factor off.
        focal_detach: whether the focal factor counts as a constant in backward, as in GCL's release; False is the standard focal loss.
        label_smoothing: share of the target's weight that is spread over all classes, in [0, 1]: a number, or a vector (C,) of which each target takes its own
            (label-aware smoothing, see :func:`gclkern.label_aware_smoothing`).
        angular: cloud and margin add to the angle. The cloud is in right angles, in [0, 1], and the margin in radians, in [0, pi/2]. Where theta + a would pass
            pi, with a the angle added, cosine - a sin(a) takes the place of cos(theta + a), as in ArcFace's release. 1 - cosine^2, whose root has no derivative
            at 0, is at least 1e-6, so gradients are finite at cosines of 1 and -1.
        difficulty_margin: the margin, in radians, in [0, pi/4], adds to the angle, and is up to twice as large for samples that the cosines alone do not
            classify correctly; the gradient includes that of this factor. The cloud is subtracted. It excludes `angular`.
        easy_margin: angles are only added where the cosine is positive, as with the option of this name in the releases of ArcFace and AGCL. It needs
            `angular` or `difficulty_margin`.
        ignore_index: a sample with this label, in either target, has no loss and no gradient.
        reduction: "mean" divides by the kept samples' sum of lam * weight[target] + (1 - lam) * weight[target_b] (torch's rule, mixed), with
            gamma > 0 by their number; "sum"; or "none" for the loss of each sample (N,).
        seed: key of the noise: an int, a () int64 tensor on the device of `cosine`, or None to draw one from torch's generator there.
        row_offset: index of the first sample in the global batch; with one seed for all ranks, rank * batch makes the noise of data-parallel training equal to
            that of one process.
        class_offset: index of the first class in the global class range, for a shard of the classes.
        backend: "auto" takes Triton kernels on a GPU (NVIDIA's from compute capability 8.0), compiled loops on a CPU where they were built, and torch elsewhere
            and for float64. "triton", "cpu" and "torch" force one: "triton" and "cpu" refuse float64 with a TypeError, and what cannot run here with a
            ValueError. On CPU tensors "triton" needs the environment variable TRITON_INTERPRET=1.

    Returns:
        The loss, float32 (float64 for float64 input): () for "mean" and "sum", (N,) for "none". All samples ignored: 0 for "sum", NaN for "mean".

    Raises:
        ValueError, TypeError: an argument is wrong, or a tensor other than `cosine` and `bias` requires a gradient; the message names it, its value and the
            remedy. On a GPU neither labels nor class vectors are read, because that would make the host wait: a label out of range makes the loss of its row
            NaN. :func:`gclkern.set_debug` enables the checks.
        RuntimeError: a second derivative, or a tensor inside a transform of torch.func.

    Gradients exist for `cosine` and `bias`, but not for `bias` beside `angular` or `difficulty_margin`; backward may be repeated, a second derivative is not
    supported. On a GPU the gradient of `cosine` is a view of a buffer whose rows are padded to a multiple of 128 elements, so it may not be contiguous; where
    `cosine` is a leaf, torch then stores a contiguous copy in `.grad`.

    Example:
        >>> import torch, gclkern
        >>> cosine = torch.tensor([[0.3, 0.1, 0.2], [0.2, 0.1, 0.3]], requires_grad=True)
        >>> target, cloud = torch.tensor([0, 1]), 0.5 * gclkern.cloud_sizes([500, 50, 5])
        >>> loss = gclkern.functional.gcl_cross_entropy(cosine, target, cloud, seed=0)
        >>> noise = gclkern.cloud_noise(0, num_rows=2, num_classes=3)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(30 * (cosine - cloud * noise), target), atol=1e-4)
        True
        >>> loss.backward()
    """
    if not torch.compiler.is_dynamo_compiling():
        made = ready.logit_loss(
            cosine, target, cloud, margin, bias, weight, target_b, lam, label_smoothing, seed, scale, gamma, focal_detach, ignore_index, reduction, row_offset,
            class_offset, angular, difficulty_margin, easy_margin, backend,
        )  # fmt: skip
        if made is not None:
            return made[0] if made[1] is None else LogitLossInOnePass.apply(cosine, bias, scale, made)
    check_matrix("cosine", cosine)
    terms = loss_terms(
        "cosine", cosine, cosine.shape[1], target, cloud, scale=scale, margin=margin, bias=bias, weight=weight, target_b=target_b, lam=lam, gamma=gamma,
        focal_detach=focal_detach, label_smoothing=label_smoothing, angular=angular, difficulty_margin=difficulty_margin, easy_margin=easy_margin,
        ignore_index=ignore_index, reduction=reduction, seed=seed, row_offset=row_offset, class_offset=class_offset,
    )  # fmt: skip
    chosen, for_backward = resolve_backend(backend, cosine), _gradient_is_wanted(cosine, terms.bias)
    if calls_directly(chosen, cosine, *terms):
        loss, gradient, _ = loss_and_gradient(cosine, terms, for_backward)
        return loss if gradient is None else LogitLossInOnePass.apply(cosine, terms.bias, terms.scale, (loss, gradient))
    return LogitLoss.apply(cosine, terms.bias, terms, for_backward, chosen)


def linear_gcl_cross_entropy(
    features: Tensor,  # (N, D)
    linear_weight: Tensor,  # (C, D)
    target: Tensor,  # (N,)
    cloud: Tensor | None = None,  # (C,)
    *,
    normalize: bool = True,
    plan: Plan = "auto",
    scale: float = 30.0,
    margin: Tensor | float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    gamma: float = 0.0,
    focal_detach: bool = True,
    label_smoothing: Tensor | float = 0.0,
    angular: bool = False,
    difficulty_margin: bool = False,
    easy_margin: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    class_offset: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    r""":func:`gcl_cross_entropy` computed from features and classifier weights, without the (N, C) intermediates of a chain of torch operators.

        cosine_ij = <f_i, w_j> / (\|f_i\| \|w_j\|)      (a row of norm <= 1e-12 has cosine 0 everywhere and gradient 0)

    The products are normalised instead of the weights, in backward too, so no normalised copy of the weights exists.
    The arguments have the order of ``torch.nn.functional.linear_cross_entropy``.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64. Under autocast they are cast to its dtype; the weights are not.
        linear_weight: (C, D), one row for each class, in the dtype of the features or, beside 16-bit features, float32.
        target: class of each sample (N,), int64, or soft labels (N, C), as in :func:`gcl_cross_entropy`.
        cloud: size of each class's cloud (C,), or None.
        normalize: False takes the plain products <f_i, w_j> as logits (use scale 1).
        plan: "materialised" keeps one (N, C) buffer (three products); "chunked" holds one chunk of classes at a time (four products); "recompute"
            stores no logits: the kernels keep them in registers, the other backends in a buffer of a few MB that does not grow with C (four products);
            "auto" takes the first while its buffer is at most 2 GiB, on a CPU 128 MiB. Beyond, the kernels take "chunked", which is predicted to be faster
            there, and the other backends "recompute". All give equal results to rounding.
        scale, margin, bias, weight, target_b, lam, gamma, focal_detach, label_smoothing, angular, difficulty_margin, easy_margin, ignore_index,
            reduction, seed, row_offset, class_offset, backend: as in :func:`gcl_cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64 input): () for "mean" and "sum", (N,) for "none".

    Raises:
        ValueError, TypeError: as :func:`gcl_cross_entropy`.

    Gradients exist for `features`, `linear_weight` and `bias`; backward may be repeated, a second derivative is not supported.

    Example:
        >>> import torch, gclkern
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> classifier = gclkern.CosineLinear(16, 100)
        >>> target = torch.arange(8)
        >>> loss = gclkern.functional.linear_gcl_cross_entropy(features, classifier.weight, target)
        >>> loss.backward()
        >>> features.grad.shape, classifier.weight.grad.shape
        (torch.Size([8, 16]), torch.Size([100, 16]))
        >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> gclkern.functional.linear_gcl_cross_entropy(torch.tensor([[2.0, 0.0]]), rows, torch.tensor([0]), scale=1.0)  # cosines 1 and 0
        tensor(0.3133)
    """
    loss: Tensor = _head_loss(
        features, linear_weight, target, cloud, False, normalize=normalize, plan=plan, scale=scale, margin=margin, bias=bias, weight=weight, target_b=target_b,
        lam=lam, gamma=gamma, focal_detach=focal_detach, label_smoothing=label_smoothing, angular=angular, difficulty_margin=difficulty_margin,
        easy_margin=easy_margin, ignore_index=ignore_index, reduction=reduction, seed=seed, row_offset=row_offset, class_offset=class_offset, backend=backend,
    )  # fmt: skip
    return loss


_HEAD_DEFAULTS: dict[str, Any] = linear_gcl_cross_entropy.__kwdefaults__ or {}


def linear_gcl_cross_entropy_with_top1(
    features: Tensor,  # (N, D)
    linear_weight: Tensor,  # (C, D)
    target: Tensor,  # (N,)
    cloud: Tensor | None = None,  # (C,)
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Tensor, Tensor]:
    """:func:`linear_gcl_cross_entropy`, and whether each sample is classified correctly, from the same matrix product.

    A prediction is the class of the largest cosine (with ``normalize=False`` of the largest product), before noise, margin and bias are added. So,
    without ignored samples, ``top1.mean()`` is the accuracy on the batch, which would otherwise cost a second product. Nothing waits for the GPU.

    Args:
        features, linear_weight, target, cloud, options: as in :func:`linear_gcl_cross_entropy`.

    Returns:
        The loss, as :func:`linear_gcl_cross_entropy` returns it, and top1 (N,) in its dtype, without a gradient: 1 where the target has the largest cosine,
        else 0. With two targets it is the share, `lam` or 1 - `lam`, of the one with the largest cosine. A tie with another class is 0, and so is an
        ignored sample; a label out of range on a GPU makes it NaN. With 16-bit features, cosines that differ by less than their rounding may be ranked either
        way.

    Raises:
        ValueError, TypeError: as :func:`linear_gcl_cross_entropy`.

    Example:
        >>> import torch, gclkern
        >>> features, target = torch.randn(8, 16), torch.arange(8)
        >>> classifier = gclkern.CosineLinear(16, 100)
        >>> loss, top1 = gclkern.functional.linear_gcl_cross_entropy_with_top1(features, classifier.weight, target, margin=0.1)
        >>> top1.equal((classifier(features).argmax(1) == target).float())
        True
    """
    unknown = options.keys() - _HEAD_DEFAULTS.keys()
    if unknown:
        raise TypeError(f"linear_gcl_cross_entropy_with_top1() got an unexpected keyword argument {min(unknown)!r}")
    loss, top1 = _head_loss(features, linear_weight, target, cloud, True, **{**_HEAD_DEFAULTS, **options})
    return loss, top1


def _head_loss(
    features: Tensor, linear_weight: Tensor, target: Tensor, cloud: Tensor | None, with_top1: bool, *, normalize: bool, plan: str, backend: str,
    **options: Any,
) -> Any:  # fmt: skip
    """The loss, or with `with_top1` the pair of loss and top-1."""
    features = check_head(features, linear_weight, normalize=normalize)
    terms = loss_terms("features", features, linear_weight.shape[0], target, cloud, **options)
    chosen = resolve_backend(backend, features)
    resolved = resolve_plan(plan, features, linear_weight.shape[0], normalize=normalize, backend=chosen)
    for_backward = _gradient_is_wanted(features, linear_weight, terms.bias)
    return HeadLoss.apply(features, linear_weight, terms.bias, terms, normalize, resolved, for_backward, chosen, with_top1)


def dro_lt_loss(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    centroids: Tensor,  # (C, D)
    epsilon: Tensor | float,  # (), (C,)
    *,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,  # (C,)
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""The DRO-LT bound (Samuel and Chechik, "Distributional robustness loss for long-tail learning", ICCV 2021).

    The centroid mu_c of a class should be nearer to the samples of its class than to all others, by a margin of 2 epsilon_c. The softmax runs over
    the SAMPLES of the batch B, with y_j the class of sample j:

        l_cj   = -(\|mu_c - z_j\|_2 + 2 epsilon_c [y_j == c]) / temperature
        loss_c = mean over i in B with y_i = c of (logsumexp_{j in B} l_cj - l_ci)
        loss   = sum_{c in B} w_c loss_c / sum_{c in B} w_c

    Distances are computed from differences in float32, not from dot products: they are exactly 0 at the centroid, where the gradient is 0 too, and accurate for
    features far from the origin. Runs are bitwise repeatable on one device, and nothing waits for the GPU.

    Args:
        features: z (N, D), float32, bfloat16, float16 or float64, of any strides.
        target: class of each sample (N,), int64, in [0, C).
        centroids: mu (C, D), see :func:`gclkern.functional.class_centroids` and :class:`gclkern.ClassCentroids`. They are statistics: no gradient
            is defined for them.
        epsilon: radius of the ball around the centroid, >= 0: a number, or a tensor () or (C,), which may require a gradient. That gradient is never
            negative: it is 2 / temperature times a sum of probabilities, so gradient descent can only decrease epsilon.
        temperature: T; 1 in the paper.
        class_weight: w_c (C,), >= 0; None gives all classes the same weight. A class of weight 0 is left out: its samples have no loss term and do not
            count in the mean, and its row of `centroids` may hold anything, but its samples remain in the softmax of the other classes. Give weight 0 to
            classes without samples, which have no centroid: ``class_weight=(counts > 0).float()`` with the counts that
            :func:`gclkern.functional.class_centroids` returns.
        reduction: "mean" is the formula above; "sum" is sum_c w_c loss_c, without the division; "none" returns each sample's part of that sum,
            w_c / n_c * (logsumexp_j l_cj - l_ci) with n_c samples of class c = y_i in the batch.
        backend: as in :func:`gcl_cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64 features): () for "mean" and "sum", (N,) for "none". If all samples are left out: 0 for "sum", NaN for "mean".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value. On a GPU labels are not read (that would synchronise): a label out of
            range makes that sample's term and gradient NaN; it remains in the softmax of all classes. :func:`gclkern.set_debug` enables the check.

    Gradients exist for `features` and `epsilon`; backward may be repeated, a second derivative is not supported. A NaN feature makes every term NaN,
    because every softmax runs over all samples.

    Example:
        >>> import torch
        >>> from gclkern.functional import class_centroids, dro_lt_loss
        >>> features = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 2.0]])
        >>> target = torch.tensor([0, 0, 2])
        >>> centroids, counts = class_centroids(features, target, num_classes=3)
        >>> loss = dro_lt_loss(features.requires_grad_(), target, centroids, 0.1, class_weight=(counts > 0).float())
        >>> round(loss.item(), 4)
        0.3809
    """
    check_matrix("features", features)
    check_matrix("centroids", centroids)
    rows, dim = features.shape
    num_classes = centroids.shape[0]
    if centroids.shape[1] != dim:
        raise ValueError(f"centroids must have the {dim} columns of features, got shape {tuple(centroids.shape)}")
    check_same_device("centroids", centroids, "features", features)
    refuse_gradient("centroids", centroids)
    check_choice("reduction", reduction, REDUCTIONS)
    temperature = check_number("temperature", temperature, 0.0, open_low=True)
    dtype = statistics_dtype(features)
    weight = class_vector("class_weight", class_weight, num_classes, "features", features, dtype)
    if weight is not None:
        check_values("class_weight", weight, 0.0)
    radius = check_epsilon(epsilon, num_classes, features, dtype)
    target = check_target("target", target, rows, num_classes, None, "features", features)
    return DROLTBound.apply(features, radius, target, centroids.detach().to(dtype), weight, temperature, reduction, resolve_backend(backend, features))


def class_centroids(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Mean feature of each class and number of its samples, in one pass over the features; bitwise repeatable on one device.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64, of any strides. Centroids are statistics: no gradient is defined, so pass detached
            features or call it under ``torch.no_grad()``.
        target: class of each sample (N,), int64, in [0, num_classes).
        num_classes: C.

    Returns:
        centroids (C, D), float32 (float64 for float64 features), 0 for classes without samples; counts (C,), int64. A class of count 0 has no centroid:
        :func:`gclkern.functional.dro_lt_loss` leaves it out when its weight is 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value. On a GPU labels are not read (that would synchronise): a sample
            whose label is out of range is left out, so the counts sum to less than N. :func:`gclkern.set_debug` enables the check.

    Example:
        >>> import torch
        >>> from gclkern.functional import class_centroids
        >>> class_centroids(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0]]), torch.tensor([0, 0, 2]), num_classes=3)
        (tensor([[2., 3.],
                [0., 0.],
                [5., 5.]]), tensor([2, 0, 1]))
    """
    if ready.ready_rows(features, target) and type(num_classes) is int and num_classes > 0 and not features.requires_grad:
        means, counts, valid = sums_or_means(features, target, num_classes, means=True)
        if valid:
            return means, counts
    check_matrix("features", features)
    refuse_gradient("features", features)
    check_int("num_classes", num_classes, 1)
    target = check_target("target", target, features.shape[0], num_classes, None, "features", features)
    sums, counts = call_operator("segment_sums", resolve_backend("auto", features), features.detach(), target, num_classes)
    return sums.div_(counts.clamp(min=1)[:, None]), counts


def supervised_contrastive(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    *,
    prototypes: Tensor | None = None,  # (C, D)
    class_counts: Tensor | None = None,  # (C,)
    temperature: float = 0.1,
    include_samples: bool = True,
    include_own_class: bool = True,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Supervised contrastive loss: a softmax of each sample over the other SAMPLES of the batch and, where given, over class prototypes.

    With all rows scaled to unit length, keys k of class c(k), and y_i the class of sample i,

        loss_i = log sum_{k != i} w_ik exp(<x_i, k> / temperature) - mean over keys p != i of class y_i of <x_i, p> / temperature

    and w_ik = 1. The losses of the literature are

        SupCon   features of two or more views, concatenated along the rows                             (Khosla et al., NeurIPS 2020, Eq. 2)
        BCL      `prototypes`, and `class_counts` = keys of each class in the batch, samples and prototype: w_ik = 1 / (class_counts_c(k) - [c(k) = y_i]),
                 the mean over the keys of a class in place of the sum                                  (Zhu et al., CVPR 2022)
        PSC      `prototypes`, include_samples=False, include_own_class=False                           (Wang et al., CVPR 2021)

    Features are normalised here, and so are prototypes; a row of norm <= 1e-12 has cosine 0 with everything and gradient 0. Of the matrix over pairs of samples
    no more than a tile is in memory. A sample without a positive key (the only one of its class, and no prototypes) has no term and does not count in the mean.
    Runs are bitwise repeatable on one device, and nothing waits for the GPU.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64, of any strides.
        target: class of each sample (N,), int64; in [0, C) with prototypes or class_counts, any number without.
        prototypes: one key for each class (C, D), in the dtype of the features or float32. May require a gradient.
        class_counts: keys of each class in the batch (C,), at least 1; None weighs every key 1.
        temperature: T, at least 1/300: below, float64 cannot hold the exponentials. 0.1 is SupCon's, and BCL's on CIFAR.
        include_samples: False takes the prototypes as the only keys.
        include_own_class: False leaves the keys of the own class out of the denominator; the loss may then be negative.
        reduction: "mean" over the samples with a positive, "sum", or "none" for each sample (N,).
        backend: as in :func:`gcl_cross_entropy`. On a CPU "auto" takes torch, which computes in float64, at temperatures below 1/40, and "cpu" refuses them.

    Returns:
        The loss, float32 (float64 for float64 features): () for "mean" and "sum", (N,) for "none". No sample with a positive: 0 for "sum", NaN for "mean".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and its value. On a GPU labels are not read (that would synchronise): a label out of
            range makes that sample's term and gradient NaN. :func:`gclkern.set_debug` enables the check.

    Gradients exist for `features` and `prototypes`; backward may be repeated, a second derivative is not supported.

    Example:
        >>> import torch
        >>> from gclkern.functional import supervised_contrastive
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]], requires_grad=True)
        >>> loss = supervised_contrastive(features, torch.tensor([0, 1, 0, 1]), temperature=1.0)
        >>> round(loss.item(), 4)  # log(e + 2) - 1
        0.5514
        >>> loss.backward()
    """
    check_matrix("features", features)
    dtype = statistics_dtype(features)
    num_classes = None
    if prototypes is not None:
        num_classes = check_prototypes(prototypes, features).shape[0]
    if not isinstance(include_samples, bool):
        raise TypeError(f"include_samples must be True or False, got {include_samples!r}")
    if not isinstance(include_own_class, bool):
        raise TypeError(f"include_own_class must be True or False, got {include_own_class!r}")
    if not include_samples and prototypes is None:
        raise ValueError("include_samples is False and prototypes is None, so there are no keys; give prototypes")
    if class_counts is not None:
        if not isinstance(class_counts, Tensor):
            raise TypeError(f"class_counts must be a tensor or None, got {type(class_counts).__name__}")
        num_classes = class_counts.numel() if num_classes is None else num_classes
        if class_counts.is_complex():
            raise TypeError(f"class_counts must be a tensor of real numbers, got {class_counts.dtype}")
        class_counts = class_vector("class_counts", class_counts.to(dtype), num_classes, "features", features, dtype)
        if class_counts is not None:
            check_values("class_counts", class_counts, 1.0, remark=": it counts the keys of a class in the batch")
    if num_classes is None:
        target = check_labels("target", target, features.shape[0], "features", features).contiguous()
    else:
        target = check_target("target", target, features.shape[0], num_classes, None, "features", features)
    check_choice("reduction", reduction, REDUCTIONS)
    temperature = check_temperature(temperature)
    chosen = resolve_contrast_backend(backend, features, temperature)
    return SupervisedContrast.apply(features, prototypes, target, class_counts, temperature, include_samples, include_own_class, reduction, chosen)


def _gradient_is_wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
