"""Sums of feature rows by class, each in double precision and in an order that does not depend on the number of threads.

Where the sums of all classes fit the cache, rows are read as they lie, a part of them by each thread. Otherwise they are ordered by class, so
that one class's sums at a time are in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DONE, DTYPES, Segments, address, call
from gclkern.kernels.terms import implements

_CACHED = 2**15  # sums that a core's second-level cache holds, in double precision, beside the rows
_MAX_PARTS = 8  # of the rows; it fixes the order of additions, so it must not depend on the number of threads
_ROWS_OF_A_CLASS = 4  # in each part: with fewer, sums of parts cost more than they save


@implements("segment_sums", "cpu")
def segment_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The same as gclkern.kernels.centroids.segment_sums."""
    sums, counts, _ = sums_or_means(features, target, num_classes, means=False)
    return sums, counts


def sums_or_means(features: Tensor, target: Tensor, num_classes: int, *, means: bool) -> tuple[Tensor, Tensor, bool]:
    """The sums of the rows of each class, or their means; the counts; and whether all labels are classes."""
    rows, dim = features.shape
    target = target.contiguous()
    sums, counts = torch.empty((num_classes, dim), dtype=torch.float32, device="cpu"), target.new_empty(num_classes)
    parts = order = starts = None
    num_parts = min(_MAX_PARTS, rows // (_ROWS_OF_A_CLASS * num_classes)) if num_classes * dim <= _CACHED else 0
    if num_parts > 0:
        parts = torch.empty((num_parts, num_classes, dim), dtype=torch.float64, device="cpu")
    else:
        order, starts = target.new_empty(rows), target.new_empty(num_classes + 1)
    result = call(
        "segment_sums",
        Segments.pack(
            rows, num_classes, dim, features.data_ptr(), DTYPES[features.dtype], *features.stride(), *map(address, (target, order, starts, parts)),
            num_parts, sums.data_ptr(), counts.data_ptr(), means, torch.get_num_threads(),
        ),
    )  # fmt: skip
    return sums, counts, result == DONE
