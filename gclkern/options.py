"""The options of the losses: the names, types and choices of the keywords that one layer hands to the next, each written once.

The functions of gclkern.functional spell their keywords out with their defaults. Whatever forwards keywords to them takes ``**options: Unpack[...]`` of one of
these dictionaries, so that editors complete the names and type checkers find a wrong one.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Backend = Literal["auto", "triton", "cpu", "torch"]
Plan = Literal["auto", "materialised", "chunked", "recompute"]
Reduction = Literal["mean", "sum", "none"]
Strategy = Literal["log", "power", "cosine"]
LearnedEpsilon = Literal["learned", "sqrt"]


class LossOptions(TypedDict, total=False):
    """What every loss over classes takes when it is built."""

    weight: Tensor | None  # (C,)
    label_smoothing: Tensor | float  # or (C,)
    ignore_index: int
    reduction: Reduction
    backend: Backend


class GCLOptions(LossOptions, total=False):
    """What :class:`gclkern.GCLLoss` takes when it is built."""

    noise_mul: float
    strategy: Strategy
    exponent: float | None
    scale: float
    margin: Tensor | float  # or (C,)
    gamma: float
    focal_detach: bool


class LinearGCLOptions(GCLOptions, total=False):
    """What :class:`gclkern.LinearGCLLoss` takes when it is built."""

    plan: Plan


class CrossEntropyOptions(LossOptions, total=False):
    """What :func:`gclkern.functional.gcl_cross_entropy` takes."""

    scale: float
    margin: Tensor | float | None  # or (C,)
    bias: Tensor | None  # (C,)
    target_b: Tensor | None  # (N,)
    lam: Tensor | float | None  # or (), (N,)
    gamma: float
    focal_detach: bool
    seed: Tensor | int | None
    row_offset: int
    class_offset: int


class LinearCrossEntropyOptions(CrossEntropyOptions, total=False):
    """What :func:`gclkern.functional.linear_gcl_cross_entropy` takes."""

    normalize: bool
    plan: Plan


class DROLTOptions(TypedDict, total=False):
    """What :func:`gclkern.functional.dro_lt_loss` takes."""

    temperature: float
    class_weight: Tensor | None  # (C,)
    reduction: Reduction
    backend: Backend
