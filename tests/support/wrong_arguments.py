"""Calls that the operations refuse: changes of a small valid call, the argument that the error names, and what it shows of its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support.cases import Options

NAN, INF = float("nan"), float("inf")
ROWS, CLASSES, WIDTH = 3, 5, 4


@dataclass(frozen=True)
class Wrong:
    named: str  # the argument, a word of the message
    error: type[Exception]
    shown: str  # what the message must hold
    changes: Options


def _labels() -> torch.Tensor:
    return torch.tensor([0, 4, 2])


VALID: dict[str, Options] = {
    "gcl_cross_entropy": {"cosine": torch.zeros(ROWS, CLASSES), "target": _labels()},
    "gcl_cross_entropy by angles": {"cosine": torch.zeros(ROWS, CLASSES), "target": _labels(), "angular": True, "margin": 0.5},
    "cloud_noise": {"seed": 7, "num_rows": 2, "num_classes": 3, "row_offset": 0, "class_offset": 0},
    **{
        name: {"features": torch.ones(ROWS, WIDTH), "linear_weight": torch.ones(CLASSES, WIDTH), "target": _labels()}
        for name in ("linear_gcl_cross_entropy materialised", "linear_gcl_cross_entropy_with_top1")
    },
    "dro_lt_loss": {"features": torch.zeros(5, 4), "target": torch.zeros(5, dtype=torch.int64), "centroids": torch.zeros(3, 4), "epsilon": 0.5},
    "supervised_contrastive": {"features": torch.ones(ROWS, WIDTH), "target": _labels(), "prototypes": torch.ones(CLASSES, WIDTH)},
    "vmf_contrast": {"cosine": torch.zeros(ROWS, CLASSES), "target": _labels(), "concentration": torch.ones(CLASSES)},
    "class_centroids": {"features": torch.zeros(3, 2), "target": torch.zeros(3, dtype=torch.int64), "num_classes": 2},
}

# Further arguments without which an argument is not checked.
_COMPANIONS: dict[str, Options] = {"seed": {"cloud": torch.ones(CLASSES)}, "target_b": {"lam": 0.5}, "lam": {"target_b": torch.tensor([1, 1, 1])}}


def _values(*pairs: tuple[str, object]) -> list[Wrong]:
    return [Wrong(name, ValueError, str(value), _COMPANIONS.get(name, {}) | {name: value}) for name, value in pairs]


def _types(*pairs: tuple[str, object]) -> list[Wrong]:
    return [Wrong(name, TypeError, "", _COMPANIONS.get(name, {}) | {name: value}) for name, value in pairs]


def _tensors(error: type[Exception], name: str, *tensors: torch.Tensor) -> list[Wrong]:
    """Tensors of a wrong dtype, or of a wrong shape."""
    return [
        Wrong(name, error, str(tensor.dtype if error is TypeError else tuple(tensor.shape)), _COMPANIONS.get(name, {}) | {name: tensor}) for tensor in tensors
    ]


_VECTORS = ("cloud", "margin", "bias", "weight")
_LABELS = ("target", "target_b")
_ON_META: dict[str, torch.Tensor] = {
    **{name: torch.ones(CLASSES) for name in _VECTORS}, **{name: torch.zeros(ROWS, dtype=torch.int64) for name in _LABELS}, "lam": torch.ones(ROWS),
    "seed": torch.tensor(7),
}  # fmt: skip

# Of both cross entropies.
FAMILY: tuple[Wrong, ...] = (
    *_values(
        ("scale", 0.0), ("scale", -1.0), ("scale", NAN), ("scale", INF), ("gamma", -0.5), ("gamma", NAN), ("gamma", INF), ("label_smoothing", -0.1),
        ("label_smoothing", 1.5), ("label_smoothing", NAN), ("margin", NAN), ("margin", INF), ("row_offset", -1), ("row_offset", 2**63), ("class_offset", -1),
        ("class_offset", 2**63), ("seed", 2**64), ("seed", -(2**63) - 1), ("reduction", "average"), ("reduction", None), ("backend", "cuda"),
        ("backend", "numpy"), ("lam", -0.1), ("lam", 1.5), ("lam", NAN),
    ),
    *_types(
        ("scale", "30"), ("scale", None), ("scale", torch.tensor(30.0)), ("gamma", None), ("label_smoothing", "0.1"), ("margin", "0.1"), ("focal_detach", 1),
        ("focal_detach", None), ("ignore_index", 1.5), ("ignore_index", None), ("row_offset", 1.0), ("class_offset", 2.5), ("seed", 1.5), ("seed", "7"),
        ("cloud", 0.5), ("cloud", [0.5] * CLASSES), ("bias", 1.0), ("weight", [1.0] * CLASSES), ("target", [0, 4, 2]), ("target_b", [0, 4, 2]), ("lam", "0.5"),
        ("lam", torch.ones(ROWS, dtype=torch.int64)),
    ),
    *(wrong for name in _VECTORS for wrong in _tensors(ValueError, name, *(torch.ones(shape) for shape in ((CLASSES + 1,), (1,), (), (1, CLASSES))))),
    *(wrong for name in _VECTORS for wrong in _tensors(TypeError, name, torch.ones(CLASSES, dtype=torch.int64))),
    *(Wrong(name, ValueError, "meta", _COMPANIONS.get(name, {}) | {name: value.to("meta")}) for name, value in _ON_META.items()),  # any other device
    *(
        Wrong(name, ValueError, f"{name}[2] is {value}, but must be a finite number", {name: torch.tensor([1.0, 1.0, value, 1.0, 1.0])})
        for name, values in (("cloud", (-0.1, -INF, INF, NAN)), ("weight", (-0.1, -INF, INF, NAN)), ("margin", (-INF, INF, NAN)))
        for value in values
    ),
    *(
        Wrong(name, TypeError, "must be a dense tensor", _COMPANIONS.get(name, {}) | {name: value.to_sparse()})
        for name, value in _ON_META.items()
    ),
    *(
        Wrong(name, ValueError, "requires a gradient", _COMPANIONS.get(name, {}) | {name: torch.full((size,), 0.5, requires_grad=True)})
        for name, size in (("cloud", CLASSES), ("margin", CLASSES), ("weight", CLASSES), ("lam", ROWS))
    ),
    *(
        Wrong(name, ValueError, str(wrong), _COMPANIONS.get(name, {}) | {name: torch.tensor([0, wrong, 2])})
        for name in _LABELS
        for wrong in (CLASSES, -1, 10**12, -(2**40))
    ),
    Wrong("target", ValueError, "-100", {"target": torch.tensor([0, -100, 2]), "ignore_index": -1}),  # the ignored label is the only one out of range
    *(
        wrong
        for name in _LABELS
        for shape in ((ROWS + 1,), (1,), (), (ROWS, 1), (ROWS, CLASSES))
        for wrong in _tensors(ValueError, name, torch.zeros(shape, dtype=torch.int64))
    ),
    *(wrong for name in _LABELS for dtype in (torch.int32, torch.float32, torch.bool) for wrong in _tensors(TypeError, name, torch.zeros(ROWS, dtype=dtype))),
    Wrong("lam", ValueError, "target_b", {"target_b": torch.tensor([1, 1, 1])}),
    Wrong("target_b", ValueError, "lam", {"lam": 0.5}),
    *(
        Wrong("lam", ValueError, str(share)[:4], {"target_b": torch.tensor([1, 1, 1]), "lam": torch.tensor([0.5, share, 1.0])}) for share in (-0.1, 1.5, NAN)
    ),
    *_tensors(ValueError, "lam", *(torch.full(shape, 0.5) for shape in ((ROWS + 1,), (1,), (ROWS, 1)))),
    *_tensors(ValueError, "seed", torch.tensor([1]), torch.tensor([[1, 2]])),
    *_tensors(TypeError, "seed", torch.tensor(1, dtype=torch.int32), torch.tensor(1.0)),
)  # fmt: skip

LOGITS: tuple[Wrong, ...] = (
    *_tensors(ValueError, "cosine", *(torch.zeros(shape) for shape in ((0, CLASSES), (ROWS, 0), (0, 0), (CLASSES,), (2, ROWS, CLASSES), ()))),
    *(
        Wrong("cosine", TypeError, str(dtype), {"cosine": torch.zeros(ROWS, CLASSES, dtype=dtype)})
        for dtype in (torch.int64, torch.complex64, torch.bool)
    ),
    Wrong("cosine", TypeError, "", {"cosine": [[0.0, 1.0]]}),
)  # fmt: skip


ANGLES: tuple[Wrong, ...] = (
    *_types(("angular", 1), ("difficulty_margin", None), ("easy_margin", "yes")),
    Wrong("easy_margin", ValueError, "True", {"easy_margin": True, "angular": False}),
    Wrong("margin", ValueError, "1.6", {"margin": 1.6}),
    Wrong("margin", ValueError, "-0.1", {"margin": torch.tensor([0.0, -0.1, 0.0, 0.0, 0.0])}),
    Wrong("margin", ValueError, "0.8", {"margin": 0.8, "difficulty_margin": True, "angular": False}),
    Wrong("difficulty_margin", ValueError, "angular", {"difficulty_margin": True}),
    Wrong("cloud", ValueError, "1.5", {"cloud": torch.full((CLASSES,), 1.5)}),
    Wrong("bias", ValueError, "requires a gradient", {"bias": torch.zeros(CLASSES, requires_grad=True)}),
)  # fmt: skip


def _shapes(features: tuple[int, ...], linear_weight: tuple[int, ...], named: str) -> Wrong:
    shown = str(features if named == "features" else linear_weight)
    return Wrong(named, ValueError, shown, {"features": torch.ones(features), "linear_weight": torch.ones(linear_weight)})


def _dtypes(features: torch.dtype, linear_weight: torch.dtype) -> Wrong:
    named, shown = ("features", features) if features == torch.int64 else ("linear_weight", linear_weight)
    changes = {"features": torch.ones(ROWS, WIDTH, dtype=features), "linear_weight": torch.ones(CLASSES, WIDTH, dtype=linear_weight)}
    return Wrong(named, TypeError, str(shown), changes)


HEAD: tuple[Wrong, ...] = (
    _shapes((0, WIDTH), (CLASSES, WIDTH), "features"),
    _shapes((ROWS, 0), (CLASSES, 0), "features"),
    _shapes((ROWS, WIDTH), (0, WIDTH), "linear_weight"),
    _shapes((WIDTH,), (CLASSES, WIDTH), "features"),
    _shapes((ROWS, WIDTH), (WIDTH,), "linear_weight"),
    _shapes((2, ROWS, WIDTH), (CLASSES, WIDTH), "features"),
    _shapes((ROWS, WIDTH), (CLASSES, WIDTH + 1), "linear_weight"),
    _shapes((ROWS, WIDTH), (WIDTH, CLASSES), "linear_weight"),
    _dtypes(torch.float32, torch.bfloat16),
    _dtypes(torch.float16, torch.bfloat16),
    _dtypes(torch.bfloat16, torch.float16),
    _dtypes(torch.float64, torch.float32),
    _dtypes(torch.float32, torch.float64),
    _dtypes(torch.bfloat16, torch.float64),
    _dtypes(torch.int64, torch.float32),
    _dtypes(torch.float32, torch.int64),
    Wrong("linear_weight", ValueError, "meta", {"linear_weight": torch.ones(CLASSES, WIDTH, device="meta")}),
    *(Wrong("plan", ValueError, repr(plan), {"plan": plan}) for plan in ("fused", "", None)),
    *(Wrong("normalize", TypeError, repr(value), {"normalize": value}) for value in (1, None, "yes")),
)

BOUND: tuple[Wrong, ...] = (
    Wrong("features", ValueError, "must have 2 dimensions", {"features": torch.zeros(5)}),
    Wrong("features", TypeError, "must be float32", {"features": torch.zeros(5, 4, dtype=torch.int32)}),
    Wrong("features", ValueError, "must not be empty", {"features": torch.zeros(0, 4)}),
    Wrong("centroids", ValueError, "must have the 4 columns of features", {"centroids": torch.zeros(3, 5)}),
    Wrong("centroids", ValueError, "detach", {"centroids": torch.zeros(3, 4, requires_grad=True)}),
    Wrong("centroids", ValueError, "meta", {"centroids": torch.zeros(3, 4, device="meta")}),
    Wrong("target", TypeError, "must be int64", {"target": torch.zeros(5)}),
    Wrong("target", ValueError, "must have shape (5,)", {"target": torch.zeros(4, dtype=torch.int64)}),
    Wrong("target", ValueError, "target[2] is 3", {"target": torch.tensor([0, 1, 3, 0, 0])}),
    Wrong("target", ValueError, "target[3] is -100", {"target": torch.tensor([0, 1, 2, -100, 0])}),
    Wrong("epsilon", ValueError, "a number, or a tensor of shape () or (3,), got (2,)", {"epsilon": torch.zeros(2)}),
    Wrong("epsilon", TypeError, "a number or a floating-point tensor", {"epsilon": torch.zeros(3, dtype=torch.int64)}),
    Wrong("epsilon", ValueError, "a finite number", {"epsilon": -0.5}),
    *(
        Wrong(name, ValueError, f"{name}[1] is {value}, but must be a finite number, at least 0", {name: torch.tensor([0.5, value, 0.0])})
        for name in ("epsilon", "class_weight")
        for value in (-0.25, INF, NAN)
    ),
    Wrong("epsilon", ValueError, "epsilon is -0.25, but must be a finite number, at least 0", {"epsilon": torch.tensor(-0.25)}),
    *(Wrong(name, TypeError, "must be a dense tensor", {name: torch.ones(3).to_sparse()}) for name in ("epsilon", "class_weight")),
    Wrong("temperature", ValueError, "a finite number", {"temperature": 0.0}),
    Wrong("temperature", TypeError, "a number", {"temperature": torch.tensor(1.0)}),
    Wrong("class_weight", ValueError, "must have shape (3,)", {"class_weight": torch.ones(4)}),
    Wrong("class_weight", ValueError, "requires a gradient", {"class_weight": torch.ones(3, requires_grad=True)}),
    Wrong("reduction", ValueError, "must be one of", {"reduction": "average"}),
    Wrong("backend", ValueError, "must be one of", {"backend": "cuda"}),
)

CONTRASTIVE: tuple[Wrong, ...] = (
    *_values(
        ("temperature", 0.0), ("temperature", -1.0), ("temperature", 0.003), ("temperature", NAN), ("temperature", INF), ("reduction", "average"),
        ("reduction", None), ("backend", "cuda"), ("backend", None),
    ),
    *_types(
        ("features", [[1.0] * WIDTH] * ROWS), ("prototypes", [[1.0] * WIDTH] * CLASSES), ("target", [0, 4, 2]), ("class_counts", [1.0] * CLASSES),
        ("temperature", "0.1"), ("temperature", None), ("temperature", True), ("temperature", torch.tensor(0.1)), ("include_samples", 1),
        ("include_samples", None), ("include_own_class", 0), ("include_own_class", "no"),
    ),
    *_tensors(ValueError, "features", *(torch.ones(shape) for shape in ((WIDTH,), (0, WIDTH), (ROWS, 0), (2, ROWS, WIDTH)))),
    *_tensors(ValueError, "prototypes", *(torch.ones(shape) for shape in ((WIDTH,), (0, WIDTH), (CLASSES, WIDTH + 1), (1, CLASSES, WIDTH)))),
    *(
        wrong
        for name, shape in (("features", (ROWS, WIDTH)), ("prototypes", (CLASSES, WIDTH)))
        for dtype in (torch.int64, torch.complex64, torch.bool)
        for wrong in _tensors(TypeError, name, torch.ones(shape, dtype=dtype))
    ),
    *_tensors(TypeError, "prototypes", torch.ones(CLASSES, WIDTH, dtype=torch.float16), torch.ones(CLASSES, WIDTH, dtype=torch.float64)),
    *_tensors(ValueError, "target", *(torch.zeros(shape, dtype=torch.int64) for shape in ((ROWS + 1,), (), (ROWS, 1)))),
    *_tensors(TypeError, "target", *(torch.zeros(ROWS, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.bool))),
    Wrong("target", TypeError, "takes no soft labels", {"target": torch.ones(ROWS, CLASSES)}),
    *(Wrong("target", ValueError, f"target[1] is {wrong}", {"target": torch.tensor([0, wrong, 2])}) for wrong in (CLASSES, -1, -100, 10**12)),
    Wrong("target", ValueError, f"target[1] is {CLASSES}", {"target": torch.tensor([0, CLASSES, 2]), "prototypes": None, "class_counts": torch.ones(CLASSES)}),
    *_tensors(ValueError, "class_counts", *(torch.ones(shape) for shape in ((CLASSES + 1,), (), (CLASSES, 1)))),
    *_tensors(TypeError, "class_counts", torch.ones(CLASSES, dtype=torch.complex64)),
    *(
        Wrong("class_counts", ValueError, f"class_counts[1] is {shown}", {"class_counts": torch.tensor([1.0, value, 1.0, 1.0, 1.0])})
        for value, shown in ((0.5, "0.5"), (-3.0, "-3"), (NAN, "nan"), (INF, "inf"))
    ),
    Wrong("class_counts", ValueError, "requires a gradient", {"class_counts": torch.ones(CLASSES, requires_grad=True)}),
    *(
        Wrong(name, ValueError, "meta", {name: value.to("meta")})
        for name, value in (("prototypes", torch.ones(CLASSES, WIDTH)), ("target", _labels()), ("class_counts", torch.ones(CLASSES)))
    ),
    Wrong("prototypes", ValueError, "no keys", {"prototypes": None, "include_samples": False}),
)  # fmt: skip

# Its module checks the rest, see test_proco.py.
CONTRAST: tuple[Wrong, ...] = (
    *_tensors(ValueError, "cosine", *(torch.zeros(shape) for shape in ((CLASSES,), (0, CLASSES), (ROWS, 0), (1, ROWS, CLASSES)))),
    *_tensors(TypeError, "cosine", *(torch.zeros(ROWS, CLASSES, dtype=dtype) for dtype in (torch.int64, torch.complex64, torch.bool))),
    *_values(("backend", "cuda"), ("backend", "cpu"), ("backend", None)),
    Wrong("concentration", ValueError, "requires a gradient", {"concentration": torch.ones(CLASSES, requires_grad=True)}),
)


def _centroids(named: str, error: type[Exception], shown: str, features: torch.Tensor, target: torch.Tensor, num_classes: Any = 2) -> Wrong:
    return Wrong(named, error, shown, {"features": features, "target": target, "num_classes": num_classes})


_ZEROS = torch.zeros(3, dtype=torch.int64)

CENTROIDS: tuple[Wrong, ...] = (
    _centroids("features", ValueError, "must have 2 dimensions", torch.zeros(3), _ZEROS),
    _centroids("features", ValueError, "must not be empty", torch.zeros(0, 3), _ZEROS[:0]),
    _centroids("features", ValueError, "detach", torch.zeros(3, 2, requires_grad=True), _ZEROS),
    _centroids("target", TypeError, "must be int64", torch.zeros(3, 2), torch.zeros(3)),
    _centroids("target", TypeError, "must be a dense tensor", torch.zeros(3, 2), _ZEROS.to_sparse()),
    _centroids("target", ValueError, "target[1] is 2", torch.zeros(3, 2), torch.tensor([0, 2, 1])),
    _centroids("target", ValueError, "target[2] is -1", torch.zeros(3, 2), torch.tensor([0, 1, -1])),
    _centroids("num_classes", ValueError, "must be at least 1, got 0", torch.zeros(3, 2), _ZEROS, 0),
    _centroids("num_classes", TypeError, "must be an int", torch.zeros(3, 2), _ZEROS, 2.0),
)

NOISE: tuple[Wrong, ...] = (
    *(
        Wrong("seed", TypeError if of_a_type else ValueError, shown, {"seed": value})
        for value, of_a_type, shown in (
            (1.0, True, "1.0"), (True, True, "True"), (torch.tensor(1, dtype=torch.int32), True, "int32"), (torch.tensor([1]), False, "(1,)"),
            (2**64, False, str(2**64)), (-(2**63) - 1, False, str(-(2**63) - 1)),
        )
    ),
    *_types(("num_rows", 2.0), ("num_classes", True), ("row_offset", 1.5)),
    *_values(("num_rows", 0), ("num_classes", -1), ("row_offset", -1), ("row_offset", 2**63), ("class_offset", 2**35 - 2)),
)  # fmt: skip
