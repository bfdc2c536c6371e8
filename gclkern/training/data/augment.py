"""Augmentation of whole batches of uint8 images on their device. Every random choice comes in as numbers, so it is reproducible wherever those are.

none          nothing
standard      a random crop of the padded image and a horizontal flip
autoaugment   the same, then AutoAugment's policy for CIFAR, then cutout: what DRO-LT trains with
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Random numbers that one sample takes.
AUGMENTATIONS = {"none": 0, "standard": 3, "autoaugment": 10}
_CUTOUT = 16
# AutoAugment's authors fill what a shear, a shift or a rotation leaves open with grey.
_FILL = 128

Operation = IntEnum(
    "Operation", "ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize Solarize AutoContrast Equalize Invert", start=0
)
# All of the first two groups become stronger in either direction.
_MOVES = (Operation.ShearX, Operation.ShearY, Operation.TranslateX, Operation.TranslateY, Operation.Rotate)
_BLENDS = (Operation.Brightness, Operation.Color, Operation.Contrast, Operation.Sharpness)
_MAPS = (Operation.Posterize, Operation.Solarize, Operation.Invert)
# Cubuk et al., "AutoAugment: learning augmentation policies from data", CVPR 2019, Table 7: operation, probability, magnitude, twice for each sub-policy.
_POLICY = """
    Invert       .1 7  Contrast     .2 6
    Rotate       .7 2  TranslateX   .3 9
    Sharpness    .8 1  Sharpness    .9 3
    ShearY       .5 8  TranslateY   .7 9
    AutoContrast .5 8  Equalize     .9 2
    ShearY       .2 7  Posterize    .3 7
    Color        .4 3  Brightness   .6 7
    Sharpness    .3 9  Brightness   .7 9
    Equalize     .6 5  Equalize     .5 1
    Contrast     .6 7  Sharpness    .6 5
    Color        .7 7  TranslateX   .5 8
    Equalize     .3 7  AutoContrast .4 8
    TranslateY   .4 3  Sharpness    .2 6
    Brightness   .9 6  Color        .2 8
    Solarize     .5 2  Invert       .0 3
    Equalize     .2 0  AutoContrast .6 0
    Equalize     .2 8  Equalize     .6 4
    Color        .9 9  Equalize     .6 6
    AutoContrast .8 4  Solarize     .2 8
    Brightness   .1 3  Color        .7 0
    Solarize     .4 5  AutoContrast .9 3
    TranslateY   .9 9  TranslateY   .7 9
    AutoContrast .9 2  Solarize     .8 3
    Equalize     .8 8  Invert       .1 3
    TranslateY   .7 9  AutoContrast .9 1
"""


def augment_batch(images: Tensor, numbers: Tensor, augmentation: str, padding: int, flip: bool) -> Tensor:
    """Augmented copies of uint8 images (B, C, H, W), from numbers (B, AUGMENTATIONS[augmentation]) in [0, 1)."""
    images = crop_and_flip(images, numbers[:, :3], padding, flip)
    if augmentation == "autoaugment":
        images = cutout(autoaugment(images, numbers[:, 3:8]), numbers[:, 8:10])
    return images


def crop_and_flip(images: Tensor, numbers: Tensor, padding: int, flip: bool) -> Tensor:
    """A random crop of the image padded with zeros, then a horizontal flip of half of them, from numbers (B, 3)."""
    height, width = images.shape[-2:]
    top, left = (numbers[:, :2] * (2 * padding + 1)).to(torch.int64).sub_(padding).unbind(1)
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device).expand(images.shape[0], -1)
    if flip:
        columns = torch.where(numbers[:, 2, None] < 0.5, width - 1 - columns, columns)
    return _take(images, rows[:, :, None], (columns + left[:, None])[:, None, :], 0)


def cutout(images: Tensor, numbers: Tensor, size: int = _CUTOUT) -> Tensor:
    """A black square around a random pixel, cut off at the borders (DeVries and Taylor, "Improved regularization of CNNs with cutout"), from numbers (B, 2)."""
    inside = []
    for extent, number in zip(images.shape[-2:], numbers.unbind(1), strict=True):
        start = (number * extent).to(torch.int64)[:, None] - size // 2
        places = torch.arange(extent, device=images.device)
        inside.append((places >= start) & (places < start + size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def autoaugment(images: Tensor, numbers: Tensor) -> Tensor:
    """AutoAugment's policy for CIFAR on colour images, from numbers (B, 5): the sub-policy, whether its two operations take place, their directions."""
    if images.shape[1] != 3:
        raise ValueError(f"autoaugment needs colour images, got {images.shape[1]} channels; take the standard augmentation")
    kinds, shares, magnitudes = _policy_tables(images.device)
    policy = (numbers[:, 0] * kinds.shape[0]).to(torch.int64)
    for step in range(2):
        takes_place = numbers[:, 1 + step] < shares[policy, step]
        sign = torch.where(numbers[:, 3 + step] < 0.5, -1.0, 1.0)
        images = apply_operations(images, torch.where(takes_place, kinds[policy, step], -1), magnitudes[policy, step], sign)
    return images


@cache
def _policy_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Operation, probability and magnitude of both steps of the sub-policies, (25, 2) each."""
    cells = [line.split() for line in _POLICY.strip().splitlines()]
    kinds = torch.tensor([[Operation[row[0]], Operation[row[3]]] for row in cells], device=device)
    shares = torch.tensor([[float(row[1]), float(row[4])] for row in cells], device=device)
    return kinds, shares, torch.tensor([[float(row[2]), float(row[5])] for row in cells], device=device)


def apply_operations(images: Tensor, kind: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """One operation on each image (B, 3, H, W) uint8: `kind` (B,) is an Operation, -1 for none; `magnitude` (B,) in [0, 9]; `sign` (B,) 1 or -1."""
    strength = magnitude / 9 * torch.where(kind <= Operation.Sharpness, sign, 1.0)
    out = images.clone()
    functions = {_move: _MOVES, _blend: _BLENDS, _map_values: _MAPS, _auto_contrast: (Operation.AutoContrast,), _equalize: (Operation.Equalize,)}
    for operation, kinds in functions.items():
        chosen = torch.stack([kind == one for one in kinds]).any(0)  # numbers go with the kernel; a tensor of them would be copied, which waits for the device
        if images.device.type == "cpu":
            places = chosen.nonzero().flatten()
            out[places] = operation(images[places], kind[places], strength[places])
        else:
            # To sort the images out would wait for the device; to compute every operation on all of them costs less.
            out = torch.where(chosen[:, None, None, None], operation(images, kind, strength), out)
    return out


def _move(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Shears from the top left corner, shifts in whole pixels, and rotations around the centre, by the nearest pixel."""
    height, width = images.shape[-2:]
    zero = torch.zeros_like(strength)

    def amount(wanted: int, most: float) -> Tensor:
        return torch.where(kind == wanted, strength * most, zero)

    angle = amount(Operation.Rotate, math.radians(30))
    # A pixel at (y, x) of the result comes from (y', x'), y' = a y + b x + e and x' = c y + d x + f.
    diagonal, b, c = angle.cos(), angle.sin() + amount(Operation.ShearY, 0.3), -angle.sin() + amount(Operation.ShearX, 0.3)
    shift_y, shift_x = amount(Operation.TranslateY, 150 / 331 * height).trunc(), amount(Operation.TranslateX, 150 / 331 * width).trunc()
    centred = (kind == Operation.Rotate).to(strength.dtype)[:, None, None]
    # positions of the pixels' middles, from the corner or from the centre
    middle_y, middle_x = centred * height / 2, centred * width / 2
    y = torch.arange(height, device=images.device).view(1, -1, 1) + 0.5 - middle_y
    x = torch.arange(width, device=images.device).view(1, 1, -1) + 0.5 - middle_x
    diagonal, b, c, shift_y, shift_x = (value[:, None, None] for value in (diagonal, b, c, shift_y, shift_x))
    rows = (diagonal * y + b * x - shift_y + middle_y).floor().to(torch.int64)
    columns = (c * y + diagonal * x - shift_x + middle_x).floor().to(torch.int64)
    return _take(images, rows, columns, _FILL)


def _take(images: Tensor, rows: Tensor, columns: Tensor, fill: int) -> Tensor:
    """Pixels (B, C, H, W) from `rows` and `columns`, broadcast to (B, H, W), and `fill` for those outside of the image."""
    height, width = images.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    places = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    taken = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return taken.masked_fill(~inside[:, None], fill)


def _blend(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """The image moved away from, or towards, a plainer one: black, itself in grey, its mean grey, or itself smoothed."""
    values = images.to(torch.float32)
    grey = (values * _grey_shares(images.device)).sum(1, keepdim=True).floor()
    ratio, kind = 1 + 0.9 * strength[:, None, None, None], kind[:, None, None, None]
    plain = torch.where(kind == Operation.Color, grey, torch.where(kind == Operation.Contrast, grey.mean((1, 2, 3), keepdim=True), 0.0))
    plain = torch.where(kind == Operation.Sharpness, _smooth(values), plain)
    return (ratio * values + (1 - ratio) * plain).clamp_(0, 255).to(torch.uint8)


@cache
def _grey_shares(device: torch.device) -> Tensor:
    """What red, green and blue give to grey, (3, 1, 1)."""
    return torch.tensor([0.2989, 0.587, 0.114], device=device).view(3, 1, 1)


def _smooth(values: Tensor) -> Tensor:
    """Every pixel averaged with its eight neighbours, itself counted five times; the border stays."""
    sums = F.avg_pool2d(values, 3, stride=1) * 9
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = ((sums + 4 * values[:, :, 1:-1, 1:-1]) / 13).round()
    return smooth


def _map_values(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Fewer bits, from 8 down to 4, or what is at least a threshold, from 255 down to 0, inverted."""
    mask = -(1 << (strength * 4).round().to(torch.int32))[:, None, None, None]
    threshold = torch.where(kind == Operation.Invert, 0.0, 255 * (1 - strength))[:, None, None, None]
    solarized = torch.where(images >= threshold, 255 - images, images)
    return torch.where((kind == Operation.Posterize)[:, None, None, None], (images.to(torch.int32) & mask).to(torch.uint8), solarized)


def _auto_contrast(images: Tensor, _kind: Tensor, _strength: Tensor) -> Tensor:
    """Each channel stretched to the whole range; a channel of one value stays."""
    values = images.to(torch.float32)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((values - low.masked_fill(flat, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _kind: Tensor, _strength: Tensor) -> Tensor:
    """Each channel's histogram made even, in whole numbers, as the Python imaging library does."""
    pixels = images.flatten(2).to(torch.int64)
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram  # pixels darker than each value
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(0, 255)
    # a step of 0: too few values to spread
    return torch.where(step == 0, pixels, table.gather(2, pixels)).to(torch.uint8).view_as(images)
