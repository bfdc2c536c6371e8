"""How far losses and gradients are from float64 on the same inputs: python -m benchmarks.errors

Each problem has 8 rows whose targets have a given probability. OPERATIONS is the grid: every probability, scale (of losses over samples 1 / temperature),
offset and dtype with 1000 classes, and other numbers of classes at scale 30. An offset is a constant that is added to all logits: to the inputs where they are
float32 logits, else by the bias, because 16 bits and cosines cannot hold it; for the DRO-LT bound and centroids it is added to all coordinates. The same is
measured of torch's own operators, and of pytorch-metric-learning where it has the loss, on the same inputs in float32. The float64 values of a loss are the
library's own, which tests/test_operations.py compares with independent formulas.
Writes benchmarks/results/numerics/errors.json, from which `python -m benchmarks.render_results` makes the tables of docs/numerics.md. A test measures a part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.provenance import kernels_hash, torch_hash
from gclkern.functional import class_centroids, dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy, supervised_contrastive
from gclkern.kernels.terms import FLOAT32_TEMPERATURE, PREFIXES
from gclkern.losses.proco import vmf_contrast
from gclkern.options import Backend
from gclkern.torch_backend.noise import philox_words
from gclkern.training.atomic_files import replace_text

PATH = RESULTS / "numerics" / "errors.json"
ROWS, DIM = 8, 64
_MARGIN = math.radians(20)  # of the target's angle
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
P, SCALES, OFFSETS = (0.9, 0.99, 0.999, 0.9999), (1.0, 30.0, 64.0), (0.0, 1e4, 1e6)
SMALL, MOST = 1000, 1_000_000  # classes


@dataclass(frozen=True)
class Problem:
    operation: str
    dtype: str = "float32"  # of the inputs
    p: float | None = 0.999  # None where there is no probability
    scale: float | None = 30.0
    offset: float = 0.0
    classes: int | None = SMALL  # None where a loss has no classes


@dataclass(frozen=True)
class Errors:
    """The largest of all rows. ULP are steps of float32 at the exact value; centroids and noise are a value alone."""

    loss_relative: float
    loss_ulp: float
    target_relative: float | None = None  # of the gradient of the target's logit; of the row of features where there are no logits
    gradient_relative: float | None = None  # the norm of the difference over the norm of the exact gradient


Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Built:
    """A problem's tensors, of which losses have a gradient, and what is computed of them."""

    inputs: list[Tensor]
    ours: Loss  # takes `backend`, too
    others: dict[str, Loss] = field(default_factory=dict)
    exact: Loss | None = None  # in float64; None: ours
    target: Tensor | None = None  # of inputs that are logits or cosines


LIBRARY = ("torch", "cpu", "triton")
PEER = "pytorch-metric-learning"


def _rest(p: float) -> float:
    """log of the sum of all other classes' probabilities over the target's."""
    return math.log((1 - p) / p)


def _targets_of(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (N, C) in float64 whose targets have the probability of the problem, and the targets."""
    assert problem.p is not None and problem.classes is not None
    target = torch.arange(ROWS) % problem.classes
    z = torch.randn(ROWS, problem.classes, generator=generator, dtype=torch.float64)
    others = z.scatter(1, target[:, None], -math.inf).logsumexp(1)
    z[torch.arange(ROWS), target] = others - _rest(problem.p)
    return z, target


def _bias_of(problem: Problem) -> Tensor | None:
    """The offset of problems whose inputs cannot hold it."""
    return torch.full((problem.classes or 0,), problem.offset) if problem.offset else None


def _options(bias: Tensor | None, x: Tensor) -> dict[str, Any]:
    return {"reduction": "none"} if bias is None else {"reduction": "none", "bias": bias.to(torch.promote_types(x.dtype, torch.float32))}


def _plain(logits: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(logits if bias is None else logits + bias, target, reduction="none")


def _logits(problem: Problem, generator: torch.Generator) -> Built:
    z, target = _targets_of(problem, generator)
    scale: Any = problem.scale
    within = problem.dtype == "float32"
    bias = None if within else _bias_of(problem)
    cosine = ((z + problem.offset * within) / scale).to(DTYPES[problem.dtype])

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return gcl_cross_entropy(x, target, scale=scale, backend=backend, **_options(bias, x))

    return Built([cosine], ours, {"F.cross_entropy": lambda x: _plain(scale * x, target, bias)}, target=target)


def _angular(problem: Problem, generator: torch.Generator) -> Built:
    """ArcFace."""
    z, target = _targets_of(problem, generator)
    scale: Any = problem.scale
    bias, place = _bias_of(problem), (torch.arange(ROWS), target)
    cosine = z / scale
    cosine[place] = (cosine[place].acos() - _MARGIN).cos()  # so that the margin takes it to the probability of the problem

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return gcl_cross_entropy(x, target, scale=scale, angular=True, margin=_MARGIN, backend=backend, **_options(bias, x))

    def plain(x: Tensor) -> Tensor:
        own = (x[place].acos() + _MARGIN).cos()
        return _plain(scale * x.index_put(place, own), target, bias)

    def metric_learning(x: Tensor) -> Tensor:
        from pytorch_metric_learning import losses, reducers

        loss = losses.ArcFaceLoss(x.shape[1], 1, margin=math.degrees(_MARGIN), scale=scale, reducer=reducers.DoNothingReducer())
        loss.get_cosine = lambda cosine: cosine  # the same inputs as all others
        values: Tensor = loss(x, target)["loss"]["losses"]
        return values

    return Built([cosine.to(DTYPES[problem.dtype])], ours, {"torch.acos": plain, PEER: metric_learning}, target=target)


def _head(problem: Problem, generator: torch.Generator) -> Built:
    """Features that lean to their class's weight by as much as the probability needs; at scale 1 the lengths make the logits."""
    assert problem.p is not None and problem.classes is not None
    scale: Any = problem.scale
    target = torch.arange(ROWS) % problem.classes
    weight = F.normalize(torch.randn(problem.classes, DIM, generator=generator, dtype=torch.float64))
    aside = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    own = weight[target]
    aside = F.normalize(aside - (aside * own).sum(1, keepdim=True) * own)
    along, across = own @ weight.T, aside @ weight.T
    low, high = torch.zeros(ROWS, 1, dtype=torch.float64), torch.ones(ROWS, 1, dtype=torch.float64)
    stretch = 30.0 if scale == 1 else 1.0
    for _ in range(30):  # bisection: the probability grows with the lean
        lean = (low + high) / 2
        z = scale * stretch * (lean * along + (1 - lean**2).sqrt() * across)
        rest = z.scatter(1, target[:, None], -math.inf).logsumexp(1) - z[torch.arange(ROWS), target]
        enough = (rest < _rest(problem.p))[:, None]
        low, high = torch.where(enough, low, lean), torch.where(enough, lean, high)
    features = stretch * (high * own + (1 - high**2).sqrt() * aside)
    bias, normalize, dtype = _bias_of(problem), scale != 1, DTYPES[problem.dtype]

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x) if normalize else x

    def ours(x: Tensor, w: Tensor, backend: Backend) -> Tensor:
        return linear_gcl_cross_entropy(x, w, target, scale=scale, normalize=normalize, backend=backend, **_options(bias, x))

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return F.linear_cross_entropy(scale * unit(x), unit(w), target, linear_bias=bias, reduction="none")

    def metric_learning(x: Tensor, w: Tensor) -> Tensor:
        from pytorch_metric_learning import losses, reducers

        loss = losses.CosFaceLoss(len(w), DIM, margin=0.0, scale=scale, reducer=reducers.DoNothingReducer())
        del loss.W
        loss.W = w.T
        values: Tensor = loss(x, target)["loss"]["losses"]
        return values

    plain = {"F.cross_entropy": lambda x, w: _plain(scale * F.linear(unit(x), unit(w)), target, bias), "F.linear_cross_entropy": fused}
    return Built([features.to(dtype), weight.to(dtype)], ours, {**plain, PEER: metric_learning})


def _samples(problem: Problem, generator: torch.Generator) -> Built:
    """Supervised contrast of pairs: the probability is that of a sample's partner. All others have a cosine of 0.2."""
    assert problem.p is not None
    scale: Any = problem.scale
    target, partner = torch.arange(ROWS) // 2, torch.arange(ROWS) ^ 1
    own = 0.2 + (math.log(ROWS - 2) - _rest(problem.p)) / scale
    gram = torch.full((ROWS, ROWS), 0.2, dtype=torch.float64)
    gram[torch.arange(ROWS), partner] = own
    directions = torch.linalg.qr(torch.randn(DIM, ROWS, generator=generator, dtype=torch.float64)).Q
    features = (torch.linalg.cholesky(gram.fill_diagonal_(1.0)) @ directions.T).to(DTYPES[problem.dtype])

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return supervised_contrastive(x, target, temperature=1 / scale, reduction="none", backend=backend)

    def plain(x: Tensor) -> Tensor:
        x = F.normalize(x)
        return F.cross_entropy((scale * x @ x.T).fill_diagonal_(-math.inf), partner, reduction="none")

    def metric_learning(x: Tensor) -> Tensor:
        from pytorch_metric_learning import losses, reducers

        values: Tensor = losses.SupConLoss(temperature=1 / scale, reducer=reducers.DoNothingReducer())(x, target)["loss"]["losses"]
        return values

    return Built([features], ours, {"F.cross_entropy": plain, PEER: metric_learning})


def _proco(problem: Problem, generator: torch.Generator) -> Built:
    """Cosines and concentrations such as those of trained features."""
    assert problem.p is not None and problem.scale is not None and problem.classes is not None
    dim, temperature = 128, 1 / problem.scale
    target, bias = torch.arange(ROWS) % problem.classes, _bias_of(problem)
    concentration = 300.0 + 200.0 * torch.rand(problem.classes, generator=generator, dtype=torch.float64)
    cosine = 0.05 * torch.randn(ROWS, problem.classes, generator=generator, dtype=torch.float64)
    place = (torch.arange(ROWS), target)
    others = vmf_contrast(cosine, concentration, dim, temperature).index_put(place, torch.tensor(-math.inf, dtype=torch.float64)).logsumexp(1)
    low, high = -torch.ones(ROWS, dtype=torch.float64), torch.ones(ROWS, dtype=torch.float64)
    for _ in range(30):  # bisection: the probability grows with the cosine
        middle = (low + high) / 2
        own = vmf_contrast(middle[:, None].expand(-1, ROWS), concentration[target], dim, temperature).diagonal()
        enough = others - own < _rest(problem.p)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    assert bool((high < 1).all()), f"{problem}: no cosine has this probability"
    cosine[place] = high

    def ours(x: Tensor, backend: Backend) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as its module has them
        return gcl_cross_entropy(vmf_contrast(x, concentration.to(x.dtype), dim, temperature, backend), target, scale=1.0, backend=backend, **_options(bias, x))

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
        return _plain(log_bessel(length) - log_bessel(kappa), target, bias)

    return Built([cosine.to(DTYPES[problem.dtype])], ours, {"difference of logarithms": plain}, target=target)


def _bound(problem: Problem, generator: torch.Generator) -> Built:
    """One sample of each class at a distance of 1 from its centroid, and all other centroids at a distance that makes the probability."""
    assert problem.p is not None and problem.scale is not None
    target, temperature = torch.arange(ROWS), 1 / problem.scale
    further = temperature * (math.log(ROWS - 1) - _rest(problem.p))
    directions = torch.linalg.qr(torch.randn(DIM, 2 * ROWS, generator=generator, dtype=torch.float64)).Q.T
    centroids = (((1 + further) ** 2 - 1) / 2) ** 0.5 * directions[:ROWS]
    features = (centroids + directions[ROWS:] + problem.offset).to(DTYPES[problem.dtype])
    centroids = (centroids + problem.offset).to(torch.float32)

    def ours(x: Tensor, backend: Backend) -> Tensor:
        return dro_lt_loss(x, target, centroids, 0.0, temperature=temperature, reduction="none", backend=backend)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(-torch.cdist(centroids, x, compute_mode="use_mm_for_euclid_dist") / temperature, target, reduction="none")

    return Built([features], ours, {"torch.cdist by products": plain})


def _centroids(problem: Problem, generator: torch.Generator) -> Built:
    """The means of 2000 samples of 8 classes."""
    target = torch.randint(ROWS, (2000,), generator=generator)
    centers = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    features = centers[target] + torch.randn(len(target), DIM, generator=generator, dtype=torch.float64) + problem.offset
    counts = target.bincount(minlength=ROWS)[:, None]

    def ours(x: Tensor, backend: Backend) -> Tensor:
        if backend == "cpu":
            return class_centroids(x, target, ROWS)[0]
        if backend == "triton":
            importlib.import_module("gclkern.kernels.centroids")  # registers the operator
        sums: Tensor = getattr(torch.ops.gclkern, f"{PREFIXES[backend]}segment_sums")(x, target, ROWS)[0]
        return sums / counts

    def plain(x: Tensor) -> Tensor:
        return torch.zeros(ROWS, DIM, dtype=x.dtype).index_add_(0, target, x) / counts

    return Built([features.to(DTYPES[problem.dtype])], ours, {"index_add_": plain}, exact=plain)


def _noise(problem: Problem, generator: torch.Generator) -> Built:
    seed, classes = torch.randint(2**62, (), generator=generator), problem.classes or 0

    def ours(backend: Backend) -> Tensor:
        if backend == "triton":
            importlib.import_module("gclkern.kernels.noise")
        noise: Tensor = getattr(torch.ops.gclkern, f"{PREFIXES[backend]}cloud_noise")(seed, ROWS, classes, 0, 0)
        return noise

    def exact() -> Tensor:
        """Of the same words, which are bitwise equal everywhere."""
        words = philox_words(seed, torch.arange(ROWS), torch.arange(-(-classes // 8))).long()
        radius = (-2 * (((words & 0xFFFF).double() + 0.5) / 65536).log()).sqrt() / 3
        angle = math.pi / 2 * ((words >> 16 & 0xFFFF).double() + 0.5) / 65536
        return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).clamp(max=1).view(ROWS, -1)[:, :classes]

    return Built([], ours, exact=exact)


@dataclass(frozen=True)
class Grid:
    """What an operation is measured at, and by which implementations: backends of the library, and others' operators."""

    build: Callable[[Problem, torch.Generator], Built]
    implementations: tuple[str, ...]
    p: tuple[float | None, ...] = P
    scales: tuple[float | None, ...] = SCALES
    offsets: tuple[float, ...] = OFFSETS
    classes: tuple[int | None, ...] = (SMALL, 10, 100_000, MOST)  # the first at everything, the others at scale 30
    dtypes: tuple[str, ...] = tuple(DTYPES)
    bias: bool = True  # whether an offset goes with 16 bits, which coordinates do not hold


# A cosine is at most 1, so that at scale 1 no target of 1000 classes and no sample's partner has such a probability.
OPERATIONS = {
    "logits": Grid(_logits, (*LIBRARY, "F.cross_entropy")),
    "head": Grid(_head, (*LIBRARY, "F.cross_entropy", "F.linear_cross_entropy", PEER)),
    "angular margin": Grid(_angular, (*LIBRARY, "torch.acos", PEER), scales=(30.0, 64.0)),
    "samples": Grid(_samples, ("torch", "cpu", "triton", "F.cross_entropy", PEER), scales=(14.0, 30.0, 64.0), offsets=(0.0,), classes=(None,)),
    "ProCo": Grid(_proco, ("torch", "triton", "difference of logarithms"), scales=(30.0, 64.0)),
    "DRO-LT bound": Grid(_bound, (*LIBRARY, "torch.cdist by products"), classes=(None,), bias=False),
    "centroids": Grid(_centroids, (*LIBRARY, "index_add_"), p=(None,), scales=(None,), classes=(None,), bias=False),
    "noise": Grid(_noise, LIBRARY, p=(None,), scales=(None,), offsets=(0.0,), classes=(SMALL, MOST), dtypes=("float32",)),
}


def problems() -> Iterator[Problem]:
    for operation, grid in OPERATIONS.items():
        first, *others = grid.classes
        for dtype, p, scale, offset in itertools.product(grid.dtypes, grid.p, grid.scales, grid.offsets):
            if grid.bias or not offset or dtype == "float32":
                yield Problem(operation, dtype, p, scale, offset, first)
        for classes in others:
            scale = None if None in grid.scales else 30.0
            if classes == MOST:  # takes seconds
                yield Problem(operation, p=None if None in grid.p else 0.999, scale=scale, classes=classes)
            else:
                yield from (Problem(operation, dtype, p, scale, 0.0, classes) for dtype, p in itertools.product(grid.dtypes, grid.p))


def implementations(problem: Problem) -> list[str]:
    """Those that have the problem. pytorch-metric-learning has no bias, and normalises always; interpreted, kernels take minutes for many classes.

    The loops have no losses over samples at temperatures whose smallest exponential float32 does not hold.
    """
    without = {PEER} if problem.offset or problem.scale == 1 else set()
    if (problem.classes or 0) > SMALL and problem != Problem("logits", classes=100_000):
        without.add("triton")
    if problem.operation == "samples" and 1 / (problem.scale or 1.0) < FLOAT32_TEMPERATURE:
        without.add("cpu")
    return [name for name in OPERATIONS[problem.operation].implementations if name not in without]


@contextlib.contextmanager
def _rounding() -> Iterator[None]:
    """Triton's interpreter truncates float32 to bfloat16; here it rounds to the nearest, as a GPU does."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    truncate = interpreter._convert_float

    def convert(data: Any, source: Any, result: Any, mode: Any) -> Any:
        if (source.name, result.name) == ("fp32", "bf16"):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return truncate(data, source, result, mode)

    with mock.patch.object(interpreter, "_convert_float", convert):
        yield


def _with_gradients(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach().double(), *(grad.double() for grad in torch.autograd.grad(value.sum(), leaves))]


def measure(problem: Problem, names: Iterable[str] | None = None) -> dict[str, Errors]:
    """The errors of all implementations that have the problem, or of those named."""
    built = OPERATIONS[problem.operation].build(problem, torch.Generator().manual_seed(0))
    value_alone = built.exact is not None
    evaluate = (lambda loss, inputs: [loss(*inputs).double()]) if value_alone else _with_gradients
    exact = evaluate(built.exact or (lambda *x: built.ours(*x, backend="torch")), [tensor.double() for tensor in built.inputs])
    size = exact[0].abs()
    if value_alone:  # an element near 0 has no error of its own size: noise is measured by 1, a centroid by its largest coordinate
        size = size.amax(1, keepdim=True) if built.inputs else torch.ones(())
    ulp = torch.finfo(torch.float32).eps * 2.0 ** size.log2().floor()
    errors = {}
    for name in implementations(problem) if names is None else names:
        if name in LIBRARY:
            with _rounding() if name == "triton" else contextlib.nullcontext():
                found = evaluate(lambda *x, name=name: built.ours(*x, backend=name), built.inputs)
        else:  # torch's own operators would compute the logits and the loss in 16 bits; autocast, too, gives the cross entropy float32
            found = evaluate(lambda *x, name=name: built.others[name](*(tensor.float() for tensor in x)), built.inputs)
        differences = [part - reference for part, reference in zip(found, exact, strict=True)]
        off = differences[0].abs()
        relative, in_ulp = float((off / size).max()), float((off / ulp).max())
        if value_alone:
            errors[name] = Errors(relative, in_ulp)
            continue
        if built.target is not None:
            place = (torch.arange(ROWS), built.target)
            target = differences[1][place].abs() / exact[1][place].abs()
        else:
            target = differences[1].norm(dim=1) / exact[1].norm(dim=1)
        norms = [float(difference.norm() / reference.norm()) for difference, reference in zip(differences[1:], exact[1:], strict=True)]
        errors[name] = Errors(relative, in_ulp, float(target.max()), max(norms))
    return errors


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    os.environ["TRITON_INTERPRET"] = "1"  # which is read when a kernel is first asked for
    torch.set_num_threads(1)
    rows = []
    for problem in problems():
        errors = {name: [value and float(f"{value:.3g}") for value in astuple(found)] for name, found in measure(problem).items()}
        rows.append(json.dumps({"problem": asdict(problem), "errors": errors}))
    PATH.parent.mkdir(parents=True, exist_ok=True)
    columns = [part.name for part in fields(Errors)]
    measured = {"torch": torch.__version__.partition("+")[0], "torch_hash": torch_hash(), "kernels_hash": kernels_hash(), "columns": columns}
    lines = ",\n".join(rows)  # a problem a line
    replace_text(PATH, f'{json.dumps(measured)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
