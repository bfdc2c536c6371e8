"""The softmax over samples and class prototypes: torch's matrix products make tiles of cosines, and the loops do all else in one pass over a tile.

Samples are put in the order of their classes, so that the positives of a sample are neighbours. Pairs of samples are in one tile each, as in
gclkern.torch_backend.contrastive_loss, which has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DTYPES, NULL, REDUCTIONS, Contrast, address, call
from gclkern.kernels.terms import implements, shapes_of

_TILE = 512  # rows and columns: 1 MB, which stays in the cache. A matrix of up to twice as much is one tile
_PARTS = (16, 3, 512)  # strips of a tile, ROWS_OF_A_STRIP rows each; OF_SAMPLE of native/native.h; columns
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")  # `empty_like` takes half the time of `empty`

Place = tuple[int, int, int, int]  # of a tile: its rows, of samples, and its columns, of keys


def _saved(features: Tensor, prototypes: Tensor | None, include_samples: bool) -> list[Tensor]:
    """What backward needs: unit rows (K, D); everything that the loops keep of samples and keys; and the exponentials of all pairs if they are one tile."""
    num_samples, dim = features.shape
    num_keys = num_samples if prototypes is None else num_samples + prototypes.shape[0]
    columns = num_keys if include_samples else num_keys - num_samples
    device = features.device
    return [
        torch.empty((num_keys, dim), dtype=torch.float32, device=device),
        torch.empty(7 * num_samples + 3 * num_keys, dtype=torch.float64, device=device),
        torch.empty((num_samples, columns) if num_samples * columns <= 2 * _TILE**2 else (0, 0), dtype=torch.float32, device=device),
    ]


def _members(
    features: Tensor, prototypes: Tensor | None, target: Tensor | None, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str, saved: list[Tensor], loss: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The members of `struct contrast` up to `loss`. The loops keep three sums and four integers of a sample, 8 bytes each, and six floats of a key."""
    num_samples, dim = features.shape
    known = class_counts if prototypes is None else prototypes
    keys = (NULL, 0, 0, 0) if prototypes is None else (prototypes.data_ptr(), DTYPES[prototypes.dtype], *prototypes.stride())
    unit, state, _ = saved
    sums, step = state.data_ptr(), 8 * num_samples
    integers = [sums + place * step for place in range(3, 7)]
    return (
        num_samples, unit.shape[0], dim, -1 if known is None else known.shape[0], features.data_ptr(), DTYPES[features.dtype], *features.stride(), *keys,
        address(target), address(class_counts), temperature, include_samples, include_own_class, REDUCTIONS[reduction], unit.data_ptr(), sums + 7 * step,
        *integers, sums, address(loss),
    )  # fmt: skip


def _places(num_samples: int, num_keys: int, include_samples: bool, is_one_tile: bool) -> Iterator[Place]:
    """The tiles of the matrix, without those below the diagonal of pairs of samples."""
    first = 0 if include_samples else num_samples
    if is_one_tile:
        yield 0, num_samples, first, num_keys
        return
    for top in range(0, num_samples, _TILE):
        for left in range(max(top, first), num_keys, _TILE):
            yield top, min(top + _TILE, num_samples), left, min(left + _TILE, num_keys)


def _rows(matrix: Tensor, first: int, end: int) -> Tensor:
    """A part of a matrix; torch takes longer for a view than to look for one that is not needed."""
    return matrix if end - first == matrix.shape[0] else matrix[first:end]


def _cosines(unit: Tensor, place: Place, memory: Tensor) -> Tensor:
    """A tile of the products of unit rows, from the beginning of `memory` on."""
    top, bottom, left, right = place
    tile = memory
    if memory.shape != (bottom - top, right - left):
        tile = memory.view(-1)[: (bottom - top) * (right - left)].view(bottom - top, right - left)
    return torch.mm(_rows(unit, top, bottom), _rows(unit, left, right).t(), out=tile)


@implements("contrastive_forward", "cpu")
def contrastive_forward(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss, and for backward what `_saved` lists."""
    saved = _saved(features, prototypes, include_samples)
    unit, _, kept = saved
    num_samples, num_keys = features.shape[0], unit.shape[0]
    loss = unit.new_empty(num_samples) if reduction == "none" else torch.empty_like(_SCALAR)
    members = _members(features, prototypes, target, class_counts, temperature, include_samples, include_own_class, reduction, saved, loss)
    is_one_tile = kept.shape[0] > 0
    parts, tile = None, kept
    if not is_one_tile:
        parts, tile = unit.new_empty(_PARTS), unit.new_empty((_TILE, _TILE))
    threads = torch.get_num_threads()

    def arguments(place: Place) -> bytes:
        return Contrast.pack(*members, tile.data_ptr(), *place, address(parts), 0, NULL, NULL, 0, NULL, NULL, NULL, NULL, threads)

    call("contrast_begin", arguments((0, 0, 0, 0)))
    for place in _places(num_samples, num_keys, include_samples, is_one_tile):
        _cosines(unit, place, tile)
        call("contrast_sums", arguments(place))
    return loss, saved


@implements("contrastive_backward", "cpu")
def contrastive_backward(
    grad_loss: Tensor, features: Tensor, prototypes: Tensor | None, class_counts: Tensor | None, saved: list[Tensor], temperature: float,
    include_samples: bool, include_own_class: bool, features_grad: bool, prototypes_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and the prototypes; one that was not requested is empty."""
    unit, _, kept = saved
    num_samples, num_keys = features.shape[0], unit.shape[0]
    if grad_loss.dtype != torch.float32 or not grad_loss.is_contiguous():
        grad_loss = grad_loss.to(torch.float32).contiguous()
    grad = torch.zeros_like(unit)
    rates = unit.new_empty(2 * num_keys)
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format) if features_grad else features.new_empty(0)
    if prototypes_grad and prototypes is not None:
        grad_prototypes = torch.empty_like(prototypes, memory_format=torch.contiguous_format)
    else:
        prototypes_grad, grad_prototypes = False, features.new_empty(0)
    members = _members(features, prototypes, None, class_counts, temperature, include_samples, include_own_class, "none", saved, None)
    results = (
        grad_loss.data_ptr(), grad_loss.dim(), rates.data_ptr(), grad.data_ptr(), grad_features.data_ptr() if features_grad else NULL,
        grad_prototypes.data_ptr() if prototypes_grad else NULL, torch.get_num_threads(),
    )  # fmt: skip
    is_one_tile = kept.shape[0] > 0
    pull = torch.empty_like(kept) if is_one_tile else unit.new_empty((_TILE, _TILE))
    exponentials = kept if is_one_tile else pull
    arguments = b""
    for place in _places(num_samples, num_keys, include_samples, is_one_tile):
        top, bottom, left, right = place
        tile = pull if is_one_tile else _cosines(unit, place, pull)
        arguments = Contrast.pack(*members, exponentials.data_ptr(), *place, NULL, is_one_tile, pull.data_ptr(), *results)
        call("contrast_pull", arguments)
        if features_grad:
            _rows(grad, top, bottom).addmm_(tile, _rows(unit, left, right))
        # the keys of the tile that are not among its rows
        first, end = max(left, bottom if features_grad else num_samples), right if prototypes_grad else min(right, num_samples)
        if first < end:
            grad[first:end].addmm_(tile[:, first - left : end - left].t(), _rows(unit, top, bottom))
    call("contrast_rows", arguments)
    return grad_features, grad_prototypes


@shapes_of("contrastive_forward", "cpu")
def _(
    features: Tensor, prototypes: Tensor | None, target: Tensor, class_counts: Tensor | None, temperature: float, include_samples: bool,
    include_own_class: bool, reduction: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    loss = features.new_empty(features.shape[0] if reduction == "none" else (), dtype=torch.float32)
    return loss, _saved(features, prototypes, include_samples)
