"""The noise of Gaussian clouded logits as a matrix, for inspection; the losses generate the same numbers without storing the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.dispatch import call_operator, resolve_backend
from gclkern.validation import MAX_CLASSES, check_offset, check_size, resolve_seed


def cloud_noise(
    seed: Tensor | int | None,
    num_rows: int,
    num_classes: int,
    *,
    row_offset: int = 0,
    class_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise e_ij = min(|N(0, 1/3)|, 1) of Gaussian clouded logits, as the losses draw it; 1/3 is the standard deviation.

    The formula is Eq. 11 of Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022.
    Element (i, j) depends only on the seed, row_offset + i and class_offset + j, so a part of a larger matrix equals the same part drawn alone. On one
    backend and version the values are bitwise equal however the matrix is split; between backends and GPU models they agree to 1e-4.

    Args:
        seed: None draws a seed from torch's generator of the device, so `torch.manual_seed` controls it; an int of up to 64 bits; or a 0-dim int64 tensor, on
            whose device the noise is then drawn.
        num_rows: samples, at least 1.
        num_classes: classes, at least 1.
        row_offset: global index of the first sample. Data-parallel ranks share the seed of a step and pass rank * batch.
        class_offset: global index of the first class, for a shard of the classes; class_offset + num_classes is at most 2**35.
        device: where to draw; default the seed's device for a tensor, else torch's default device.

    Returns:
        (num_rows, num_classes) float32 in [0, 1].

    Raises:
        TypeError: a seed that is not None, an int or an int64 tensor; a size or offset that is not an int.
        ValueError: a seed of more than 64 bits, with dimensions or on another device than `device`; a size or offset out of range.

    Example:
        >>> noise = cloud_noise(7, 4, 10)
        >>> noise.shape
        torch.Size([4, 10])
        >>> torch.equal(noise[1:, 3:], cloud_noise(7, 3, 7, row_offset=1, class_offset=3))
        True
    """
    num_rows = check_size("num_rows", num_rows)
    num_classes = check_size("num_classes", num_classes)
    row_offset = check_offset("row_offset", row_offset, num_rows, 2**63)
    class_offset = check_offset("class_offset", class_offset, num_classes, MAX_CLASSES)
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    # An empty tensor resolves the default device, and which of several GPUs "cuda" means.
    seed = resolve_seed(seed, torch.empty(0, device=device).device)
    return call_operator("cloud_noise", resolve_backend("auto", seed), seed, num_rows, num_classes, row_offset, class_offset)
