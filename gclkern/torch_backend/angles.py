"""Adding an angle to that of a cosine, for the margins and clouds of ArcFace, AGCL and DBM; in torch what gclkern.kernels.angles is in Triton.

With theta the angle of the cosine c,

    cos(theta + a) = c cos a - sqrt(1 - c^2) sin a                where theta + a < pi, that is, c > -cos a
                     c - a sin a                                  elsewhere, which still decreases with a

The derivative of the root is infinite at c = 1 and -1, so where 1 - c^2 is smaller than SMALLEST_SINE_SQUARED, that constant takes its place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import SMALLEST_SINE_SQUARED, LossTerms
from gclkern.torch_backend.noise import noise_at


class AngleSum(NamedTuple):
    """A cosine with an angle added, and its derivatives."""

    value: Tensor
    by_cosine: Tensor
    by_angle: Tensor


def add_angle(cosine: Tensor, angle: Tensor, *, easy: bool) -> AngleSum:
    """cos(theta + angle) of cosine = cos(theta), for angles from 0 to pi. With `easy` angles are only added where the cosine is positive."""
    sine, other = angle.sin(), angle.cos()
    square = (1 - cosine) * (1 + cosine)
    root = square.clamp_min(SMALLEST_SINE_SQUARED).sqrt()
    value = cosine * other - root * sine
    by_cosine = other + torch.where(square > SMALLEST_SINE_SQUARED, cosine * sine / root, 0.0)
    by_angle = -(cosine * sine + root * other)
    if easy:
        taken = cosine > 0
        return AngleSum(torch.where(taken, value, cosine), torch.where(taken, by_cosine, 1.0), torch.where(taken, by_angle, 0.0))
    taken = cosine > -other
    return AngleSum(torch.where(taken, value, cosine - angle * sine), torch.where(taken, by_cosine, 1.0), torch.where(taken, by_angle, -(sine + angle * other)))


class TargetLogit(NamedTuple):
    """The logit of each row's target, without and with its margin, and their derivatives by scale * cosine."""

    plain: Tensor
    own: Tensor
    plain_slope: Tensor | float
    own_slope: Tensor | float


def target_logit(scaled: Tensor, hardest: Tensor | None, label: Tensor, terms: LossTerms) -> TargetLogit:
    """From scale * cosine (N,) of the targets, and with a difficulty margin that of the largest other class."""
    cosine = scaled / terms.scale
    cloud: Tensor | float = 0.0
    if terms.cloud is not None and terms.seed is not None:
        rows = torch.arange(label.numel(), dtype=torch.int64, device=label.device) + terms.row_offset
        cloud = terms.cloud[label] * noise_at(terms.seed, rows, label + terms.class_offset).to(cosine.dtype)
    first = math.pi / 2 * cloud if terms.angular else 0.0
    plain, plain_slope = cosine, torch.ones_like(cosine)
    if isinstance(first, Tensor):
        plain, plain_slope, _ = add_angle(cosine, first, easy=terms.easy_margin)
    margin = torch.zeros_like(cosine) if terms.margin is None else terms.margin[label]
    grown: Tensor | float = 0.0  # derivative of the margin
    if hardest is not None:
        hard = hardest > scaled
        grown = torch.where(hard, -margin / 2, 0.0)
        margin = torch.where(hard, margin * (1 + (1 - cosine) / 2), margin)
    own, by_cosine, by_angle = add_angle(cosine, margin + first, easy=terms.easy_margin)
    own_slope = by_cosine + by_angle * grown
    if not terms.angular:
        plain, own = plain - cloud, own - cloud
    plain, own = plain * terms.scale, own * terms.scale
    if terms.bias is not None:
        plain, own = plain + terms.bias[label], own + terms.bias[label]
    return TargetLogit(plain, own, plain_slope, own_slope)
