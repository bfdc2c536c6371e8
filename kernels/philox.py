"""The noise stream as device code: draws of min(|N(0, 1/3)|, 1) that are a pure function of (seed, global sample row, global class).

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) with the seed as its key and the counter (class div 8, row low, row high, 0)
gives four words for a group of 8 classes; each word x gives the draws of two neighbouring classes by Box and Muller on a quarter circle:

    u = ((x & 0xffff) + 0.5) / 65536        t = (pi / 2) ((x >> 16) + 0.5) / 65536        r = sqrt(-2 ln u) / 3
    even class: min(r cos t, 1)             odd class: min(r sin t, 1)

`NVIDIA` chooses between two formulas for the same values: approximate instructions in inline assembly, or portable ones that also run in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(7)

# Two draws from one word. Fields are converted to floats without I2F, which would use the special function unit, the bottleneck here: or-ed into the mantissa
# of 2^23 a field gives the float 2^23 + field, and one fused multiply-add maps that to its range.
#   u: the low half; scaling by 2^-16 and subtracting (2^23 - 0.5) / 2^16 are exact.
#   t: the high half over the base 2^23 + 15 * 2^16. The constants are the pair near pi / 131072 and -base * pi / 131072 whose rounding errors cancel best:
#      the angle is off by 1.6e-7 at most, 4.4e-8 in the mean (a base of 2^23 and the rounded constants would give 8e-6).
#   r: -2 ln(u) / 9 is -2 ln(2) / 9 = -0.15403271 (0fbe1dbac0) times the binary logarithm.
# Saturation clamps the product to [0, 1] for free.
_NVIDIA_ASM = tl.constexpr(
    """{
    .reg .b32 word, field;
    .reg .f32 u, t, r, c, s;
    mov.b32 word, $2;
    lop3.b32 field, word, 0xffff, 0x4b000000, 0xea;
    mov.b32 u, field;
    fma.rn.ftz.f32 u, u, 0f37800000, 0fc2ffffff;
    shf.r.wrap.b32 field, word, 0x4b0f, 16;
    mov.b32 t, field;
    fma.rn.ftz.f32 t, t, 0f37c90fdc, 0fc3609fb7;
    lg2.approx.ftz.f32 r, u;
    mul.rn.ftz.f32 r, r, 0fbe1dbac0;
    sqrt.approx.ftz.f32 r, r;
    cos.approx.ftz.f32 c, t;
    sin.approx.ftz.f32 s, t;
    mul.rn.ftz.sat.f32 $0, r, c;
    mul.rn.ftz.sat.f32 $1, r, s;
    }"""
)


@triton.jit
def _product(word, multiplier: tl.constexpr):
    """The high and the low half of the 64-bit product: one wide multiplication on the GPU."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox_words(seed, rows, groups):
    """Four uint32 words for each (row, group): `seed` an int64 scalar, `rows` int64, `groups` uint32 (class div 8), whose shapes broadcast.

    With rows [R, 1] and groups [1, G] the first two rounds cost almost nothing, because they depend on only one of them or on their outer xor.
    """
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0, c1, c2 = groups, rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    high0, low0 = _product(c0, _MULTIPLIER_0)
    high1, low1 = _product(c2, _MULTIPLIER_1)
    c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ key1, low0
    for _ in tl.static_range(_ROUNDS - 1):
        key0 += _WEYL_0
        key1 += _WEYL_1
        high0, low0 = _product(c0, _MULTIPLIER_0)
        high1, low1 = _product(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


@triton.jit
def quarter_circle(v):
    """Cosine and sine of pi/4 + (pi/2) v, for v from -1/2 to 1/2."""
    # They are even(v) - odd(v) and even(v) + odd(v), without range reduction. even(v) and odd(v) / v are polynomials in v^2, with an error of 2e-9.
    square = v * v
    even_part = tl.fma(square, 0.0006389628188491178, -0.0147502972424452)
    even_part = tl.fma(even_part, square, 0.1793712141831696)
    even_part = tl.fma(even_part, square, -0.8723580182402422)
    even_part = tl.fma(even_part, square, 0.7071067811529916)
    odd_part = tl.fma(square, -0.003254220739649075, 0.056342425909468204)
    odd_part = tl.fma(odd_part, square, -0.456765155801133)
    odd_part = tl.fma(odd_part, square, 1.1107207311208223) * v
    return even_part - odd_part, even_part + odd_part


@triton.jit
def half_normals_of(word, NVIDIA: tl.constexpr):
    """The draws of the even and of the odd class that share `word` (uint32, any shape): float32, in word's shape."""
    if NVIDIA:
        even, odd = tl.inline_asm_elementwise(_NVIDIA_ASM, "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    else:
        u = ((word & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
        radius = tl.sqrt(tl.log2(u) * -0.15403270679109896)  # -2 ln(2) / 9
        cosine, sine = quarter_circle(((word >> 16).to(tl.float32) + 0.5) * (1.0 / 65536) - 0.5)
        even = tl.minimum(radius * cosine, 1.0)
        odd = tl.minimum(radius * sine, 1.0)
    return even, odd


@triton.jit
def word_tile(seed, rows, first_group, GROUPS: tl.constexpr):
    """The words of `rows` (int64 [R], global sample rows) for the classes from first_group * 8 on, one for two neighbouring classes: uint32 [R, GROUPS * 4]."""
    groups = first_group.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
    word0, word1, word2, word3 = philox_words(seed, rows[:, None], groups[None, :])
    # tl.join adds the fastest axis, so after two of them the axes are (row, group, high bit, low bit of the word's number).
    return tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(rows.shape[0], GROUPS * 4)


@triton.jit
def noise_tile(seed, rows, first_group, GROUPS: tl.constexpr, NVIDIA: tl.constexpr):
    """The draws of `rows` (int64 [R], global sample rows) for the GROUPS * 8 classes from first_group * 8 on: float32 [R, GROUPS * 8] in class order.

    Combined with data of which each thread holds 8 neighbouring classes (16-byte loads of 16-bit logits), a group stays in one thread; with any other layout,
    words and draws go through shared memory.
    """
    even, odd = half_normals_of(word_tile(seed, rows, first_group, GROUPS), NVIDIA)
    return tl.join(even, odd).reshape(rows.shape[0], GROUPS * 8)


@triton.jit
def noise_at(seed, rows, classes, NVIDIA: tl.constexpr):
    """The draw of each pair (rows[i], classes[i]), int64 [R] both: float32 [R], bitwise equal to the tile's values."""
    word0, word1, word2, word3 = philox_words(seed, rows, (classes >> 3).to(tl.uint32))
    place = (classes >> 1) & 3
    word = tl.where(place < 2, tl.where(place == 0, word0, word1), tl.where(place == 2, word2, word3))
    even, odd = half_normals_of(word, NVIDIA)
    return tl.where((classes & 1) == 0, even, odd)
