"""A switch for checks that need the values of tensors on a GPU, and so a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_enabled = False


def set_debug(enabled: bool) -> None:
    """Check the values of labels, weights and mixing shares on a GPU too, at the price of a synchronisation per call.

    Without it a label out of range on a GPU gives that row a loss of NaN; with it, the ValueError that CPU tensors always get.

    Example:
        >>> import gclkern
        >>> gclkern.set_debug(True)
        >>> gclkern.set_debug(False)
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    _enabled = enabled


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether a check may look at the tensor's values: always on a CPU, on a GPU in debug mode, never while a graph is traced or where there are none."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return _enabled or tensor.device.type == "cpu"
