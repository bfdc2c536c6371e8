"""Modules whose buffers keep their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers follow ``.to(device)`` but keep their dtype under ``.half()`` and ``.to(dtype)``, also when a model that contains it is converted.

    Losses and sums compute in float32 or better, and a vector that was rounded to 16 bits would stay rounded after ``.float()``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, vector in before.items():
            moved = self._buffers[name]
            if vector is not None and moved is not None and moved.dtype != vector.dtype:
                self._buffers[name] = vector.to(moved.device)
        return self
