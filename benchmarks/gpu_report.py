"""All tests and measurements for a machine with a GPU, in one command that may be interrupted: python -m benchmarks.gpu_report

First come the steps that decide between designs, which only need torch and Triton (see gpu_steps.py), each kernel's time and, where ncu is installed, its
counters, then its prediction; then, where pytest is installed, tests, sanitizers and all benchmarks. The results are in one JSON file in benchmarks/results/,
with a copy in $OUT if that is set. The file is written after every step, with what a step has found until it is stopped, and the same command continues it,
also on another machine that has the file. It starts again when the kernels have changed.

--dry-run shows the schedule and runs the deciding steps at tiny sizes, on a CPU where there is no GPU. Without it and without a GPU, tests and benchmarks run
with a CPU's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import predict_times
from benchmarks.common import BROKEN, INATURALIST, RESULTS, SMOKE, STOPPED, installed
from benchmarks.gpu_steps import STEPS
from benchmarks.provenance import ROOT, kernels_hash, torch_hash
from benchmarks.step_results import LOST
from gclkern import cpu_backend
from gclkern.training.atomic_files import replace_text

LIBRARY_KERNEL = re.compile("gemm|nvjet|cutlass|splitk", re.IGNORECASE)  # the names of cuBLAS's products
CALL_SECONDS = 540  # of the 600 that a call may take
PREDICTION_SECONDS, KERNELS_SECONDS, NCU_SECONDS = 60.0, 20.0, 60.0
CHECK_SECONDS = 300.0  # for tests and sanitizers together, so that a call has time for benchmarks too
DEVICES_LOST = 3  # times that a step may lose the device and continue with the next measurement in a new process
HANGS = 20.0  # seconds after which a single measurement is taken to hang
SHORTEST = 10.0  # with less time left, no step starts, because it would hardly end
ATTEMPTS = 2  # at a step that does not end, over all calls of this command
STALLED = 150.0  # seconds without a result after which a benchmark process is taken to hang: the longest case, with its compilation, takes half
BENCHMARKS = ("head", "logit_loss", "dro_lt", "contrastive", "proco", "centroids", "noise", "training_step", "sampler")
# Which cases of a file, as pytest's -k takes it: on a GPU a contestant that takes as long to compile as thirty others to measure comes when those are done.
COMPILED, REST, ALL = "torch.compile", "not torch.compile", ""
WITH_COMPILED = ("head", "logit_loss", "dro_lt", "contrastive")
DRY_RUN_TESTS = ["test_clouds.py"]  # CI runs them all on a CPU
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
GPU = torch.cuda.is_available()
# Compilers take most of a test's time on a GPU; pytest-xdist lets several work on one file. Half of all that is compiled belongs to the head's tests.
WORKERS = 4 if GPU and installed("xdist") else 0
HEAD_TESTS, HEAD_WORKERS = "test_linear_gcl_cross_entropy.py", 2 * WORKERS
LAST_WORDS = 15.0  # seconds before the end in which pytest, told to stop, writes the results that it has; it took 9 of them for 2 workers


@dataclass
class Report:
    """What is known so far, and where it is kept."""

    path: Path
    deadline: float
    tiny: bool = False  # a dry run
    data: dict[str, Any] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def check_seconds_left(self) -> float:
        return self.began + CHECK_SECONDS - time.monotonic()

    def save(self) -> None:
        with self.lock:
            text = json.dumps(self.data, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, *([Path(os.environ["OUT"], self.path.name)] if "OUT" in os.environ else [])):
                replace_text(path, text)

    @property
    def test_files(self) -> list[str]:
        """Found out once: it takes as long as to import them all."""
        if "test_files" not in self.data:
            self.data["test_files"] = device_tests()
            self.save()
        files: list[str] = self.data["test_files"]
        return files

    def step(self, name: str) -> dict[str, Any]:
        with self.lock:
            step: dict[str, Any] = self.data["steps"].setdefault(name, {"status": "open", "attempts": 0})
            return step

    def open(self, name: str) -> bool:
        return self.step(name)["status"] == "open"

    def close(self, name: str, status: str, **result: Any) -> None:
        with self.lock:
            self.step(name).update({"status": status, **result})
            self.save()
        print(f"{self.seconds_left:6.0f} s left  {name}: {status}", flush=True)


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "CPU", "cpu": platform.machine(), "cores": os.cpu_count()}
    found["cpu_code"] = cpu_backend.summary()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "liger-kernel", "pytorch-metric-learning", "torchvision", "pytest-benchmark"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": list(torch.cuda.get_device_capability()),
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
        }
        found["cache_bytes"] = properties.L2_cache_size
        if shutil.which("nvidia-smi") is not None:
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
            found["driver, clock, top clock, power limit"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found | {"versions": versions}


def hear_interrupts() -> None:
    """Handle SIGINT even in a shell's background job, which ignores it: child processes would inherit that, and could not write their results when stopped."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    command: Sequence[str], seconds: float, environment: dict[str, str] | None = None, watch: Callable[[], bool] | None = None, last_words: float = 0.0
) -> tuple[int | None, str]:
    """Exit code, None for a process that was stopped, and the end of the output.

    The process is interrupted `last_words` seconds before its time is over, and killed when it is; or when `watch`, called every few seconds, returns False.
    """
    end = time.monotonic() + seconds - last_words
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        code: int | None = None
        while code is None and time.monotonic() < end:
            try:
                code = process.wait(max(0.1, min(10.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                code = None
            if watch is not None and not watch():
                break
        if code is None:
            if last_words > 0.0:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(last_words)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.wait()
        output.seek(0)
        return code, output.read()[-20_000:]


def attempt(
    report: Report, name: str, command: Sequence[str], limit: float, environment: dict[str, str] | None = None, last_words: float = 0.0
) -> tuple[int, str] | None:
    """Runs a step's command; None if it did not end. The step then stays open, until it has been tried ATTEMPTS times."""
    seconds = min(report.seconds_left, 5 * limit if report.tiny else limit)  # a dry run may be on a slow and busy machine
    if seconds < SHORTEST:
        return None
    step = report.step(name)
    step["attempts"] += 1
    code, output = run(command, seconds, environment, last_words=last_words)
    if code is None:
        if step["attempts"] >= ATTEMPTS:
            report.close(name, "did not end", output=output[-2000:])
        return None
    return code, output


def device_tests(*among: str) -> list[str]:
    """The test files with tests that run on the GPU, and those that cannot be imported. Tests of CPU code are left out: CI runs them."""
    if not installed("pytest"):
        return []
    if not GPU:
        return DRY_RUN_TESTS
    _, output = run([sys.executable, "-m", "pytest", *(among or ("tests",)), "--collect-only", "-qq", "-m", "device", "-p", "no:cacheprovider"], 120)
    return re.findall(r"^(?:ERROR )?tests/((?:\w+/)*test_\w+\.py)\b", output, re.MULTILINE)


def results_of(xml: Path) -> dict[str, Any]:
    """Counts of a test file's results, and the messages of what is broken; nothing where pytest did not get to write them."""
    try:
        suite = ElementTree.parse(xml).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    messages: dict[str, str] = {}
    for case in suite.iter("testcase"):
        for child in case:
            if child.tag in ("failure", "error"):
                name = str(case.get("name"))  # twice there if its process ended with it
                messages[name] = f"{messages.get(name, '')} {child.get('message')}".strip()[:400]
    return {**counts, "seconds": float(suite.get("time", 0)), "broken": messages}


def test_file(report: Report, file: str) -> None:
    name = f"tests/{file}"
    workers = HEAD_WORKERS if file == HEAD_TESTS else WORKERS
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "results.xml")
        options = ["-q", "-p", "no:cacheprovider", "--no-header", f"--junitxml={xml}", *(["-m", "device"] if GPU else [])]
        options += ["-n", str(workers), "--dist", "worksteal"] if workers else []
        # the oracles run on the CPU: a thread each, or all processes would wait for each other
        done = attempt(report, name, [sys.executable, "-m", "pytest", name, *options], report.check_seconds_left, {"OMP_NUM_THREADS": "1"}, LAST_WORDS)
        results = results_of(xml)
    if done is None:
        report.step(name).update(results)  # of the tests that were done in time
        return
    code, output = done
    passed = code in (0, 5) and bool(results)  # 5: the file has no test for this machine
    report.close(name, "passed" if passed else "failed", exit_code=code, **results, output="" if passed else output[-4000:])


def sanitizer(report: Report, tool: str) -> None:
    name = f"compute-sanitizer {tool}"
    if not GPU or shutil.which("compute-sanitizer") is None:
        report.close(name, "not here")
        return
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--target-processes", "application-only"]
    command = ["compute-sanitizer", *options, sys.executable, "-m", "benchmarks.profile_kernels"]
    # one allocation for each tensor: the caching allocator would hide a read beyond a tensor's end
    done = attempt(report, name, command, report.check_seconds_left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if done is not None:
        code, output = done
        summary = re.findall(r"========= (.*SUMMARY.*)", output)
        report.close(name, "passed" if code == 0 else "failed", exit_code=code, summary=summary, output="" if code == 0 else output[-6000:])


def guarded(report: Report, work: Callable[[], None]) -> None:
    """Runs a step and records an error of the report's own code, so that the other steps still run."""
    try:
        work()
    except Exception:
        with report.lock:
            report.data.setdefault("errors", []).append(traceback.format_exc()[-3000:])
            report.save()


def checks(report: Report) -> None:
    """Tests and sanitizers wait mostly for compilers, so several run at a time; nothing is timed meanwhile."""
    report.began = time.monotonic()
    if report.seconds_left < SHORTEST:
        return
    files = sorted(report.test_files, key=lambda file: (file != HEAD_TESTS, -(ROOT / "tests" / file).stat().st_size))  # the long ones first
    work: list[Callable[[], None]] = [partial(sanitizer, report, tool) for tool in ("memcheck", "racecheck") if report.open(f"compute-sanitizer {tool}")]
    work += [partial(test_file, report, file) for file in files if report.open(f"tests/{file}")]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // (WORKERS or 2))) as pool:
        list(pool.map(partial(guarded, report), work))


class Record:
    """The results of a benchmark file, which its process appends to a file line by line, and which `absorb` copies into the report."""

    def __init__(self, report: Report, path: str, folder: Path) -> None:
        self.report, self.path = report, path
        self.lines, self.begun = folder / "record.jsonl", folder / "record.begun"
        results = report.data["benchmarks"]
        self.others = [result for result in results if result["file"] != path]
        self.lines.write_text("".join(json.dumps(result) + "\n" for result in results if result["file"] == path))

    def absorb(self) -> list[dict[str, Any]]:
        """The file's results so far, which are added to the report."""
        lines = self.lines.read_text().split("\n")[:-1]  # the last may be half written
        found = [{**json.loads(line), "file": self.path} for line in lines]
        self.report.data["benchmarks"] = self.others + found
        self.report.save()
        return found

    def is_progressing(self, start: float) -> bool:
        """Whether a process that was started at `start` still produces results."""
        self.absorb()
        return time.time() - max(start, self.lines.stat().st_mtime) < STALLED

    def give_up_a_case(self) -> None:
        """Record the failure of the case that ended or blocked the process, so that it is not run again."""
        with self.lines.open("a") as file:
            file.write(self.begun.read_text() + "\n")
        self.begun.unlink()
        self.absorb()


def benchmark(report: Report, name: str, cases: str) -> None:
    """A file's `cases`: only those of torch.compile, all but those, or all."""
    path, step = f"benchmarks/bench_{name}.py", benchmark_step(name, cases)
    if not report.open(step):
        return
    if not installed("pytest_benchmark"):
        report.close(step, "not here")
        return
    with tempfile.TemporaryDirectory() as folder:
        record = Record(report, path, Path(folder))
        while report.seconds_left > 30:
            options = ["--benchmark-only", "--record", str(record.lines), "--stop-after", str(report.seconds_left - 25), "-q", "-p", "no:cacheprovider"]
            command = [sys.executable, "-m", "pytest", path, *options, "-k", cases]
            known = len(record.absorb())
            code, output = run(command, report.seconds_left - 5, watch=partial(record.is_progressing, time.time()))
            found = record.absorb()
            if code in (0, 1, 5):
                mine = [result for result in found if cases in (ALL, COMPILED if result["contestant"] == COMPILED else REST)]
                report.close(step, "done", cases=len(mine), failed=sum("error" in result for result in mine))
                return
            if record.begun.exists() and code != STOPPED and (code is not None or report.seconds_left > 30):
                record.give_up_a_case()
                continue
            if code in (STOPPED, None) and len(found) > known:
                return
            report.step(step)["attempts"] += 1
            if report.step(step)["attempts"] >= ATTEMPTS and code != BROKEN:
                report.close(step, "failed", exit_code=code, output=output[-3000:])
                return


def benchmark_step(name: str, cases: str) -> str:
    return f"benchmarks/bench_{name}.py" + (f" {COMPILED}" if cases == COMPILED else "")


def benchmark_parts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Files and which of their cases: first those without torch.compile, last those with it. On a CPU all at once, as contestants take turns there."""
    if not GPU:
        return [(name, ALL) for name in BENCHMARKS], []
    return [(name, REST) for name in BENCHMARKS], [(name, COMPILED) for name in WITH_COMPILED]


def deciding(report: Report, name: str) -> None:
    """A step of gpu_steps.py. What it has found when it is stopped, or when it loses the device, is in the report, and the next try continues it."""
    for _ in range(DEVICES_LOST + 1):
        if not report.open(name):
            break
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "step.json")
            path.write_text(json.dumps({key: value for key, value in report.step(name).items() if key not in ("status", "attempts", "output")}))
            command = [sys.executable, "-m", "benchmarks.gpu_steps", name, str(path), *(["--tiny"] if report.tiny else [])]
            done = attempt(report, name, command, STEPS[name][1])
            found = json.loads(path.read_text())
        if done is None and time.time() - found.get("begun", {"at": 0.0})["at"] < HANGS:
            del found["begun"]  # a measurement that had just begun when the step's time was over
        report.step(name).pop("begun", None)
        report.step(name).update(found)
        if done is None:
            report.save()
            break
        code, output = done
        if code != LOST:
            report.close(name, "failed" if code else "done", output=output[-3000:] if code else "")
    for line in [*report.step(name).get("verdict", ()), *(f"{what}: {error}" for what, error in report.step(name).get("errors", {}).items())]:
        print(f"{'':14}{line[:300]}", flush=True)


def predictions(report: Report) -> None:
    """What predict_times.py expects of each launch."""
    name = "predictions"
    if not report.open(name):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "predictions.json")
        wanted = ["--tiny"] if report.tiny else ["--shapes", *(shape.name for shape in predict_times.SHAPES)]
        command = [sys.executable, "-m", "benchmarks.predict_times", "--json", str(path), *wanted]
        done = attempt(report, name, command, PREDICTION_SECONDS)
        if done is not None:
            found = json.loads(path.read_text()) if path.exists() else []
            report.close(name, "done" if found else "failed", found=found, output="" if found else done[1][-3000:])
    for shape, plan in kernel_steps():
        print(f"{kernel_step(shape, plan)}\n{beside_predictions(report, shape, plan)}", flush=True)


def kernels(report: Report, shape: str, plan: str) -> None:
    """Each kernel's time in a plan of the head, beside its prediction."""
    name = kernel_step(shape, plan)
    if not report.open(name):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.json")
        command = [sys.executable, "-m", "benchmarks.profile_kernels", "--shape", SMOKE.name if report.tiny else shape, "--plan", plan, "--profile", str(path)]
        done = attempt(report, name, command, KERNELS_SECONDS)
        if done is not None:
            times = json.loads(path.read_text())["bf16"] if path.exists() else {}
            report.close(name, "done" if times else "failed", times=times, output="" if times else done[1][-3000:])
    print(beside_predictions(report, shape, plan), flush=True)


def beside_predictions(report: Report, shape: str, plan: str) -> str:
    expected: dict[str, float] = {}
    for row in report.step("predictions").get("found", ()):
        if (row["shape"], row["what"]) == (shape, plan):
            expected[row["name"]] = expected.get(row["name"], 0.0) + 1e6 * row["seconds"]
    lines = []
    measured: dict[str, float] = {}
    for kernel, found in report.step(kernel_step(shape, plan)).get("times", {}).items():
        name = "torch.mm" if LIBRARY_KERNEL.search(kernel) else kernel
        measured[name] = measured.get(name, 0.0) + found["microseconds"]
    for kernel, microseconds in measured.items():
        known = f"{expected[kernel]:10.1f} predicted, {microseconds / expected[kernel]:.2f}" if kernel in expected else ""
        lines.append(f"{'':14}{kernel[:60]:60}{microseconds:10.1f} us{known}")
    return "\n".join(lines)


def kernel_step(shape: str, plan: str) -> str:
    return f"kernels of {shape}, {plan}"


def kernel_steps() -> list[tuple[str, str]]:
    return [(shape.name, plan) for shape in predict_times.SHAPES for plan in predict_times.PLANS] if GPU else []


def counters(report: Report) -> None:
    name = "ncu"
    if not report.open(name):
        return
    if not GPU or shutil.which("ncu") is None:
        report.close(name, "not here")
        return
    # only of our kernels, which Triton calls by the names of their functions
    names = re.findall(r"^def (\w+_kernel)\(", "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py")), re.MULTILINE)
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(COUNTERS), "--kernel-name", f"regex:^({'|'.join(names)})$"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        command = [
            "ncu",
            *options,
            "--log-file",
            str(log),
            sys.executable,
            "-m",
            "benchmarks.profile_kernels",
            "--shape",
            INATURALIST.name,
            "--plan",
            "materialised",
        ]
        done = attempt(report, name, command, NCU_SECONDS)
        lines = [line for line in log.read_text().splitlines() if line.startswith('"')] if log.exists() else []
    if done is not None:
        code, output = done
        # the first row under the header holds the units
        rows = [{key: row[key] for key in ("Kernel Name", "Grid Size", *COUNTERS) if key in row} for row in csv.DictReader(lines)]
        report.close(name, "done" if rows else "failed", exit_code=code, rows=rows, output="" if rows else output[-3000:])


def table(data: dict[str, Any]) -> str:
    """The time and memory of every operation and shape: ours, and its ratio to the floor and to other implementations."""
    results = [result for result in data["benchmarks"] if "error" not in result]
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        if result["phase"] not in ("forward", "backward"):
            groups.setdefault((result["operation"], result["shape"], result["dtype"]), {})[result["contestant"]] = result
    lines = [f"{'':48}{'ms':>10}{'peak MB':>10}{'x floor':>9}{'x plain':>9}{'x compile':>10}"]
    for (operation, shape, dtype), found in groups.items():
        ours = [name for name in found if name.startswith("gclkern")]
        floor = next((found[name]["seconds"] for name in ("bare products", "device copy", "device fill") if name in found), None)
        for name in ours:
            seconds = found[name]["seconds"]
            ratios = [floor, *(found[peer]["seconds"] if peer in found else None for peer in ("plain torch", "torch.compile"))]
            values = [f"{seconds / ratio:.2f}" if ratio else "-" for ratio in ratios]
            label = f"{operation} | {shape} | {dtype} | {name.removeprefix('gclkern').strip(' ,') or 'auto'}"
            lines.append(f"{label:48}{1e3 * seconds:10.3f}{found[name]['peak_bytes'] / 1e6:10.1f}{values[0]:>9}{values[1]:>9}{values[2]:>10}")
    return "\n".join(lines)


def summary(data: dict[str, Any]) -> str:
    steps = data["steps"]
    tests = {name: step for name, step in steps.items() if name.startswith("tests/")}
    failed = [
        f"{name}: {', '.join(step.get('broken', {})) or step['status']}"
        for name, step in tests.items()
        if step["status"] not in ("passed", "open") or step.get("broken")
    ]
    errors = [f"{result['key']}: {result['error'][:150]}" for result in data["benchmarks"] if "error" in result]
    others = [f"{name}: {step['status']}" for name, step in steps.items() if not name.startswith("tests/")]
    by_graph = statistics.mean("graph" in result.get("timed_by", "") for result in data["benchmarks"]) if data["benchmarks"] else 0.0
    return "\n".join(
        [
            table(data),
            f"device {data['machine']['device']}, torch {data['machine']['versions']['torch']}, kernels {data['kernels_hash']}",
            f"test files: {sum(step['status'] == 'passed' for step in tests.values())} passed of {len(tests)}",
            f"benchmark cases: {len(data['benchmarks'])}, of which {len(errors)} failed; {by_graph:.0%} timed by CUDA graphs",
            *(f"  {line}" for line in [*others, *failed, *errors[:20], *data.get("errors", [])]),
        ]
    )


def begin(path: Path, deadline: float) -> Report:
    """The report at `path` where it belongs to these kernels, versions and device, else a new one."""
    report = Report(path, deadline)
    identity: dict[str, Any] = {"machine": machine(), "kernels_hash": kernels_hash(), "torch_hash": torch_hash()}
    keys = ("device", "versions")
    if path.exists():
        old = json.loads(path.read_text())
        hashes = ("kernels_hash",) if GPU else ("kernels_hash", "torch_hash")
        same = all(old[name] == identity[name] for name in hashes) and all(old["machine"][key] == identity["machine"][key] for key in keys)
        if same:
            report.data = old
            return report
        print(f"{path.name} belongs to other sources, versions or another device: starting again", flush=True)
    report.data = {**identity, "complete": False, "steps": {}, "benchmarks": []}
    return report


def run_deciding(report: Report) -> None:
    for name in STEPS:
        guarded(report, partial(deciding, report, name))


def schedule() -> str:
    """The steps in order, and the seconds that each may take."""
    steps = [(name, seconds) for name, (_, seconds) in STEPS.items()]
    steps += [(kernel_step(shape.name, plan), KERNELS_SECONDS) for shape in predict_times.SHAPES for plan in predict_times.PLANS]
    steps += [("ncu", NCU_SECONDS), ("predictions", PREDICTION_SECONDS), ("tests and sanitizers, with pytest", CHECK_SECONDS)]
    return "\n".join(["seconds at most", *(f"{seconds:8.0f}  {name}" for name, seconds in steps), "    rest  benchmarks, with pytest-benchmark"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", type=Path, help="the JSON file to continue; default benchmarks/results/<device>.json")
    parser.add_argument("--seconds", type=float, default=CALL_SECONDS, help="after which no further step begins and running ones end")
    parser.add_argument("--dry-run", action="store_true", help="show the schedule and run the deciding steps at tiny sizes")
    args = parser.parse_args(argv)
    hear_interrupts()
    deadline = time.monotonic() + args.seconds
    if args.dry_run:
        print(schedule())
        with tempfile.TemporaryDirectory() as folder:
            report = begin(Path(folder, "dry-run.json"), deadline)
            report.tiny = True
            run_deciding(report)
            predictions(report)
            kernels(report, SMOKE.name, "materialised")
        failed = [name for name, step in report.data["steps"].items() if step["status"] != "done" or step.get("errors")]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if GPU else "cpu"
    report = begin(RESULTS / f"{slug}.json" if args.resume is None else args.resume, deadline)
    if GPU:
        run_deciding(report)
    first, last = ([partial(benchmark, report, *part) for part in parts] for parts in benchmark_parts())
    profiles = [partial(kernels, report, *step) for step in kernel_steps()]
    expected = [partial(predictions, report)] if GPU else []  # it takes compilers, which other machines have, too
    for work in (*profiles, partial(counters, report), *expected, partial(checks, report), *first, *last):
        guarded(report, work)
    report.data["complete"] = "test_files" in report.data and all(not report.open(name) for name in expected_steps(report))
    report.save()
    print(summary(report.data))
    print(f"{report.path}: {'complete' if report.data['complete'] else 'not complete, the same command continues it'}")


def expected_steps(report: Report) -> list[str]:
    others = ["compute-sanitizer memcheck", "compute-sanitizer racecheck", "ncu", *(kernel_step(*step) for step in kernel_steps())]
    others += [*STEPS, "predictions"] if GPU else []
    return [*(f"tests/{file}" for file in report.test_files), *others, *(benchmark_step(*part) for parts in benchmark_parts() for part in parts)]


if __name__ == "__main__":
    main()
