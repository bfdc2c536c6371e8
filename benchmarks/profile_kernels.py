"""Runs every kernel a few times, for sanitizers and profilers.

python -m benchmarks.profile_kernels                          small odd shapes, with every optional term of the losses
python -m benchmarks.profile_kernels --shape iNaturalist      one of the benchmarks' shapes, as training uses the losses
python -m benchmarks.profile_kernels --shape NAME --plan PLAN      the head alone, in that plan
python -m benchmarks.profile_kernels --shape NAME --profile PATH   the same, and each kernel's device time as JSON
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import NOISE_MUL, SHAPES, Shape, draw_labels
from gclkern import cloud_noise, cloud_sizes
from gclkern.functional import class_centroids, dro_lt_loss, gcl_cross_entropy, linear_gcl_cross_entropy
from gclkern.options import Plan

SMALL = Shape("small", 37, 139, 72, 100, 2)
PLANS: tuple[Plan, ...] = ("materialised", "chunked", "recompute")
REPEATS = 5


def every_term(shape: Shape, device: torch.device) -> dict[str, Any]:
    """All optional terms of a loss at once, so that no branch of a kernel stays unvisited."""

    def vector(size: int) -> Tensor:
        return torch.rand(size, device=device)

    return {
        "margin": 0.3 * vector(shape.classes), "bias": vector(shape.classes).requires_grad_(), "weight": vector(shape.classes) + 0.1, "gamma": 1.0,
        "label_smoothing": 0.1, "target_b": draw_labels(shape, device), "lam": vector(shape.rows), "row_offset": 3, "class_offset": 5, "seed": 1,
    }  # fmt: skip


def run(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward of every operation."""
    target = draw_labels(shape, device)
    cloud = (NOISE_MUL * cloud_sizes(shape.class_counts())).to(device)
    features = torch.randn(shape.rows, shape.dim, dtype=dtype, device=device).requires_grad_()
    weight = torch.randn(shape.classes, shape.dim, dtype=dtype, device=device).requires_grad_()
    cosine = (2 * torch.rand(shape.rows, shape.classes, device=device) - 1).to(dtype).requires_grad_()
    for options in ({}, every_term(shape, device)) if shape is SMALL else ({},):
        gcl_cross_entropy(cosine, target, cloud, **options).backward()
        for plan in PLANS:
            linear_gcl_cross_entropy(features, weight, target, cloud, plan=plan, **options).backward()
    if device.type == "cuda":
        with mock.patch("gclkern.kernels.head.exponentials_pay", return_value=True):
            linear_gcl_cross_entropy(features, weight, target, cloud, plan="materialised").backward()
    centroids, counts = class_centroids(features.detach(), target, shape.classes)
    epsilon = torch.full((shape.classes,), 0.5, device=device, requires_grad=True)
    dro_lt_loss(features, target, centroids, epsilon, class_weight=(counts > 0).float()).backward()
    cloud_noise(1, shape.rows, shape.classes, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_head(shape: Shape, dtype: torch.dtype, device: torch.device, plan: Plan) -> None:
    """Forward and backward of the head."""
    features, weight = (torch.randn(size, shape.dim, dtype=dtype, device=device).requires_grad_() for size in (shape.rows, shape.classes))
    cloud = (NOISE_MUL * cloud_sizes(shape.class_counts())).to(device)
    linear_gcl_cross_entropy(features, weight, draw_labels(shape, device), cloud, plan=plan).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_times(work: Callable[[], object], device: torch.device) -> dict[str, dict[str, float]]:
    """Launches and device time of each kernel in one call of `work`, the longest first; without a GPU, operators and their own time."""
    work()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True) as profiler:
        for _ in range(REPEATS):
            work()
    rows = [event for event in profiler.key_averages() if not cuda or str(event.device_type) == "DeviceType.CUDA"]
    times = {event.key: (event.count, event.self_device_time_total if cuda else event.self_cpu_time_total) for event in rows}
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:40]
    return {name: {"launches": count / REPEATS, "microseconds": total / REPEATS} for name, (count, total) in longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {shape.name: shape for grid in SHAPES.values() for shape in grid}
    parser.add_argument("--shape", choices=shapes)
    parser.add_argument("--plan", choices=PLANS)
    parser.add_argument("--profile", type=Path, help="write each kernel's time there")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, dict[str, dict[str, float]]] = {}
    shape = SMALL if args.shape is None else shapes[args.shape]
    dtypes = {"bf16": torch.bfloat16} if args.plan else {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        work = partial(run, shape, dtype, device) if args.plan is None else partial(run_head, shape, dtype, device, args.plan)
        if args.profile is None:
            work()
        else:
            times[name] = kernel_times(work, device)
    if args.profile is not None:
        args.profile.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
