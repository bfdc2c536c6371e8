"""Augmentation of whole batches on their device. Every random choice comes in as numbers, so it is reproducible wherever those are."""

from __future__ import annotations

import torch
from torch import Tensor

# Random numbers that one sample takes.
AUGMENTATIONS = {"none": 0, "standard": 3}


def augment(images: Tensor, numbers: Tensor, augmentation: str, padding: int, flip: bool) -> Tensor:
    """Augmented copies of uint8 images (B, C, H, W), from numbers (B, AUGMENTATIONS[augmentation]) in [0, 1)."""
    return crop_and_flip(images, numbers[:, :3], padding, flip)


def crop_and_flip(images: Tensor, numbers: Tensor, padding: int, flip: bool) -> Tensor:
    """A random crop of the image padded with zeros, then a horizontal flip of half of them: torchvision's RandomCrop and RandomHorizontalFlip."""
    height, width = images.shape[-2:]
    top, left = (numbers[:, :2] * (2 * padding + 1)).to(torch.int64).sub_(padding).unbind(1)
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device).expand(images.shape[0], -1)
    if flip:
        columns = torch.where(numbers[:, 2, None] < 0.5, width - 1 - columns, columns)
    columns = columns + left[:, None]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    places = rows.clamp(0, height - 1)[:, None, :, None] * width + columns.clamp(0, width - 1)[:, None, None, :]
    taken = images.flatten(2).gather(2, places.flatten(2).expand(-1, images.shape[1], -1)).view_as(images)
    return taken.mul_(inside)
