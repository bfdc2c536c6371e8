"""The operators of torch and of the compiled loops, over several blocks and chunks of classes, against the float64 formula."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gclkern import cpu_backend, torch_backend
from gclkern.kernels.terms import LossTerms
from tests.support import oracle
from tests.support.cases import PLANS, REDUCTIONS, SEVERAL_BLOCKS
from tests.support.operations import OPERATIONS, Operation, outcome
from tests.support.operations import expected as expected_outcome

ROWS, CLASSES, DIM = 7, 21, 5
IN_BLOCKS = ("gcl_cross_entropy", "linear_gcl_cross_entropy chunked", "linear_gcl_cross_entropy recompute")
SEED = 2**40 + 5
ROOT = Path(__file__).resolve().parent.parent

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cloud": {"cloud": True},
    "margin": {"margin": True, "cloud": True},
    "bias": {"bias": True, "scale": 1.0},
    "weight": {"weight": True, "cloud": True},
    "smoothing": {"label_smoothing": 0.2, "margin": True},
    "smoothing weight": {"label_smoothing": 0.2, "weight": True, "bias": True},
    "focal": {"gamma": 1.5, "focal_detach": False, "margin": True},
    "focal small gamma": {"gamma": 0.5, "focal_detach": False},
    "focal detached": {"gamma": 1.0, "cloud": True, "weight": True},
    "two targets": {"two": True, "cloud": True, "margin": True},
    "two targets, all options": {
        "two": True, "cloud": True, "margin": True, "bias": True, "weight": True, "label_smoothing": 0.1, "gamma": 2.0, "focal_detach": False,
    },
    "two targets, detached": {"two": True, "gamma": 1.0, "weight": True},
    "offsets": {"cloud": True, "row_offset": 2**33 + 1, "class_offset": 13},
}  # fmt: skip


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def operator(backend: str, name: str) -> Any:
    """The operator for an operation, such as "logit_forward"."""
    return getattr(torch.ops.gclkern, f"{backend}_{name}")


# The torch operators compute in float64 where the inputs are float64, the loops in float32.
DTYPES = {"torch": torch.float64, "cpu": torch.float32}


class Case:
    """One set of options as float64 tensors, as the terms of the operators and as the keywords of the oracle."""

    def __init__(self, options: dict[str, Any], reduction: str = "mean", classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(0)
        options = dict(options)
        vectors = {
            "cloud": torch.rand(classes, generator=random, dtype=torch.float64),
            "margin": 0.3 * torch.rand(classes, generator=random, dtype=torch.float64),
            "bias": torch.randn(classes, generator=random, dtype=torch.float64),
            "weight": 0.5 + torch.rand(classes, generator=random, dtype=torch.float64),
        }
        self.vectors = {name: vector.to(dtype).double() if options.pop(name, False) else None for name, vector in vectors.items()}
        target = torch.randint(classes, (ROWS,), generator=random)
        target[2] = -100
        self.target = target
        self.target_b: Tensor | None = None
        self.lam: Tensor | None = None
        if options.pop("two", False):
            self.target_b = torch.randint(classes, (ROWS,), generator=random)
            self.target_b[3] = target[3]
            self.target_b[4] = -100
            self.lam = torch.rand(ROWS, generator=random, dtype=torch.float64)
        self.plain = {
            "scale": 8.0, "gamma": 0.0, "focal_detach": True, "label_smoothing": 0.0, "ignore_index": -100, "row_offset": 0, "class_offset": 0, **options,
        }  # fmt: skip
        self.reduction = reduction
        self.dtype = dtype
        self.cosine = (torch.rand(ROWS, classes, generator=random, dtype=torch.float64) * 2 - 1).to(dtype).double()
        self.features = torch.randn(ROWS, DIM, generator=random, dtype=torch.float64).to(dtype).double()
        self.linear_weight = torch.randn(classes, DIM, generator=random, dtype=torch.float64).to(dtype).double()
        self.grad_loss = torch.rand((ROWS,) if reduction == "none" else (), generator=random, dtype=torch.float64) + 0.5

    def terms(self, bias: Tensor | None = None) -> LossTerms:
        vectors = {name: None if vector is None else vector.to(self.dtype) for name, vector in self.vectors.items()}
        if bias is not None:
            vectors["bias"] = bias
        seed = None if vectors["cloud"] is None else torch.tensor(SEED)
        lam = None if self.lam is None else self.lam.to(self.dtype)
        return LossTerms(target=self.target, target_b=self.target_b, lam=lam, seed=seed, reduction=self.reduction, **vectors, **self.plain)

    def keywords(self) -> dict[str, Any]:
        return dict(self.vectors, target_b=self.target_b, lam=self.lam, seed=SEED, reduction=self.reduction, **self.plain)

    def leaves(self, *names: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        found = [self.vectors["bias"] if name == "bias" else getattr(self, name) for name in names]
        return [leaf.detach().to(dtype, copy=True).requires_grad_() for leaf in found if leaf is not None]


def differentiable(terms_of: Any, forward: Any, backward: Any) -> Any:
    """An autograd Function over one pair of operators, whose last input is the bias or None."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            *matrices, bias = inputs
            loss: Tensor
            loss, saved = forward(*matrices, terms_of(bias))
            ctx.save_for_backward(*matrices, bias, *saved)
            ctx.matrices = len(matrices)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> Any:
            matrices, (bias, *saved) = ctx.saved_tensors[: ctx.matrices], ctx.saved_tensors[ctx.matrices :]
            grads = backward(grad_loss, *matrices, saved, terms_of(bias), bias is not None)
            return (*grads[:-1], None if bias is None else grads[-1])

    return Loss.apply


def logit_loss(backend: str, case: Case) -> Any:
    def forward(cosine: Tensor, terms: LossTerms) -> Any:
        return operator(backend, "logit_forward")(cosine, *terms, True)

    def backward(grad_loss: Tensor, cosine: Tensor, saved: list[Tensor], terms: LossTerms, bias_grad: bool) -> Any:
        return operator(backend, "logit_backward")(grad_loss, cosine, saved, *terms, bias_grad)

    return differentiable(case.terms, forward, backward)


def head_loss(backend: str, case: Case, plan: str, normalize: bool = True) -> Any:
    def forward(features: Tensor, linear_weight: Tensor, terms: LossTerms) -> Any:
        return operator(backend, "head_forward")(features, linear_weight, *terms, normalize, plan, True, False)

    def backward(grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], terms: LossTerms, bias_grad: bool) -> Any:
        return operator(backend, "head_backward")(grad_loss, features, linear_weight, saved, *terms, normalize, plan, True, True, bias_grad)

    return differentiable(case.terms, forward, backward)


def with_gradients(loss: Tensor, leaves: list[Tensor], grad_loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad_loss.to(loss.dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor], step: float) -> None:
    torch.testing.assert_close([value.double() for value in actual], expected, rtol=step, atol=step)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and chunks even for matrices of this size, with ends that fit nothing."""
    monkeypatch.setattr(torch_backend.rows, "block_rows", lambda num_rows, num_classes, device: min(num_rows, 3))
    for head, size in ((torch_backend.head, 8), (cpu_backend.head, 4)):
        monkeypatch.setattr(head, "_MIN_CLASSES", 4)
        monkeypatch.setattr(head, "_CHUNK_BYTES", 9 * size * ROWS)
        monkeypatch.setattr(head, "_PANEL_BYTES", 5 * size * ROWS)
        monkeypatch.setattr(head, "_WEIGHT_BYTES", 4 * size * DIM)


def tolerance(backend: str, case: Case) -> float:
    """The noise of the stream is float32, as all that the loops compute; in the formula it is exact."""
    return 1e-10 if backend == "torch" and case.vectors["cloud"] is None else 2e-5


@pytest.mark.parametrize("classes", [CLASSES, SEVERAL_BLOCKS])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_follow_the_formula(name: str, reduction: str, classes: int, backend: str) -> None:
    case = Case(OPTIONS[name], reduction, classes, DTYPES[backend])
    leaves = case.leaves("cosine", "bias")
    reference = oracle.gcl_cross_entropy(leaves[0], case.target, **{**case.keywords(), "bias": leaves[1] if len(leaves) > 1 else None})
    expected = with_gradients(reference, leaves, case.grad_loss)
    mine = case.leaves("cosine", "bias", dtype=DTYPES[backend])
    actual = with_gradients(logit_loss(backend, case)(mine[0], mine[1] if len(mine) > 1 else None), mine, case.grad_loss)
    assert_close(actual, expected, tolerance(backend, case))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", OPTIONS)
def test_head_follows_the_formula(name: str, plan: str, normalize: bool, backend: str) -> None:
    case = Case(OPTIONS[name], "none", dtype=DTYPES[backend])
    leaves = case.leaves("features", "linear_weight", "bias")
    keywords = {**case.keywords(), "bias": leaves[2] if len(leaves) > 2 else None}
    expected = with_gradients(oracle.linear_gcl_cross_entropy(leaves[0], leaves[1], case.target, normalize=normalize, **keywords), leaves, case.grad_loss)
    mine = case.leaves("features", "linear_weight", "bias", dtype=DTYPES[backend])
    actual = with_gradients(head_loss(backend, case, plan, normalize)(*mine[:2], mine[2] if len(mine) > 2 else None), mine, case.grad_loss)
    assert_close(actual, expected, tolerance(backend, case))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype: torch.dtype, reduction: str, backend: str) -> None:
    case = Case(OPTIONS["two targets, all options"], reduction, dtype=torch.float32)
    case.features, case.linear_weight, case.cosine = (matrix.to(dtype).double() for matrix in (case.features, case.linear_weight, case.cosine))
    leaves = case.leaves("features", "linear_weight", "bias")
    keywords = {**case.keywords(), "bias": leaves[2]}
    expected = with_gradients(oracle.linear_gcl_cross_entropy(leaves[0], leaves[1], case.target, **keywords), leaves, case.grad_loss)
    for plan in PLANS:
        mine = [leaves[0].detach().to(dtype).requires_grad_(), leaves[1].detach().to(dtype).requires_grad_(), leaves[2].detach().float().requires_grad_()]
        actual = with_gradients(head_loss(backend, case, plan)(*mine), mine, case.grad_loss)
        assert [value.dtype for value in actual] == [torch.float32, dtype, dtype, torch.float32]
        for value, reference in zip(actual, expected, strict=True):
            step = 2e-5 if value.dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(value.double(), reference, rtol=step, atol=step * 0.1)
    cosine, bias = case.leaves("cosine", "bias")
    expected = with_gradients(oracle.gcl_cross_entropy(cosine, case.target, **{**case.keywords(), "bias": bias}), [cosine], case.grad_loss)
    narrow = cosine.detach().to(dtype).requires_grad_()
    actual = with_gradients(logit_loss(backend, case)(narrow, bias.detach().float()), [narrow], case.grad_loss)
    assert [value.dtype for value in actual] == [torch.float32, dtype]
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=max(2e-5, torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_beside_float32_weights(dtype: torch.dtype, backend: str) -> None:
    case = Case(OPTIONS["cloud"], dtype=torch.float32)
    features, weight = case.features.to(dtype), case.linear_weight.float()
    reference = [features.float().requires_grad_(), weight.clone().requires_grad_()]
    expected = with_gradients(head_loss(backend, case, "materialised")(*reference, None), reference, case.grad_loss)
    mine = [features.requires_grad_(), weight.requires_grad_()]
    actual = with_gradients(head_loss(backend, case, "materialised")(*mine, None), mine, case.grad_loss)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    assert torch.equal(actual[1], expected[1].to(dtype))


@pytest.mark.parametrize("name", ["cloud", "two targets, all options"])
def test_exponentials_that_are_not_kept_are_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OPTIONS[name])

    def run() -> tuple[Tensor, list[Tensor]]:
        _, saved = torch.ops.gclkern.torch_logit_forward(case.cosine, *case.terms(), True)
        leaf = case.leaves("cosine")
        return saved[-1], with_gradients(logit_loss("torch", case)(leaf[0], None), leaf, case.grad_loss)

    kept, expected = run()
    assert kept.shape == case.cosine.shape
    assert torch.ops.gclkern.torch_logit_forward(case.cosine, *case.terms(), False)[1][-1].numel() == 0  # nothing for a backward that will not come
    monkeypatch.setattr("gclkern.torch_backend.logit_loss._KEPT_BYTES", 0)
    kept, again = run()
    assert kept.numel() == 0
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.name in IN_BLOCKS], ids=str)
def test_sixteen_bits_in_several_blocks(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is converted to float32 in a workspace, of which the last one takes a part."""
    monkeypatch.setattr("gclkern.torch_backend.logit_loss._KEPT_BYTES", 0)
    arguments = operation.sample(rows=ROWS + 1, dtype=torch.bfloat16)
    found = outcome(functools.partial(operation.function, backend="torch"), arguments, operation.differentiable(arguments))
    for name, exact in expected_outcome(operation, arguments).parts().items():
        # rounded gradients, and products of rounded features at a scale of 8
        assert (found.parts()[name].double() - exact.double()).norm() <= 2**-6 * exact.norm(), name


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("two", [True, False])
def test_few_classes(classes: int, two: bool, backend: str) -> None:
    case = Case({"two": two, "margin": True}, "none", classes, DTYPES[backend])
    cosine = case.leaves("cosine")
    expected = with_gradients(oracle.gcl_cross_entropy(cosine[0], case.target, **case.keywords()), cosine, case.grad_loss)
    mine = case.leaves("cosine", dtype=DTYPES[backend])
    assert_close(with_gradients(logit_loss(backend, case)(mine[0], None), mine, case.grad_loss), expected, tolerance(backend, case))


def test_classes_that_are_switched_off(backend: str) -> None:
    case = Case(OPTIONS["bias"], "none", dtype=DTYPES[backend])
    case.target[2] = 5  # the formula has no answer for an ignored row of infinite logits
    assert case.vectors["bias"] is not None
    off = [column for column in range(CLASSES) if column not in case.target.tolist()][:5]
    case.vectors["bias"][off] = -math.inf
    for plan in PLANS:
        leaves = case.leaves("features", "linear_weight")
        bias = case.vectors["bias"]
        expected = with_gradients(oracle.linear_gcl_cross_entropy(leaves[0], leaves[1], case.target, **case.keywords()), leaves, case.grad_loss)
        mine = case.leaves("features", "linear_weight", dtype=DTYPES[backend])
        actual = with_gradients(head_loss(backend, case, plan)(*mine, bias.to(DTYPES[backend])), mine, case.grad_loss)
        assert_close(actual, expected, tolerance(backend, case))


@pytest.mark.parametrize("name", ["plain", "two targets", "smoothing weight"])
def test_an_infinite_logit_of_the_target_makes_its_row_nan(name: str, backend: str) -> None:
    """As in torch's cross entropy: the odds of such a target are 0, which looks like a loss."""
    case = Case(OPTIONS[name], "none", dtype=DTYPES[backend])
    expected, *_ = operator(backend, "logit_forward")(case.cosine.to(case.dtype), *case.terms(), True)
    case.cosine[1, case.target[1]] = math.inf
    leaf = case.leaves("cosine", dtype=case.dtype)
    loss, grad = with_gradients(logit_loss(backend, case)(leaf[0], case.terms().bias), leaf, case.grad_loss)
    others = torch.arange(ROWS) != 1
    assert loss[1].isnan() and grad[1].isnan().any()
    assert torch.equal(loss[others], expected[others]) and grad[others].isfinite().all()


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_is_no_class_makes_its_row_nan(label: int, backend: str) -> None:
    case = Case(OPTIONS["two targets"], "none", dtype=DTYPES[backend])
    cosine, features, linear_weight = (matrix.to(case.dtype) for matrix in (case.cosine, case.features, case.linear_weight))
    expected, *_ = operator(backend, "logit_forward")(cosine, *case.terms(), True)
    case.target = case.target.clone()
    case.target[0] = label
    others = torch.arange(ROWS) != 0
    loss, *_ = operator(backend, "logit_forward")(cosine, *case.terms(), True)
    assert loss[0].isnan() and torch.equal(loss[others], expected[others])
    for plan in PLANS:
        loss, saved = operator(backend, "head_forward")(features, linear_weight, *case.terms(), True, plan, True, True)
        assert loss[0].isnan() and loss[others].isfinite().all()
        assert saved[-1][0].isnan() and saved[-1][others].isfinite().all(), "top-1"


@pytest.mark.parametrize(("name", "reduction"), [("plain", "none"), ("two targets, all options", "mean")])
def test_operators_are_registered_soundly(name: str, reduction: str, backend: str) -> None:
    case = Case(OPTIONS[name], reduction, dtype=torch.float32)
    terms = case.terms()
    cosine, features, weight, grad_loss = (tensor.float() for tensor in (case.cosine, case.features, case.linear_weight, case.grad_loss))
    logit_forward, logit_backward, head_forward, head_backward = (
        operator(backend, name) for name in ("logit_forward", "logit_backward", "head_forward", "head_backward")
    )
    torch.library.opcheck(logit_forward, (cosine, *terms, True))
    _, saved = logit_forward(cosine, *terms, True)
    for bias_grad in (True, False):
        torch.library.opcheck(logit_backward, (grad_loss, cosine, saved, *terms, bias_grad))
    for plan, normalize in (("materialised", True), ("materialised", False), ("chunked", True), ("recompute", False)):
        torch.library.opcheck(head_forward, (features, weight, *terms, normalize, plan, True, False))
        _, saved = head_forward(features, weight, *terms, normalize, plan, True, False)
        torch.library.opcheck(head_backward, (grad_loss, features, weight, saved, *terms, normalize, plan, True, True, True))
    torch.library.opcheck(head_forward, (features, weight, *terms, True, "recompute", False, True))


MEMORY = """
import torch
from benchmarks.memory import peak_bytes
from gclkern.functional import linear_gcl_cross_entropy

torch.set_num_threads(1)

def problem(rows, classes, dim):
    return torch.randn(rows, dim, requires_grad=True), torch.randn(classes, dim, requires_grad=True), torch.arange(rows), torch.rand(classes)

def step(features, weight, target, cloud):
    linear_gcl_cross_entropy(features, weight, target, cloud, seed=1).backward()
    assert bool(torch.isfinite(weight.grad.sum()))

step(*problem(8, 16, 8))  # what is loaded and compiled once
inputs = problem(64, 1_000_000, 64)
print(peak_bytes(lambda: step(*inputs)) - inputs[1].nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the resident set from /proc")
def test_a_million_classes_need_no_matrix_of_logits() -> None:
    # beyond the weight and its gradient, with the plan that "auto" chooses; the logits alone would be 256 MB
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 * 10**6
