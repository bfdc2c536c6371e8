"""Every operation's kernels against the torch backend in float64, in parts for processes side by side; without a GPU, the torch backend against itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import SCALE
from benchmarks.step_results import DEVICE, Results
from gclkern import cloud_noise
from gclkern.functional import class_centroids, dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy, supervised_contrastive
from gclkern.losses.proco import vmf_contrast
from gclkern.options import Backend, Plan

PLANS: tuple[Plan, ...] = ("materialised", "chunked", "recompute")
OURS: Backend = "triton" if DEVICE.type == "cuda" else "torch"
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # relative, in the Euclidean norm
FORMS: dict[str, dict[str, Any]] = {
    "SupCon": {},
    "BCL": {"prototypes": True, "class_counts": True},
    "PSC": {"prototypes": True, "include_samples": False, "include_own_class": False},
}


def exponentials_stored(pay: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, the materialised head stores exponentials at any size, or at none."""
    return mock.patch("gclkern.kernels.head.exponentials_pay", return_value=pay)


def _wide(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in values.items()}


def _compare_calls(
    results: Results, what: str, names: tuple[str, ...], leaves: tuple[Tensor, ...], call: Callable[..., Tensor], others: Mapping[str, Any], limit: float
) -> None:
    """The values and gradients of `call(*leaves, backend=..., **others)`, and of the torch backend in float64."""
    with results.trying(what):
        found = _gradients(call, leaves, OURS, others)
        wanted = _gradients(call, tuple(leaf.double() for leaf in leaves), "torch", _wide(others))
        for name, ours, theirs in zip(("loss", *names), found, wanted, strict=True):
            results.compare(f"{what}: {name}", ours, theirs, limit)


def _gradients(call: Callable[..., Tensor], leaves: tuple[Tensor, ...], backend: Backend, others: Mapping[str, Any]) -> tuple[Tensor, ...]:
    own = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    loss = call(*own, backend=backend, **others)
    return loss.detach(), *torch.autograd.grad(loss[~loss.isnan()].sum(), own)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _terms(case: str, rows: int, classes: int) -> dict[str, Any]:
    options: dict[str, Any] = {"cloud": torch.rand(classes, device=DEVICE) * 0.5, "scale": SCALE, "seed": 7, "reduction": "none"}
    if case == "everything":
        options |= {
            "margin": 0.1 * torch.rand(classes, device=DEVICE), "weight": torch.rand(classes, device=DEVICE) + 0.5, "gamma": 1.0, "label_smoothing": 0.1,
            "target_b": torch.randint(classes, (rows,), device=DEVICE), "lam": torch.rand(rows, device=DEVICE), "row_offset": 3, "class_offset": 5,
        }  # fmt: skip
    if case in ("angular", "difficulty_margin"):
        options |= {"margin": 0.1 * torch.rand(classes, device=DEVICE), case: True}
    return options


def _sizes(tiny: bool) -> tuple[int, int]:
    """Samples, and an odd number of classes."""
    return (6, 21) if tiny else (200, 8142)


def _target(rows: int, classes: int) -> Tensor:
    target = torch.randint(classes, (rows,), device=DEVICE)
    target[1] = -100
    return target


def _head(dim: int, dtype: torch.dtype, case: str, results: Results, tiny: bool) -> None:
    rows, classes = _sizes(tiny)
    leaves = torch.randn(rows, dim, device=DEVICE).to(dtype), torch.randn(classes, dim, device=DEVICE).to(dtype)
    options = {"target": _target(rows, classes), **_terms(case, rows, classes)}
    for plan, stored in (*((plan, False) for plan in PLANS), ("materialised", True)):
        what = f"head, {case}, {plan}{' of exponentials' if stored else ''}, D = {dim}, {_name(dtype)}"
        with exponentials_stored(stored):
            _compare_calls(results, what, ("features", "weight"), leaves, linear_gcl_cross_entropy, {**options, "plan": plan}, LIMIT[dtype])


def _logits(dtype: torch.dtype, results: Results, tiny: bool) -> None:
    rows, classes = _sizes(tiny)
    cosine = (2 * torch.rand(rows, classes, device=DEVICE) - 1).to(dtype)
    for case in ("plain", "everything", "angular", "difficulty_margin"):
        options = {"target": _target(rows, classes), **_terms(case, rows, classes)}
        _compare_calls(results, f"loss, {case}, {_name(dtype)}", ("cosine",), (cosine,), gcl_cross_entropy, options, LIMIT[dtype])


def _samples(dim: int, results: Results, tiny: bool) -> None:
    rows, classes = (9, 3) if tiny else (700, 60)
    features, prototypes = torch.randn(rows, dim, device=DEVICE), torch.randn(classes, dim, device=DEVICE)
    target = torch.randint(classes, (rows,), device=DEVICE)
    for name, form in FORMS.items():
        options = {"target": target, "reduction": "none", **form}
        if form.get("class_counts"):
            options["class_counts"] = target.bincount(minlength=classes).float() + 1
        of_prototypes = options.pop("prototypes", False)
        leaves, names = ((features, prototypes), ("features", "prototypes")) if of_prototypes else ((features,), ("features",))
        _compare_calls(results, f"{name}, D = {dim}", names, leaves, _contrast, options, LIMIT[torch.float32])


def _contrast(features: Tensor, prototypes: Tensor | None = None, **options: Any) -> Tensor:
    return supervised_contrastive(features, prototypes=prototypes, **options)


def _bound(dtype: torch.dtype, results: Results, tiny: bool) -> None:
    rows, classes, dim = (6, 4, 8) if tiny else (200, 81, 301)
    target, centroids = torch.randint(classes, (rows,), device=DEVICE), torch.randn(classes, dim, device=DEVICE)
    features, epsilon = (centroids[target] + 0.5 * torch.randn(rows, dim, device=DEVICE)).to(dtype), torch.full((classes,), 0.5, device=DEVICE)
    options = {"target": target, "centroids": centroids, "reduction": "none"}
    _compare_calls(results, f"DRO-LT bound, {_name(dtype)}", ("features", "epsilon"), (features, epsilon), _dro_lt, options, LIMIT[dtype])


def _dro_lt(features: Tensor, epsilon: Tensor, **options: Any) -> Tensor:
    return dro_lt_loss(features, epsilon=epsilon, **options)


def _distributions(results: Results, tiny: bool) -> None:
    rows, classes = _sizes(tiny)
    cosine, concentration = 2 * torch.rand(rows, classes, device=DEVICE) - 1, 200 * torch.rand(classes, device=DEVICE)
    options = {"concentration": concentration, "dim": 128, "temperature": 0.1}
    _compare_calls(results, "contrast with distributions", ("cosine",), (cosine,), vmf_contrast, options, LIMIT[torch.float32])


def _centroids(results: Results, tiny: bool) -> None:
    rows, classes = (20, 3) if tiny else (5000, 301)
    for dtype in LIMIT:
        with results.trying(f"centroids, {_name(dtype)}"):
            features, target = torch.randn(rows, 72, device=DEVICE).to(dtype), torch.randint(classes, (rows,), device=DEVICE)
            found = class_centroids(features, target, classes)[0]
            sums = torch.zeros(classes, 72, dtype=torch.float64).index_add_(0, target.cpu(), features.cpu().double())
            wanted = sums / target.cpu().bincount(minlength=classes).clamp(min=1)[:, None]
            results.compare(f"centroids, {_name(dtype)}", found.cpu(), wanted, LIMIT[torch.float32])


def _draws(results: Results, tiny: bool) -> None:
    """The draws that are known, and a NaN row, which spoils its own loss alone."""
    with results.trying("known draws"):
        known = torch.tensor([0.0689661, 0.1897665, 0.3705992, 0.1379022])
        draws = cloud_noise(2**40 + 5, 1, 4, row_offset=2**33 + 1, device=DEVICE)[0].cpu()
        if float((draws - known).abs().max()) > 1e-4:
            results.say(f"the known draws are {draws.tolist()}")
    rows, classes = _sizes(tiny)
    features, weight = torch.randn(rows, 40, device=DEVICE), torch.randn(classes, 40, device=DEVICE)
    features[2] = torch.nan
    others = torch.arange(rows, device=DEVICE) != 2
    for plan in PLANS:
        with results.trying(f"a NaN row, {plan}"):
            options = {"target": torch.randint(classes, (rows,), device=DEVICE), **_terms("plain", rows, classes), "plan": plan}
            loss, grad, _ = _gradients(linear_gcl_cross_entropy, (features, weight), OURS, options)
            if not (loss[2].isnan() and loss[others].isfinite().all() and grad[others].isfinite().all()):
                results.say(f"{plan}: a NaN row spreads")


def parts(tiny: bool) -> dict[str, Callable[[Results, bool], None]]:
    """By name; the longest to compile first."""
    dims = (12,) if tiny else (512, 300, 301)
    cases = ("plain", "everything", *(("angular", "difficulty_margin") if tiny else ()))
    heads = [(dim, dtype, case) for dim in dims for dtype in LIMIT for case in cases]
    if not tiny:
        heads += [(512, torch.bfloat16, case) for case in ("angular", "difficulty_margin")]
    found: dict[str, Callable[[Results, bool], None]] = {f"head {dim} {_name(dtype)} {case}": partial(_head, dim, dtype, case) for dim, dtype, case in heads}
    found |= {f"logits {_name(dtype)}": partial(_logits, dtype) for dtype in LIMIT}
    found |= {f"samples {dim}": partial(_samples, dim) for dim in (24, 200)}  # rows that are one tile, and several
    found |= {f"bound {_name(dtype)}": partial(_bound, dtype) for dtype in LIMIT}
    return found | {"distributions": _distributions, "centroids": _centroids, "draws": _draws}
