"""The steps of benchmarks.gpu_report that decide between designs, each in its own process: python -m benchmarks.gpu_steps NAME OUT.json [--tiny]

They only need torch and Triton, not pytest. A step writes what it measured and, under "verdict", the conclusion in words. With --tiny a step takes small sizes,
and on a machine without a GPU everything runs on the CPU, to check that the step works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import predict_times
from benchmarks.bench_head import make_inputs
from benchmarks.common import BOTH, HUNDRED_THOUSAND, INATURALIST, MILLION, NOISE_MUL, SCALE, Inputs, Shape, draw_labels, step_of
from benchmarks.provenance import ROOT
from benchmarks.timing import Call, prepare
from gclkern import cloud_noise, cloud_sizes
from gclkern.functional import gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.options import Backend, Plan

PLANS: tuple[Plan, ...] = ("materialised", "chunked", "recompute")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = (Shape("tiny", 8, 40, 16, 50, 2),)
ROUNDS = 5
# What design and predictions ask for: seconds of the loss, and the head in bare products.
LOSS_GOAL = {INATURALIST.name: 20e-6, HUNDRED_THOUSAND.name: 0.9e-3, MILLION.name: 2.3e-3}
HEAD_GOAL = {INATURALIST.name: 1.5, HUNDRED_THOUSAND.name: 1.55, MILLION.name: 1.7}
LIBRARY_PAYS = 1.3  # a product of ours that takes this many times as long as torch.mm should be replaced by it


def seconds(call: Call) -> float:
    """Of one call: the least of some rounds, on a GPU by CUDA graph."""
    timed = prepare([lambda: call], DEVICE, graph=True)
    return min(timed.seconds() for _ in range(ROUNDS))


def release() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def shapes(tiny: bool) -> tuple[Shape, ...]:
    return TINY if tiny else predict_times.SHAPES


def ceilings(tiny: bool) -> dict[str, Any]:
    """What the machine does at best: a copy, and a large product."""
    size = 2**12 if tiny else 2**30
    source, target = torch.zeros(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
    copy = 2 * size / seconds(lambda: target.copy_(source))
    edge = 64 if tiny else 8192
    a = torch.randn(edge, edge, device=DEVICE).bfloat16()
    product = 2.0 * edge**3 / seconds(lambda: a @ a)
    found = {"copy bytes a second": copy, "product operations a second": product}
    expected = {"copy bytes a second": predict_times.MEMORY_RATE, "product operations a second": predict_times.LIBRARY_RATE}
    return found | {"verdict": [f"{name}: {value:.3g}, where the predictions take {expected[name]:.3g}" for name, value in found.items()]}


def compilation(tiny: bool) -> dict[str, Any]:
    """Every kernel of the steps to come, compiled by processes side by side, so that nothing later waits for a compiler."""
    options = [["--plan", plan, "--shape", shape.name] for shape in (predict_times.SHAPES if not tiny else ()) for plan in PLANS]
    running = [subprocess.Popen([sys.executable, "-m", "benchmarks.profile_kernels", *option], cwd=ROOT) for option in options or [["--plan", "materialised"]]]
    failed = sum(process.wait() != 0 for process in running)
    return {"processes": len(running), "failed": failed, "verdict": [f"{failed} of {len(running)} processes failed"] if failed else []}


def _exponentials(pay: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, the materialised head stores exponentials at any size, or at none."""
    return mock.patch("gclkern.kernels.head.exponentials_pay", return_value=pay)


def _terms_of(case: str, rows: int, classes: int) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": SCALE, "seed": 7, "reduction": "none"}
    if case == "everything":
        options |= {
            "margin": 0.1 * torch.rand(classes, device=DEVICE), "weight": torch.rand(classes, device=DEVICE) + 0.5, "gamma": 1.0, "label_smoothing": 0.1,
            "target_b": torch.randint(classes, (rows,), device=DEVICE), "lam": torch.rand(rows, device=DEVICE), "row_offset": 3, "class_offset": 5,
        }  # fmt: skip
    return options


def correctness(tiny: bool) -> dict[str, Any]:
    """The kernels against the torch backend in float64, at an odd number of classes: values, gradients, ignored and NaN rows, the known draws."""
    torch.manual_seed(0)
    broken: list[str] = []
    errors: dict[str, float] = {}
    rows, classes = (6, 21) if tiny else (200, 8142)
    backend: Backend = "triton" if DEVICE.type == "cuda" else "torch"
    for dim in (12,) if tiny else (512, 300, 301):
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2**-6)):
            features, weight = torch.randn(rows, dim, device=DEVICE).to(dtype), torch.randn(classes, dim, device=DEVICE).to(dtype)
            target = torch.randint(classes, (rows,), device=DEVICE)
            target[1] = -100
            cloud = torch.rand(classes, device=DEVICE) * 0.5
            for case in ("plain", "everything"):
                options = _terms_of(case, rows, classes)
                wide = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in options.items()}
                wanted = _gradients(features.double(), weight.double(), target, cloud.double(), "torch", plan="materialised", **wide)
                for plan, exponentials in (*((plan, False) for plan in PLANS), ("materialised", True)):
                    with _exponentials(exponentials):
                        found = _gradients(features, weight, target, cloud, backend, plan=plan, **options)
                    for name, ours, theirs in zip(("loss", "features", "weight"), found, wanted, strict=True):
                        error = float((ours.double() - theirs).norm() / theirs.norm())
                        key = f"{case}, {plan}{' of exponentials' if exponentials else ''}, D = {dim}, {str(dtype).removeprefix('torch.')}: {name}"
                        errors[key] = error
                        if not error <= limit:
                            broken.append(f"{key} is off by {error:.1e}")
    features[2] = float("nan")
    options = _terms_of("plain", rows, classes)
    loss, grad, _ = _gradients(features, weight, target, cloud, backend, plan="materialised", **options)
    others = torch.arange(rows, device=DEVICE) != 2
    if not (loss[2].isnan() and loss[others].isfinite().all() and grad[others].isfinite().all()):
        broken.append("a NaN row spreads")
    known = torch.tensor([0.0689661, 0.1897665, 0.3705992, 0.1379022], device=DEVICE)
    draws = cloud_noise(2**40 + 5, 1, 4, row_offset=2**33 + 1, device=DEVICE)[0]
    if float((draws - known).abs().max()) > 1e-4:
        broken.append(f"the known draws are {draws.tolist()}")
    return {"errors": errors, "verdict": broken or [f"{len(errors)} comparisons hold, the largest error is {max(errors.values()):.1e}"]}


def _gradients(features: Tensor, linear_weight: Tensor, target: Tensor, cloud: Tensor, backend: Backend, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = features.clone().requires_grad_(), linear_weight.clone().requires_grad_()
    loss = linear_gcl_cross_entropy(*leaves, target, cloud, backend=backend, **options)
    of_features, of_weight = torch.autograd.grad(loss[~loss.isnan()].sum(), leaves)
    return loss.detach(), of_features, of_weight


def repeats(tiny: bool) -> dict[str, Any]:
    """The same step many times, bitwise equal: a missing fence or wait in a product's pipeline would show as noise."""
    inputs = make_inputs(TINY[0] if tiny else HUNDRED_THOUSAND, "bf16", DEVICE)
    number = 3 if tiny else 100
    different: dict[str, int] = {}
    for plan in PLANS:
        step = _head(inputs, plan, seed=1)
        first: Any = step()
        different[plan] = 0
        for _ in range(number):
            again: Any = step()
            different[plan] += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        release()
    verdict = [f"{plan}: {count} of {number} repeats differ" for plan, count in different.items() if count] or [f"{number} repeats of each plan are equal"]
    return {"different": different, "verdict": verdict}


def _head(inputs: Inputs, plan: Plan, seed: int | None = None) -> Call:
    def loss(inputs: Inputs) -> Tensor:
        features, weight = inputs.leaves
        return linear_gcl_cross_entropy(features, weight, inputs.target, inputs.cloud, scale=SCALE, plan=plan, seed=seed)

    return step_of(loss)(inputs, BOTH)


def _bare(shape: Shape, padded: bool) -> Call:
    """Three products; with `padded` the matrix (N, C) has rows of a multiple of 64 elements, without it those of a bare C."""
    extent = -(-shape.classes // 64) * 64 if padded else shape.classes
    features, weight = (torch.randn(size, shape.dim, device=DEVICE).bfloat16() for size in (shape.rows, shape.classes))
    logits = torch.empty(shape.rows, extent, dtype=torch.bfloat16, device=DEVICE)[:, : shape.classes]

    def call() -> tuple[Tensor, Tensor]:
        torch.mm(features, weight.T, out=logits)
        return logits @ weight, logits.T @ features

    return call


def _timings_of(shape: Shape) -> dict[str, float]:
    times = {f"bare products, {name}": seconds(_bare(shape, name == "padded")) for name in ("padded", "unpadded")}
    for dtype in ("bf16", "autocast"):
        inputs = make_inputs(shape, dtype, DEVICE)
        for plan in get_args(Plan):
            times[f"head {dtype}, {plan}"] = seconds(_head(inputs, plan))
            release()
    cosine = (2 * torch.rand(shape.rows, shape.classes, device=DEVICE) - 1).bfloat16().requires_grad_()
    target, cloud = draw_labels(shape, DEVICE), (NOISE_MUL * cloud_sizes(shape.class_counts())).to(DEVICE)
    times["loss"] = seconds(lambda: torch.autograd.grad(gcl_cross_entropy(cosine, target, cloud, scale=SCALE), cosine))
    times["loss without noise"] = seconds(lambda: torch.autograd.grad(gcl_cross_entropy(cosine, target, scale=SCALE), cosine))
    times["copy of the logits"] = seconds(lambda: cosine.detach().clone())
    return times


def timings(tiny: bool) -> dict[str, Any]:
    """The head in its plans beside the bare products, and the loss beside a copy."""
    found: dict[str, dict[str, float]] = {}
    verdict = []
    for shape in shapes(tiny):
        times = found[shape.name] = _timings_of(shape)
        ratio = times["head bf16, auto"] / times["bare products, padded"]
        best = min(PLANS, key=lambda plan: times[f"head bf16, {plan}"])
        verdict.append(f"{shape.name}: head {ratio:.2f} of the bare products, goal {HEAD_GOAL.get(shape.name)}; the fastest plan is {best}")
        verdict.append(f"{shape.name}: loss {1e6 * times['loss']:.0f} us, goal {1e6 * LOSS_GOAL.get(shape.name, 0.0):.0f}")
        release()
    return {"seconds": found, "verdict": verdict}


@contextlib.contextmanager
def _option(kernel: Any, **options: Any) -> Iterator[None]:
    """Launches of `kernel` inside take these options, too."""
    run = type(kernel).run

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs, **(options if self is kernel else {}))

    with mock.patch.object(type(kernel), "run", changed):
        yield


def _products_of(shape: Shape) -> dict[str, float]:
    from gclkern.kernels import products as ours
    from gclkern.kernels.logit_loss import empty_rows

    x, weight = (F.normalize(torch.randn(size, shape.dim, device=DEVICE)).bfloat16() for size in (shape.rows, shape.classes))
    logits = empty_rows(shape.rows, shape.classes, torch.bfloat16, DEVICE).zero_()
    norm, sums, out = torch.ones(shape.classes, device=DEVICE), torch.zeros(8, shape.classes, device=DEVICE), torch.empty_like(weight)

    def features_gradient() -> None:
        parts = ours.feature_gradient_parts(shape.rows, shape.dim, logits.dtype, weight.dtype, DEVICE)
        ours.add_feature_gradient(logits, weight, parts, resume=False)

    calls: dict[str, tuple[Call, Call]] = {
        "cosines": (lambda: ours.cosine_product(x, weight, norm, logits), lambda: torch.mm(x, weight.T, out=logits)),
        "features' gradient": (features_gradient, lambda: torch.mm(logits, weight, out_dtype=torch.float32)),
        "weights' gradient": (lambda: ours.weight_gradient(logits, x, weight, sums, norm, None, out), lambda: torch.mm(logits.T, x)),
    }
    times = {}
    with mock.patch.object(ours, "uses_cublas", return_value=False):
        for name, (call, library) in calls.items():
            times[f"{name}, torch.mm"] = seconds(library)
            times[name] = seconds(call)
            with mock.patch.object(ours, "WIDE_COLUMNS", 2**62):
                times[f"{name}, 128 x 128"] = seconds(call)
                if name.startswith("weights"):
                    with _option(ours._weight_gradient_kernel, maxnreg=128):
                        times[f"{name}, 128 x 128, 128 registers"] = seconds(call)
    return times


def products(tiny: bool) -> dict[str, Any]:
    """Each product beside torch.mm, with both tiles, and with fewer registers."""
    found: dict[str, dict[str, float]] = {}
    verdict = []
    for shape in shapes(tiny) if DEVICE.type == "cuda" else ():
        times = found[shape.name] = _products_of(shape)
        for name in ("cosines", "features' gradient", "weights' gradient"):
            ours, narrow, library = times[name], times[f"{name}, 128 x 128"], times[f"{name}, torch.mm"]
            verdict.append(f"{shape.name}: {name} take {ours / library:.2f} of torch.mm" + (": it should serve" if ours / library > LIBRARY_PAYS else ""))
            verdict.append(f"{shape.name}: {name}: 128 x {'256' if ours <= narrow else '128'} is the faster tile, {abs(1 - ours / narrow):.0%}")
        best, fewer = (min(times["weights' gradient"], times["weights' gradient, 128 x 128"]), times["weights' gradient, 128 x 128, 128 registers"])
        verdict.append(f"{shape.name}: 128 registers {'help' if fewer < best else 'do not help'} the weights' gradient ({fewer / best:.2f})")
        release()
    return {"seconds": found, "verdict": verdict or ["needs a GPU"]}


def gradient(tiny: bool) -> dict[str, Any]:
    """The gradient kernel in more and fewer splits than it chooses."""
    found: dict[str, dict[str, float]] = {}
    verdict = []
    for shape in shapes(tiny) if DEVICE.type == "cuda" else ():
        inputs = make_inputs(shape, "bf16", DEVICE)
        with _exponentials(False):
            times = found[shape.name] = {"chosen": seconds(_head(inputs, "materialised"))}
            for splits in (1, 3, 4, 8, 16, 32):
                with mock.patch("gclkern.kernels.logit_loss.gradient_splits", return_value=splits):
                    times[f"{splits} splits"] = seconds(_head(inputs, "materialised"))
        best = min(times, key=times.__getitem__)
        verdict.append(f"{shape.name}: the splits that are chosen are {times['chosen'] / times[best]:.2f} of the best ({best})")
        release()
    return {"seconds": found, "verdict": verdict or ["needs a GPU"]}


def exponentials(tiny: bool) -> dict[str, Any]:
    """The materialised head with cosines in its buffer, and with exponentials and the vendor's products, whose panels have several sizes."""
    from gclkern.kernels.head import exponentials_pay

    found: dict[str, dict[str, float]] = {}
    verdict = []
    for shape in shapes(tiny) if DEVICE.type == "cuda" else ():
        inputs = make_inputs(shape, "bf16", DEVICE)
        times = found[shape.name] = {}
        with _exponentials(False):
            times["cosines"] = seconds(_head(inputs, "materialised"))
        with _exponentials(True):
            times["exponentials"] = seconds(_head(inputs, "materialised"))
            for power in (22, 23, 25, 26, 40):
                with mock.patch("gclkern.kernels.exponentials.PANEL_BYTES", 2**power):
                    times[f"exponentials, panels of 2^{power} bytes"] = seconds(_head(inputs, "materialised"))
                release()
        ratio, chosen = times["exponentials"] / times["cosines"], exponentials_pay(shape.rows, shape.classes, shape.dim)
        verdict.append(f"{shape.name}: exponentials take {ratio:.2f} of cosines; " + ("the rule is right" if chosen == (ratio < 1) else "the rule is wrong"))
        best = min((name for name in times if name != "cosines"), key=times.__getitem__)
        verdict.append(f"{shape.name}: the size of panels is {times['exponentials'] / times[best]:.2f} of the best ({best})")
        release()
    return {"seconds": found, "verdict": verdict or ["needs a GPU"]}


STEPS: dict[str, tuple[Callable[[bool], dict[str, Any]], float]] = {
    # in order, the most deciding first; seconds that each may take
    "compilation": (compilation, 60.0),
    "ceilings": (ceilings, 20.0),
    "correctness": (correctness, 60.0),
    "repeats": (repeats, 40.0),
    "timings": (timings, 90.0),
    "exponentials": (exponentials, 40.0),
    "products": (products, 60.0),
    "gradient": (gradient, 40.0),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(STEPS))
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    args.out.write_text(json.dumps(STEPS[args.name][0](args.tiny), indent=1) + "\n")


if __name__ == "__main__":
    main()
