"""Losses on a CPU that has other work: the time of a step alone, and beside one busy process for each core.

    python -m benchmarks.cpu_busy [--threads 2 --rounds 15 --json PATH]

Contestants take turns in one process; first with the machine to themselves, then beside the other processes. A round lasts many time slices of the scheduler,
because a call may be shorter than one: most calls then meet no other process, and a few wait for a whole slice. The report has means over the rounds, in
float32 with noise, of the loss with all gradients, and by how much the other processes slow a contestant down, with its standard error. A fair scheduler slows
down by 1.5 what keeps one of two cores busy, and by 2 what keeps both busy. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_head, bench_logit_loss
from benchmarks.common import BOTH, CIFAR, IMAGENET, INATURALIST, Operation, Shape
from benchmarks.provenance import torch_hash
from benchmarks.timing import Call, keep_freed_memory, load_average, load_warning
from gclkern import cpu_backend
from gclkern.training.arguments import number
from gclkern.training.atomic_files import replace_text

MEASURED: tuple[tuple[Operation, Shape, tuple[str, ...]], ...] = (
    (bench_logit_loss.OPERATION, CIFAR, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_logit_loss.OPERATION, IMAGENET, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_logit_loss.OPERATION, INATURALIST, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_head.OPERATION, IMAGENET, ("gclkern", "plain torch", "bare products")),
)

ROUND_SECONDS = 0.2


def step_of(operation: Operation, shape: Shape, contestant: str) -> Call:
    torch.manual_seed(0)
    return operation.contestants[contestant].prepare(operation.make_inputs(shape, "fp32", torch.device("cpu")), BOTH)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def other_work() -> Iterator[None]:
    """A process for each core that computes without end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores())]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def average(call: Call, least: float) -> float:
    """Seconds of a call, on average over as many as take at least `least` seconds."""
    calls, start, now = 0, time.perf_counter(), 0.0
    while now - start < least:
        call()
        calls, now = calls + 1, time.perf_counter()
    return (now - start) / calls


def measure(steps: dict[str, Call], rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds of a call in each round of each contestant; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, call in steps.items():
            seconds[name].append(average(call, least))
    return seconds


def relative_error(seconds: list[float]) -> float:
    """Standard error of the mean over the mean."""
    return statistics.stdev(seconds) / math.sqrt(len(seconds)) / statistics.mean(seconds)


def results_of(operation: Operation, shape: Shape, contestants: tuple[str, ...], rounds: int, least: float = ROUND_SECONDS) -> list[dict[str, Any]]:
    steps = {name: step_of(operation, shape, name) for name in contestants}
    measure(steps, 1, least)  # warms up
    alone = measure(steps, rounds, least)
    with other_work():
        measure(steps, 1, least)  # until the scheduler has settled
        busy = measure(steps, rounds, least)
    names = {"operation": operation.name, "shape": shape.name, "rows": shape.rows, "classes": shape.classes, "dim": shape.dim}
    results = []
    for name in contestants:
        alone_seconds, busy_seconds = statistics.mean(alone[name]), statistics.mean(busy[name])
        slowdown, error = busy_seconds / alone_seconds, math.hypot(relative_error(alone[name]), relative_error(busy[name]))
        row = {"contestant": name, "alone_seconds": alone_seconds, "busy_seconds": busy_seconds, "slowdown": slowdown, "slowdown_error": slowdown * error}
        results.append({**names, **row})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=number(int, 1), default=cores())
    parser.add_argument("--rounds", type=number(int, 2), default=15, help="timed rounds, alone and again beside the other processes (default 15)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    load, warning = load_average(), load_warning(args.threads)
    results = []
    if warning:
        print(warning)
    print(f"{args.threads} threads, {cores()} cores, load {load:.1f} before, torch {torch.__version__}, {cpu_backend.summary()}")
    print(f"{'':44}{'alone ms':>10}{'busy ms':>10}{'slowdown':>18}")
    for measured in MEASURED:
        for row in results_of(*measured, args.rounds):
            results.append(row)
            name = f"{row['operation']} | {row['shape']} | {row['contestant']}"
            milliseconds = f"{1e3 * row['alone_seconds']:10.2f}{1e3 * row['busy_seconds']:10.2f}"
            print(f"{name:44}{milliseconds}{row['slowdown']:10.2f} ± {row['slowdown_error']:.2f}", flush=True)
    if args.json is not None:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": cores(), "cpu_code": cpu_backend.summary(), "load_before": load}
        counts = {"threads": args.threads, "rounds": args.rounds, "round_seconds": ROUND_SECONDS}
        data = {"torch_hash": torch_hash(), "software": machine, **counts, "results": results}
        replace_text(args.json, json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
