"""The noise stream: draws of min(|N(0, 1/3)|, 1) that are a pure function of (seed, sample row, class), the same on every device and for any batch split.

The words come from Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11), with the seed as its key and
(class div 8, row low, row high, 0) as its counter. One 32-bit word x serves two neighbouring classes:

    u = ((x & 0xffff) + 0.5) / 65536        t = (pi / 2) ((x >> 16) + 0.5) / 65536        r = sqrt(-2 ln u) / 3
    even class: min(r cos t, 1)             odd class: min(r sin t, 1)

Other backends have their own implementations, gclkern.kernels.philox and cpu_backend/native/philox.h, because they cannot call this one.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from gclkern.kernels.terms import implements

# 0-dim tensors on the CPU work beside tensors on every device, and are faster than Python numbers, which each operation has to convert.
_MULTIPLIER_0, _MULTIPLIER_1, _LOW, _HALF = (torch.tensor(value, device="cpu") for value in (0xD2511F53, 0xCD9E8D57, 0xFFFFFFFF, 32))
_FIELD, _FIELD_BITS = (torch.tensor(value, dtype=torch.int32, device="cpu") for value in (0xFFFF, 16))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_GROUP = 8  # classes that share a counter
# Groups computed at a time. On a CPU twice torch's grain size of 32768 elements, the least that keeps two threads busy: more would leave the cache. On another
# device many, because each operation costs a launch.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 22


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables over 16-bit fields, with two float32 values packed into each float64 element: (r, r) indexed by u's field, (cos t, sin t) by t's.

    Tables are the fastest way in torch. They also make a value independent of its position; torch's vectorised log and cos may round differently at loop ends.
    """
    middle = torch.arange(65536, dtype=torch.float64, device="cpu").add_(0.5).div_(65536)
    radius = middle.log().mul_(-2.0).sqrt_().div_(3.0).float()
    angle = middle.mul(math.pi / 2)
    radii = torch.stack((radius, radius), dim=1)
    circle = torch.stack((angle.cos().float(), angle.sin().float()), dim=1)
    return radii.view(torch.float64).view(-1).to(device), circle.view(torch.float64).view(-1).to(device)


@functools.cache
def _weyl(device: torch.device) -> Tensor:
    """What each round adds to the two words of the key, (rounds, 2)."""
    return torch.tensor([[i * step for step in _WEYL] for i in range(_ROUNDS)], device=device)


class _FirstRounds(NamedTuple):
    """The part of Philox that depends on only the row or only the group, and so is cheap: the state after rounds 1 and 2, and the keys of the later rounds.

    After round 2 the state of (row i, group j) is c0 = row0[i] ^ group0[j], c1 = group1[j], c2 = row2[i] ^ group2[j], c3 = row3[i]. The key of round 3 is
    already in group1 and row3, which that round only takes into exclusive ors.
    """

    row0: Tensor
    row2: Tensor
    row3: Tensor
    group0: Tensor
    group1: Tensor
    group2: Tensor
    keys: Tensor  # (rounds, 2), in the low halves

    def span(self, rows: slice, groups: slice) -> _FirstRounds:
        return _FirstRounds(self.row0[rows], self.row2[rows], self.row3[rows], self.group0[groups], self.group1[groups], self.group2[groups], self.keys)


def _first_rounds(seed: Tensor, rows: Tensor, groups: Tensor) -> _FirstRounds:
    keys = torch.stack((seed, seed >> _HALF)) + _weyl(seed.device)
    key0, key1 = keys.unbind(1)
    # keys and products keep their high halves until a single word is needed, which the mask _LOW cuts out
    row_product = ((rows >> _HALF) & _LOW) * _MULTIPLIER_1
    group_product = groups * _MULTIPLIER_0
    row1, group3 = row_product, group_product
    row_product = (((row_product >> _HALF) ^ rows ^ key0[0]) & _LOW) * _MULTIPLIER_0
    group_product = (((group_product >> _HALF) ^ key1[0]) & _LOW) * _MULTIPLIER_1
    return _FirstRounds(
        row0=(row1 ^ key0[1]) & _LOW,
        row2=(row_product >> _HALF) & _LOW,
        row3=row_product ^ key1[2],
        group0=(group_product >> _HALF) & _LOW,
        group1=group_product ^ key0[2],
        group2=(group3 ^ key1[1]) & _LOW,
        keys=keys,
    )


def _last_rounds(first: _FirstRounds, scratch: Tensor, words: Tensor) -> None:
    """Rounds 3 to 7 in place: `words` (int32) receives four elements for each (row, group), `scratch` (int64) has six.

    The groups are a vector, or (rows, 1) if each row has its own.
    """
    shape = (first.row0.numel(), first.group0.shape[-1])
    state, *products = scratch.view(3, 2, *shape).unbind()  # a product and the last one, in turn
    # Lane 0 holds what c0 and c1 come from, lane 1 what c2 and c3 come from. A product stays 64 bits wide: the next round takes its low half, the words c1 and
    # c3, into the exclusive ors of its lane, and one mask a round removes the other half.
    state0, state1 = state.unbind()
    lanes = [product.unbind() for product in products]
    torch.bitwise_xor(first.row0[:, None], first.group0, out=state0)
    torch.bitwise_xor(first.row2[:, None], first.group2, out=state1)
    for i, key in enumerate(first.keys.view(_ROUNDS, 2, 1, 1)[2:].unbind()):
        product, last_product = products[i % 2], products[1 - i % 2]
        torch.mul(state1, _MULTIPLIER_1, out=lanes[i % 2][0])
        torch.mul(state0, _MULTIPLIER_0, out=lanes[i % 2][1])
        torch.bitwise_right_shift(product, _HALF, out=state)
        if i == 0:
            state0.bitwise_xor_(first.group1)
            state1.bitwise_xor_(first.row3[:, None])
        else:
            state.bitwise_xor_(last_product).bitwise_xor_(key)
        state.bitwise_and_(_LOW)
    # c0 and c1, then c2 and c3, each two as the halves of an int64.
    product.bitwise_left_shift_(_HALF)
    pairs = words.view(torch.int64).view(*shape, 2)
    torch.bitwise_or(state0, product[0], out=pairs[..., 0])
    torch.bitwise_or(state1, product[1], out=pairs[..., 1])


def philox_words(seed: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
    """The words of the counters (group, row), (rows, groups, 4) int32; `rows` and `groups` are int64 vectors, `seed` a 0-dim int64 tensor."""
    counters = rows.numel() * groups.numel()
    words = torch.empty(4 * counters, dtype=torch.int32, device=rows.device)
    _last_rounds(_first_rounds(seed, rows, groups), torch.empty(6 * counters, dtype=torch.int64, device=rows.device), words)
    return words.view(rows.numel(), groups.numel(), 4)


def noise_at(seed: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
    """The draw of each pair (rows[i], classes[i]), int64 (N,) both: (N,) float32, bitwise equal to the elements of `fill_noise`."""
    radii, circle = (table.view(torch.float32).view(-1, 2) for table in _tables(rows.device))
    words = torch.empty(4 * rows.numel(), dtype=torch.int32, device=rows.device)
    _last_rounds(_first_rounds(seed, rows, classes.unsqueeze(1) // _GROUP), torch.empty(6 * rows.numel(), dtype=torch.int64, device=rows.device), words)
    word = words.view(-1, 4).gather(1, (classes % _GROUP // 2).unsqueeze(1))[:, 0].to(torch.int64)
    odd = classes % 2
    return (radii[word & 0xFFFF, odd] * circle[word >> 16 & 0xFFFF, odd]).clamp_max_(1.0)


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
    first_rounds = _first_rounds(
        seed,
        torch.arange(rows, dtype=torch.int64, device=device).add_(row_offset),
        torch.arange(num_groups, dtype=torch.int64, device=device).add_(first_group),
    )
    radii, circle = _tables(device)
    # One workspace for everything, which the allocator is likely to reuse in the next call. It has twelve parts of eight bytes per group: Philox uses six, and
    # after that the radii and directions use eight.
    size = row_step * group_step
    workspace = torch.empty(12 * size, dtype=torch.int64, device=device)
    for row in range(0, rows, row_step):
        row_end = min(row + row_step, rows)
        for group in range(0, num_groups, group_step):
            group_end = min(group + group_step, num_groups)
            count = (row_end - row) * (group_end - group)
            words, index = workspace[8 * size : 8 * size + 2 * count].view(torch.int32), workspace[10 * size : 10 * size + 2 * count].view(torch.int32)
            _last_rounds(first_rounds.span(slice(row, row_end), slice(group, group_end)), workspace[: 6 * count], words)
            radius, direction = workspace[: 4 * count].view(torch.float64), workspace[4 * count : 8 * count].view(torch.float64)
            torch.bitwise_and(words, _FIELD, out=index)
            torch.index_select(radii, 0, index, out=radius)
            torch.bitwise_right_shift(words, _FIELD_BITS, out=index).bitwise_and_(_FIELD)
            torch.index_select(circle, 0, index, out=direction)
            draws = radius.view(torch.float32).mul_(direction.view(torch.float32)).view(row_end - row, -1)
            begin, end = max(group * _GROUP, skipped), min(group_end * _GROUP, skipped + classes)
            draws, part = draws[:, begin - group * _GROUP : end - group * _GROUP], out[row:row_end, begin - skipped : end - skipped]
            if part.dtype == draws.dtype:
                torch.clamp_max(draws, 1.0, out=part)
            else:
                part.copy_(draws.clamp_max_(1.0))


@implements("cloud_noise", "torch")
def cloud_noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    """The same as gclkern.kernels.noise.cloud_noise: (num_rows, num_classes) float32 on the device of `seed` (0-dim int64)."""
    noise = torch.empty(num_rows, num_classes, dtype=torch.float32, device=seed.device)
    fill_noise(noise, seed, row_offset, class_offset)
    return noise
