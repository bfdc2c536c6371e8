"""The head's loss with all gradients on a CPU, beside its three bare matrix products and beside the same loss in plain torch operators.

    python -m benchmarks.cpu_head --quick                       # seconds: 128 samples, 1000 classes, 512 dimensions
    python -m benchmarks.cpu_head [--rows 512 --classes 8142 --dim 2048 --threads 2 --json PATH]

Time: the contestants take turns in one process; a round gives each of them one run. The report has medians over the rounds, and the median over the rounds of
the ratio to the same round's products with its 95% interval. Ctrl-C ends the rounds early: the report is made of those that are complete, without memory.
Memory: each contestant makes one step in a process of its own. Counted is the peak of the resident set during the step over its size before: that includes the
gradients of features and weight, which are returned, and the matrix library's workspace, and excludes the inputs. `beyond gradients` takes the gradients off.
Ctrl-C here leaves out the contestants that are still to come. The times are printed and written before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_head
from benchmarks.common import BOTH, Shape
from benchmarks.memory import peak_bytes
from benchmarks.provenance import torch_hash
from benchmarks.timing import Call, Timed, keep_freed_memory, load_average, load_warning, rounds_in_turn, wall_clock
from gclkern import cpu_backend
from gclkern.training.arguments import number
from gclkern.training.atomic_files import replace_text

CPU = torch.device("cpu")
# without the one that takes the plan that "auto" chooses, which is here among the others
CONTESTANTS = {name: contestant for name, contestant in bench_head.CONTESTANTS.items() if name != "gclkern"}

FULL = {"rows": 512, "classes": 8142, "dim": 2048, "rounds": 15}
QUICK = {"rows": 128, "classes": 1000, "dim": 512, "rounds": 5}


def step_of(name: str, rows: int, classes: int, dim: int) -> Call:
    """The contestant's loss with all gradients, on inputs of its own."""
    torch.manual_seed(0)
    return CONTESTANTS[name].prepare(bench_head.make_inputs(Shape("head", rows, classes, dim), "fp32", CPU), BOTH)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_times(args: argparse.Namespace, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each contestant in every complete round; an interruption before the first one ends the program."""
    timed: list[Timed] = []
    rounds: list[list[float]] = []
    try:
        for name in names:
            note(f"preparing {name}")
            timed.append(wall_clock([partial(step_of, name, args.rows, args.classes, args.dim)]))
        for number in range(args.rounds):
            note(f"round {number + 1} of {args.rounds}")
            rounds += [list(row) for row in zip(*rounds_in_turn(timed, 1), strict=True)]
    except KeyboardInterrupt:
        if not rounds:
            sys.exit("interrupted before the end of the first round: there are no times")
        note(f"interrupted after {len(rounds)} of {args.rounds} rounds")
    return dict(zip(names, map(list, zip(*rounds, strict=True)), strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median by order statistics, without an assumption on the distribution; below six values all of them.

    The median lies outside the k-th smallest and k-th largest of n values with the probability that a fair coin thrown n times shows heads less than k times,
    or tails.
    """
    ordered, count = sorted(values), len(values)
    outside, place = 0.0, 0
    while place < count // 2 and 2 * (outside + math.comb(count, place) / 2**count) <= 0.05:
        outside += math.comb(count, place) / 2**count
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[-1 - place]


def ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios and its 95% interval."""
    ratios = [mine / other for mine, other in zip(values, others, strict=True)]
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high}


def rows_of(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The results of each contestant."""
    found = {}
    for name, times in seconds.items():
        bare = ratio(times, seconds["bare products"])
        found[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "fastest_milliseconds": 1e3 * min(times),
            "times_bare_products": bare["median"],
            "interval": [bare["low"], bare["high"]],
        }
    return found


def verdict(seconds: dict[str, list[float]]) -> str:
    """The conclusion of the measurement in one line."""
    ours = min((name for name in seconds if name.startswith("gclkern")), key=lambda name: statistics.median(seconds[name]))
    bare, plain = ratio(seconds[ours], seconds["bare products"]), ratio(seconds["plain torch"], seconds[ours])
    how = "faster than" if plain["low"] > 1 else "slower than" if plain["high"] < 1 else "level with"
    return (
        f"{ours}: {bare['median']:.2f} times the bare products ({bare['low']:.2f} to {bare['high']:.2f}); "
        f"{how} plain torch, which takes {plain['median']:.2f} times as long ({plain['low']:.2f} to {plain['high']:.2f})"
    )


def measure_memory(args: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Peak of each contestant; after an interruption, of those that are done."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "classes", "dim", "threads")]
    gradients = 4 * args.dim * (args.rows + args.classes)
    found = {}
    measured = [name for name in names if name != "torch.compile"]  # its process has just compiled, which hides the memory of the step
    try:
        for name in measured:
            note(f"memory of {name}")
            command = [sys.executable, "-m", "benchmarks.cpu_head", *sizes, "--memory-of", name]
            # the least of three: plain torch's varies by a fifth from process to process
            peak = min(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))
            found[name] = {"peak_bytes": peak, "peak_bytes_beyond_gradients": peak - gradients}
    except KeyboardInterrupt:
        note(f"interrupted after the memory of {len(found)} of {len(measured)}")
    return found


def memory_of(args: argparse.Namespace) -> int:
    step_of(args.memory_of, 8, 16, 8)()
    return peak_bytes(step_of(args.memory_of, args.rows, args.classes, args.dim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, five rounds, no compiler and no memory; the sizes below still count")
    parser.add_argument("--rows", type=number(int, 1), help="default 512")
    parser.add_argument("--classes", type=number(int, 1), help="default 8142")
    parser.add_argument("--dim", type=number(int, 1), help="default 2048")
    parser.add_argument("--threads", type=number(int, 1), default=2)
    parser.add_argument("--rounds", type=number(int, 1), help="timed rounds, after one to warm up (default 15)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--memory-of", choices=CONTESTANTS, help="print only the bytes that one step of this contestant takes, measured in this process")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(memory_of(args))
        return
    keep_freed_memory()
    load, cores = load_average(), os.cpu_count() or 1
    warning = load_warning(args.threads)
    if warning:
        note(warning)
    names = [name for name in CONTESTANTS if not (args.quick and name == "torch.compile")]
    seconds = measure_times(args, names)
    times = rows_of(seconds)
    print(f"N={args.rows} C={args.classes} D={args.dim}, float32, noise on, {args.threads} threads, torch {torch.__version__}; forward + backward")
    print(f"{len(seconds['plain torch'])} rounds; load {load:.1f} on {cores} cores before the start")
    print(f"{'':36}{'ms':>9}{'fastest':>9}{'x bare':>8}{'95% interval':>16}")
    for name, row in times.items():
        interval = "{:.3f} to {:.3f}".format(*row["interval"])
        print(f"{name:36}{row['milliseconds']:9.1f}{row['fastest_milliseconds']:9.1f}{row['times_bare_products']:8.3f}{interval:>16}")
    if warning:
        print(warning)
    print(verdict(seconds), flush=True)
    shape = {name: getattr(args, name) for name in ("rows", "classes", "dim", "threads")} | {"rounds": len(seconds["plain torch"])}
    machine: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    machine |= {"cpu_code": cpu_backend.summary(), "load": round(load, 2), "cores": cores}

    def write(memory: dict[str, dict[str, float]]) -> None:
        if args.json is not None:
            results = {name: {"includes": CONTESTANTS[name].includes, **times[name], **memory.get(name, {})} for name in names}
            replace_text(args.json, json.dumps({"torch_hash": torch_hash(), "shape": shape, "software": machine, "results": results}, indent=2) + "\n")

    write({})
    if args.quick or len(seconds["plain torch"]) < args.rounds:
        return
    memory = measure_memory(args, names)
    print(f"{'':36}{'peak MB':>9}{'beyond gradients':>18}")
    for name, peaks in memory.items():
        print(f"{name:36}{peaks['peak_bytes'] / 1e6:9.1f}{peaks['peak_bytes_beyond_gradients'] / 1e6:18.1f}")
    write(memory)


if __name__ == "__main__":
    main()
