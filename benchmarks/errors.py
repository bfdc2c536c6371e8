"""How far losses and gradients are from float64 on the same inputs: python -m benchmarks.errors

Each case starts from one problem, 8 rows of 1000 classes at scale 30 whose targets have probability 0.999, and changes one of its numbers: the probability, the
scale (of losses over samples 1 / temperature), a constant that is added to all logits (for the DRO-LT bound, to all coordinates), the dtype or the number of
classes. Beside the library stand on the same inputs in float32: torch's own operators, and pytorch-metric-learning where it has the loss. The float64 side is
the library's own, which tests/test_operations.py compares with independent formulas.
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
from gclkern.functional import dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy, supervised_contrastive
from gclkern.losses.proco import vmf_contrast
from gclkern.options import Backend
from gclkern.training.atomic_files import replace_text

PATH = RESULTS / "numerics" / "errors.json"
ROWS, DIM = 8, 64
_MARGIN = 0.3  # of the target's angle
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1000  # the most classes of a case that a test measures again


@dataclass(frozen=True)
class Case:
    """One problem."""

    operation: str
    implementation: Any  # a backend of the library, or another's operator
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


Loss = Callable[..., Tensor]
Inputs = tuple[list[Tensor], Loss, dict[str, Loss]]  # the tensors with a gradient, the library's loss with its backend, and the others'


LIBRARY = ("torch", "cpu", "triton")
PEER = "pytorch-metric-learning"
_P, _SCALE, _OFFSET = (0.9, 0.99, 0.9999), (1.0, 64.0), (1e4, 1e6)
_HALVES = ("bfloat16", "float16")
# What each operation is compared with, and the cases: none of 16 bits and none of other numbers of classes for interpreted kernels, which truncate
# to 16 bits where a GPU rounds, and are slow.
OPERATIONS: dict[str, tuple[list[str], dict[str, tuple[Any, ...]]]] = {
    "logits": (
        [*LIBRARY, "F.cross_entropy"], {"p": _P, "scale": _SCALE, "offset": _OFFSET, "dtype": _HALVES, "classes": (10, 100_000, 1_000_000)}
    ),
    "head": ([*LIBRARY, "F.cross_entropy", PEER], {"p": _P, "scale": _SCALE, "dtype": _HALVES, "classes": (10, 100_000)}),
    "angular margin": ([*LIBRARY, "torch.acos"], {"p": _P, "scale": (64.0,), "dtype": _HALVES, "classes": (10, 100_000)}),
    "samples": (["torch", "triton", "F.cross_entropy", PEER], {"p": _P, "scale": (14.0, 64.0), "dtype": _HALVES}),
    "ProCo": (["torch", "triton", "difference of logarithms"], {"classes": (10, 100_000)}),
    "DRO-LT bound": ([*LIBRARY, "torch.cdist by products"], {"offset": _OFFSET, "dtype": _HALVES}),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every operation by every implementation, from the base case in one direction at a time."""
    for operation, (implementations, changes) in OPERATIONS.items():
        for implementation in implementations:
            base = Case(operation, implementation)
            yield base
            for name, values in changes.items():
                if implementation == "triton" and name in ("dtype", "classes"):
                    continue
                if implementation == PEER and name == "scale":
                    values = tuple(value for value in values if value != 1.0)  # scale 1 is without normalisation, which it always has
                yield from (replace(base, **{name: value}) for value in values)


def _rest(p: float) -> float:
    """log of the sum of all other classes' probabilities over the target's."""
    return math.log((1 - p) / p)


def _targets_of(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (N, C) in float64 whose targets have the probability of the case, and the targets."""
    target = torch.arange(ROWS) % case.classes
    z = torch.randn(ROWS, case.classes, generator=generator, dtype=torch.float64)
    others = z.scatter(1, target[:, None], -math.inf).logsumexp(1)
    z[torch.arange(ROWS), target] = others - _rest(case.p)
    return z, target


def _logits(case: Case, generator: torch.Generator) -> Inputs:
    z, target = _targets_of(case, generator)
    cosine = ((z + case.offset) / case.scale).to(DTYPES[case.dtype])

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return gcl_cross_entropy(x, target, scale=case.scale, reduction="none", backend=backend)

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(case.scale * x, target, reduction="none")

    return [cosine], ours, {"F.cross_entropy": theirs}


def _angular(case: Case, generator: torch.Generator) -> Inputs:
    """ArcFace."""
    z, target = _targets_of(case, generator)
    place = (torch.arange(ROWS), target)
    cosine = z / case.scale
    cosine[place] = (cosine[place].acos() - _MARGIN).cos()  # so that the margin takes it to the probability of the case

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return gcl_cross_entropy(x, target, scale=case.scale, angular=True, margin=_MARGIN, reduction="none", backend=backend)

    def theirs(x: Tensor) -> Tensor:
        own = (x[place].acos() + _MARGIN).cos()
        return F.cross_entropy(case.scale * x.index_put(place, own), target, reduction="none")

    return [cosine.to(DTYPES[case.dtype])], ours, {"torch.acos": theirs}


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

    def metric_learning(x: Tensor, w: Tensor) -> Tensor:
        from pytorch_metric_learning import losses, reducers

        loss = losses.CosFaceLoss(case.classes, DIM, margin=0.0, scale=case.scale, reducer=reducers.DoNothingReducer())
        del loss.W
        loss.W = w.T
        values: Tensor = loss(x, target)["loss"]["losses"]
        return values

    return [features.to(dtype), weight.to(dtype)], ours, {"F.cross_entropy": plain, PEER: metric_learning}


def _samples(case: Case, generator: torch.Generator) -> Inputs:
    """Supervised contrast of pairs: the probability is that of a sample's partner. All others have a cosine of 0.2."""
    target, partner = torch.arange(ROWS) // 2, torch.arange(ROWS) ^ 1
    own = 0.2 + (math.log(ROWS - 2) - _rest(case.p)) / case.scale
    gram = torch.full((ROWS, ROWS), 0.2, dtype=torch.float64)
    gram[torch.arange(ROWS), partner] = own
    directions = torch.linalg.qr(torch.randn(DIM, ROWS, generator=generator, dtype=torch.float64)).Q
    features = (torch.linalg.cholesky(gram.fill_diagonal_(1.0)) @ directions.T).to(DTYPES[case.dtype])

    def pairs(features: Tensor) -> Tensor:
        return (case.scale * features @ features.T).fill_diagonal_(-math.inf)

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return supervised_contrastive(x, target, temperature=1 / case.scale, reduction="none", backend=backend)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(pairs(F.normalize(x)), partner, reduction="none")

    def metric_learning(x: Tensor) -> Tensor:
        from pytorch_metric_learning import losses, reducers

        values: Tensor = losses.SupConLoss(temperature=1 / case.scale, reducer=reducers.DoNothingReducer())(x, target)["loss"]["losses"]
        return values

    return [features], ours, {"F.cross_entropy": plain, PEER: metric_learning}


def _proco(case: Case, generator: torch.Generator) -> Inputs:
    """Cosines and concentrations such as those of trained features. No cosine gives a probability close to 1."""
    dim, temperature = 128, 0.1
    target = torch.arange(ROWS) % case.classes
    concentration = 1.0 + 400.0 * torch.rand(case.classes, generator=generator, dtype=torch.float64)
    cosine = 0.1 * torch.randn(ROWS, case.classes, generator=generator, dtype=torch.float64)
    cosine[torch.arange(ROWS), target] = 0.9

    def ours(x: Tensor, backend: Backend) -> Tensor:
        logits = vmf_contrast(x, concentration.to(x.dtype), dim, temperature, backend)
        return gcl_cross_entropy(logits, target, scale=1.0, reduction="none", backend=backend)

    def log_bessel(k: Tensor) -> Tensor:
        """log(I_v(k) / k^v), by its uniform asymptotic series."""
        v = dim / 2 - 1
        root = (1 + (k / v).square()).sqrt()
        t = 1 / root
        series = 1 + (3 * t - 5 * t**3) / (24 * v)
        return v * (root + (k / v / (1 + root)).log()) - 0.5 * (2 * math.pi * v * root).log() + series.log() - v * k.log()

    def plain(x: Tensor) -> Tensor:
        kappa = concentration.to(x.dtype)
        length = (kappa.square() + 1 / temperature**2 + 2 * kappa * x / temperature).sqrt()
        return F.cross_entropy(log_bessel(length) - log_bessel(kappa), target, reduction="none")

    return [cosine.to(torch.float32)], ours, {"difference of logarithms": plain}


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

    return [features], ours, {"torch.cdist by products": plain}


_BUILD = {"logits": _logits, "head": _head, "angular margin": _angular, "samples": _samples, "ProCo": _proco, "DRO-LT bound": _bound}


def _with_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach().double(), *(grad.double() for grad in torch.autograd.grad(value.sum(), leaves))]


def measure(case: Case) -> Errors:
    inputs, ours, others = _BUILD[case.operation](case, torch.Generator().manual_seed(0))
    exact = _with_gradients(lambda *x: ours(*x, backend="torch"), [tensor.double() for tensor in inputs])
    if case.implementation in LIBRARY:
        found = _with_gradients(lambda *x: ours(*x, backend=case.implementation), inputs)
    else:  # torch's own operators would compute the logits and the loss in 16 bits; autocast, too, gives the cross entropy float32
        found = _with_gradients(lambda *x: others[case.implementation](*(tensor.float() for tensor in x)), inputs)
    loss, gradient = (part - reference for part, reference in zip(found[:2], exact[:2], strict=True))
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact[0].abs().log2().floor()
    if case.operation in ("logits", "angular margin", "ProCo"):
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
