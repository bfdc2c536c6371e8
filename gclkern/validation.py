"""Checks of the arguments of a loss, made once, before any operator sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gclkern.backend import autocast_is_on
from gclkern.debug import values_may_be_read
from gclkern.kernels.terms import LossTerms
from gclkern.noise import resolve_seed

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CLASSES = 2**35  # the noise stream counts groups of 8 classes in 32 bits


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number within [low, high], or (low, high] with `open_low`; anything else is refused by name."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor; call .item() on it (no gradient is defined for {name})")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # comparisons alone, which a traced graph of symbolic numbers can take; NaN fails them all
    if not (-math.inf < value < math.inf and low <= value <= high) or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be a finite number in {bounds}, got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_matrix(name: str, value: object) -> Tensor:
    """A non-empty floating-point matrix."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(value.shape)}")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def check_same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name} is on {value.device} but {reference_name} is on {reference.device}; move one of them")


def check_labels(name: str, target: object, rows: int, reference_name: str, reference: Tensor) -> Tensor:
    """Labels (N,) int64, of whatever values."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor of class labels, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {target.dtype}; call {name}.long()")
    if target.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one label for each row of {reference_name}, got {tuple(target.shape)}")
    check_same_device(name, target, reference_name, reference)
    return target


def check_target(name: str, target: object, rows: int, num_classes: int, ignore_index: int | None, reference_name: str, reference: Tensor) -> Tensor:
    """Labels (N,) int64; where their values may be read, each is a class or `ignore_index`."""
    target = check_labels(name, target, rows, reference_name, reference)
    if values_may_be_read(target):
        wrong = target.clamp(0, num_classes - 1) != target
        if bool(wrong.any()):
            found = (wrong if ignore_index is None else wrong & (target != ignore_index)).nonzero()
            if found.numel() > 0:
                row = int(found[0])
                allowed = f"[0, {num_classes})" + ("" if ignore_index is None else f" or ignore_index ({ignore_index})")
                raise ValueError(f"{name}[{row}] is {int(target[row])}, but labels must be in {allowed}")
    return target.contiguous()


def refuse_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but none is defined for it; pass {name}.detach()")


def class_vector(
    name: str, value: object, num_classes: int, reference_name: str, reference: Tensor, dtype: torch.dtype, *, differentiable: bool = False
) -> Tensor | None:
    """One value for each class, (C,), in the dtype of the statistics."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({num_classes},) or None, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.shape != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), one value for each class, got {tuple(value.shape)}")
    check_same_device(name, value, reference_name, reference)
    if not differentiable:
        refuse_gradient(name, value)
    return value.to(dtype).contiguous()


def _margin_vector(margin: object, num_classes: int, reference_name: str, reference: Tensor, dtype: torch.dtype) -> Tensor | None:
    if margin is None or isinstance(margin, Tensor):
        return class_vector("margin", margin, num_classes, reference_name, reference, dtype)
    value = check_number("margin", margin)
    return None if value == 0.0 else torch.full((num_classes,), value, dtype=dtype, device=reference.device)


def _mixing_share(lam: object, rows: int, reference_name: str, reference: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(lam, Tensor):
        # A number that changes with every batch: a traced graph takes it into a product as it comes, but torch.full would be traced again for each.
        return torch.ones(rows, dtype=dtype, device=reference.device) * check_number("lam", lam, 0.0, 1.0)
    if not lam.dtype.is_floating_point:
        raise TypeError(f"lam must be a number or a floating-point tensor, got {lam.dtype}")
    if lam.shape not in ((), (rows,)):
        raise ValueError(f"lam must be a number, or a tensor of shape () or ({rows},), got {tuple(lam.shape)}")
    check_same_device("lam", lam, reference_name, reference)
    refuse_gradient("lam", lam)
    if values_may_be_read(lam):
        wrong = ~((lam >= 0) & (lam <= 1))
        if bool(wrong.any()):
            raise ValueError(f"lam must be in [0, 1], got {float(lam[wrong][0])}")
    return lam.to(dtype).expand(rows).contiguous()


def check_offset(name: str, value: object, extent: int, limit: int) -> int:
    # while a graph is traced an int may be symbolic, which `check_int` would refuse
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    # while a graph is traced the upper end would bound its extent, which torch.export refuses
    if value < 0 or not (torch.compiler.is_compiling() or value <= limit - extent):
        raise ValueError(f"{name} must be in [0, {limit - extent}], got {value}")
    return value  # type: ignore[return-value]


def check_head(features: Tensor, linear_weight: Tensor, *, normalize: bool) -> Tensor:
    """The features (N, D) of a head with weights (C, D), in autocast's dtype where that is on."""
    check_matrix("features", features)
    check_matrix("linear_weight", linear_weight)
    check_same_device("linear_weight", linear_weight, "features", features)
    if features.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            f"linear_weight must have shape (classes, {features.shape[1]}) to match features of shape {tuple(features.shape)}, got {tuple(linear_weight.shape)}"
        )
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {normalize!r}")
    device_type = features.device.type
    if autocast_is_on(device_type) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(device_type))
    if features.dtype != linear_weight.dtype and (features.dtype.itemsize != 2 or linear_weight.dtype != torch.float32):
        raise TypeError(f"linear_weight is {linear_weight.dtype} beside features of {features.dtype}; use one dtype, or 16-bit features with float32 weights")
    return features


def loss_terms(
    reference_name: str,
    reference: Tensor,  # (N, ...) the matrix whose rows are the samples
    num_classes: int,
    target: Tensor,
    cloud: Tensor | None,
    *,
    scale: float,
    margin: Tensor | float | None,
    bias: Tensor | None,
    weight: Tensor | None,
    target_b: Tensor | None,
    lam: Tensor | float | None,
    gamma: float,
    focal_detach: bool,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    seed: Tensor | int | None,
    row_offset: int,
    class_offset: int,
) -> LossTerms:
    """The validated terms of a loss over `num_classes` classes; raises ValueError or TypeError by argument name."""
    rows = reference.shape[0]
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(focal_detach, bool):
        raise TypeError(f"focal_detach must be True or False, got {focal_detach!r}")
    check_choice("reduction", reduction, REDUCTIONS)
    if (target_b is None) != (lam is None):
        given, missing = ("lam", "target_b") if target_b is None else ("target_b", "lam")
        raise ValueError(f"{given} is given without {missing}; two targets need both")
    weight = class_vector("weight", weight, num_classes, reference_name, reference, dtype)
    if weight is not None and values_may_be_read(weight):
        wrong = ~(weight >= 0)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(f"weight[{index}] is {float(weight[index])}, but class weights must not be negative")
    cloud = class_vector("cloud", cloud, num_classes, reference_name, reference, dtype)
    return LossTerms(
        target=check_target("target", target, rows, num_classes, ignore_index, reference_name, reference),
        target_b=None if target_b is None else check_target("target_b", target_b, rows, num_classes, ignore_index, reference_name, reference),
        lam=None if target_b is None else _mixing_share(lam, rows, reference_name, reference, dtype),
        cloud=cloud,
        margin=_margin_vector(margin, num_classes, reference_name, reference, dtype),
        bias=class_vector("bias", bias, num_classes, reference_name, reference, dtype, differentiable=True),
        weight=weight,
        seed=None if cloud is None else resolve_seed(seed, reference.device),
        scale=check_number("scale", scale, 0.0, open_low=True),
        gamma=check_number("gamma", gamma, 0.0),
        focal_detach=focal_detach,
        label_smoothing=check_number("label_smoothing", label_smoothing, 0.0, 1.0),
        ignore_index=ignore_index,
        row_offset=check_offset("row_offset", row_offset, rows, 2**63),
        class_offset=check_offset("class_offset", class_offset, num_classes, MAX_CLASSES),
        reduction=reduction,
    )
