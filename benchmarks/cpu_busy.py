"""Losses on a CPU that has other work: the time of a step alone, and beside one busy process for each core.

    python -m benchmarks.cpu_busy [--threads 2 --rounds 15 --json PATH]

Contestants take turns in one process; first with the machine to themselves, then beside the other processes. The report has medians over the rounds, in
float32 with noise, of the loss with all gradients, and by how much the other processes slow a contestant down: by about 2 if the scheduler is fair.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_head, bench_logit_loss
from benchmarks.common import BOTH, CIFAR, IMAGENET, INATURALIST, Operation, Shape
from benchmarks.provenance import torch_hash
from benchmarks.timing import Call, Timed, busy_cores, rounds_in_turn, wall_clock
from gclkern import cpu_backend
from gclkern.training.atomic_files import replace_text

MEASURED: tuple[tuple[Operation, Shape, tuple[str, ...]], ...] = (
    (bench_logit_loss.OPERATION, CIFAR, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_logit_loss.OPERATION, IMAGENET, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_logit_loss.OPERATION, INATURALIST, ("gclkern", "plain torch", "torch cross entropy")),
    (bench_head.OPERATION, IMAGENET, ("gclkern", "plain torch", "bare products")),
)


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


def measure(timed: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant."""
    seconds = rounds_in_turn(list(timed.values()), rounds)
    return {name: statistics.median(times) for name, times in zip(timed, seconds, strict=True)}


def results_of(operation: Operation, shape: Shape, contestants: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    timed = {name: wall_clock([partial(step_of, operation, shape, name)]) for name in contestants}
    alone = measure(timed, rounds)
    with other_work():
        measure(timed, 1)  # until the scheduler has settled
        busy = measure(timed, rounds)
    names = {"operation": operation.name, "shape": shape.name, "rows": shape.rows, "classes": shape.classes, "dim": shape.dim}
    return [{**names, "contestant": name, "alone_seconds": alone[name], "busy_seconds": busy[name], "slowdown": busy[name] / alone[name]} for name in timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = busy_cores()
    results = []
    print(f"{args.threads} threads, {cores()} cores, load {load:.1f} before, torch {torch.__version__}, {cpu_backend.summary()}")
    print(f"{'':44}{'alone ms':>10}{'busy ms':>10}{'slowdown':>10}")
    for measured in MEASURED:
        for row in results_of(*measured, args.rounds):
            results.append(row)
            name = f"{row['operation']} | {row['shape']} | {row['contestant']}"
            print(f"{name:44}{1e3 * row['alone_seconds']:10.2f}{1e3 * row['busy_seconds']:10.2f}{row['slowdown']:10.2f}", flush=True)
    if args.json is not None:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": cores(), "cpu_code": cpu_backend.summary(), "load_before": load}
        data = {"torch_hash": torch_hash(), "software": machine, "threads": args.threads, "rounds": args.rounds, "results": results}
        replace_text(args.json, json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
