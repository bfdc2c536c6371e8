"""Programs and functions in processes of their own: train.py as a user starts it, and a function in several that share a gloo process group on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

ROOT = Path(__file__).resolve().parents[2]


def start_train(*arguments: object, ranks: int = 1) -> subprocess.Popen[str]:
    """train.py on `ranks` processes of one thread each, together a process group of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What a process prints that ends well."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    return output


def _enter(rank: int, world: int, store: str, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    function(rank, world, *arguments)
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., None], *arguments: Any, seconds: float = 120.0) -> None:
    """Call `function(rank, world, *arguments)` in `world` new processes. What one raises is raised here; no rank waits for another beyond `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, (world, str(Path(folder) / "store"), seconds, function, arguments), nprocs=world)
