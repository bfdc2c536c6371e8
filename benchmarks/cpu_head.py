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
from functools import partial
from pathlib import Path

import torch

from benchmarks import bench_head
from benchmarks.common import BOTH, Shape
from benchmarks.memory import peak_bytes
from benchmarks.provenance import torch_hash
from benchmarks.timing import Call, rounds_in_turn, wall_clock
from gclkern import cpu_backend
from gclkern.training.atomic_files import replace_text

CPU = torch.device("cpu")
# without the one that takes the plan that "auto" chooses, which is here among the others
CONTESTANTS = {name: contestant for name, contestant in bench_head.CONTESTANTS.items() if name != "gclkern"}


def step_of(name: str, rows: int, classes: int, dim: int) -> Call:
    """The contestant's loss with all gradients, on inputs of its own."""
    torch.manual_seed(0)
    return CONTESTANTS[name].prepare(bench_head.make_inputs(Shape("head", rows, classes, dim), "fp32", CPU), BOTH)


def measure_times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    timed = [wall_clock([partial(step_of, name, args.rows, args.classes, args.dim)]) for name in CONTESTANTS]
    seconds = dict(zip(CONTESTANTS, rounds_in_turn(timed, args.rounds), strict=True))
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
        if name == "torch.compile":
            continue  # its process has compiled just before: what of its memory the step takes does not show
        command = [sys.executable, "-m", "benchmarks.cpu_head", *sizes, "--memory-of", name]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found[name] = {"peak_bytes": peak, "peak_bytes_beyond_gradients": peak - gradients}
    return found


def memory_of(args: argparse.Namespace) -> int:
    step_of(args.memory_of, 8, 16, 8)()
    return peak_bytes(step_of(args.memory_of, args.rows, args.classes, args.dim))


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
    print(f"{'':36}{'ms':>9}{'fastest':>9}{'x bare':>8}{'peak MB':>9}{'beyond gradients':>18}")
    for name, row in times.items():
        peaks = [f"{value / 1e6:.1f}" for value in memory.get(name, {}).values()] or ["", ""]
        print(f"{name:36}{row['milliseconds']:9.1f}{row['fastest_milliseconds']:9.1f}{row['times_bare_products']:8.3f}{peaks[0]:>9}{peaks[1]:>18}")
    if args.json is not None:
        shape = {name: getattr(args, name) for name in ("rows", "classes", "dim", "threads", "rounds")}
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "cpu_code": cpu_backend.summary()}
        results = {name: {"includes": CONTESTANTS[name].includes, **times[name], **memory.get(name, {})} for name in CONTESTANTS}
        replace_text(args.json, json.dumps({"torch_hash": torch_hash(), "shape": shape, "software": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
