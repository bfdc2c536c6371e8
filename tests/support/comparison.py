"""One call of the package beside the same call of the oracle, and how far apart the two may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support import oracle
from tests.support.cases import Options

# What storing a number in a dtype may change, relative to it. Triton's interpreter truncates bfloat16 where a GPU rounds.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# The smallest positive number of float16; the other dtypes reach 1e-38.
SMALLEST = {torch.float64: 0.0, torch.float32: 1e-37, torch.float16: 2**-24, torch.bfloat16: 1e-37}


@dataclass(frozen=True)
class Result:
    """A loss and its gradients for the matrices and, where it requires one, the bias."""

    loss: Tensor
    grads: list[Tensor]
    grad_bias: Tensor | None


def measure(
    function: Callable[..., Tensor], matrices: list[Tensor], target: Tensor, cloud: Tensor | None, options: Options, upstream: Tensor | None = None
) -> Result:
    """Loss and gradients of `function(*matrices, target, cloud, **options)`; `upstream` weights the losses, 1 when it is None."""
    device = matrices[0].device
    leaves = [matrix.detach().requires_grad_() for matrix in matrices]
    moved = {name: value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = function(*leaves, target.to(device), None if cloud is None else cloud.to(device), **moved)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    bias = moved.get("bias")
    return Result(loss.detach(), [leaf.grad for leaf in leaves], None if bias is None else bias.grad)  # type: ignore[misc]


def exact(
    function: Callable[..., Tensor], matrices: list[Tensor], target: Tensor, cloud: Tensor | None, options: Options, upstream: Tensor | None = None
) -> Result:
    """`measure` of an oracle: float64, on the CPU, from the same rounded inputs."""
    double = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in options.items()}
    for name, value in options.items():
        if isinstance(value, Tensor) and value.requires_grad:
            double[name] = value.detach().double().requires_grad_()
    double.pop("backend", None)
    double.pop("plan", None)
    return measure(function, [matrix.detach().cpu().double() for matrix in matrices], target, None if cloud is None else cloud.double(), double, upstream)


def is_smoothed(options: Options) -> bool:
    smoothing = options.get("label_smoothing", 0.0)
    return isinstance(smoothing, Tensor) or smoothing > 0


def noise_error(device: torch.device) -> float:
    """How far a draw of the noise may be from the exact one: 1e-4 with a GPU's approximate instructions, otherwise the rounding of float32."""
    return 1e-4 if device.type == "cuda" else 1e-6


def logit_error(cosine: Tensor, cloud: Tensor | None, options: Options) -> float:
    """How far a float32 logit s (cos - cloud e - margin) + bias may be from the exact one: a few roundings of its largest term, and the noise's own error."""
    scale, bias = options.get("scale", 30.0), options.get("bias")
    # Inputs are exact; the dtype of the statistics decides.
    epsilon = 2**-52 if cosine.dtype == torch.float64 else 2**-23
    finite = cosine.detach().double().nan_to_num(0.0, 0.0, 0.0)
    size = scale * (float(finite.abs().max()) + 1) + (0.0 if bias is None else float(bias.detach().abs().max()))
    return float(4 * epsilon * size) + (0.0 if cloud is None else scale * float(cloud.max()) * noise_error(cosine.device))


def assert_within(actual: Tensor, expected: Tensor, atol: Tensor | float, rtol: float, what: str) -> None:
    """Elementwise |actual - expected| <= atol + rtol |expected|; equal NaNs and infinities pass."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = torch.as_tensor(atol, dtype=torch.float64) + rtol * expected.abs().nan_to_num(0.0, 0.0, 0.0)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~(same | ((actual - expected).abs() <= allowed))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {place}: {actual[place]:.9g}, expected {expected[place]:.9g}")


def check_logit_loss(
    function: Callable[..., Tensor], cosine: Tensor, target: Tensor, cloud: Tensor | None = None, upstream: Tensor | None = None, **options: Any
) -> None:
    """The package's loss and gradients of cosines (N, C) agree with the oracle's on the same rounded inputs."""
    actual = measure(function, [cosine], target, cloud, options, upstream)
    expected = exact(oracle.gcl_cross_entropy, [cosine], target, cloud, options, upstream)
    error = logit_error(cosine, cloud, options)
    weight = options.get("weight")
    heaviest = 1.0 if weight is None else float(weight.max())

    assert actual.loss.dtype == (torch.float64 if cosine.dtype == torch.float64 else torch.float32)
    # |dl / dz|_1 <= 2 w, focal factors add at most as much again; a few float32 roundings of the sum come on top.
    rounding = 2e-15 if cosine.dtype == torch.float64 else 2e-6
    assert_within(actual.loss, expected.loss, 4 * heaviest * error * (cosine.shape[0] if options.get("reduction") == "sum" else 1), rounding, "loss")

    grad, grad_expected = actual.grads[0], expected.grads[0]
    assert grad.dtype == cosine.dtype and grad.shape == cosine.shape
    # A probability is off by its relative error, twice the logit's; so is the gradient, unless two terms of opposite sign meet in it: label smoothing takes a
    # share from every probability, and two targets pull at each other's column. Those leave an error of the terms' size; so does the derivative of an added
    # angle, a difference that is 0 where the sum of the angles is pi.
    adds_angles = options.get("angular", False) or options.get("difficulty_margin", False)
    cancels = is_smoothed(options) or options.get("target_b") is not None or adds_angles
    size = options.get("scale", 30.0) * heaviest * (1.0 if upstream is None else float(upstream.abs().max()))
    rtol = 4 * error + 4 * rounding + ROUNDING[cosine.dtype]
    tiny = SMALLEST[cosine.dtype] + 1e-30 * size
    assert_within(grad, grad_expected, (size * 4 * (error + rounding) if cancels else 0.0) + tiny, rtol, "gradient of cosine")
    if expected.grad_bias is not None:
        assert actual.grad_bias is not None
        column = grad_expected.abs().sum(0) / options.get("scale", 30.0)
        atol = (4 * error + 4 * rounding) * (column + (size * cosine.shape[0] if cancels else 0.0))
        assert_within(actual.grad_bias, expected.grad_bias, atol + 1e-30 * size, 0.0, "gradient of bias")


def check_head_loss(
    function: Callable[..., Tensor],
    features: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    cloud: Tensor | None = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> None:
    """The package's loss and gradients of features (N, D) and weights (C, D) agree with the oracle's on the same rounded inputs."""
    actual = measure(function, [features, linear_weight], target, cloud, options, upstream)
    expected = exact(oracle.linear_gcl_cross_entropy, [features, linear_weight], target, cloud, options, upstream)

    # The gradient of the cosines, which an error of the products is measured by: a row of it times unit vectors is a row of the features' gradient.
    normalize = options.get("normalize", True)
    left, right = features.detach().cpu().double(), linear_weight.detach().cpu().double()
    left_size, right_size = (matrix.norm(dim=1) for matrix in (left, right))
    product = oracle.unit_rows(left) @ oracle.unit_rows(right).T if normalize else left @ right.T
    logit_options = {name: value for name, value in options.items() if name not in ("normalize", "plan")}
    pull = exact(oracle.gcl_cross_entropy, [product], target, cloud, logit_options, upstream).grads[0].abs()

    scale = options.get("scale", 30.0)
    weight = options.get("weight")
    heaviest = 1.0 if weight is None else float(weight.max())
    size = 1.0 if normalize else max(1.0, float((left_size[:, None] * right_size).max()))
    error = logit_error(product.to(torch.float64 if features.dtype == torch.float64 else torch.float32).to(features.device), cloud, options)
    stored = 0.0
    if features.dtype.itemsize == 2:
        # A buffer of products in 16 bits: fp16 for cosines, where half a step is 2^-12 (doubled where the interpreter truncates); plain products may be bf16.
        # Their gradient is rounded to bf16 before it enters the other two products.
        error += scale * (2**-11 if normalize else size * 2**-8)
        stored = 2**-7
    elif features.dtype == torch.float32:
        error += 8 * scale * size * 2**-23  # the sum over D of the product, and the norms

    assert actual.loss.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    rounding = 2e-15 if features.dtype == torch.float64 else 2e-6
    assert_within(actual.loss, expected.loss, 4 * heaviest * error * (len(features) if options.get("reduction") == "sum" else 1), rounding, "loss")

    # Two terms of opposite sign meet in a column of two targets or of label smoothing, as in check_logit_loss.
    cancels = is_smoothed(options) or options.get("target_b") is not None
    if cancels:
        pull = pull + scale * heaviest * (1.0 if upstream is None else float(upstream.abs().max())) * 0.1
    for name, matrix, grad, reference, pulls in (
        ("features", features, actual.grads[0], expected.grads[0], (pull @ right_size if not normalize else pull.sum(1) / left_size)[:, None]),
        ("linear_weight", linear_weight, actual.grads[1], expected.grads[1], (pull.T @ left_size if not normalize else pull.sum(0) / right_size)[:, None]),
    ):
        assert grad.dtype == matrix.dtype and grad.shape == matrix.shape
        atol = (4 * error + 4 * rounding + stored) * pulls.nan_to_num(0.0, 0.0, 0.0) + SMALLEST[matrix.dtype]
        assert_within(grad, reference, atol, ROUNDING[matrix.dtype], f"gradient of {name}")
    if expected.grad_bias is not None:
        assert actual.grad_bias is not None
        assert_within(actual.grad_bias, expected.grad_bias, (4 * error + 4 * rounding + stored) * pull.sum(0) / scale + 1e-30, 0.0, "gradient of bias")
