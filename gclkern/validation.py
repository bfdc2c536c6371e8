"""Checks of arguments, made once before an operator is called. Each raises a TypeError or ValueError that names the argument and its value."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from torch import Tensor

from gclkern.devices import autocast_is_on, refuse_transforms, values_may_be_read
from gclkern.kernels.terms import LossTerms, statistics_dtype
from gclkern.options import Reduction
from gclkern.soft_labels import mixed_targets

# Vector: one number for each class (C,), or one label for each sample (N,); a pandas Series is one, too. ClassCounts: the same, or a dict or Counter by class.
if TYPE_CHECKING:
    import numpy.typing as npt

    Vector: TypeAlias = Sequence[float] | npt.NDArray[Any] | Tensor
    ClassCounts: TypeAlias = Vector | Mapping[int, float]
else:
    Vector = Sequence[float] | Tensor  # or a numpy array: numpy is not imported just for an annotation
    ClassCounts = Vector | Mapping[int, float]

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CLASSES = 2**35  # the noise stream counts groups of 8 classes in 32 bits


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number within [low, high], or (low, high] with `open_low`; anything else raises an error that names the argument."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor; call .item() on it (no gradient is defined for {name})")
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(value, (int, float)):
        value = float(value)
    # only comparisons, which also work on the symbolic numbers of a traced graph; NaN fails all of them
    if not (-math.inf < value < math.inf and low <= value <= high) or (open_low and value == low):
        bounds = "" if math.isinf(low) and math.isinf(high) else f" in {'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value}")
    return float(value)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int in [low, high], or at least `low` where `high` is None; anything else raises an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not isinstance(value, int):
        value = int(value)
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}, got {value}")
    return value


def check_temperature(value: object) -> float:
    """The temperature of a contrastive loss: below 1/300 float64 could not hold the exponentials of cosines."""
    return check_number("temperature", value, 1 / 300)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def as_vector(name: str, value: object, meaning: str) -> Tensor:
    """A one-dimensional, non-empty tensor of real numbers from a sequence, a numpy array or a tensor; a sequence of floats becomes float64."""
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, which has no values; pass a tensor of another device or a list")
        vector = value.detach()
    else:
        if hasattr(value, "to_numpy"):
            value = value.to_numpy()  # torch would ask a pandas Series for its items by their labels
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


def _by_class(name: str, value: object) -> object:
    """The values of a mapping or a pandas Series in the order of its keys, which must be the classes 0 to C - 1; anything else as it is."""
    if isinstance(value, Mapping):
        keys, values = list(value.keys()), list(value.values())
    elif hasattr(value, "to_numpy") and hasattr(value, "index"):
        keys, values = value.index.tolist(), value.to_numpy().tolist()
    else:
        return value
    found = {key: count for key, count in zip(keys, values, strict=True) if isinstance(key, (int, numbers.Integral)) and not isinstance(key, bool)}
    if len(found) < len(keys) or any(index not in found for index in range(len(keys))):
        wrong = next((key for key in keys if key not in found or not 0 <= key < len(keys)), None)
        raise ValueError(
            f"{name} has the key {wrong!r}, but its {len(keys)} keys must be the classes 0 to {len(keys) - 1}; "
            f"pass a list in the order of the classes, such as [{name}[class_name] for class_name in class_names]"
        )
    return [found[index] for index in range(len(keys))]


def num_classes_of(class_counts: ClassCounts) -> int:
    return class_counts.numel() if isinstance(class_counts, Tensor) else len(class_counts)


def check_class_counts(class_counts: ClassCounts) -> Tensor:
    """The counts as a float64 tensor (C,) on the CPU, each positive and finite. Fractions are allowed: effective or weighted counts.

    Raises:
        TypeError: not numbers.
        ValueError: not one-dimensional, empty, a mapping of other keys than the classes, or a count that is not positive and finite; the message names it.
    """
    counts = as_vector("class_counts", _by_class("class_counts", class_counts), "one count for each class").to("cpu", torch.float64)
    wrong = ~((counts > 0) & counts.isfinite())
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        if bool((counts >= 0).all()) and bool((counts == counts.floor()).all()) and counts.numel() > counts.max() + 1:
            raise ValueError(
                f"class_counts holds {counts.numel()} numbers from 0 to {int(counts.max())}, which look like the labels of samples; "
                f"pass the number of samples of each class: torch.bincount(labels)"
            )
        raise ValueError(
            f"class_counts[{index}] is {counts[index].item():g}, but every class needs a positive, finite count; "
            f"leave a class without samples out of the data set, or count it as 1"
        )
    return counts


def device_of(class_counts: ClassCounts) -> torch.device:
    """The device of a vector computed from the counts: that of a tensor, else the CPU."""
    return class_counts.device if isinstance(class_counts, Tensor) else torch.device("cpu")


def check_dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested:
        found = "a nested tensor; call torch.cat(tensor.unbind())" if value.is_nested else f"{value.layout}; call {name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def check_values(name: str, values: Tensor, low: float = -math.inf, high: float = math.inf, remark: str = "") -> None:
    """Where the values of a tensor () or (n,) may be read, each is a finite number in [low, high]."""
    if not values_may_be_read(values):
        return
    values = values.detach()
    smallest, largest = map(float, values.aminmax())  # NaN if any value is
    if -math.inf < smallest and low <= smallest and largest <= high and largest < math.inf:
        return
    index = ((values >= low) & (values <= high) & values.isfinite()).logical_not().nonzero()[0].tolist()
    bounds = "" if math.isinf(low) else f", at least {low:g}" if math.isinf(high) else f" in [{low:g}, {high:g}]"
    raise ValueError(f"{name}{index or ''} is {float(values[tuple(index)]):g}, but must be a finite number{bounds}{remark}")


def check_matrix(name: str, value: object) -> Tensor:
    """A non-empty, dense floating-point matrix."""
    if not isinstance(value, Tensor):
        remedy = "; pass its weight" if isinstance(getattr(value, "weight", None), Tensor) else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{remedy}")
    refuse_transforms(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    check_dense(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(value.shape)}")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def check_prototypes(prototypes: object, features: Tensor) -> Tensor:
    """One key for each class (C, D), in the dtype of the features (N, D) or of the statistics."""
    prototypes = check_matrix("prototypes", prototypes)
    check_same_device("prototypes", prototypes, "features", features)
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(f"prototypes must have the {features.shape[1]} columns of features, got shape {tuple(prototypes.shape)}")
    if prototypes.dtype not in (features.dtype, statistics_dtype(features)):
        raise TypeError(f"prototypes is {prototypes.dtype} beside features of {features.dtype}; use one dtype, or float32 prototypes")
    return prototypes


def check_last_dimension(name: str, value: Tensor, size: int) -> None:
    """Of features or logits that a layer takes; TorchScript compiles it with the layer."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}), got {list(value.shape)}")


def check_same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name} is on {value.device} but {reference_name} is on {reference.device}; move one of them")


def check_labels(name: str, target: object, rows: int, reference_name: str, reference: Tensor, *, or_soft: bool = False) -> Tensor:
    """Labels (N,) int64; their values are not checked. With `or_soft` the error for labels that are no integers says that there are soft ones."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor of class labels, got {type(target).__name__}")
    if target.is_floating_point():
        soft = ", or pass soft labels (samples, classes) as target" if or_soft else ""
        remedy = f"call {name}.long(){soft}" if target.dim() < 2 else "this loss takes no soft labels"
        raise TypeError(f"{name} must be int64, got {target.dtype} of shape {tuple(target.shape)}; {remedy}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {target.dtype}; call {name}.long()")
    check_dense(name, target)
    if target.shape != (rows,):
        remedy = f"; soft labels are floating point: call {name}.float()" if or_soft and target.dim() == 2 and target.shape[1] > 1 else ""
        raise ValueError(f"{name} must have shape ({rows},), one label for each row of {reference_name}, got {tuple(target.shape)}{remedy}")
    check_same_device(name, target, reference_name, reference)
    return target


def holds_soft_labels(target: object) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point() and target.dim() == 2


def hard_labels(
    target: Tensor, target_b: Tensor | None, lam: Tensor | float | None, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor | float | None, int]:
    """Soft labels (N, C) as two targets and a share; other targets as they are."""
    if not holds_soft_labels(target):
        return target, target_b, lam, ignore_index
    if target_b is not None or lam is not None:
        raise ValueError("target holds soft labels, which have their second class in them; leave out target_b and lam")
    return *mixed_targets(target), -100  # they hold shares of classes, none of which is ignored


def check_target(name: str, target: object, rows: int, num_classes: int, ignore_index: int | None, reference_name: str, reference: Tensor) -> Tensor:
    """Labels (N,) int64; where their values may be read, each is a class or `ignore_index`."""
    target = check_labels(name, target, rows, reference_name, reference, or_soft=ignore_index is not None)
    if values_may_be_read(target):
        low, high = target.aminmax()
        if int(low) < 0 or int(high) >= num_classes:
            wrong = target.clamp(0, num_classes - 1) != target
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
    check_dense(name, value)
    if value.shape != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), one value for each class, got {tuple(value.shape)}")
    check_same_device(name, value, reference_name, reference)
    if not differentiable:
        refuse_gradient(name, value)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()  # .to() looks the tensor over even where there is nothing to convert


def margin_vector(margin: object, num_classes: int, reference_name: str, reference: Tensor, dtype: torch.dtype) -> Tensor | None:
    if margin is None or isinstance(margin, Tensor):
        vector = class_vector("margin", margin, num_classes, reference_name, reference, dtype)
        if vector is not None:
            check_values("margin", vector)
        return vector
    value = check_number("margin", margin)
    return None if value == 0.0 else torch.full((num_classes,), value, dtype=dtype, device=reference.device)


def _check_angles(cloud: Tensor | None, margin: Tensor | None, largest_margin: float, bias: Tensor | None) -> None:
    """Margin and cloud that add to an angle: their sum may be at most pi, and only the cosines get a gradient."""
    for name, vector, most, unit in (("margin", margin, largest_margin, "radians"), ("cloud", cloud, 1.0, "right angles")):
        if vector is not None:
            check_values(name, vector, 0.0, most, f", the {unit} that are added to an angle")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias requires a gradient, but none is defined for it beside angular or difficulty_margin; pass bias.detach()")


def _smoothing(value: Tensor, num_classes: int, reference_name: str, reference: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Label smoothing of each class (C,)."""
    vector = class_vector("label_smoothing", value, num_classes, reference_name, reference, dtype)
    if vector is not None:
        check_values("label_smoothing", vector, 0.0, 1.0)
    return vector


def _mixing_share(lam: object, rows: int, reference_name: str, reference: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(lam, Tensor):
        # The number changes with every batch: torch.compile would retrace torch.full for each number, but not a product.
        return torch.ones(rows, dtype=dtype, device=reference.device) * check_number("lam", lam, 0.0, 1.0)
    if not lam.dtype.is_floating_point:
        raise TypeError(f"lam must be a number or a floating-point tensor, got {lam.dtype}")
    check_dense("lam", lam)
    if lam.shape not in ((), (rows,)):
        raise ValueError(f"lam must be a number, or a tensor of shape () or ({rows},), got {tuple(lam.shape)}")
    check_same_device("lam", lam, reference_name, reference)
    refuse_gradient("lam", lam)
    check_values("lam", lam, 0.0, 1.0)
    return lam.to(dtype).expand(rows).contiguous()


def check_offset(name: str, value: object, extent: int, limit: int) -> int:
    # while a graph is traced an int may be symbolic, which `check_int` would refuse
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not isinstance(value, (int, torch.SymInt)):
        value = int(value)
    # while a graph is traced, a check of the upper end would limit the sizes that the graph takes, which torch.export refuses
    if value < 0 or not (torch.compiler.is_compiling() or value <= limit - extent):
        raise ValueError(f"{name} must be in [0, {limit - extent}], got {value}")
    return value  # type: ignore[return-value]


def check_size(name: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if not isinstance(size, (int, torch.SymInt)):
        size = int(size)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size  # type: ignore[return-value]


def resolve_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as a 0-dim int64 tensor on `device`, without a synchronisation.

    None draws one from torch's generator of that device, so `torch.manual_seed` controls it. An int may be any 64-bit value, signed or unsigned.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}; call seed.long()")
        check_dense("seed", seed)
        if seed.dim() != 0:
            raise ValueError(f"seed must be a 0-dim tensor, got shape {tuple(seed.shape)}; pass one element of it")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device} but the noise is needed on {device}; move it there once, or pass an int")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral)):
        raise TypeError(f"seed must be None, an int or a 0-dim int64 tensor, got {seed!r}")
    if torch.compiler.is_compiling():
        # A number that changes with every step becomes a symbol, whose range is that of int64: no constant beyond it may meet the symbol.
        high = torch.full((), seed // 2**32, dtype=torch.int64, device=device)
        return high * 2**32 + seed % 2**32
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}; reduce it modulo 2**64")
    seed = int(seed)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def check_head(features: Tensor, linear_weight: Tensor, *, normalize: bool) -> Tensor:
    """The features (N, D) of a head with weights (C, D), cast to autocast's dtype where autocast is on."""
    check_matrix("features", features)
    check_matrix("linear_weight", linear_weight)
    for name, value in (("features", features), ("linear_weight", linear_weight)):
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor, of which this rank holds a part; pass {name}.full_tensor(), or call the criterion inside the forward of the module that "
                f"FSDP wraps, where the weight is whole"
            )
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


def check_epsilon(epsilon: Tensor | float, num_classes: int, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Epsilon as a tensor () or (C,) in the dtype of the statistics."""
    if not isinstance(epsilon, Tensor):
        return torch.full((), check_number("epsilon", epsilon, 0.0), dtype=dtype, device=features.device)
    if not epsilon.dtype.is_floating_point:
        raise TypeError(f"epsilon must be a number or a floating-point tensor, got {epsilon.dtype}")
    check_dense("epsilon", epsilon)
    if epsilon.shape not in ((), (num_classes,)):
        raise ValueError(f"epsilon must be a number, or a tensor of shape () or ({num_classes},), got {tuple(epsilon.shape)}")
    check_same_device("epsilon", epsilon, "features", features)
    check_values("epsilon", epsilon, 0.0)
    return epsilon.to(dtype).contiguous()


def _check_options(
    rows: int, num_classes: int, scale: object, gamma: object, label_smoothing: object, ignore_index: object, row_offset: object, class_offset: object,
    reduction: str, focal_detach: object, angular: object, difficulty_margin: object, easy_margin: object,
) -> tuple[float, float, float, int, int, int, str]:  # fmt: skip
    """The options of a loss that are not tensors."""
    switches = {"focal_detach": focal_detach, "angular": angular, "difficulty_margin": difficulty_margin, "easy_margin": easy_margin}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if angular and difficulty_margin:
        raise ValueError("angular and difficulty_margin are both True; difficulty_margin adds the margin to the angle by itself, so leave out angular")
    if easy_margin and not (angular or difficulty_margin):
        raise ValueError("easy_margin is True, but no angle is added; it needs angular=True or difficulty_margin=True")
    check_choice("reduction", reduction, REDUCTIONS)
    return (
        check_number("scale", scale, 0.0, open_low=True), check_number("gamma", gamma, 0.0), check_number("label_smoothing", label_smoothing, 0.0, 1.0),
        check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1), check_offset("row_offset", row_offset, rows, 2**63),
        check_offset("class_offset", class_offset, num_classes, MAX_CLASSES), reduction,
    )  # fmt: skip


_options_seen_before = functools.lru_cache(maxsize=64, typed=True)(_check_options)  # a training passes the same options at every step


def _checked_options(*options: Any) -> tuple[float, float, float, int, int, int, str]:
    if not torch.compiler.is_compiling():
        try:
            return _options_seen_before(*options)
        except TypeError:
            pass  # an option is wrong or cannot be hashed; checked again below, where the error names it
    return _check_options(*options)


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
    label_smoothing: Tensor | float,
    ignore_index: int,
    reduction: str,
    seed: Tensor | int | None,
    row_offset: int,
    class_offset: int,
    angular: bool = False,
    difficulty_margin: bool = False,
    easy_margin: bool = False,
) -> LossTerms:
    """The validated terms of a loss over `num_classes` classes; raises ValueError or TypeError by argument name."""
    rows = reference.shape[0]
    dtype = statistics_dtype(reference)
    smoothing = None
    if isinstance(label_smoothing, Tensor):
        smoothing, label_smoothing = _smoothing(label_smoothing, num_classes, reference_name, reference, dtype), 0.0
    switches = (focal_detach, angular, difficulty_margin, easy_margin)
    scale, gamma, label_smoothing, ignore_index, row_offset, class_offset, reduction = _checked_options(
        rows, num_classes, scale, gamma, label_smoothing, ignore_index, row_offset, class_offset, reduction, *switches
    )
    if (target_b is None) != (lam is None):
        given, missing = ("lam", "target_b") if target_b is None else ("target_b", "lam")
        raise ValueError(f"{given} is given without {missing}; two targets need both")
    if holds_soft_labels(target):
        if target.shape != (rows, num_classes):
            raise ValueError(f"target holds soft labels, so it must have shape ({rows}, {num_classes}), got {tuple(target.shape)}")
        target, target_b, lam, ignore_index = hard_labels(target, target_b, lam, ignore_index)
    weight = class_vector("weight", weight, num_classes, reference_name, reference, dtype)
    if weight is not None:
        check_values("weight", weight, 0.0)
    cloud = class_vector("cloud", cloud, num_classes, reference_name, reference, dtype)
    if cloud is not None:
        check_values("cloud", cloud, 0.0)
    margins = margin_vector(margin, num_classes, reference_name, reference, dtype)
    if angular or difficulty_margin:
        _check_angles(cloud if angular else None, margins, math.pi / 4 if difficulty_margin else math.pi / 2, bias)
    return LossTerms(
        check_target("target", target, rows, num_classes, ignore_index, reference_name, reference),
        None if target_b is None else check_target("target_b", target_b, rows, num_classes, ignore_index, reference_name, reference),
        None if target_b is None else _mixing_share(lam, rows, reference_name, reference, dtype),
        cloud,
        margins,
        class_vector("bias", bias, num_classes, reference_name, reference, dtype, differentiable=True),
        weight,
        None if cloud is None else resolve_seed(seed, reference.device),
        scale, gamma, focal_detach, label_smoothing, ignore_index, row_offset, class_offset, reduction, smoothing, angular, difficulty_margin, easy_margin,
    )  # fmt: skip
