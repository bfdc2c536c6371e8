"""The losses as functions: argument checks, the choice of a backend and of a plan, then one autograd Function.

gcl_cross_entropy          from cosines or logits (N, C)
linear_gcl_cross_entropy   from features (N, D) and classifier weights (C, D): normalisation, product, noise and softmax in one
dro_lt_loss                the DRO-LT bound of features around their class centroids
class_centroids            the class means that the bound pulls to
"""

from __future__ import annotations

import torch
from torch import Tensor

import gclkern.torch_backend  # noqa: F401 (registers its operators)
from gclkern.autograd import HeadLoss, LogitLoss
from gclkern.backend import resolve_backend
from gclkern.centroids import class_centroids
from gclkern.dro import dro_lt_loss
from gclkern.plans import resolve_plan
from gclkern.validation import check_head, check_matrix, loss_terms

__all__ = ["class_centroids", "dro_lt_loss", "gcl_cross_entropy", "linear_gcl_cross_entropy"]


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
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    class_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""Cross entropy of clouded cosine logits (GCL, CVPR 2022, Eq. 11), with the margins, biases and weights of its relatives.

    With e_ij = min(\|N(0, 1/3)\|, 1), one draw for each sample and class, the logit of class j for a sample of class t is

        z_ij(t) = scale * (cosine_ij - cloud_j * e_ij - margin_j * [j == t]) + bias_j

    and the loss of sample i is torch's cross entropy of z_i(t), with class weights and label smoothing, times
    (1 - exp(-loss))^gamma. With a second target (mixup) it is lam * loss(target) + (1 - lam) * loss(target_b), from one pass and ONE draw of the
    noise; GCL's released code runs its criterion twice, with two draws.

    Statistics and the loss are computed in float32 (float64 for float64 input), and the target's gradient without cancellation: it stays
    accurate where the target's probability is close to 1. Runs of equal seed are bitwise equal on one device.

    Args:
        cosine: cosines or logits (N, C), float32, bfloat16, float16 or float64, of any strides.
        target: class of each sample (N,), int64, in [0, C) or `ignore_index`.
        cloud: size of each class's cloud (C,); None adds no noise. :func:`gclkern.cloud_sizes` computes it from class counts.
        scale: factor s on the cosines; 30 is GCL's first stage. Use 1 for plain logits.
        margin: subtracted from the target's cosine: a number for CosFace, a vector (C,) for LDAM.
        bias: added to the logits (C,), for example tau * log prior (logit adjustment). May require a gradient.
        weight: class weights (C,), as in torch's cross entropy.
        target_b: second target (N,) of a mixed sample; needs `lam`.
        lam: share of `target` in [0, 1]: a number, or a tensor () or (N,).
        gamma: focal exponent; 0 turns the focal factor off.
        focal_detach: whether the focal factor counts as a constant in backward, as in GCL's release; False is the standard focal loss.
        label_smoothing: share of the target's weight that is spread over all classes, in [0, 1].
        ignore_index: a sample with this label, in either target, has no loss and no gradient.
        reduction: "mean" divides by the kept samples' sum of lam * weight[target] + (1 - lam) * weight[target_b] (torch's rule, mixed), with
            gamma > 0 by their number; "sum"; or "none" for the loss of each sample (N,).
        seed: key of the noise: an int, a () int64 tensor on the device of `cosine`, or None to draw one from torch's generator there.
        row_offset: index of the first sample in the global batch; with one seed for all ranks, rank * batch makes data parallel noise equal to one
            process's.
        class_offset: index of the first class in the global class range, for a shard of the classes.
        backend: "auto" (kernels on a GPU, of NVIDIA's from compute capability 8.0 on; torch elsewhere and for float64), "triton" or "torch".

    Returns:
        The loss, float32 (float64 for float64 input): () for "mean" and "sum", (N,) for "none". All samples ignored: 0 for "sum", NaN for "mean".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and the remedy. On a GPU labels are not read (that would
            synchronise): a label out of range makes that row's loss NaN. :func:`gclkern.set_debug` has them read.

    Gradients exist for `cosine` and `bias`; backward may be repeated, a second derivative is not supported.

    Example:
        >>> import torch, gclkern
        >>> cosine = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, -0.1]], requires_grad=True)
        >>> cloud = 0.5 * gclkern.cloud_sizes([500, 50, 5])
        >>> loss = gclkern.functional.gcl_cross_entropy(cosine, torch.tensor([0, 1]), cloud, seed=0)
        >>> loss.backward()
        >>> cosine.grad.shape
        torch.Size([2, 3])
    """
    check_matrix("cosine", cosine)
    terms = loss_terms(
        "cosine", cosine, cosine.shape[1], target, cloud, scale=scale, margin=margin, bias=bias, weight=weight, target_b=target_b, lam=lam, gamma=gamma,
        focal_detach=focal_detach, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, seed=seed, row_offset=row_offset,
        class_offset=class_offset,
    )  # fmt: skip
    chosen = resolve_backend(backend, cosine)
    if chosen == "triton":
        import gclkern.kernels.logit_loss  # noqa: F401 (registers the operators)
    return LogitLoss.apply(cosine, _gradient_is_wanted(cosine, terms.bias), chosen, *terms)


def linear_gcl_cross_entropy(
    features: Tensor,  # (N, D)
    linear_weight: Tensor,  # (C, D)
    target: Tensor,  # (N,)
    cloud: Tensor | None = None,  # (C,)
    *,
    normalize: bool = True,
    plan: str = "auto",
    scale: float = 30.0,
    margin: Tensor | float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    gamma: float = 0.0,
    focal_detach: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    class_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r""":func:`gcl_cross_entropy` of a classifier's cosines, without ever holding what a chain of torch operators would hold.

        cosine_ij = <f_i, w_j> / (\|f_i\| \|w_j\|)      (a row of norm <= 1e-12 has cosine 0 everywhere and gradient 0)

    The normalisation happens after the product, and its backward in the epilogues of the gradient products, so no normalised copy of the weights exists.
    Follows ``torch.nn.functional.linear_cross_entropy`` in its argument order.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64. Under autocast they are cast to its dtype, the weights are not.
        linear_weight: (C, D), one row for each class, in the dtype of the features or, beside 16-bit features, float32.
        target: class of each sample (N,), int64.
        cloud: size of each class's cloud (C,), or None.
        normalize: False takes the plain products <f_i, w_j> as logits (use scale 1).
        plan: "materialised" keeps one (N, C) buffer (three products); "chunked" holds one chunk of classes at a time (four products); "recompute"
            keeps the logits in registers and allocates nothing of size N * C (four products); "auto" chooses by :mod:`gclkern.plans`. All give equal results to
            rounding.
        scale, margin, bias, weight, target_b, lam, gamma, focal_detach, label_smoothing, ignore_index, reduction, seed, row_offset, class_offset,
            backend: as in :func:`gcl_cross_entropy`.

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
    """
    features = check_head(features, linear_weight, normalize=normalize)
    terms = loss_terms(
        "features", features, linear_weight.shape[0], target, cloud, scale=scale, margin=margin, bias=bias, weight=weight, target_b=target_b, lam=lam,
        gamma=gamma, focal_detach=focal_detach, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, seed=seed,
        row_offset=row_offset, class_offset=class_offset,
    )  # fmt: skip
    chosen = resolve_backend(backend, features)
    if chosen == "triton":
        import gclkern.kernels.head  # noqa: F401 (registers the operators)
    resolved = resolve_plan(plan, features, linear_weight.shape[0], normalize=normalize, backend=chosen)
    for_backward = _gradient_is_wanted(features, linear_weight, terms.bias)
    return HeadLoss.apply(features, linear_weight, normalize, resolved, for_backward, chosen, *terms)


def _gradient_is_wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
