"""Kernels that show what the device code of the noise stream computes."""

from __future__ import annotations

import triton
import triton.language as tl

from gclkern.kernels.philox import half_normals_of, noise_at, noise_tile, philox_words


@triton.jit
def words_of_counters(words, seeds, rows, groups):
    """Four words for each program's own seed, row and group."""
    counter = tl.program_id(0)
    word0, word1, word2, word3 = philox_words(tl.load(seeds + counter), tl.load(rows + counter), tl.load(groups + counter).to(tl.uint32))
    tl.store(words + 4 * counter, word0)
    tl.store(words + 4 * counter + 1, word1)
    tl.store(words + 4 * counter + 2, word2)
    tl.store(words + 4 * counter + 3, word3)


@triton.jit
def draws_of_words(draws, words, BLOCK: tl.constexpr, NVIDIA: tl.constexpr):
    """The two draws of each word."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    even, odd = half_normals_of(tl.load(words + offsets).to(tl.uint32), NVIDIA)
    tl.store(draws + 2 * offsets, even)
    tl.store(draws + 2 * offsets + 1, odd)


@triton.jit
def tile_and_places(tile, places, seed, first_row, first_group, ROWS: tl.constexpr, GROUPS: tl.constexpr, NVIDIA: tl.constexpr):
    """The same draws twice: as a tile, and one (row, class) at a time."""
    rows = first_row.to(tl.int64) + tl.arange(0, ROWS)
    first_group = first_group.to(tl.int64)
    offsets = tl.arange(0, ROWS)[:, None] * (GROUPS * 8) + tl.arange(0, GROUPS * 8)[None, :]
    tl.store(tile + offsets, noise_tile(tl.load(seed), rows, first_group, GROUPS, NVIDIA))
    for column in range(GROUPS * 8):
        classes = tl.zeros((ROWS,), tl.int64) + first_group * 8 + column
        tl.store(places + tl.arange(0, ROWS) * (GROUPS * 8) + column, noise_at(tl.load(seed), rows, classes, NVIDIA))
