"""The options of the losses: names, types and allowed values of keyword arguments, each defined once.

The functions of gclkern.functional list their keywords with their defaults. Functions and modules that forward keywords to them take
``**options: Unpack[...]`` with one of the dictionaries below, so that editors complete the names and type checkers find wrong ones.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Backend = Literal["auto", "triton", "cpu", "torch"]
Plan = Literal["auto", "materialised", "chunked", "recompute"]
Reduction = Literal["mean", "sum", "none"]
Strategy = Literal["log", "power", "cosine"]
LearnedEpsilon = Literal["learned", "sqrt"]
SmoothingShape = Literal["concave", "linear", "convex"]


class LossOptions(TypedDict, total=False):
    """Arguments of every loss module over classes."""

    weight: Tensor | None  # (C,)
    label_smoothing: Tensor | float  # or (C,)
    ignore_index: int
    reduction: Reduction
    backend: Backend


class GCLOptions(LossOptions, total=False):
    """Arguments of :class:`gclkern.GCLLoss`."""

    noise_mul: float
    strategy: Strategy
    exponent: float | None
    scale: float
    margin: Tensor | float  # or (C,)
    gamma: float
    focal_detach: bool
    angular: bool
    difficulty_margin: bool
    easy_margin: bool
    tau: float


class LinearGCLOptions(GCLOptions, total=False):
    """Arguments of :class:`gclkern.LinearGCLLoss`."""

    plan: Plan


class CrossEntropyOptions(LossOptions, total=False):
    """Keywords of :func:`gclkern.functional.gcl_cross_entropy`."""

    scale: float
    margin: Tensor | float | None  # or (C,)
    bias: Tensor | None  # (C,)
    target_b: Tensor | None  # (N,)
    lam: Tensor | float | None  # or (), (N,)
    gamma: float
    focal_detach: bool
    angular: bool
    difficulty_margin: bool
    easy_margin: bool
    seed: Tensor | int | None
    row_offset: int
    class_offset: int


class LinearCrossEntropyOptions(CrossEntropyOptions, total=False):
    """Keywords of :func:`gclkern.functional.linear_gcl_cross_entropy`."""

    normalize: bool
    plan: Plan


class DROLTOptions(TypedDict, total=False):
    """Keywords of :func:`gclkern.functional.dro_lt_loss`."""

    temperature: float
    class_weight: Tensor | None  # (C,)
    reduction: Reduction
    backend: Backend
