"""Augmentation of whole batches of uint8 images on their device. Random numbers are arguments, so results are reproducible if they are.

resized-crop  8% to 100% of the image, 3:4 to 4:3, resized (Inception, ImageNet)
crop          the image shifted by up to an eighth of its side, filled with black (CIFAR)
flip          half of the images mirrored
color         brightness, contrast and saturation, each by up to 40%, in random order
autoaugment   AutoAugment's policy for CIFAR
rand-augment  two random operations of magnitude 10 of 30
grey          a fifth of the images in grey
cutout        a black square of half the side
sim           SimCLR's augmentation: resized crop of 20% to 100%, flip, stronger colours, grey, blur
sim-sharp     the same with a resized crop of 8% to 100% and without blur

Parts are joined by commas in any order; they are applied in the order of this list. DRO-LT and newer methods use `crop,flip,autoaugment,cutout` on CIFAR.
`sim` and `sim-sharp` cannot be combined with others.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = ("resized-crop", "crop", "flip", "color", "autoaugment", "rand-augment", "grey", "cutout")
# Shears, shifts and rotations fill the uncovered area with grey, as AutoAugment's authors do.
_FILL = 128
# Pixels that a CPU augments at a time: with all intermediate tensors they stay in its caches.
_CPU_PIXELS = 1 << 18


class Columns(NamedTuple):
    """Which of a sample's random numbers each part uses; they do not depend on the other parts."""

    crop: slice = slice(0, 2)
    flip: slice = slice(2, 3)
    autoaugment: slice = slice(3, 8)
    cutout: slice = slice(8, 10)
    resized_crop: slice = slice(10, 14)
    color: slice = slice(14, 20)
    rand_augment: slice = slice(20, 24)
    grey: slice = slice(24, 25)
    blur: slice = slice(25, 27)


COLUMNS = Columns()


@dataclass(frozen=True)
class View:
    """The augmentation of a training batch."""

    least_area: float | None = None  # share of the image, of a resized crop
    crop: bool = False
    flip: bool = False
    color: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    color_share: float = 1.0  # of the images whose colours change
    policy: str | None = None  # "autoaugment" or "rand-augment"
    grey_share: float = 0.0
    blur_share: float = 0.0
    cutout: bool = False

    @property
    def numbers(self) -> int:
        """How many random numbers a sample needs."""
        used = {
            "crop": self.crop, "flip": self.flip, "autoaugment": self.policy == "autoaugment", "cutout": self.cutout,
            "resized_crop": self.least_area is not None, "color": self.color is not None, "rand_augment": self.policy == "rand-augment",
            "grey": self.grey_share > 0, "blur": self.blur_share > 0,
        }  # fmt: skip
        return max((getattr(COLUMNS, name).stop for name, use in used.items() if use), default=0)


_GREY_SHARE = 0.2
# Chen et al., "A simple framework for contrastive learning of visual representations" (ICML 2020), weaker: as BCL (CVPR 2022) has it on CIFAR, and the
# released code of BCL, on the large sets, and of ProCo.
_SIM = View(least_area=0.2, flip=True, color=(0.4, 0.4, 0.4, 0.1), color_share=0.8, grey_share=_GREY_SHARE, blur_share=0.5)
COMBINED = {"none": View(), "sim": _SIM, "sim-sharp": replace(_SIM, least_area=0.08, blur_share=0.0)}


def parse_augmentation(text: str) -> View:
    """The augmentation of part names joined by commas, "sim", "sim-sharp", or "none", which leaves images unchanged.

    Raises:
        ValueError: an unknown part, or two that exclude each other.

    Example:
        >>> parse_augmentation("flip,crop")
        View(least_area=None, crop=True, flip=True, color=None, color_share=1.0, policy=None, grey_share=0.0, blur_share=0.0, cutout=False)
    """
    if text in COMBINED:
        return COMBINED[text]
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown augmentation {part!r} in {text!r}; join parts of {', '.join(PARTS)} by commas, or take {', '.join(COMBINED)}")
    for first, second in (("crop", "resized-crop"), ("autoaugment", "rand-augment")):
        if first in parts and second in parts:
            raise ValueError(f"the augmentations {first} and {second} exclude each other, got {text!r}; take one")
    return View(
        least_area=0.08 if "resized-crop" in parts else None,
        crop="crop" in parts,
        flip="flip" in parts,
        color=(0.4, 0.4, 0.4, 0.0) if "color" in parts else None,
        policy=next((part for part in parts if part in ("autoaugment", "rand-augment")), None),
        grey_share=_GREY_SHARE if "grey" in parts else 0.0,
        cutout="cutout" in parts,
    )


Operation = IntEnum(
    "Operation", "ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize Solarize AutoContrast Equalize Invert", start=0
)
# The operations of the first two groups have a random sign.
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


def augment_batch(images: Tensor, numbers: Tensor, view: View) -> Tensor:
    """Augmented copies of uint8 images (B, C, H, W), from numbers (B, view.numbers) in [0, 1). A resized crop is applied before, see :func:`resized_boxes`."""
    if images.device.type == "cpu":
        step = max(1, _CPU_PIXELS // (images.shape[-1] * images.shape[-2]))
        return torch.cat([_augment(part, draws, view) for part, draws in zip(images.split(step), numbers.split(step), strict=True)])
    return _augment(images, numbers, view)


def _augment(images: Tensor, numbers: Tensor, view: View) -> Tensor:
    if view.crop or view.flip:
        images = crop_and_flip(images, numbers, padding=images.shape[-1] // 8 if view.crop else 0, flip=view.flip)
    if view.color is not None:
        images = color_jitter(images, numbers[:, COLUMNS.color], view.color, view.color_share)
    if view.policy is not None:
        policy = autoaugment if view.policy == "autoaugment" else rand_augment
        channels = images.shape[1]  # grey images are expanded to three channels
        images = policy(images.expand(-1, 3, -1, -1), numbers)[:, :channels]
    if view.grey_share:
        grey = _grey(images.to(torch.float32)).round().to(torch.uint8)
        images = torch.where((numbers[:, COLUMNS.grey] < view.grey_share)[:, :, None, None], grey, images)
    if view.blur_share:
        images = blur(images, numbers[:, COLUMNS.blur], view.blur_share)
    return cutout(images, numbers[:, COLUMNS.cutout]) if view.cutout else images


def crop_and_flip(images: Tensor, numbers: Tensor, padding: int, flip: bool) -> Tensor:
    """A random crop of the image padded with zeros, then a horizontal flip of half of them, from numbers (B, 3)."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).expand(images.shape[0], -1)
    columns = torch.arange(width, device=images.device).expand(images.shape[0], -1)
    if flip:
        columns = torch.where(numbers[:, COLUMNS.flip] < 0.5, width - 1 - columns, columns)
    if padding:
        top, left = (numbers[:, COLUMNS.crop] * (2 * padding + 1)).to(torch.int64).sub_(padding).unbind(1)
        rows, columns = rows + top[:, None], columns + left[:, None]
    return _take(images, rows[:, :, None], columns[:, None, :], 0)


def resized_boxes(numbers: Tensor, view: Tensor, least_area: float) -> Tensor:
    """Boxes (B, 4) of a resized crop (Szegedy et al., "Going deeper with convolutions", CVPR 2015), from numbers (B, 4): top, left, height and width.

    They are fractions of an image that was resized to a square. `view` (B, 2) is the height and width, as fractions, of the largest square in the original
    image, which give its aspect ratio. A box that would be higher or wider than the image is clipped.
    """
    area = least_area + (1 - least_area) * numbers[:, :1]
    ratio = torch.exp((2 * numbers[:, 1:2] - 1) * math.log(4 / 3))  # of width to height
    proportions = view[:, :1] / view[:, 1:]  # of the image
    sides = torch.cat([(area * proportions / ratio).sqrt(), (area * ratio / proportions).sqrt()], 1).clamp_(max=1)
    return torch.cat([numbers[:, 2:4] * (1 - sides), sides], 1)


def resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The boxes (B, 4), as fractions of the sides, cut out of images (B, C, H, W) uint8 and resized bilinearly to (B, C, size, size)."""
    if images.device.type == "cpu":
        step = max(1, _CPU_PIXELS // size**2)
        return torch.cat([_resample(part, box, size) for part, box in zip(images.split(step), boxes.split(step), strict=True)])
    return _resample(images, boxes, size)


def _resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    corner, sides = boxes[:, :2], boxes[:, 2:]
    middle, zero = 2 * corner + sides - 1, torch.zeros_like(sides[:, 0])
    theta = torch.stack([sides[:, 1], zero, middle[:, 1], zero, sides[:, 0], middle[:, 0]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [images.shape[0], images.shape[1], size, size], align_corners=False)
    taken = F.grid_sample(images.to(torch.float32), grid, padding_mode="border", align_corners=False)
    return taken.round_().clamp_(0, 255).to(torch.uint8)


def color_jitter(images: Tensor, numbers: Tensor, amounts: tuple[float, float, float, float], share: float) -> Tensor:
    """Changes brightness, contrast, saturation and hue in random order, from numbers (B, 6): whether to change, the order, and the four changes."""
    applies = numbers[:, :1] < share
    changes = torch.where(applies, 2 * numbers[:, 2:6] - 1, 0.0)
    steps = 4 if amounts[3] and images.shape[1] == 3 else 3
    orders = _orders(steps, images.device)
    order = orders[(numbers[:, 1] * len(orders)).to(torch.int64)]
    values = images.to(torch.float32)
    for step in range(steps):
        kind = order[:, step, None, None, None]
        ratio = torch.ones_like(kind, dtype=torch.float32)
        for place, amount in enumerate(amounts[:3]):
            ratio = torch.where(kind == place, 1 + amount * changes[:, place, None, None, None], ratio)
        grey = _grey(values)
        plain = torch.where(kind == 0, 0.0, torch.where(kind == 1, grey.mean((1, 2, 3), keepdim=True), grey))
        mixed = (ratio * values + (1 - ratio) * plain).clamp_(0, 255)
        if steps == 4 and values.device.type == "cpu":
            places = (order[:, step] == 3).nonzero().flatten()
            mixed[places] = _turn_hue(values[places], amounts[3] * changes[places, 3])
        elif steps == 4:  # to select images would synchronise with the device
            mixed = torch.where(kind == 3, _turn_hue(values, amounts[3] * changes[:, 3]), mixed)
        values = mixed
    return values.round_().to(torch.uint8)


@cache
def _orders(count: int, device: torch.device) -> Tensor:
    """All orders of some operations, (count!, count)."""
    return torch.tensor(list(itertools.permutations(range(count))), device=device)


def _turn_hue(values: Tensor, turn: Tensor) -> Tensor:
    """Colours (B, 3, H, W) with their hue turned by shares (B,) of the circle."""
    red, green, blue = values.unbind(1)
    value = values.amax(1)
    spread = value - values.amin(1)
    divisor = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(value == red, (green - blue) / divisor, torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4))
    hue = hue + 6 * turn[:, None, None]
    sectors = torch.stack([(hue + start) % 6 for start in (5, 3, 1)], 1)
    return value[:, None] - spread[:, None] * torch.minimum(sectors, 4 - sectors).clamp(0, 1)


def blur(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """A Gaussian blur with sigma 0.1 to 2 pixels and a kernel of a tenth of the side, from numbers (B, 2): whether to blur, and sigma."""
    reach = max(1, images.shape[-1] // 20)
    sigma = 0.1 + 1.9 * numbers[:, 1:]
    weights = torch.exp(-((torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2) / 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    values = images.to(torch.float32).flatten(0, 1)[None]
    mode = "reflect" if reach < images.shape[-1] else "replicate"
    values = F.conv2d(F.pad(values, (reach, reach, 0, 0), mode=mode), weights[:, None, None], groups=len(weights))
    values = F.conv2d(F.pad(values, (0, 0, reach, reach), mode=mode), weights[:, None, :, None], groups=len(weights))
    blurred = values.view_as(images).round_().clamp_(0, 255).to(torch.uint8)
    return torch.where((numbers[:, :1] < share)[:, :, None, None], blurred, images)


def cutout(images: Tensor, numbers: Tensor) -> Tensor:
    """A black square of half the side around a random pixel, clipped at the borders (DeVries and Taylor, "Improved regularization of CNNs with cutout"), from
    numbers (B, 2); on CIFAR 16 pixels of 32.
    """
    size, inside = images.shape[-1] // 2, []
    for extent, number in zip(images.shape[-2:], numbers.unbind(1), strict=True):
        start = (number * extent).to(torch.int64)[:, None] - size // 2
        places = torch.arange(extent, device=images.device)
        inside.append((places >= start) & (places < start + size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def autoaugment(images: Tensor, numbers: Tensor) -> Tensor:
    """AutoAugment's policy for CIFAR on colour images. Numbers choose the sub-policy, whether to apply each of its two operations, and their signs."""
    numbers = numbers[:, COLUMNS.autoaugment]
    kinds, shares, magnitudes = _policy_tables(images.device)
    policy = (numbers[:, 0] * kinds.shape[0]).to(torch.int64)
    for step in range(2):
        takes_place = numbers[:, 1 + step] < shares[policy, step]
        sign = torch.where(numbers[:, 3 + step] < 0.5, -1.0, 1.0)
        images = apply_operations(images, torch.where(takes_place, kinds[policy, step], -1), magnitudes[policy, step], sign)
    return images


def rand_augment(images: Tensor, numbers: Tensor) -> Tensor:
    """Two operations of magnitude 10 of 30, each drawn from none and all but Invert (Cubuk et al., "RandAugment", NeurIPS 2020), and their directions."""
    numbers = numbers[:, COLUMNS.rand_augment]
    magnitude = torch.full_like(numbers[:, 0], 9 * 10 / 30)  # in steps of AutoAugment, of which there are 9
    for step in range(2):
        kind = (numbers[:, step] * len(Operation)).to(torch.int64) - 1
        images = apply_operations(images, kind, magnitude, torch.where(numbers[:, 2 + step] < 0.5, -1.0, 1.0))
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
            # Selecting the images would synchronise with the device; applying every operation to all of them is cheaper.
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
    """Extrapolates the image away from, or interpolates it towards, a degenerate one: black, its grey version, its mean grey, or its smoothed version."""
    values = images.to(torch.float32)
    grey = _grey(values).floor()
    ratio, kind = 1 + 0.9 * strength[:, None, None, None], kind[:, None, None, None]
    plain = torch.where(kind == Operation.Color, grey, torch.where(kind == Operation.Contrast, grey.mean((1, 2, 3), keepdim=True), 0.0))
    plain = torch.where(kind == Operation.Sharpness, _smooth(values), plain)
    return (ratio * values + (1 - ratio) * plain).clamp_(0, 255).to(torch.uint8)


def _grey(values: Tensor) -> Tensor:
    """Images (B, 1, H, W) of the brightness of those (B, C, H, W)."""
    return (values * _grey_shares(values.device)).sum(1, keepdim=True) if values.shape[1] == 3 else values


@cache
def _grey_shares(device: torch.device) -> Tensor:
    """The weights of red, green and blue in grey, (3, 1, 1)."""
    return torch.tensor([0.2989, 0.587, 0.114], device=device).view(3, 1, 1)


def _smooth(values: Tensor) -> Tensor:
    """Every pixel averaged with its eight neighbours, itself counted five times; the border stays."""
    sums = F.avg_pool2d(values, 3, stride=1) * 9
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = ((sums + 4 * values[:, :, 1:-1, 1:-1]) / 13).round()
    return smooth


def _map_values(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Posterize (keep 8 to 4 bits), or solarize (invert values from a threshold on, which goes from 255 down to 0)."""
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
    """Equalizes the histogram of each channel, in integers, as Pillow does."""
    pixels = images.flatten(2).to(torch.int64)
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram  # pixels darker than each value
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(0, 255)
    # a step of 0: too few values to spread
    return torch.where(step == 0, pixels, table.gather(2, pixels)).to(torch.uint8).view_as(images)
