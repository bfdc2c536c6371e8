"""The steps of benchmarks.gpu_report that decide between designs: python -m benchmarks.gpu_steps NAME OUT.json [--shape SHAPE] [--part PART] [--tiny]

Each runs in a process of its own and only needs torch and Triton, not pytest. It writes OUT.json after every measurement, continues what that file holds, and
puts the conclusions in words under "verdict". With --compile every call runs once, so that its kernels are in Triton's cache. With --tiny a step takes small
sizes; on a machine without a GPU everything runs on the CPU, to check that the step works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_centroids, bench_contrastive, bench_dro_lt, bench_proco, predict_times
from benchmarks.bench_head import make_inputs
from benchmarks.common import BOTH, HUNDRED_THOUSAND, INATURALIST, MILLION, NOISE_MUL, SCALE, Inputs, Operation, Shape, draw_labels, step_of
from benchmarks.gpu_checks import PLANS, exponentials_stored, parts
from benchmarks.profile_kernels import kernel_times
from benchmarks.step_results import DEVICE, Results, side_by_side
from benchmarks.timing import Call
from gclkern import SupConLoss, cloud_sizes
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.options import Plan

TINY = (Shape("tiny", 8, 40, 16, 50, 2),)
# What design and predictions ask for: seconds of the loss, the head in bare products, and the contrast of samples in two bare float32 products.
LOSS_GOAL = {INATURALIST.name: 20e-6, HUNDRED_THOUSAND.name: 0.9e-3, MILLION.name: 2.3e-3}
HEAD_GOAL = {INATURALIST.name: 1.5, HUNDRED_THOUSAND.name: 1.55, MILLION.name: 1.7}
SAMPLES_GOAL = 1.5
LIBRARY_PAYS = 1.3  # a product of ours that takes this many times as long as torch.mm should be replaced by it
OTHERS: tuple[Operation, ...] = tuple(module.OPERATION for module in (bench_contrastive, bench_dro_lt, bench_proco, bench_centroids))


class Step(Protocol):
    def __call__(self, results: Results, shapes: Sequence[Shape], tiny: bool) -> None: ...


def release() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def ceilings(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """What the machine does at best: a copy, and a large product."""
    size, edge = (2**12, 64) if tiny else (2**30, 8192)

    def copy() -> Call:
        source, target = torch.zeros(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return lambda: target.copy_(source)

    def product() -> Call:
        a = torch.randn(edge, edge, device=DEVICE).bfloat16()
        return lambda: a @ a

    copied, multiplied = 2 * size / results.seconds("ceilings", "copy", copy), 2.0 * edge**3 / results.seconds("ceilings", "product", product)
    results.say(f"copy: {copied:.3g} bytes a second, where the predictions take {predict_times.MEMORY_RATE:.3g}")
    results.say(f"product: {multiplied:.3g} operations a second, where the predictions take {predict_times.LIBRARY_RATE:.3g}")


def compilation(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """Every kernel of the steps to come, compiled by processes side by side, so that nothing later waits for a compiler."""
    if tiny:
        jobs = {"timings": ["timings", "--tiny"]}
    else:
        names = ("timings", "exponentials", "products", "gradient")
        jobs = {f"{name} of {shape.name}": [name, "--shape", shape.name] for name in names for shape in reversed(shapes)}
        jobs |= {name: [name] for name in ("others", "repeats")}
    side_by_side(results, {name: [*arguments, "--compile"] for name, arguments in jobs.items()}, COMPILATION_SECONDS - 5)
    results.data["verdict"] = [f"{len(jobs)} processes, {len(results.errors)} errors: {', '.join(results.errors)}"]


def correctness(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The checks of gpu_checks.py."""
    if tiny:
        for check in parts(tiny).values():
            check(results, tiny)
    else:
        side_by_side(results, {name: ["correctness", "--part", name] for name in parts(tiny)}, CORRECTNESS_SECONDS - 5)
    comparisons = results.data["comparisons"]
    worst = max(comparisons, key=comparisons.__getitem__, default="none")
    results.say(f"{len(comparisons)} comparisons, the largest error is {comparisons.get(worst, math.nan):.1e}: {worst}")


def repeats(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The same step many times, bitwise equal: a missing fence or wait in a product's pipeline would show as noise."""
    number = 1 if results.compile_only else 3 if tiny else 100
    for plan in PLANS:
        with results.trying(f"repeats, {plan}"):
            step = _head(make_inputs(TINY[0] if tiny else HUNDRED_THOUSAND, "bf16", DEVICE), plan, seed=1)
            first: Any = step()
            different = 0
            for _ in range(number):
                again: Any = step()
                different += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            results.say(f"{plan}: {different} of {number} repeats differ" if different else f"{plan}: {number} repeats are equal")
        release()


def _head(inputs: Inputs, plan: Plan, seed: int | None = None) -> Call:
    def loss(inputs: Inputs) -> Tensor:
        features, weight = inputs.leaves
        return linear_gcl_cross_entropy(features, weight, inputs.target, inputs.cloud, scale=SCALE, plan=plan, seed=seed)

    return step_of(loss)(inputs, BOTH)


def _heads(shape: Shape, dtype: str) -> Callable[[Plan], Callable[[], Call]]:
    """By plan, what makes the step of the head; all of them take the same inputs."""
    inputs = functools.cache(partial(make_inputs, shape, dtype, DEVICE))
    return lambda plan: lambda: _head(inputs(), plan)


def _bare(shape: Shape, padded: bool) -> Call:
    """Three products; with `padded` the matrix (N, C) has rows of a multiple of 64 elements, without it those of a bare C."""
    extent = -(-shape.classes // 64) * 64 if padded else shape.classes
    features, weight = (torch.randn(size, shape.dim, device=DEVICE).bfloat16() for size in (shape.rows, shape.classes))
    logits = torch.empty(shape.rows, extent, dtype=torch.bfloat16, device=DEVICE)[:, : shape.classes]

    def call() -> tuple[Tensor, Tensor]:
        torch.mm(features, weight.T, out=logits)
        return logits @ weight, logits.T @ features

    return call


def _loss(shape: Shape, noise: bool) -> Call:
    cosine = (2 * torch.rand(shape.rows, shape.classes, device=DEVICE) - 1).bfloat16().requires_grad_()
    target, cloud = draw_labels(shape, DEVICE), (NOISE_MUL * cloud_sizes(shape.class_counts())).to(DEVICE) if noise else None
    return lambda: torch.autograd.grad(gcl_cross_entropy(cosine, target, cloud, scale=SCALE), cosine)


def _copy_of_logits(shape: Shape) -> Call:
    cosine = torch.rand(shape.rows, shape.classes, device=DEVICE).bfloat16()
    return lambda: cosine.clone()


def timings(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The head in its plans beside the bare products, and the loss beside a copy: of all shapes first what there are goals for."""
    for shape in shapes:
        bare = results.seconds(shape.name, "bare products, padded", partial(_bare, shape, True))
        head = results.seconds(shape.name, "head bf16, auto", _heads(shape, "bf16")("auto"))
        loss = results.seconds(shape.name, "loss", partial(_loss, shape, True))
        results.say(f"{shape.name}: head {head / bare:.2f} of the bare products, goal {HEAD_GOAL.get(shape.name)}")
        results.say(f"{shape.name}: loss {1e6 * loss:.0f} us, goal {1e6 * LOSS_GOAL.get(shape.name, 0.0):.0f}")
    for shape in shapes:
        results.seconds(shape.name, "loss without noise", partial(_loss, shape, False))
        results.seconds(shape.name, "copy of the logits", partial(_copy_of_logits, shape))
        results.seconds(shape.name, "bare products, unpadded", partial(_bare, shape, False))
        for dtype in ("bf16", "autocast"):
            heads = _heads(shape, dtype)
            times: dict[str, float] = {plan: results.seconds(shape.name, f"head {dtype}, {plan}", heads(plan)) for plan in get_args(Plan)}
            best = fastest(times, PLANS)
            results.say(f"{shape.name}, {dtype}: the fastest plan is {best}; auto takes {times['auto'] / times[best]:.2f} of it")


def fastest(times: dict[str, float], names: Iterable[str]) -> str:
    """The name of the shortest time; those that failed are NaN."""
    return min(names, key=lambda name: math.inf if math.isnan(times[name]) else times[name])


def others(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The losses over samples, the DRO-LT bound, ProCo and centroids beside plain torch, and the time of each kernel."""
    for shape in predict_times.SAMPLES if not tiny else ():
        bare = results.seconds(shape.name, "two bare float32 products", partial(_bare_samples, shape))
        for name, forms in (("SupCon", 1), ("BCL", 2)):
            ours = results.seconds(shape.name, name, partial(_samples, shape, forms))
            results.say(f"{shape.name}: {name} takes {ours / bare:.2f} of two bare float32 products, goal {SAMPLES_GOAL}")
    for operation in OTHERS:
        shape = (operation.shapes or {})["smoke" if tiny else "cuda"][0]
        group = f"{operation.name}, {shape.name}"
        times = {name: results.seconds(group, name, partial(_contestant, operation, shape, name)) for name in ("gclkern", "plain torch")}
        results.say(f"{group}: {times['gclkern'] / times['plain torch']:.2f} of plain torch")
        if not results.compile_only:
            with results.trying(f"kernels of {group}"):
                results.data.setdefault("kernels", {})[group] = kernel_times(_contestant(operation, shape, "gclkern"), DEVICE)


def _contestant(operation: Operation, shape: Shape, name: str) -> Call:
    return operation.contestants[name].prepare(operation.make_inputs(shape, "fp32", DEVICE), operation.phases[-1])


def _bare_samples(shape: Shape) -> Call:
    x, y = (torch.randn(shape.rows, shape.dim, device=DEVICE) for _ in range(2))
    square = torch.empty(shape.rows, shape.rows, device=DEVICE)
    return lambda: (torch.mm(x, y.T, out=square), square @ x)


def _samples(shape: Shape, forms: int) -> Call:
    """SupCon, or with two forms of keys BCL."""
    inputs = bench_contrastive.make_inputs(shape, "fp32", DEVICE)
    criterion: Any = bench_contrastive.OURS if forms == 2 else SupConLoss(temperature=bench_contrastive.TEMPERATURE)
    leaves = inputs.leaves[:forms]
    return lambda: torch.autograd.grad(criterion(*leaves, inputs.target), leaves)


@contextlib.contextmanager
def _option(kernel: Any, **options: Any) -> Iterator[None]:
    """Launches of `kernel` inside take these options, too."""
    run = type(kernel).run

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs, **(options if self is kernel else {}))

    with mock.patch.object(type(kernel), "run", changed):
        yield


def _products_of(shape: Shape) -> dict[str, tuple[Call, Call]]:
    """Our products and torch.mm's, by name."""
    from gclkern.kernels import products as ours
    from gclkern.kernels.logit_loss import empty_rows

    x, weight = (F.normalize(torch.randn(size, shape.dim, device=DEVICE)).bfloat16() for size in (shape.rows, shape.classes))
    logits = empty_rows(shape.rows, shape.classes, torch.bfloat16, DEVICE).zero_()
    norm, sums, out = torch.ones(shape.classes, device=DEVICE), torch.zeros(8, shape.classes, device=DEVICE), torch.empty_like(weight)

    def features_gradient() -> None:
        parts = ours.feature_gradient_parts(shape.rows, shape.dim, logits.dtype, weight.dtype, DEVICE)
        ours.add_feature_gradient(logits, weight, parts, resume=False)

    return {
        "cosines": (lambda: ours.cosine_product(x, weight, norm, logits), lambda: torch.mm(x, weight.T, out=logits)),
        "features' gradient": (features_gradient, lambda: torch.mm(logits, weight, out_dtype=torch.float32)),
        "weights' gradient": (lambda: ours.weight_gradient(logits, x, weight, sums, norm, None, out), lambda: torch.mm(logits.T, x)),
    }


def products(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """Each product beside torch.mm, with both tiles, and with fewer registers."""
    if DEVICE.type != "cuda":
        results.say("needs a GPU")
        return
    from gclkern.kernels import products as ours

    narrow = partial(mock.patch.object, ours, "WIDE_COLUMNS", 2**62)
    for shape in shapes:
        calls = functools.cache(partial(_products_of, shape))
        measure = partial(_measure_product, results, shape, calls)
        with mock.patch.object(ours, "uses_cublas", return_value=False):
            times = {}
            for name in ("weights' gradient", "cosines", "features' gradient"):
                times[name], library = measure(name), measure(name, suffix=", torch.mm")
                with narrow():
                    small = measure(name, suffix=", 128 x 128")
                ratio = times[name] / library
                results.say(f"{shape.name}: {name} take {ratio:.2f} of torch.mm" + (": it should serve" if ratio > LIBRARY_PAYS else ""))
                results.say(f"{shape.name}: {name}: the chosen tile takes {times[name] / small:.2f} of 128 x 128")
            with narrow(), _option(ours._weight_gradient_kernel, maxnreg=128):
                fewer = measure("weights' gradient", suffix=", 128 x 128, 128 registers")
        chosen = times["weights' gradient"]
        results.say(f"{shape.name}: weights' gradient: 128 x 128 in 128 registers takes {fewer / chosen:.2f} of the chosen tile")
        release()


def _measure_product(results: Results, shape: Shape, calls: Callable[[], dict[str, tuple[Call, Call]]], name: str, suffix: str = "") -> float:
    return results.seconds(shape.name, name + suffix, lambda: calls()[name][suffix == ", torch.mm"])


def gradient(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The gradient kernel in more and fewer splits than it chooses."""
    if DEVICE.type != "cuda":
        results.say("needs a GPU")
        return
    for shape in shapes:
        make = _heads(shape, "bf16")("materialised")
        with exponentials_stored(False):
            times = {"chosen": results.seconds(shape.name, "chosen", make)}
            for splits in (1, 3, 4, 8, 16, 32):
                with mock.patch("gclkern.kernels.logit_loss.gradient_splits", return_value=splits):
                    times[f"{splits} splits"] = results.seconds(shape.name, f"{splits} splits", make)
        best = fastest(times, times)
        results.say(f"{shape.name}: the splits that are chosen take {times['chosen'] / times[best]:.2f} of the best ({best})")
        release()


def exponentials(results: Results, shapes: Sequence[Shape], tiny: bool) -> None:
    """The materialised head with cosines in its buffer, and with exponentials and the vendor's products, whose panels have several sizes."""
    if DEVICE.type != "cuda":
        results.say("needs a GPU")
        return
    from gclkern.kernels.head import exponentials_pay

    for shape in shapes:
        chosen = exponentials_pay(shape.rows, shape.classes, shape.dim)
        make = _heads(shape, "bf16")("materialised")
        with exponentials_stored(False):
            cosines = results.seconds(shape.name, "cosines", make)
        with exponentials_stored(True):
            times = {"exponentials": results.seconds(shape.name, "exponentials", make)}
            for power in (22, 23, 25, 26, 40):
                name = f"exponentials, panels of 2^{power} bytes"
                with mock.patch("gclkern.kernels.exponentials.PANEL_BYTES", 2**power):
                    times[name] = results.seconds(shape.name, name, make)
        ratio, best = times["exponentials"] / cosines, fastest(times, times)
        results.say(f"{shape.name}: exponentials take {ratio:.2f} of cosines; " + ("the rule is right" if chosen == (ratio < 1) else "the rule is wrong"))
        results.say(f"{shape.name}: the size of panels takes {times['exponentials'] / times[best]:.2f} of the best ({best})")
        release()


COMPILATION_SECONDS, CORRECTNESS_SECONDS = 90.0, 70.0
STEPS: dict[str, tuple[Step, float]] = {
    # in order, the most deciding first; seconds that each may take
    "compilation": (compilation, COMPILATION_SECONDS),
    "correctness": (correctness, CORRECTNESS_SECONDS),
    "timings": (timings, 70.0),
    "repeats": (repeats, 30.0),
    "others": (others, 40.0),
    "ceilings": (ceilings, 15.0),
    "exponentials": (exponentials, 40.0),
    "products": (products, 40.0),
    "gradient": (gradient, 40.0),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(STEPS))
    parser.add_argument("out", type=Path, help="the JSON file to write, and to continue")
    parser.add_argument("--shape", choices=[shape.name for shape in predict_times.SHAPES], help="only this one")
    parser.add_argument("--part", choices=list(parts(False)), help="of correctness, only this one")
    parser.add_argument("--compile", action="store_true", help="time nothing")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    results = Results(args.out, compile_only=args.compile)
    results.save()
    if args.part is not None:
        parts(args.tiny)[args.part](results, args.tiny)
    else:
        shapes = TINY if args.tiny else [shape for shape in predict_times.SHAPES if args.shape in (None, shape.name)]
        STEPS[args.name][0](results, shapes, args.tiny)
    results.save()


if __name__ == "__main__":
    main()
