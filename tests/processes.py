"""Run a function in several processes that share a gloo process group on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def _enter(rank: int, world: int, store: str, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    function(rank, world, *arguments)
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., None], *arguments: Any, seconds: float = 120.0) -> None:
    """Call `function(rank, world, *arguments)` in `world` new processes. What one raises is raised here; no rank waits for another beyond `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, (world, str(Path(folder) / "store"), seconds, function, arguments), nprocs=world)
