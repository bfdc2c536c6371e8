"""The head's loss with all gradients on a CPU, beside its three bare matrix products and beside the same loss in plain torch operators.

    python -m benchmarks.cpu_head [--rows 512 --classes 8142 --dim 2048 --threads 2 --json PATH]

Time: the contestants take turns in one process; a round gives each of them one run. The report has medians over the rounds, and the median over the rounds of
the ratio to the same round's products.
Memory: each contestant makes one step in a process of its own. Counted is the peak of the resident set during the step over its size before: that includes the
gradients of features and weight, which are returned, and the matrix library's workspace, and excludes the inputs. `beyond gradients` takes the gradients off.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import gclkern.torch_backend  # noqa: F401 (registers the operators)
from benchmarks.common import torch_hash
from benchmarks.memory import peak_bytes
from gclkern.kernels.terms import LossTerms
from gclkern.noise import fill_noise

SCALE = 30.0


def problem(rows: int, classes: int, dim: int) -> tuple[Tensor, Tensor, LossTerms]:
    torch.manual_seed(0)
    features, weight = torch.randn(rows, dim), torch.randn(classes, dim)
    terms = LossTerms(
        target=torch.randint(classes, (rows,)), target_b=None, lam=None, cloud=0.5 * torch.rand(classes), margin=None, bias=None, weight=None,
        seed=torch.tensor(1), scale=SCALE, gamma=0.0, focal_detach=True, label_smoothing=0.0, ignore_index=-100, row_offset=0, class_offset=0, reduction="mean",
    )  # fmt: skip
    return features, weight, terms


def bare_products(features: Tensor, weight: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    logits = features @ weight.t()
    return logits @ weight, logits.t() @ features


def ours(plan: str) -> Callable[[Tensor, Tensor, LossTerms], tuple[Tensor, Tensor]]:
    def step(features: Tensor, weight: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
        _, saved = torch.ops.gclkern.torch_head_forward(features, weight, *terms, True, plan, True)
        grads = torch.ops.gclkern.torch_head_backward(torch.ones(()), features, weight, saved, *terms, True, plan, True, True, False)
        return grads[0], grads[1]

    return step


def plain_torch(features: Tensor, weight: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The formula with the same noise, as one writes it with autograd."""
    features, weight = features.detach().requires_grad_(), weight.detach().requires_grad_()
    cosine = F.normalize(features, dim=1) @ F.normalize(weight, dim=1).t()
    noise = torch.empty(cosine.shape)
    assert terms.seed is not None and terms.cloud is not None
    fill_noise(noise, terms.seed)
    F.cross_entropy(SCALE * (cosine - terms.cloud * noise), terms.target).backward()
    assert features.grad is not None and weight.grad is not None
    return features.grad, weight.grad


CONTESTANTS: dict[str, Callable[[Tensor, Tensor, LossTerms], tuple[Tensor, Tensor]]] = {
    "bare products": bare_products,
    "materialised": ours("materialised"),
    "chunked": ours("chunked"),
    "recompute": ours("recompute"),
    "plain torch": plain_torch,
}


def measure_times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    inputs = problem(args.rows, args.classes, args.dim)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for round_number in range(args.rounds + 1):
        for name, step in CONTESTANTS.items():
            start = time.perf_counter()
            step(*inputs)
            if round_number > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    products = seconds["bare products"]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "fastest_milliseconds": 1e3 * min(times),
            "times_bare_products": statistics.median(mine / bare for mine, bare in zip(times, products, strict=True)),
        }
        for name, times in seconds.items()
    }


def measure_memory(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "classes", "dim", "threads")]
    gradients = 4 * args.dim * (args.rows + args.classes)
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "benchmarks.cpu_head", *sizes, "--memory-of", name]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found[name] = {"peak_bytes": peak, "peak_bytes_beyond_gradients": peak - gradients}
    return found


def memory_of(args: argparse.Namespace) -> int:
    step = CONTESTANTS[args.memory_of]
    step(*problem(8, 16, 8))
    inputs = problem(args.rows, args.classes, args.dim)
    return peak_bytes(lambda: step(*inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=8142)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, after one to warm up")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--memory-of", choices=CONTESTANTS, help="print only the bytes that one step of this contestant takes, measured in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(memory_of(args))
        return
    times, memory = measure_times(args), measure_memory(args)
    print(f"N={args.rows} C={args.classes} D={args.dim}, float32, noise on, {args.threads} threads, torch {torch.__version__}; forward + backward")
    print(f"{'':14}{'ms':>9}{'fastest':>9}{'x bare':>8}{'peak MB':>9}{'beyond gradients':>18}{'x plain torch':>15}")
    plain = memory["plain torch"]["peak_bytes_beyond_gradients"]
    for name, row in times.items():
        beyond = memory[name]["peak_bytes_beyond_gradients"]
        print(
            f"{name:14}{row['milliseconds']:9.1f}{row['fastest_milliseconds']:9.1f}{row['times_bare_products']:8.3f}"
            f"{memory[name]['peak_bytes'] / 1e6:9.1f}{beyond / 1e6:18.1f}{beyond / plain:15.3f}"
        )
    if args.json is not None:
        shape = {name: getattr(args, name) for name in ("rows", "classes", "dim", "threads", "rounds")}
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        results = {name: times[name] | memory[name] for name in CONTESTANTS}
        args.json.write_text(json.dumps({"torch_hash": torch_hash(), "shape": shape, "software": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
