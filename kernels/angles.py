"""Adding an angle to that of a cosine, for the margins and clouds of ArcFace, AGCL and DBM.

With theta the angle of the cosine c,

    cos(theta + a) = c cos a - sqrt(1 - c^2) sin a                where theta + a < pi, that is, c > -cos a
                     c - a sin a                                  elsewhere, which still decreases with a

The derivative of the root is infinite at c = 1 and -1, so where 1 - c^2 is smaller than SMALLEST_SINE_SQUARED, that constant takes its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import quarter_circle
from .terms import SMALLEST_SINE_SQUARED

HALF_PI = tl.constexpr(1.5707963267948966)
_INVERSE_PI = tl.constexpr(0.3183098861837907)
_SMALLEST = tl.constexpr(SMALLEST_SINE_SQUARED)
_SINE_AND_COSINE = tl.constexpr("sin.approx.ftz.f32 $0, $2; cos.approx.ftz.f32 $1, $2;")


@triton.jit
def _sine_and_cosine(angle, NVIDIA: tl.constexpr):
    """Of angles from 0 to pi, with an error of 2^-20."""
    if NVIDIA:
        sine, cosine = tl.inline_asm_elementwise(_SINE_AND_COSINE, "=&f,=f,f", [angle], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    else:
        half_cosine, half_sine = quarter_circle(angle * _INVERSE_PI - 0.5)
        sine = 2.0 * half_sine * half_cosine
        cosine = 1.0 - 2.0 * half_sine * half_sine
    return sine, cosine


@triton.jit
def add_angle(cosine, angle, EASY: tl.constexpr, NVIDIA: tl.constexpr):
    """cos(theta + angle) of cosine = cos(theta), for angles from 0 to pi, and its derivatives by cosine and by angle.

    With EASY angles are only added where the cosine is positive.
    """
    sine, other = _sine_and_cosine(angle, NVIDIA)
    square = (1.0 - cosine) * (1.0 + cosine)
    inverse_root = tl.rsqrt(tl.maximum(square, _SMALLEST))
    root = tl.maximum(square, _SMALLEST) * inverse_root
    value = cosine * other - root * sine
    by_cosine = other + tl.where(square > _SMALLEST, cosine * sine * inverse_root, 0.0)
    by_angle = -(cosine * sine + root * other)
    if EASY:
        taken = cosine > 0.0
        value = tl.where(taken, value, cosine)
        by_angle = tl.where(taken, by_angle, 0.0)
    else:
        taken = cosine > -other
        value = tl.where(taken, value, cosine - angle * sine)
        by_angle = tl.where(taken, by_angle, -(sine + angle * other))
    return value, tl.where(taken, by_cosine, 1.0), by_angle
