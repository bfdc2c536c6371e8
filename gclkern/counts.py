"""Checks of what a data set's labels give: how many training samples each class has, and the whole numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# One number for each class (C,), or one label for each sample (N,).
Vector = Sequence[float] | npt.NDArray[Any] | Tensor


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int in [low, high], without an upper end for None; anything else is refused by name."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}, got {value}")
    return value


def as_vector(name: str, value: object, meaning: str) -> Tensor:
    """A one-dimensional, non-empty tensor of real numbers from a sequence, a numpy array or a tensor; a sequence of floats becomes float64."""
    if isinstance(value, Tensor):
        vector = value.detach()
    else:
        try:
            # torch.tensor copies, so a read-only array needs no warning; float64 keeps the digits of Python's floats.
            vector = torch.tensor(value, device="cpu")
            if vector.is_floating_point():
                vector = torch.tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a sequence of numbers, a numpy array or a tensor, {meaning}, got {type(value).__name__} ({error})") from error
    if vector.dtype == torch.bool or vector.is_complex():
        raise TypeError(f"{name} must hold numbers, {meaning}, got {vector.dtype}")
    if vector.dim() != 1:
        raise ValueError(f"{name} must have one dimension, {meaning}, got shape {tuple(vector.shape)}")
    if vector.numel() == 0:
        raise ValueError(f"{name} is empty, but it needs at least one value, {meaning}")
    return vector


def check_class_counts(class_counts: Vector) -> Tensor:
    """The counts as a float64 tensor (C,) on the CPU, each positive and finite. Fractions are allowed: effective or weighted counts.

    Raises:
        TypeError: not numbers.
        ValueError: not one-dimensional, empty, or a count that is not positive and finite; the message names the class.
    """
    counts = as_vector("class_counts", class_counts, "one count for each class").to("cpu", torch.float64)
    wrong = ~((counts > 0) & counts.isfinite())
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"class_counts[{index}] is {counts[index].item():g}, but every class needs a positive, finite count; "
            f"leave a class without samples out of the data set, or count it as 1"
        )
    return counts


def device_of(class_counts: Vector) -> torch.device:
    """Where a vector computed from the counts belongs: beside a tensor, else on the CPU."""
    return class_counts.device if isinstance(class_counts, Tensor) else torch.device("cpu")
