"""What a step of benchmarks.gpu_report has found so far, and processes side by side that find more."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import ROOT
from benchmarks.timing import Call, prepare
from gclkern.training.atomic_files import replace_text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5
ENDED = "the process ended or hung here"
LOST = 3  # exit code of a process whose device no longer answers


def seconds(call: Call) -> float:
    """Of one call: the least of some rounds, on a GPU by CUDA graph."""
    timed = prepare([lambda: call], DEVICE, graph=True)
    return min(timed.seconds() for _ in range(ROUNDS))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Results:
    """Measurements and comparisons, in a file that is written after each of them: a step that hangs, fails or loses the device loses only one.

    What the file has from an earlier try is not done again, neither what failed there nor what was under way when the process ended.
    """

    def __init__(self, path: Path | None = None, *, compile_only: bool = False) -> None:
        self.path, self.compile_only = path, compile_only
        known = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.data: dict[str, Any] = {"seconds": {}, "comparisons": {}, "errors": {}, **known, "verdict": []}
        if begun := self.data.pop("begun", None):
            self.errors[begun["what"]] = ENDED
        self.lock = threading.Lock()

    @property
    def errors(self) -> dict[str, str]:
        found: dict[str, str] = self.data["errors"]
        return found

    def save(self) -> None:
        if self.path is not None:
            replace_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def say(self, line: str) -> None:
        """Adds a line to the verdict."""
        self.data["verdict"].append(line)
        self.save()

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Records a failure of the block; ends the process if the device is lost, because everything else would fail, too."""
        self.data["begun"] = {"what": what, "at": time.time()}
        self.save()
        try:
            yield
            synchronize()
        except Exception as error:
            self.errors[what] = f"{type(error).__name__}: {error}"[:600]
            try:
                synchronize()
            except RuntimeError:
                del self.data["begun"]
                self.save()
                sys.exit(LOST)
        del self.data["begun"]
        self.save()

    def seconds(self, group: str, name: str, make: Callable[[], Call]) -> float:
        """Seconds of the call that `make` returns; NaN if it failed. With `compile_only` the call runs once."""
        found: dict[str, float] = self.data["seconds"].setdefault(group, {})
        what = f"{group}, {name}"
        if name not in found and what not in self.errors:
            with self.trying(what):
                call = make()
                if self.compile_only:
                    call()
                else:
                    found[name] = seconds(call)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        return found.get(name, math.nan)

    def compare(self, what: str, found: Tensor, wanted: Tensor, limit: float) -> None:
        """Records the relative error of `found` in the Euclidean norm."""
        error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
        self.data["comparisons"][what] = error
        if not error <= limit:
            self.say(f"{what} is off by {error:.1e}")

    def join(self, name: str, part: Mapping[str, Any], failure: str) -> None:
        """Adds what a process found: its comparisons, errors and verdict."""
        with self.lock:
            self.data["comparisons"] |= part.get("comparisons", {})
            self.data["verdict"] += part.get("verdict", [])
            self.errors.update({f"{name}: {what}": error for what, error in part.get("errors", {}).items()})
            if begun := part.get("begun"):
                self.errors[f"{name}: {begun['what']}"] = ENDED
            if failure:
                self.errors[name] = failure
            self.save()


def side_by_side(results: Results, jobs: Mapping[str, Sequence[str]], limit: float) -> None:
    """Runs `python -m benchmarks.gpu_steps` with the arguments of each job, as many at a time as there are cores."""

    def run(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "part.json")
            command = [sys.executable, "-m", "benchmarks.gpu_steps", jobs[name][0], str(path), *jobs[name][1:]]
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
                failure = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-1500:]}"
            except subprocess.TimeoutExpired:
                failure = f"did not end in {limit:.0f} s"
            results.join(name, json.loads(path.read_text()) if path.exists() else {}, failure)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))
