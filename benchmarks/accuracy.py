"""The papers' tables on real data, by train.py: python -m benchmarks.accuracy

    python -m benchmarks.accuracy papers --data-dir data --jobs 8      # on a GPU: full schedules, three seeds
    python -m benchmarks.accuracy papers --jobs 8 --seconds 540        # what fits into nine minutes; the same command continues
    python -m benchmarks.accuracy papers --data cifar100-lt --jobs 8 --seconds 200    # ResNet-32's rows side by side in the minutes that a GPU has left
    python -m benchmarks.accuracy cpu --jobs 2                         # schedules short enough for a CPU
    python -m benchmarks.accuracy papers --data cifar100-lt --methods ce gcl-stage1 gcl --seeds 0

Each run is a process of train.py with a folder under --runs. A finished one leaves a JSON file in --results and is not run again, an unfinished one is resumed
from its checkpoint. A second stage retrains the checkpoint of the run that it shares stage 1 with, if that is there; else it trains stage 1 itself, to the same
weights. At the end the tables of all results are printed, as docs/accuracy.md has them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import RESULTS
from benchmarks.gpu_report import machine
from benchmarks.provenance import ROOT, training_hash
from benchmarks.published import PUBLISHED, published_top1
from gclkern.training.arguments import number
from gclkern.training.atomic_files import replace_text
from gclkern.training.data.groups import GROUPS
from gclkern.training.network import build_network
from gclkern.training.processes import stop_requests
from gclkern.training.recipes import plan

ACCURACY = RESULTS / "accuracy"
GRACE = 30.0  # seconds that a run has to write its checkpoint when it is asked to stop
# A short schedule takes less of DRO-LT's own phases than of the others: their epochs draw n_max * C images, four times the training set of CIFAR-10-LT.
ROBUST_SHARE = 0.25
COMPARISON_HEADER = ("", "method", "seeds", "last epoch", "best epoch", "published", "difference", "parameters", "augmentation")
HEADER = ("", "epochs", "seeds", "top-1", "best epoch", "published", *GROUPS, "ECE")
# Settings that only say where files are or how a run is observed; they are left out of results.
PLACES = {"data_dir", "out", "resume", "evaluate", "stage1", "download", "workers", "checkpoint_seconds", "pictures"}


class Method(NamedTuple):
    """A row of a table: what it is called there, how train.py runs it, and the method whose stage 1 it retrains."""

    label: str
    options: tuple[str, ...]
    stage1: str | None = None


def _gcl(label: str, *options: str) -> Method:
    return Method(label, ("--method", "gcl", *options), "gcl-stage1")


METHODS = {
    "ce": Method("cross entropy", ("--method", "ce")),
    "ce-mixup": Method("cross entropy, mixup", ("--method", "ce", "--mixup", "1")),
    "ldam-drw": Method("LDAM-DRW", ("--method", "ldam-drw")),
    "ce-mixup-crt": Method("cross entropy, mixup, cRT", ("--method", "ce", "--mixup", "1", "--retrain", "crt"), "ce-mixup"),
    "la": Method("logit adjustment", ("--method", "la")),
    "gcl-stage1": Method("GCL, stage 1", ("--method", "gcl", "--retrain", "none")),
    "gcl-class-balanced": _gcl("GCL, class-balanced sampling", "--retrain", "gcl", "--sampler", "class-balanced"),
    "gcl": _gcl("GCL", "--retrain", "gcl", "--sampler", "cben"),
    "dro-lt": Method("DRO-LT", ("--method", "dro-lt")),
    "gcl-ldam-drw": Method("GCL + LDAM-DRW", ("--method", "gcl-ldam-drw")),
    "arcface": Method("ArcFace", ("--method", "arcface")),
    "dbm": Method("DBM", ("--method", "dbm")),
    "agcl": Method("AGCL", ("--method", "agcl")),
    "gcl-dbm": Method("GCL + DBM", ("--method", "gcl-dbm")),
    "gcl-dro-lt": Method("GCL + DRO-LT", ("--method", "gcl+dro-lt")),
    "cloud-cosine": Method("GCL, clouds by cosine", ("--method", "gcl", "--cloud", "cosine")),
    "cloud-power-1/3": Method("GCL, clouds by power 1/3", ("--method", "gcl", "--cloud", "power-1/3")),
    "cloud-power-1/4": Method("GCL, clouds by power 1/4", ("--method", "gcl", "--cloud", "power-1/4")),
    "gcl-instance": _gcl("GCL, instance sampling", "--retrain", "gcl", "--sampler", "instance"),
    "gcl-effective-number": _gcl("GCL, effective-number sampling", "--retrain", "gcl", "--sampler", "effective-number"),
    "gcl-lws": _gcl("GCL stage 1, LWS", "--retrain", "lws"),
    "gcl-tau-norm": _gcl("GCL stage 1, tau-norm", "--retrain", "tau-norm"),
    "gcl-crt": _gcl("GCL stage 1, cRT", "--retrain", "crt"),
    "mislas": Method("MiSLAS", ("--method", "ce", "--mixup", "1", "--retrain", "mislas"), "ce-mixup"),
    "disalign": Method("DisAlign", ("--method", "ce", "--retrain", "disalign"), "ce"),
    "post-hoc-la": Method("logit adjustment, post-hoc", ("--method", "ce", "--retrain", "post-hoc-la"), "ce"),
    "ncm": Method("nearest class mean", ("--method", "ce", "--retrain", "ncm"), "ce"),
    "ce-crt": Method("cross entropy, cRT", ("--method", "ce", "--retrain", "crt"), "ce"),
    "ce-lws": Method("cross entropy, LWS", ("--method", "ce", "--retrain", "lws"), "ce"),
    "balanced-softmax": Method("balanced softmax", ("--method", "balanced-softmax")),
    "tde": Method("De-confound-TDE", ("--method", "tde")),
    "bbn": Method("BBN", ("--method", "bbn")),
    "oltr": Method("OLTR", ("--method", "oltr")),
    "hybrid-sc": Method("Hybrid-SC", ("--method", "hybrid-sc")),
    "hybrid-psc": Method("Hybrid-PSC", ("--method", "hybrid-psc")),
    "bcl": Method("BCL", ("--method", "bcl")),
    "proco": Method("ProCo", ("--method", "proco")),
}


@dataclass(frozen=True)
class Table:
    """Runs: all combinations of data sets, imbalance factors, methods and seeds."""

    data: tuple[str, ...]
    imbalance: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs_scale: float = 1.0  # of the published schedules
    options: tuple[str, ...] = ()  # of train.py, for every run


_BOTH = ("cifar100-lt", "cifar10-lt")
_RIVALS = ("tde", "bbn", "hybrid-sc", "hybrid-psc", "bcl", "proco", "la", "balanced-softmax")
_RETRAINED = ("ce", "ce-mixup", "mislas", "disalign", "post-hoc-la", "ncm", "ce-crt", "ce-lws")
_MAIN = ("ce", "ce-mixup", "ldam-drw", "ce-mixup-crt", "la", "gcl-stage1", "gcl-class-balanced", "gcl", "dro-lt", "gcl-dro-lt")
TABLES = {
    "papers": Table(_BOTH, (100,), _MAIN),
    "factors": Table(_BOTH, (50, 200), _MAIN),
    "dro-lt": Table(("cifar100-lt",), (10,), ("ce", "dro-lt", "gcl-dro-lt")),
    "clouds": Table(("cifar10-lt",), (100,), ("gcl-stage1", "gcl", "cloud-cosine", "cloud-power-1/3", "cloud-power-1/4")),
    "samplers": Table(("cifar10-lt",), (100,), ("gcl-stage1", "gcl", "gcl-class-balanced", "gcl-instance", "gcl-effective-number")),
    "retrains": Table(("cifar10-lt",), (100,), ("gcl-stage1", "gcl", "gcl-lws", "gcl-tau-norm", "gcl-crt")),
    "rivals": Table(_BOTH, (100,), (*_RETRAINED, *_RIVALS)),
    "cpu": Table(
        ("cifar10-lt",), (100,), ("ce", "ldam-drw", "gcl-stage1", "gcl", "dro-lt"), (0, 1), 0.05,
        ("--amp", "bf16", "--channels-last", "--eval-every", "2"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of train.py."""

    data: str
    imbalance: float
    method: str
    seed: int
    epochs_scale: float
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        schedule = "full" if self.epochs_scale == 1 else f"x{self.epochs_scale:g}"
        return f"{self.data}-{self.imbalance:g}-{self.method.replace('/', '_')}-{schedule}-seed{self.seed}"

    @property
    def base(self) -> Run | None:
        """The run whose stage 1 this one retrains."""
        stage1 = METHODS[self.method].stage1
        return None if stage1 is None else replace(self, method=stage1)

    @property
    def arguments(self) -> list[str]:
        """Of train.py; where things are comes on top."""
        arguments = ["--data", self.data, "--imbalance", f"{self.imbalance:g}", "--seed", str(self.seed), "--no-baseline", "--no-pictures"]
        arguments += [*METHODS[self.method].options, *self.options]
        if self.epochs_scale == 1:
            return arguments
        if self.method.endswith("dro-lt"):
            published = plan("ce", None, self.data, [1])[0].epochs
            arguments += ["--epochs", str(max(1, round(self.epochs_scale * published))), "--epochs-scale", f"{ROBUST_SHARE * self.epochs_scale:g}"]
            return arguments
        return [*arguments, "--epochs-scale", f"{self.epochs_scale:g}"]


def cpu_options() -> tuple[str, ...]:
    """What long training takes on a CPU: a compiled step (0.8 of the time of ResNet-32's), in bfloat16 where the CPU multiplies it (0.6 of float32's).

    Nothing where there is a GPU.
    """
    if torch.cuda.is_available():
        return ()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    half = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return ("--compile", "--amp", "bf16", "--channels-last") if half else ("--compile",)


def runs_of(table: Table) -> list[Run]:
    """First seeds first, so that a table that is stopped has a number everywhere before it has a deviation anywhere."""
    options = (*table.options, *cpu_options()) if table.epochs_scale == 1 else table.options
    return [
        Run(data, imbalance, method, seed, table.epochs_scale, options)
        for seed in table.seeds
        for data in table.data
        for imbalance in table.imbalance
        for method in table.methods
    ]


@dataclass(frozen=True)
class Bench:
    """Where runs and results are, and how train.py is started."""

    runs: Path
    results: Path
    data_dir: str
    threads: int  # of each process on a CPU
    train: Path = ROOT / "train.py"

    def folder(self, run: Run) -> Path:
        return self.runs / run.name

    def result(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def command(self, run: Run) -> list[str]:
        """The command that starts the run or continues it."""
        folder, train = self.folder(run), [sys.executable, str(self.train)]
        files = [] if run.data == "digits-lt" else ["--data-dir", self.data_dir]
        if (folder / "last.pt").exists():
            return [*train, "--resume", str(folder), *files]
        command = [*train, *run.arguments, "--out", str(folder), *files]
        if run.base is not None and (checkpoint := self.folder(run.base) / "stage-1.pt").exists():
            command += ["--stage1", str(checkpoint)]
        return command

    def start(self, run: Run) -> subprocess.Popen[bytes]:
        self.runs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TQDM_MININTERVAL": "60"}  # a line a minute
        with (self.runs / f"{run.name}.log").open("ab") as log:
            # out of this process's group: Ctrl-C reaches this one alone, which passes on one request to stop
            return subprocess.Popen(self.command(run), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def collect(self, run: Run) -> dict[str, Any]:
        """Write the result of a finished run."""
        folder = self.folder(run)
        summary = json.loads((folder / "summary.json").read_text())
        metrics = folder / "metrics.csv"  # a second stage without epochs, such as tau-norm, leaves none
        rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
        curves = {name: [_value(row[name]) for row in rows] for name in (rows[0] if rows else ())}
        result = {
            "data": run.data,
            "imbalance": run.imbalance,
            "method": run.method,
            "seed": run.seed,
            "epochs_scale": run.epochs_scale,
            "arguments": run.arguments,
            "settings": {name: value for name, value in summary["config"].items() if name not in PLACES},
            "phases": summary["phases"],
            "machine": machine(),
            "code": training_hash(),
            "class_counts": summary["class_counts"],
            "groups": summary["groups"],
            "reports": summary["reports"],
            "curves": curves,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        replace_text(self.result(run), "{\n" + lines + "\n}\n")
        (folder / "last.pt").unlink(missing_ok=True)  # nothing continues from it; hundreds of runs fill a disk
        return result


def _value(text: str) -> Any:
    """A cell of metrics.csv: a number, a word, or None where it is empty."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text or None


def run_all(bench: Bench, runs: Sequence[Run], *, jobs: int, seconds: float) -> list[Run]:
    """Run what is not finished, `jobs` at a time, until all is done, a signal arrives or `seconds` are over; returns the runs that failed."""
    began = time.monotonic()
    pending = [run for run in runs if not bench.result(run).exists()]
    print(f"{len(runs) - len(pending)} of {len(runs)} runs are finished", flush=True)
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[Run] = []
    asked: float | None = None  # when the runs were asked to stop
    with stop_requests() as stop:
        while running or (pending and asked is None):
            now = time.monotonic()
            if asked is None and (stop or now - began >= seconds):
                asked = now
                stop.accept()
                for process in running.values():
                    process.terminate()
            for run, process in list(running.items()):
                if asked is not None and now - asked >= GRACE:
                    process.kill()
                if process.poll() is None:
                    continue
                del running[run]
                if (bench.folder(run) / "summary.json").exists():
                    top1 = last_report(bench.collect(run))["top1"]
                    print(f"{now - began:7.0f} s  {run.name}: top-1 {100 * top1:.2f}", flush=True)
                elif asked is None:
                    failed.append(run)
                    print(f"{now - began:7.0f} s  {run.name}: failed, see {bench.runs / run.name}.log", flush=True)
            for run in list(pending) if asked is None else ():
                if run.base in failed:
                    failed.append(run)
                    pending.remove(run)
                elif len(running) < jobs and run.base not in running and run.base not in pending:
                    pending.remove(run)
                    running[run] = bench.start(run)
            time.sleep(0.1)
    done = sum(bench.result(run).exists() for run in runs)
    print(f"{done} of {len(runs)} runs are finished" + ("" if done + len(failed) == len(runs) else "; the same command continues"), flush=True)
    return failed


def _percent(shares: Sequence[float | None]) -> str:
    """Mean over seeds in percent, with the sample standard deviation where there are two or more; empty for a group that is not there."""
    found = [100 * share for share in shares if share is not None]
    if not found:
        return ""
    return f"{statistics.mean(found):.2f}" + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def last_report(result: dict[str, Any]) -> dict[str, Any]:
    """That of the last phase, by which a run is judged. A run with held-out images has a report of its best epoch behind it."""
    report: dict[str, Any] = result["reports"][result["phases"][-1]["name"]]
    return report


def _best_epoch(result: dict[str, Any]) -> float | None:
    """The best top-1 of the last phase's evaluated epochs: chosen on the test set, as the releases report theirs. None for a phase without epochs."""
    curves, last = result["curves"], result["phases"][-1]["name"]
    found = zip(curves.get("phase", ()), curves.get("top1", ()), strict=True)
    return max((top1 for phase, top1 in found if phase == last and top1 is not None), default=None)


def _row(found: Sequence[dict[str, Any]]) -> list[str]:
    """A method's row, of its results of all seeds: its last phase counts."""
    first = found[0]
    reports = [last_report(result) for result in found]
    return [
        METHODS[first["method"]].label,
        " + ".join(str(phase["epochs"]) for phase in first["phases"] if phase["epochs"]),
        str(len(found)),
        _percent([report["top1"] for report in reports]),
        _percent([_best_epoch(result) for result in found]),
        published_top1(first["data"], first["imbalance"], first["method"]),
        *(_percent([report["groups"].get(group) for report in reports]) for group in GROUPS),
        _percent([report["ece"] for report in reports]),
    ]


def _title(found: Sequence[dict[str, Any]]) -> str:
    """What a table's numbers have in common: data, schedule, hardware, code."""
    first = found[0]
    scale = first["epochs_scale"]
    schedule = "the full published schedules"
    if scale != 1:
        schedule = (
            f"SHORT schedules, {scale:g} of the published epochs ({ROBUST_SHARE * scale:g} in DRO-LT's own phases), not comparable with the published numbers"
        )
    machine, precision = first["machine"], {"off": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}[first["settings"]["amp"]]
    device = f"{machine['cores']} CPU cores ({machine['cpu']})" if machine["device"] == "CPU" else machine["device"]
    codes = ", ".join(f"`{code}`" for code in sorted({result["code"] for result in found}))
    return f"**{_name(first['data'])}, imbalance {first['imbalance']:g}**: {schedule}. {device}, {precision}; code {codes}."


def _name(data: str) -> str:
    return data.upper().replace("CIFAR", "CIFAR-")


def _markdown(header: Sequence[str], words: int, lines: Iterable[Sequence[str]]) -> str:
    """A table whose first `words` columns are words and the others numbers."""
    rows = [header, ("---",) * words + ("---:",) * (len(header) - words), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _augmentation(result: dict[str, Any]) -> str:
    """What the longest phase does to its images; a data set's own augmentation is CIFAR's crop and flip."""
    phase = max(result["phases"], key=lambda phase: phase["epochs"])
    augment = phase.get("augment") or result["settings"]["augment"] or "crop,flip"
    return ", ".join([*augment.split(","), *(["mixup"] if phase["mixup"] else [])])


def _parameters(result: dict[str, Any]) -> int:
    """Parameters of the trained network."""
    phase = result["phases"][-1]
    model = result["settings"]["model"] or "resnet32"
    if phase.get("backbone"):
        model = f"{phase['backbone']}:{model}"
    network = build_network(model, phase["head"], len(result["class_counts"]), in_channels=3, image_size=32)
    return sum(parameter.numel() for parameter in network.parameters())


def comparison(results: Path) -> str:
    """One Markdown table of all full schedules beside the published numbers, by rising accuracy for each data set and factor; empty without one.

    A row has the runs of all seeds, on whatever device and in whatever precision.
    """
    full = [result for result in results_of(results) if result["epochs_scale"] == 1]
    rows: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for result in full:
        rows.setdefault((result["data"], result["imbalance"], result["method"]), []).append(result)
    lines = []
    for key, found in rows.items():
        shares = [last_report(result)["top1"] for result in found]
        top1 = statistics.mean(100 * share for share in shares)
        numbers = [
            str(len(found)),
            _percent(shares),
            _percent([_best_epoch(result) for result in found]),
            published_top1(*key),
            f"{top1 - PUBLISHED[key]:+.2f}" if key in PUBLISHED else "",
            f"{_parameters(found[0]):,}",
            _augmentation(found[0]),
        ]
        lines.append(((key[0], key[1], top1), [f"{_name(key[0])}, {key[1]:g}", METHODS[key[2]].label, *numbers]))
    return _markdown(COMPARISON_HEADER, 2, [line for _, line in sorted(lines)]) if lines else ""


def tables(results: Path) -> str:
    """Markdown tables of all results in a folder: one for each schedule, data set, imbalance factor, device and precision; full schedules come first."""

    def common(result: dict[str, Any]) -> tuple[Any, ...]:
        return -result["epochs_scale"], result["data"], result["imbalance"], result["machine"]["device"], result["settings"]["amp"]

    found = sorted(results_of(results), key=lambda result: (*common(result), list(METHODS).index(result["method"]), result["seed"]))
    parts = []
    for _, part in groupby(found, key=common):
        group = list(part)
        lines = [_row(list(rows)) for _, rows in groupby(group, key=lambda result: result["method"])]
        parts.append(_title(group) + "\n\n" + _markdown(HEADER, 2, lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default = "papers" if torch.cuda.is_available() else "cpu"
    add("table", nargs="?", default=default, choices=list(TABLES), help=f"{', '.join(TABLES)} (default papers on a GPU, else cpu)")
    add("--data", nargs="+", metavar="NAME", help="data sets in place of the table's")
    add("--imbalance", nargs="+", type=number(float, 1), metavar="FACTOR", help="imbalance factors in place of the table's")
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help=f"methods in place of the table's, of {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=number(int, 0), metavar="SEED", help="seeds in place of the table's")
    add("--epochs-scale", type=number(float, 0), metavar="FACTOR", help="share of the published epochs in place of the table's")
    add("--data-dir", type=Path, default=Path("data"), help="folder of the data sets' files (default data)")
    add("--jobs", type=number(int, 1), default=1, help="runs at a time (default 1); on a CPU as many as cores, each with one thread, are fastest")
    add("--seconds", type=number(float, 0), default=float("inf"), help="stop after so long, with checkpoints (default never)")
    add("--runs", type=Path, default=ROOT / "runs" / "accuracy", help="folder of the runs' folders (default runs/accuracy)")
    add("--results", type=Path, default=ACCURACY, help="folder of the results (default benchmarks/results/accuracy)")
    args = parser.parse_args(argv)
    given: dict[str, Any] = {name: tuple(value) for name in ("data", "imbalance", "methods", "seeds") if (value := getattr(args, name)) is not None}
    if args.epochs_scale is not None:
        given["epochs_scale"] = args.epochs_scale
    table = replace(TABLES[args.table], **given)
    # train.py runs in the folder of the repository, wherever this command does
    bench = Bench(args.runs.resolve(), args.results.resolve(), str(args.data_dir.resolve()), threads=max(1, (os.cpu_count() or 1) // args.jobs))
    failed = run_all(bench, runs_of(table), jobs=args.jobs, seconds=args.seconds)
    print("\n" + tables(bench.results))
    if failed:
        sys.exit(f"failed: {', '.join(run.name for run in failed)}")


if __name__ == "__main__":
    main()
