"""How far losses and gradients are from float64 on the same inputs: python -m benchmarks.errors

Each case starts from one problem, 8 rows of 1000 classes at scale 30 whose targets have probability 0.999, and changes one of its numbers: the probability, the
scale, a constant that is added to all logits (for the DRO-LT bound, to all coordinates), the dtype or the number of classes. Beside the library stand
torch's own operators on the same inputs in float32. The float64 side is the library's own, which tests/test_operations.py compares with independent formulas.
Writes benchmarks/results/numerics/errors.json, from which `python -m benchmarks.render_results` makes the table of docs/numerics.md. A test measures the small
cases again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.provenance import kernels_hash, torch_hash
from gclkern.functional import dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.options import Backend
from gclkern.training.atomic_files import replace_text

PATH = RESULTS / "numerics" / "errors.json"
ROWS, DIM = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1000  # the most classes of a case that a test measures again


@dataclass(frozen=True)
class Case:
    """One problem."""

    operation: str
    implementation: Any  # "torch" or "triton" of the library, or one of torch's operators
    dtype: str = "float32"
    p: float = 0.999
    scale: float = 30.0
    offset: float = 0.0
    classes: int = SMALL


@dataclass(frozen=True)
class Errors:
    """The largest of all rows. ULP are steps of float32 at the exact value."""

    loss_relative: float
    loss_ulp: float
    target_relative: float  # of the gradient of the target's logit; of the row of features where there are no logits
    gradient_relative: float  # the norm of the difference over the norm of the exact gradient


Inputs = tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]


def cases() -> Iterator[Case]:
    """Every operation by every implementation, from the base case in one direction at a time."""
    for operation, names in OPERATIONS.items():
        for implementation in names:
            changes: list[dict[str, Any]] = [{}]
            if operation != "DRO-LT bound":
                changes += [{"p": p} for p in (0.9, 0.99, 0.9999)]
                changes += [{"scale": scale} for scale in (1.0, 64.0)]
            if operation != "head":
                changes += [{"offset": offset} for offset in (1e4, 1e6)]
            if implementation != "triton":  # the interpreter truncates to 16 bits where a GPU rounds, and is slow
                changes += [{"dtype": dtype} for dtype in ("bfloat16", "float16")]
                changes += [{"classes": classes} for classes in {"logits": (10, 100_000, 1_000_000), "head": (10, 100_000)}.get(operation, ())]
            yield from (replace(Case(operation, implementation), **change) for change in changes)


def _rest(p: float) -> float:
    """log of the sum of all other classes' probabilities over the target's."""
    return math.log((1 - p) / p)


def _logits(case: Case, generator: torch.Generator) -> Inputs:
    target = torch.arange(ROWS) % case.classes
    z = torch.randn(ROWS, case.classes, generator=generator, dtype=torch.float64)
    others = z.scatter(1, target[:, None], -math.inf).logsumexp(1)
    z[torch.arange(ROWS), target] = others - _rest(case.p)
    cosine = ((z + case.offset) / case.scale).to(DTYPES[case.dtype])

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return gcl_cross_entropy(x, target, scale=case.scale, reduction="none", backend=backend)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(case.scale * x, target, reduction="none")

    return [cosine], ours, plain


def _head(case: Case, generator: torch.Generator) -> Inputs:
    """Features that lean to their class's weight by as much as the probability needs; at scale 1 the lengths make the logits."""
    target = torch.arange(ROWS) % case.classes
    weight = F.normalize(torch.randn(case.classes, DIM, generator=generator, dtype=torch.float64))
    aside = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    own = weight[target]
    aside = F.normalize(aside - (aside * own).sum(1, keepdim=True) * own)
    low, high = torch.zeros(ROWS, 1, dtype=torch.float64), torch.ones(ROWS, 1, dtype=torch.float64)
    stretch = 30.0 if case.scale == 1 else 1.0
    for _ in range(40):  # bisection: the probability grows with the lean
        lean = (low + high) / 2
        features = stretch * (lean * own + (1 - lean**2).sqrt() * aside)
        z = case.scale * features @ weight.T
        rest = z.scatter(1, target[:, None], -math.inf).logsumexp(1) - z[torch.arange(ROWS), target]
        enough = (rest < _rest(case.p))[:, None]
        low, high = torch.where(enough, low, lean), torch.where(enough, lean, high)
    normalize = case.scale != 1
    dtype = DTYPES[case.dtype]

    def ours(x: Tensor, w: Tensor, backend: Backend) -> Tensor:
        return linear_gcl_cross_entropy(x, w, target, scale=case.scale, normalize=normalize, reduction="none", backend=backend)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        product = F.linear(F.normalize(x), F.normalize(w)) if normalize else F.linear(x, w)
        return F.cross_entropy(case.scale * product, target, reduction="none")

    return [features.to(dtype), weight.to(dtype)], ours, plain


def _bound(case: Case, generator: torch.Generator) -> Inputs:
    """Two samples of each class near its centroid, at a distance of about 1; the offset moves all points away from the origin."""
    target = torch.arange(ROWS) % (ROWS // 2)
    centroids = torch.randn(ROWS // 2, DIM, generator=generator, dtype=torch.float64)
    features = centroids[target] + torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64) / DIM**0.5 + case.offset
    features, centroids = features.to(DTYPES[case.dtype]), (centroids + case.offset).to(torch.float32)

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return dro_lt_loss(x, target, centroids, 0.0, reduction="none", backend=backend)

    def plain(x: Tensor) -> Tensor:
        row = -torch.cdist(centroids[target], x, compute_mode="use_mm_for_euclid_dist")
        return (row.logsumexp(1) - row.diagonal()) / 2

    return [features], ours, plain


OPERATIONS: dict[str, list[str]] = {
    "logits": ["torch", "triton", "F.cross_entropy"],
    "head": ["torch", "triton", "F.cross_entropy"],
    "DRO-LT bound": ["torch", "triton", "torch.cdist by products"],
}
_BUILD = {"logits": _logits, "head": _head, "DRO-LT bound": _bound}


def _with_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach().double(), *(grad.double() for grad in torch.autograd.grad(value.sum(), leaves))]


def measure(case: Case) -> Errors:
    inputs, ours, plain = _BUILD[case.operation](case, torch.Generator().manual_seed(0))
    exact = _with_gradients(lambda *x: ours(*x, backend="torch"), [tensor.double() for tensor in inputs])
    library = case.implementation in ("torch", "triton")
    # torch's own operators would compute the logits and the loss in 16 bits; autocast, too, gives the cross entropy float32
    found = _with_gradients((lambda *x: ours(*x, backend=case.implementation)) if library else (lambda *x: plain(*(tensor.float() for tensor in x))), inputs)
    loss, gradient = (part - reference for part, reference in zip(found[:2], exact[:2], strict=True))
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact[0].abs().log2().floor()
    if case.operation == "logits":
        place = (torch.arange(ROWS), torch.arange(ROWS) % case.classes)
        target = gradient[place].abs() / exact[1][place].abs()
    else:
        target = gradient.norm(dim=1) / exact[1].norm(dim=1)
    norms = [float((part - reference).norm() / reference.norm()) for part, reference in zip(found[1:], exact[1:], strict=True)]
    return Errors(float((loss.abs() / exact[0].abs()).max()), float((loss.abs() / ulp).max()), float(target.max()), max(norms))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    torch.set_num_threads(1)
    rows = [{"case": asdict(case), "errors": {name: float(f"{value:.3g}") for name, value in asdict(measure(case)).items()}} for case in cases()]
    PATH.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)  # a case a line
    measured = {"torch": torch.__version__.partition("+")[0], "torch_hash": torch_hash(), "kernels_hash": kernels_hash()}
    replace_text(PATH, f'{json.dumps(measured)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
