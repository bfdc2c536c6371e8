"""One table of the library's operations: what each takes, samples of it, its formula in float64, and calls that it refuses.

The tests of tests/test_operations.py run over all of it. A new operation gets them by one more entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gclkern.functional import (
    class_centroids,
    dro_lt_loss,
    gcl_cross_entropy,
    linear_gcl_cross_entropy,
    linear_gcl_cross_entropy_with_top1,
    supervised_contrastive,
)
from gclkern.kernels.terms import PREFIXES, statistics_dtype
from gclkern.losses.proco import vmf_contrast
from gclkern.noise import cloud_noise
from tests.support import oracle
from tests.support.cases import PLANS, Options, angle_sets, class_smoothing_sets, cosines, labels, mixed, option_sets, vector
from tests.support.wrong_arguments import ANGLES, BOUND, CENTROIDS, CONTRAST, CONTRASTIVE, FAMILY, HEAD, LOGITS, NOISE, Wrong

CLASSES, DIM = 37, 19  # no multiple of a vector, an alignment or a group of the noise


@dataclass(frozen=True)
class Operation:
    """A function of the library. All of its arguments are given by name."""

    name: str
    function: Callable[..., Tensor]  # takes `backend`, too
    reference: Callable[..., Tensor]  # the same of float64 tensors on the CPU; autograd differentiates it
    samples: Callable[[int], dict[str, Options]]  # by name: arguments of so many rows, on the CPU; `everything` has all options
    axes: dict[str, str]  # what the dimensions of a tensor argument are: "rows", "classes" or "dims"
    leaves: tuple[str, ...] = ()  # arguments that have a gradient
    narrow: tuple[str, ...] = ()  # arguments that may have 16 bits, the matrices; none: it makes one
    grid: bool = True  # whether it draws noise at row_offset and class_offset
    batch: bool = False  # whether a row's loss depends on the other rows
    backends: tuple[str, ...] = ("torch", "cpu", "triton")
    interpreted: bool = True  # False: its kernels are another entry's, and these tests run them on a GPU alone
    wrong: tuple[Wrong, ...] = ()  # changes of the call VALID[name]

    def __str__(self) -> str:
        return self.name

    def sample(self, name: str = "everything", rows: int = 6, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Options:
        """A sample on `device`, whose matrices have `dtype`. With float64 everything has."""

        def convert(argument: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().to(device)
            return value.to(dtype) if value.is_floating_point() and (argument in self.narrow or dtype == torch.float64) else value

        return {argument: convert(argument, value) for argument, value in self.samples(rows)[name].items()}

    def differentiable(self, arguments: Options) -> tuple[str, ...]:
        """Those of `arguments` that have a gradient."""
        return tuple(name for name in self.leaves if isinstance(arguments.get(name), Tensor))


@dataclass(frozen=True)
class Outcome:
    """A result and its gradients by the names of the arguments."""

    value: Tensor
    grads: dict[str, Tensor]

    def parts(self) -> dict[str, Tensor]:
        return {"value": self.value, **self.grads}


def upstream_of(value: Tensor) -> Tensor:
    """A gradient for a result: no two of its elements are equal, so that none can stand for another."""
    return torch.linspace(-0.7, 1.9, max(value.numel(), 1), dtype=torch.float64).view(value.shape).to(value)


def outcome(function: Callable[..., Tensor], arguments: Options, wanted: tuple[str, ...], *, retain: bool = False) -> Outcome:
    """The result, and the gradients of `wanted`, for the upstream gradient above."""
    arguments = {name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    value = function(**arguments)
    grads = torch.autograd.grad(value, [arguments[name] for name in wanted], upstream_of(value), retain_graph=retain) if wanted else ()
    return Outcome(value.detach(), dict(zip(wanted, grads, strict=True)))


def expected(operation: Operation, arguments: Options) -> Outcome:
    """The outcome of the formula in float64, on the same rounded inputs."""
    exact = {
        name: (value.detach().cpu().double() if value.is_floating_point() else value.cpu()) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return outcome(operation.reference, exact, operation.differentiable(arguments))


# ---- the entries


def _logit_samples(rows: int) -> dict[str, Options]:
    given = {"cosine": cosines(rows, CLASSES), "target": labels(rows, CLASSES)}
    smoothing = class_smoothing_sets(rows, CLASSES)["mixed"]
    return {name: given | options for name, options in (option_sets(rows, CLASSES) | {"smoothing of each class": smoothing}).items()}


def _soft_samples(rows: int) -> dict[str, Options]:
    """Labels (N, C) of one or two classes a row; what names a class does not go with them."""
    target, pair = labels(rows, CLASSES), mixed(rows, CLASSES)
    share = pair["lam"][:, None]
    soft = share * F.one_hot(target, CLASSES) + (1 - share) * F.one_hot(pair["target_b"], CLASSES)
    everything = {name: value for name, value in option_sets(rows, CLASSES)["everything"].items() if name not in pair}
    return {name: {"cosine": cosines(rows, CLASSES), "target": soft} | options for name, options in (("plain", {}), ("everything", everything))}


def _exact_of_soft_labels(cosine: Tensor, target: Tensor, **options: Any) -> Tensor:
    first, second = target.argsort(1, descending=True)[:, :2].T
    return oracle.gcl_cross_entropy(cosine, first, target_b=second, lam=target.gather(1, first[:, None])[:, 0], **options)


def _head_samples(rows: int) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(rows, DIM, generator=generator), torch.randn(CLASSES, DIM, generator=generator)
    given = {"features": features, "linear_weight": weight, "target": labels(rows, CLASSES)}
    chosen = ("plain", "bias", "weight_smoothing", "focal_undetached", "cloud", "mixed", "focal_stage_2", "everything")
    samples = {name: given | option_sets(rows, CLASSES)[name] for name in chosen}
    return samples | {"plain product": given | option_sets(rows, CLASSES)["everything"] | {"normalize": False, "scale": 0.5}}


def _angle_samples(rows: int) -> dict[str, Options]:
    # within (-1, 1): at the ends the formula has no derivative
    given = {"cosine": 0.9 * cosines(rows, CLASSES), "target": labels(rows, CLASSES)}
    return {name: given | options for name, options in angle_sets(rows, CLASSES).items()}


def _angle_head_samples(rows: int) -> dict[str, Options]:
    matrices = {name: _head_samples(rows)["plain"][name] for name in ("features", "linear_weight", "target")}
    return {name: matrices | angle_sets(rows, CLASSES)[name] for name in ("plain", "agcl easy", "dbm and clouds", "dbm and everything", "everything")}


def _reduced(top1: Tensor, reduction: str = "mean", **_: Any) -> Tensor:
    return top1 if reduction == "none" else top1.sum() if reduction == "sum" else top1.mean()


def _loss_and_top1(features: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Both results in one tensor; its gradient is that of the loss."""
    loss, top1 = linear_gcl_cross_entropy_with_top1(features, linear_weight, target, **options)
    return loss + _reduced(top1, **options)


def _exact_loss_and_top1(features: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return oracle.linear_gcl_cross_entropy(features, linear_weight, target, **options) + _reduced(
        oracle.top1(features, linear_weight, target, options.get("target_b"), options.get("lam")), **options
    )


def _top1_samples(rows: int) -> dict[str, Options]:
    samples = _head_samples(rows)
    # every other sample lies at its class, and is classified correctly
    near = samples["plain"]["features"] + 4 * (torch.arange(rows) % 2)[:, None] * samples["plain"]["linear_weight"][samples["plain"]["target"]]
    return {name: samples[name] | {"features": near} for name in ("plain", "cloud", "mixed", "everything")}


def _bound_samples(rows: int) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(rows, DIM, generator=generator), torch.randn(CLASSES, DIM, generator=generator)
    given: Options = {"features": features, "target": labels(rows, 4), "centroids": centroids}  # 4: a class has several of the rows
    weighted = {"class_weight": vector(CLASSES, 0.1, 2.0, seed=5), "temperature": 0.7}
    return {
        "plain": given | {"epsilon": 0.5},
        "one epsilon": given | {"epsilon": torch.tensor(0.3)},
        "everything": given | {"epsilon": vector(CLASSES, 0.0, 1.0)} | weighted,
        "more classes than rows": given | {"epsilon": vector(CLASSES, 0.0, 1.0), "target": labels(rows, CLASSES)} | weighted,
    }


def _contrastive_samples(rows: int) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(0)
    features, prototypes = torch.randn(rows, DIM, generator=generator), torch.randn(CLASSES, DIM, generator=generator)
    target = labels(rows, 4)
    given: Options = {"features": features, "target": target, "temperature": 0.5}
    counts = (target.bincount(minlength=CLASSES) + 1).float()
    return {
        "plain": given,
        "everything": given | {"prototypes": prototypes, "class_counts": counts},
        "prototypes alone": given | {"prototypes": prototypes, "include_samples": False, "include_own_class": False},
    }


def _vmf_cross_entropy(cosine: Tensor, target: Tensor, concentration: Tensor, backend: str = "auto", **options: Any) -> Tensor:
    """ProCo's loss: the cross entropy of the contrasts, of cosines in float32 or better as its module has them."""
    cosine = cosine.to(statistics_dtype(cosine)) if cosine.is_floating_point() else cosine
    contrast = vmf_contrast(cosine, concentration, DIM, 0.5, backend)
    return gcl_cross_entropy(contrast, target, scale=1.0, backend=backend, **options)


def _exact_vmf_cross_entropy(cosine: Tensor, target: Tensor, concentration: Tensor, **options: Any) -> Tensor:
    return oracle.gcl_cross_entropy(oracle.vmf_contrast(cosine, concentration, DIM, 0.5), target, scale=1.0, **options)


def _vmf_samples(rows: int) -> dict[str, Options]:
    given = {"cosine": cosines(rows, CLASSES), "target": labels(rows, CLASSES), "concentration": vector(CLASSES, 0.0, 40.0)}
    everything = {name: value for name, value in option_sets(rows, CLASSES)["everything"].items() if name not in ("scale", "row_offset", "class_offset")}
    return {"plain": given, "bias": given | option_sets(rows, CLASSES)["bias"], "everything": given | everything}


def _noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int, backend: str = "auto") -> Tensor:
    """The public function has no choice of a backend, so each one is reached by its operator."""
    if backend == "auto":
        return cloud_noise(seed, num_rows, num_classes, row_offset=row_offset, class_offset=class_offset)
    if backend == "triton":
        import gclkern.kernels.noise  # noqa: F401 (registers the operator)

    noise: Tensor = getattr(torch.ops.gclkern, f"{PREFIXES[backend]}cloud_noise")(seed, num_rows, num_classes, row_offset, class_offset)
    return noise


def _exact_noise(seed: Tensor, num_rows: int, num_classes: int, row_offset: int, class_offset: int) -> Tensor:
    return oracle.noise(int(seed), num_rows, num_classes, row_offset, class_offset)


def _noise_samples(rows: int) -> dict[str, Options]:
    return {"everything": {"seed": torch.tensor(2**40 + 5), "num_rows": rows, "num_classes": CLASSES, "row_offset": 2**33 + 1, "class_offset": 5}}


def _centroids(features: Tensor, target: Tensor, num_classes: int, backend: str = "auto") -> Tensor:
    """The means; the public function has no choice of a backend, so each one is reached by its operator."""
    if backend == "auto":
        return class_centroids(features, target, num_classes)[0]
    if backend == "triton":
        import gclkern.kernels.centroids  # noqa: F401 (registers the operator)

    sums, counts = getattr(torch.ops.gclkern, f"{PREFIXES[backend]}segment_sums")(features, target, num_classes)
    return sums / counts.clamp(min=1)[:, None]


def _centroid_samples(rows: int) -> dict[str, Options]:
    features = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0))
    return {"everything": {"features": features, "target": labels(rows, 4), "num_classes": CLASSES}}


_CLASS_VECTORS = dict.fromkeys(("cloud", "margin", "bias", "weight"), "classes")
_FAMILY = {"target": "rows", "target_b": "rows", "lam": "rows", "label_smoothing": "classes", **_CLASS_VECTORS}

OPERATIONS = [
    Operation(
        "gcl_cross_entropy", gcl_cross_entropy, oracle.gcl_cross_entropy, _logit_samples, {"cosine": "rows classes", **_FAMILY}, leaves=("cosine", "bias"),
        narrow=("cosine",), wrong=(*FAMILY, *LOGITS),
    ),
    Operation(
        "gcl_cross_entropy of soft labels", gcl_cross_entropy, _exact_of_soft_labels, _soft_samples,
        {"cosine": "rows classes", "target": "rows classes", **_CLASS_VECTORS}, leaves=("cosine", "bias"), narrow=("cosine",),
        interpreted=False,
    ),
    *(
        Operation(
            f"linear_gcl_cross_entropy {plan}", functools.partial(linear_gcl_cross_entropy, plan=plan), oracle.linear_gcl_cross_entropy, _head_samples,
            {"features": "rows dims", "linear_weight": "classes dims", **_FAMILY}, leaves=("features", "linear_weight", "bias"),
            narrow=("features", "linear_weight"), wrong=(*FAMILY, *HEAD) if plan == "materialised" else (),  # arguments are checked before the plan is chosen
        )
        for plan in PLANS
    ),
    Operation(
        "gcl_cross_entropy by angles", gcl_cross_entropy, oracle.gcl_cross_entropy, _angle_samples, {"cosine": "rows classes", **_FAMILY}, leaves=("cosine",),
        narrow=("cosine",), wrong=ANGLES,
    ),
    Operation(
        "linear_gcl_cross_entropy by angles", linear_gcl_cross_entropy, oracle.linear_gcl_cross_entropy, _angle_head_samples,
        {"features": "rows dims", "linear_weight": "classes dims", **_FAMILY}, leaves=("features", "linear_weight"), narrow=("features", "linear_weight"),
    ),
    Operation(
        "linear_gcl_cross_entropy_with_top1", _loss_and_top1, _exact_loss_and_top1, _top1_samples,
        {"features": "rows dims", "linear_weight": "classes dims", **_FAMILY}, leaves=("features", "linear_weight", "bias"),
        narrow=("features", "linear_weight"), interpreted=False, wrong=(*FAMILY, *HEAD),
    ),
    Operation(
        "dro_lt_loss", dro_lt_loss, oracle.dro_lt_loss, _bound_samples,
        {"features": "rows dims", "target": "rows", "centroids": "classes dims", "epsilon": "classes", "class_weight": "classes"},
        leaves=("features", "epsilon"), narrow=("features",), grid=False, batch=True, wrong=BOUND,
    ),
    Operation(
        "supervised_contrastive", supervised_contrastive, oracle.supervised_contrastive, _contrastive_samples,
        {"features": "rows dims", "target": "rows", "prototypes": "classes dims", "class_counts": "classes"}, leaves=("features", "prototypes"),
        narrow=("features",), grid=False, batch=True, wrong=CONTRASTIVE,
    ),
    Operation(
        "vmf_contrast", _vmf_cross_entropy, _exact_vmf_cross_entropy, _vmf_samples, {"cosine": "rows classes", "concentration": "classes", **_FAMILY},
        leaves=("cosine", "bias"), narrow=("cosine",), backends=("torch", "triton"), wrong=CONTRAST,
    ),
    Operation(
        "class_centroids", _centroids, oracle.class_centroids, _centroid_samples, {"features": "rows dims", "target": "rows"}, narrow=("features",), grid=False,
        batch=True, wrong=CENTROIDS,
    ),
    Operation("cloud_noise", _noise, _exact_noise, _noise_samples, {}, wrong=NOISE),
]  # fmt: skip
