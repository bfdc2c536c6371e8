"""Conversion of soft labels (N, C), as MixUp and CutMix produce them, to two hard labels and the weight of the first."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.devices import values_may_be_read


def mixed_targets(soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two classes of each row of soft labels, and the share of the first one: the `target`, `target_b` and `lam` of the losses.

    The losses accept soft labels as their `target` and call this. MixUp and CutMix of timm and torchvision produce one or two classes per row.

    Args:
        soft: shares (N, C), floating point, at least 0 and of sum 1 in every row (to 1e-5, for 16-bit tensors to two units of their precision), with at most
            two classes of a share above 0. Label smoothing gives every class a share: turn it off in the transform (timm's default is 0.1) and give
            `label_smoothing` to the loss.

    Returns:
        target, target_b (N,) int64, the class of the larger share first and the same class twice where there is one; lam (N,), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: `soft` is not such a matrix. On a GPU its values are not read (that would synchronise): `lam` is NaN in a wrong row, and so is
            the loss. :func:`gclkern.set_debug` enables the check.

    Example:
        >>> import torch, gclkern
        >>> gclkern.mixed_targets(torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]))
        (tensor([2, 0]), tensor([1, 0]), tensor([0.7500, 1.0000]))
    """
    if not isinstance(soft, Tensor):
        raise TypeError(f"soft labels must be a tensor, got {type(soft).__name__}")
    if not soft.is_floating_point():
        raise TypeError(f"soft labels must be floating point, got {soft.dtype}; labels of one class each need no conversion")
    if soft.dim() != 2 or soft.numel() == 0:
        raise ValueError(f"soft labels must have shape (samples, classes), got {tuple(soft.shape)}")
    if soft.requires_grad and torch.is_grad_enabled():
        raise ValueError("soft labels require a gradient, but none is defined for them; pass target.detach()")
    tolerance = max(1e-5, 2 * torch.finfo(soft.dtype).eps)
    shares = soft if soft.dtype == torch.float64 else soft.float()
    largest, classes = shares.topk(min(2, shares.shape[1]), dim=1)
    first, second = largest[:, 0], largest[:, -1]
    if shares.shape[1] == 1:
        second = torch.zeros_like(first)
    total = shares.sum(1)
    negative = (shares < 0).any(1)
    more = (total - first - second).abs() > tolerance
    wrong = negative | more | ~((total - 1).abs() <= tolerance)
    if values_may_be_read(soft) and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        if bool(more[row]) and not bool(negative[row]):
            count = int((shares[row] > 0).sum())
            raise ValueError(
                f"target[{row}] has {count} classes with a share, but soft labels may have two, as MixUp and CutMix make; "
                "give label_smoothing to the loss, and 0 to the transform (timm's default is 0.1)"
            )
        found = "a negative share" if bool(negative[row]) else f"the sum {float(total[row]):g}"
        raise ValueError(f"target[{row}] has {found}, but the shares of soft labels must be at least 0 and add up to 1")
    lam = (first / (first + second)).masked_fill(wrong, torch.nan)
    return classes[:, 0].contiguous(), torch.where(second > 0, classes[:, -1], classes[:, 0]), lam
