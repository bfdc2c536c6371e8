"""The noise stream: draws of min(|N(0, 1/3)|, 1) that are a pure function of (seed, sample row, class), the same on every device and for any batch split.

The words come from Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11), with the seed as its key and
(class div 8, row low, row high, 0) as its counter. One 32-bit word x serves two neighbouring classes:

    u = ((x & 0xffff) + 0.5) / 65536        t = (pi / 2) ((x >> 16) + 0.5) / 65536        r = sqrt(-2 ln u) / 3
    even class: min(r cos t, 1)             odd class: min(r sin t, 1)

This module is the torch implementation and the public function; gclkern.kernels.noise is the Triton one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gclkern.backend import resolve_backend

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 7
_LOW = 0xFFFFFFFF
_GROUP = 8  # classes that share a counter
# Groups computed at a time. On a CPU large enough that torch gives every thread of a pair a share (its grain is 32768 elements), small enough for the cache;
# on another device large, because there a small operation costs its launch.
_CPU_CHUNK = 40960
_DEVICE_CHUNK = 1 << 22


def _wrap(value: int) -> int:
    """The int64 with the low 64 bits of value."""
    return (value + 2**63) % 2**64 - 2**63


def resolve_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as a 0-dim int64 tensor on `device`, without a synchronisation.

    None draws one from torch's generator of that device, so `torch.manual_seed` governs it. An int may be any 64-bit value, signed or unsigned.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}; call seed.long()")
        if seed.dim() != 0:
            raise ValueError(f"seed must be a 0-dim tensor, got shape {tuple(seed.shape)}; pass one element of it")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device} but the noise is needed on {device}; move it there once, or pass an int")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be None, an int or a 0-dim int64 tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}; reduce it modulo 2**64")
    return torch.full((), _wrap(seed), dtype=torch.int64, device=device)


def cloud_noise(
    seed: Tensor | int | None,
    num_rows: int,
    num_classes: int,
    *,
    row_offset: int = 0,
    class_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise e_ij = min(|N(0, 1/3)|, 1) of Gaussian clouded logits (Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment",
    CVPR 2022, Eq. 11), as the losses draw it: 1/3 is the standard deviation.

    Element (i, j) depends on nothing but the seed, row_offset + i and class_offset + j, so a part of a larger matrix equals the same part drawn alone. On one
    backend and version the values are bitwise equal however the matrix is split; between backends and GPU models they agree to 1e-4.

    Args:
        seed: None draws a seed from torch's generator of the device, so `torch.manual_seed` governs it; an int of up to 64 bits; or a 0-dim int64 tensor, whose
            device the noise then has.
        num_rows: samples, at least 1.
        num_classes: classes, at least 1.
        row_offset: global number of the first sample. Data-parallel ranks share the seed of a step and take rank * batch. Default 0: the batch is the whole grid.
        class_offset: global number of the first class; class_offset + num_classes is at most 2**35. Default 0: all classes are here.
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
    from gclkern.validation import MAX_CLASSES, check_offset  # that module imports this one

    for name, size in (("num_rows", num_rows), ("num_classes", num_classes)):
        if isinstance(size, (bool, float, Tensor)):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    row_offset = check_offset("row_offset", row_offset, num_rows, 2**63)
    class_offset = check_offset("class_offset", class_offset, num_classes, MAX_CLASSES)
    if device is None:
        place = seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    else:
        place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    seed = resolve_seed(seed, place)
    if resolve_backend("auto", seed) == "triton":
        from gclkern.kernels.noise import cloud_noise_op

        return cloud_noise_op(seed, num_rows, num_classes, row_offset, class_offset)
    return torch_cloud_noise_op(seed, num_rows, num_classes, row_offset, class_offset)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every 16-bit field, two float32 values packed into one float64 element: (r, r) by u's field, (cos t, sin t) by t's.

    Tables are the fastest way here, and they make a value independent of its place in a vector: torch's vectorised log and cos need not round alike in a loop's tail.
    """
    middle = torch.arange(65536, dtype=torch.float64, device="cpu").add_(0.5).div_(65536)
    radius = middle.log().mul_(-2.0).sqrt_().div_(3.0).float()
    angle = middle.mul(math.pi / 2)
    radii = torch.stack((radius, radius), dim=1)
    circle = torch.stack((angle.cos().float(), angle.sin().float()), dim=1)
    return radii.view(torch.float64).view(-1).to(device), circle.view(torch.float64).view(-1).to(device)


def _first_rounds(seed: Tensor, rows: Tensor, groups: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Tensor]]:
    """The part of Philox that sees only one of row and group: the keys of the rounds, and what round 2 leaves as factors of its state.

    After round 2 the state of (row i, group j) is c0 = row0[i] ^ group0[j], c1 = group1[j], c2 = row2[i] ^ group2[j], c3 = row3[i].
    """
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    keys = [((key0 + _WEYL_0 * i) & _LOW, (key1 + _WEYL_1 * i) & _LOW) for i in range(_ROUNDS)]
    high, low = (rows >> 32) & _LOW, rows & _LOW
    product = high * _MULTIPLIER_1
    row_state, row_low = ((product >> 32) & _LOW) ^ low ^ keys[0][0], product & _LOW
    product = groups * _MULTIPLIER_0
    group_state, group_low = ((product >> 32) & _LOW) ^ keys[0][1], product & _LOW
    row_product, group_product = row_state * _MULTIPLIER_0, group_state * _MULTIPLIER_1
    group0, row0 = (group_product >> 32) & _LOW, row_low ^ keys[1][0]
    row2, group2 = (row_product >> 32) & _LOW, group_low ^ keys[1][1]
    return keys, (row0, group0, group_product & _LOW, row2, group2, row_product & _LOW)


def philox_words(seed: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
    """The words of the counters (group, row): int32 of shape (rows, groups, 4); `rows` and `groups` are int64 vectors, `seed` a 0-dim int64 tensor."""
    words = torch.empty(rows.numel() * groups.numel() * 4, dtype=torch.int32, device=rows.device)
    keys, factors = _first_rounds(seed, rows, groups)
    _last_rounds(keys, factors, slice(None), slice(None), torch.empty(3 * words.numel() // 2, dtype=torch.int64, device=rows.device), words)
    return words.view(rows.numel(), groups.numel(), 4)


def _last_rounds(keys: list[tuple[Tensor, Tensor]], factors: Sequence[Tensor], row_span: slice, group_span: slice, scratch: Tensor, words: Tensor) -> None:
    """Rounds 3 to 7 for a span of rows and groups, in place: `words` receives four int32 for each (row, group), `scratch` has room for six int64."""
    row0, group0, group1, row2, group2, row3 = factors
    row0, row2, row3 = row0[row_span, None], row2[row_span, None], row3[row_span, None]
    group0, group1, group2 = group0[group_span], group1[group_span], group2[group_span]
    state, product, last_product = scratch.view(3, 2, row0.shape[0], group0.shape[0])
    # Lane 0 is what leads to c2 and c3 of the next round, lane 1 to c0 and c1. Products stay 64 bits wide, and a lane is masked once a round, after the exclusive
    # ors: the low half of the last product is the word that this round passes on (c3, c1), its other half is dirt that the mask removes.
    torch.bitwise_xor(row0, group0, out=state[1])
    torch.bitwise_xor(row2, group2, out=state[0])
    for i in range(2, _ROUNDS):
        torch.mul(state[1], _MULTIPLIER_0, out=product[0])
        torch.mul(state[0], _MULTIPLIER_1, out=product[1])
        torch.bitwise_right_shift(product, 32, out=state)
        if i == 2:
            state[0] ^= row3
            state[1] ^= group1
        else:
            state ^= last_product
        state[0] ^= keys[i][1]
        state[1] ^= keys[i][0]
        state &= _LOW
        product, last_product = last_product, product
    # c0 and c1, then c2 and c3, as the two halves of an int64.
    last_product <<= 32
    pairs = words.view(torch.int64).view(row0.shape[0], group0.shape[0], 2)
    torch.bitwise_or(state[1], last_product[1], out=pairs[..., 0])
    torch.bitwise_or(state[0], last_product[0], out=pairs[..., 1])


def fill_noise(out: Tensor, seed: Tensor, row_offset: int = 0, class_offset: int = 0) -> None:
    """Writes the noise of rows row_offset... and classes class_offset... into `out` (rows, classes), float32 or float64, any strides, on the seed's device.

    float64 receives the float32 draws. The values do not depend on how a matrix is split into calls.
    """
    rows, classes = out.shape
    if out.numel() == 0:
        return
    device = out.device
    first_group, skipped = divmod(class_offset, _GROUP)
    num_groups = (skipped + classes + _GROUP - 1) // _GROUP
    chunk = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    group_step = min(num_groups, chunk)
    row_step = min(rows, max(1, chunk // group_step))
    keys, factors = _first_rounds(
        seed, torch.arange(rows, dtype=torch.int64, device=device) + row_offset, torch.arange(num_groups, dtype=torch.int64, device=device) + first_group
    )
    radii, circle = _tables(device)
    size = row_step * group_step
    scratch = torch.empty(6 * size, dtype=torch.int64, device=device)
    words = torch.empty(4 * size, dtype=torch.int32, device=device)
    index = torch.empty_like(words)
    # The two gathered tables take the place of the state of Philox, which is spent by then.
    left, right = scratch[: 4 * size].view(torch.float64), torch.empty(4 * size, dtype=torch.float64, device=device)
    for row in range(0, rows, row_step):
        row_end = min(row + row_step, rows)
        for group in range(0, num_groups, group_step):
            group_end = min(group + group_step, num_groups)
            count = (row_end - row) * (group_end - group)
            some_words, some_index = words[: 4 * count], index[: 4 * count]
            _last_rounds(keys, factors, slice(row, row_end), slice(group, group_end), scratch[: 6 * count], some_words)
            torch.bitwise_and(some_words, 0xFFFF, out=some_index)
            torch.index_select(radii, 0, some_index, out=left[: 4 * count])
            torch.bitwise_right_shift(some_words, 16, out=some_index)
            some_index &= 0xFFFF
            torch.index_select(circle, 0, some_index, out=right[: 4 * count])
            draws = left[: 4 * count].view(torch.float32)
            draws *= right[: 4 * count].view(torch.float32)
            draws = draws.view(row_end - row, (group_end - group) * _GROUP)
            first, last = max(group * _GROUP, skipped), min(group_end * _GROUP, skipped + classes)
            torch.clamp_max(
                draws[:, first - group * _GROUP : last - group * _GROUP], 1.0, out=out[row:row_end, first - skipped : last - skipped]
            )


def _torch_cloud_noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    noise = torch.empty(num_rows, num_classes, dtype=torch.float32, device=seed.device)
    fill_noise(noise, seed, row_offset, class_offset)
    return noise


CLOUD_NOISE_SCHEMA = "(Tensor seed, SymInt num_rows, SymInt num_classes, SymInt row_offset, SymInt class_offset) -> Tensor"
torch_cloud_noise_op = torch.library.custom_op("gclkern::torch_cloud_noise", _torch_cloud_noise, mutates_args=(), schema=CLOUD_NOISE_SCHEMA)


@torch_cloud_noise_op.register_fake
def _(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    return seed.new_empty((num_rows, num_classes), dtype=torch.float32)
