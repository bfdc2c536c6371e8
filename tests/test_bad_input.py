"""Every wrong argument of the two cross entropies is refused by name, with its value, before anything is computed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from gclkern.devices import set_debug
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy

NAN, INF = float("nan"), float("inf")
ROWS, CLASSES, WIDTH = 3, 5, 4


def inputs(**changes: Any) -> dict[str, Any]:
    """A valid call of either loss, with some arguments changed."""
    return {"target": torch.tensor([0, 4, 2]), **changes}


@pytest.fixture(params=["gcl_cross_entropy", "linear_gcl_cross_entropy"])
def loss(request: pytest.FixtureRequest) -> Any:
    """Both losses by the arguments that they share."""

    def logits(**arguments: Any) -> Tensor:
        arguments.setdefault("cosine", torch.zeros(ROWS, CLASSES))
        return gcl_cross_entropy(arguments.pop("cosine"), arguments.pop("target"), arguments.pop("cloud", None), **arguments)

    def head(**arguments: Any) -> Tensor:
        return linear_gcl_cross_entropy(torch.ones(ROWS, WIDTH), torch.ones(CLASSES, WIDTH), arguments.pop("target"), arguments.pop("cloud", None), **arguments)

    return logits if request.param == "gcl_cross_entropy" else head


def check(error: type[Exception], named: str, shown: str, call: Any, **arguments: Any) -> None:
    """`call(**arguments)` raises `error`, whose message holds the argument's name as a word and its value as `shown`."""
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b{named}\b", message), f"{named!r} is not named in {message!r}"
    assert shown in message, f"{shown!r} is not shown in {message!r}"


def test_the_valid_call_is_valid(loss: Any) -> None:
    assert loss(**inputs()).isfinite()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 0.0), ("scale", -1.0), ("scale", NAN), ("scale", INF),
        ("gamma", -0.5), ("gamma", NAN), ("gamma", INF),
        ("label_smoothing", -0.1), ("label_smoothing", 1.5), ("label_smoothing", NAN),
        ("margin", NAN), ("margin", INF),
        ("row_offset", -1), ("row_offset", 2**63), ("class_offset", -1), ("class_offset", 2**63),
        ("seed", 2**64), ("seed", -(2**63) - 1),
        ("reduction", "average"), ("reduction", None), ("backend", "cuda"), ("backend", "numpy"),
    ],
)  # fmt: skip
def test_values(loss: Any, name: str, value: object) -> None:
    # The seed is looked at where there is noise to draw.
    extra = {"cloud": torch.ones(CLASSES)} if name == "seed" else {}
    check(ValueError, name, str(value), loss, **inputs(**extra, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", "30"), ("scale", None), ("scale", torch.tensor(30.0)), ("gamma", None), ("label_smoothing", "0.1"), ("margin", "0.1"),
        ("focal_detach", 1), ("focal_detach", None), ("ignore_index", 1.5), ("ignore_index", None),
        ("row_offset", 1.0), ("class_offset", 2.5), ("seed", 1.5), ("seed", "7"),
        ("cloud", 0.5), ("cloud", [0.5] * CLASSES), ("bias", 1.0), ("weight", [1.0] * CLASSES), ("target", [0, 4, 2]), ("target_b", [0, 4, 2]),
    ],
)  # fmt: skip
def test_types(loss: Any, name: str, value: object) -> None:
    extra: dict[str, Any] = {"cloud": torch.ones(CLASSES)} if name == "seed" else {"lam": 0.5} if name == "target_b" else {}
    check(TypeError, name, "", loss, **inputs(**extra) | {name: value})


@pytest.mark.parametrize("name", ["cloud", "margin", "bias", "weight"])
@pytest.mark.parametrize("shape", [(CLASSES + 1,), (1,), (), (1, CLASSES)])
def test_shapes_of_class_vectors(loss: Any, name: str, shape: tuple[int, ...]) -> None:
    check(ValueError, name, str(shape), loss, **inputs(**{name: torch.ones(shape)}))


@pytest.mark.parametrize("name", ["cloud", "margin", "bias", "weight"])
def test_dtypes_of_class_vectors(loss: Any, name: str) -> None:
    check(TypeError, name, "int64", loss, **inputs(**{name: torch.ones(CLASSES, dtype=torch.int64)}))


@pytest.mark.parametrize("name", ["cloud", "margin", "bias", "weight", "target", "target_b", "lam", "seed"])
def test_devices(loss: Any, name: str) -> None:
    """The meta device stands for any other one."""
    values = {"target": torch.zeros(ROWS, dtype=torch.int64), "target_b": torch.zeros(ROWS, dtype=torch.int64), "lam": torch.ones(ROWS)}
    elsewhere = values.get(name, torch.tensor(7) if name == "seed" else torch.ones(CLASSES)).to("meta")
    companions: dict[str, dict[str, Any]] = {"seed": {"cloud": torch.ones(CLASSES)}, "target_b": {"lam": 0.5}, "lam": {"target_b": values["target_b"]}}
    extra = companions.get(name, {})
    check(ValueError, name, "meta", loss, **inputs(**extra) | {name: elsewhere})


@pytest.mark.parametrize("value", [-0.1, -INF, NAN])
def test_negative_weights(loss: Any, value: float) -> None:
    check(ValueError, "weight", str(value)[:4], loss, **inputs(weight=torch.tensor([1.0, 1.0, value, 1.0, 1.0])))


@pytest.mark.parametrize("name", ["cloud", "margin", "weight", "lam"])
def test_gradients_that_are_not_defined(loss: Any, name: str) -> None:
    extra = {"target_b": torch.tensor([1, 1, 1])} if name == "lam" else {}
    value = torch.full((ROWS if name == "lam" else CLASSES,), 0.5, requires_grad=True)
    check(ValueError, name, "requires a gradient", loss, **inputs(**extra) | {name: value})


# ---- labels


@pytest.mark.parametrize("name", ["target", "target_b"])
@pytest.mark.parametrize("wrong", [CLASSES, -1, 10**12, -(2**40)])
def test_labels_out_of_range(loss: Any, name: str, wrong: int) -> None:
    labels = torch.tensor([0, wrong, 2])
    extra = {"lam": 0.5} if name == "target_b" else {}
    check(ValueError, name, str(wrong), loss, **inputs(**extra) | {name: labels})


def test_the_ignored_label_is_the_only_one_out_of_range(loss: Any) -> None:
    labels = torch.tensor([0, -100, 2])
    assert loss(target=labels).isfinite()
    check(ValueError, "target", "-100", loss, target=labels, ignore_index=-1)
    assert loss(target=torch.tensor([0, -1, 2]), ignore_index=-1).isfinite()


@pytest.mark.parametrize("name", ["target", "target_b"])
@pytest.mark.parametrize("shape", [(ROWS + 1,), (1,), (), (ROWS, 1), (ROWS, CLASSES)])
def test_shapes_of_labels(loss: Any, name: str, shape: tuple[int, ...]) -> None:
    extra = {"lam": 0.5} if name == "target_b" else {}
    check(ValueError, name, str(shape), loss, **inputs(**extra) | {name: torch.zeros(shape, dtype=torch.int64)})


@pytest.mark.parametrize("name", ["target", "target_b"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool], ids=str)
def test_dtypes_of_labels(loss: Any, name: str, dtype: torch.dtype) -> None:
    extra = {"lam": 0.5} if name == "target_b" else {}
    check(TypeError, name, str(dtype), loss, **inputs(**extra) | {name: torch.zeros(ROWS, dtype=dtype)})


# ---- two targets


def test_two_targets_need_their_share(loss: Any) -> None:
    second = torch.tensor([1, 1, 1])
    check(ValueError, "lam", "target_b", loss, **inputs(target_b=second))
    check(ValueError, "target_b", "lam", loss, **inputs(lam=0.5))


@pytest.mark.parametrize("share", [-0.1, 1.5, NAN])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_shares_out_of_range(loss: Any, share: float, as_tensor: bool) -> None:
    lam = torch.tensor([0.5, share, 1.0]) if as_tensor else share
    check(ValueError, "lam", str(share)[:4], loss, **inputs(target_b=torch.tensor([1, 1, 1]), lam=lam))


@pytest.mark.parametrize("shape", [(ROWS + 1,), (1,), (ROWS, 1)])
def test_shapes_of_shares(loss: Any, shape: tuple[int, ...]) -> None:
    check(ValueError, "lam", str(shape), loss, **inputs(target_b=torch.tensor([1, 1, 1]), lam=torch.full(shape, 0.5)))


@pytest.mark.parametrize("lam", ["0.5", torch.ones(ROWS, dtype=torch.int64)])
def test_types_of_shares(loss: Any, lam: object) -> None:
    check(TypeError, "lam", "", loss, **inputs(target_b=torch.tensor([1, 1, 1]), lam=lam))


# ---- seeds


@pytest.mark.parametrize("seed", [torch.tensor([1]), torch.tensor([[1, 2]])])
def test_shapes_of_seeds(loss: Any, seed: Tensor) -> None:
    check(ValueError, "seed", str(tuple(seed.shape)), loss, **inputs(cloud=torch.ones(CLASSES), seed=seed))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_dtypes_of_seeds(loss: Any, dtype: torch.dtype) -> None:
    check(TypeError, "seed", str(dtype), loss, **inputs(cloud=torch.ones(CLASSES), seed=torch.tensor(1, dtype=dtype)))


# ---- the matrices


@pytest.mark.parametrize("shape", [(0, CLASSES), (ROWS, 0), (0, 0)])
def test_empty_cosines(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\bcosine\b") as caught:
        gcl_cross_entropy(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(CLASSES,), (2, ROWS, CLASSES), ()])
def test_dimensions_of_cosines(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\bcosine\b") as caught:
        gcl_cross_entropy(torch.zeros(shape), torch.zeros(ROWS, dtype=torch.int64))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_dtypes_of_cosines(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"\bcosine\b.*{dtype}"):
        gcl_cross_entropy(torch.zeros(ROWS, CLASSES, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64))


def test_cosines_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"\bcosine\b"):
        gcl_cross_entropy([[0.0, 1.0]], torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "linear_weight", "named"),
    [
        ((0, WIDTH), (CLASSES, WIDTH), "features"),
        ((ROWS, 0), (CLASSES, 0), "features"),
        ((ROWS, WIDTH), (0, WIDTH), "linear_weight"),
        ((WIDTH,), (CLASSES, WIDTH), "features"),
        ((ROWS, WIDTH), (WIDTH,), "linear_weight"),
        ((2, ROWS, WIDTH), (CLASSES, WIDTH), "features"),
        ((ROWS, WIDTH), (CLASSES, WIDTH + 1), "linear_weight"),
        ((ROWS, WIDTH), (WIDTH, CLASSES), "linear_weight"),
    ],
)
def test_shapes_of_the_heads_matrices(features: tuple[int, ...], linear_weight: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{named}\b") as caught:
        linear_gcl_cross_entropy(torch.ones(features), torch.ones(linear_weight), torch.zeros(features[0], dtype=torch.int64))
    assert str(features if named == "features" else linear_weight) in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
    ],
    ids=str,
)
def test_dtypes_of_the_heads_matrices(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    wrong = ("features", dtype) if dtype == torch.int64 else ("linear_weight", weight_dtype)
    with pytest.raises(TypeError, match=rf"\b{wrong[0]}\b.*{wrong[1]}"):
        linear_gcl_cross_entropy(torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(CLASSES, WIDTH, dtype=weight_dtype), torch.tensor([0, 4, 2]))


def test_devices_of_the_heads_matrices() -> None:
    with pytest.raises(ValueError, match=r"\blinear_weight\b.*meta"):
        linear_gcl_cross_entropy(torch.ones(ROWS, WIDTH), torch.ones(CLASSES, WIDTH, device="meta"), torch.tensor([0, 4, 2]))


@pytest.mark.parametrize("plan", ["fused", "", None])
def test_plans(plan: object) -> None:
    with pytest.raises(ValueError, match=rf"\bplan\b.*{plan!r}"):
        linear_gcl_cross_entropy(torch.ones(ROWS, WIDTH), torch.ones(CLASSES, WIDTH), torch.tensor([0, 4, 2]), plan=plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [1, None, "yes"])
def test_normalize(normalize: object) -> None:
    with pytest.raises(TypeError, match=rf"\bnormalize\b.*{normalize!r}"):
        linear_gcl_cross_entropy(torch.ones(ROWS, WIDTH), torch.ones(CLASSES, WIDTH), torch.tensor([0, 4, 2]), normalize=normalize)  # type: ignore[arg-type]


# ---- where values may not be read


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["weight", "lam"])
def test_values_on_a_gpu_are_read_in_debug_mode_only(name: str) -> None:
    cosine, target = torch.zeros(ROWS, CLASSES, device="cuda"), torch.tensor([0, 4, 2], device="cuda")
    arguments: dict[str, Any] = {"weight": torch.full((CLASSES,), -1.0)} if name == "weight" else {"target_b": target, "lam": torch.tensor([0.5, 2.0, 1.0])}
    arguments = {key: value.to("cuda") for key, value in arguments.items()}
    gcl_cross_entropy(cosine, target, **arguments)
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            gcl_cross_entropy(cosine, target, **arguments)
    finally:
        set_debug(False)
