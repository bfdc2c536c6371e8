"""The benchmarks measure what they say: contestants agree with one another, memory is counted right, and the report continues where it stopped."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import (
    bench_centroids,
    bench_contrastive,
    bench_dro_lt,
    bench_head,
    bench_logit_loss,
    bench_proco,
    common,
    gpu_checks,
    gpu_report,
    gpu_steps,
    timing,
)
from benchmarks.common import BOTH, SMOKE, Inputs
from benchmarks.memory import allocated_peak
from benchmarks.provenance import ROOT
from benchmarks.step_results import ENDED, LOST, Results
from benchmarks.timing import prepare
from gclkern.functional import gcl_cross_entropy

CPU = torch.device("cpu")


def without_noise(inputs: Inputs) -> Inputs:
    """The same inputs with equal class counts, so that there are no clouds and the results are not random."""
    return Inputs(inputs.shape, inputs.dtype, inputs.device, inputs.leaves, inputs.target, torch.ones_like(inputs.class_counts))


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (bench_logit_loss.OPERATION, ["gclkern", "gclkern, no noise", "plain torch"]),
        (bench_head.OPERATION, ["gclkern", "gclkern materialised", "gclkern chunked", "gclkern recompute", "plain torch"]),
        (bench_dro_lt.OPERATION, ["gclkern", "plain torch", "as released"]),
        (bench_contrastive.OPERATION, ["gclkern", "plain torch"]),
        (bench_proco.OPERATION, ["gclkern", "plain torch"]),
    ],
    ids=lambda value: value.name if isinstance(value, common.Operation) else "",
)
def test_contestants_compute_the_same(operation: common.Operation, names: list[str]) -> None:
    torch.manual_seed(0)
    inputs = operation.make_inputs(SMOKE, "fp32", CPU)
    if operation in (bench_logit_loss.OPERATION, bench_head.OPERATION):
        inputs = without_noise(inputs)
    first, *others = (operation.contestants[name].prepare(inputs, BOTH)() for name in names)
    for grads in others:
        torch.testing.assert_close(grads, first, rtol=1e-3, atol=1e-5)


def test_centroids_are_the_same() -> None:
    inputs = bench_centroids.make_inputs(SMOKE, "fp32", CPU)
    ours, plain = (bench_centroids.CONTESTANTS[name].prepare(inputs, bench_centroids.PASS)() for name in ("gclkern", "plain torch"))
    assert isinstance(ours, tuple)
    torch.testing.assert_close(plain, ours[0])


def test_phases_add_up() -> None:
    inputs = without_noise(bench_head.make_inputs(SMOKE, "fp32", CPU))
    prepared = bench_head.CONTESTANTS["gclkern"].prepare
    backward = prepared(inputs, "backward")
    torch.testing.assert_close(backward(), prepared(inputs, BOTH)())
    torch.testing.assert_close(backward(), backward())


def test_class_counts_are_long_tailed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCLKERN_DATA", raising=False)
    counts = common.CIFAR.class_counts()
    assert len(counts) == 100 and int(counts[0]) == 500 and int(counts[-1]) == 5 and bool((counts.diff() <= 0).all())
    (tmp_path / "counts_inat18.txt").write_text("3\n1\n2\n")
    monkeypatch.setenv("GCLKERN_DATA", str(tmp_path))
    assert common.INATURALIST.class_counts().tolist() == [3, 1, 2]


def test_peak_counts_what_lives_at_once() -> None:
    def call() -> torch.Tensor:
        for _ in range(3):
            first = torch.zeros(1000)  # 4000 bytes, gone before the next
            del first
        second = torch.zeros(500)
        return second + 1.0

    assert allocated_peak(call, CPU) == pytest.approx(4000, abs=64)


def test_a_round_is_the_mean_of_its_calls() -> None:
    timed = prepare([lambda: lambda: time.sleep(0.02), lambda: lambda: time.sleep(0.04)], CPU, graph=True)
    assert timed.how == "wall clock" and timed.seconds() >= 0.03


def test_report_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    path = tmp_path / "made-up.json"
    first = gpu_report.begin(path, time.monotonic() + 10)
    first.close("ncu", "not here")
    assert not gpu_report.begin(path, 0.0).open("ncu")
    monkeypatch.setattr(gpu_report, "kernels_hash", lambda: "other kernels")
    assert gpu_report.begin(path, 0.0).open("ncu")


def test_a_step_that_does_not_end_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    report = gpu_report.begin(tmp_path / "made-up.json", time.monotonic() + 100)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu_report, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu_report, "LAST_WORDS", 0.0)
    assert gpu_report.attempt(report, "step", sleeper, 0.5) is None and report.open("step")
    assert gpu_report.attempt(report, "step", sleeper, 0.5) is None and not report.open("step")
    assert (tmp_path / "out" / "made-up.json").exists()


@pytest.mark.slow
def test_pytest_may_write_what_it_has_when_its_time_is_over(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "results")!r}).write_text("half of them")
"""
    gpu_report.hear_interrupts()
    assert gpu_report.run([sys.executable, "-c", script], 12.0, last_words=4.0)[0] is None
    assert (tmp_path / "results").read_text() == "half of them"
    assert gpu_report.results_of(tmp_path / "results") == {}, "no XML"


@pytest.mark.slow
def test_a_test_that_loses_the_device_fails_alone(tmp_path: Path) -> None:
    """The test's process ends, another process runs the remaining tests, and the report contains the message of the failed test."""
    (tmp_path / "lost.py").write_text("""
import pytest, torch

lost = False

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    from tests import conftest
    conftest.GPU, torch.cuda.synchronize = True, synchronize
    torch.cuda.current_stream = torch.cuda.default_stream = lambda: 0

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    global lost
    lost |= item.name == "test_places_steps_at_60_and_80"
    assert not lost, "what this test said"
""")
    xml = tmp_path / "results.xml"
    options = ["-p", "lost", "-p", "no:cacheprovider", "-n", "1", "--dist", "worksteal", f"--junitxml={xml}"]
    command = [sys.executable, "-m", "pytest", "tests/training/test_schedules.py", *options]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    broken = gpu_report.results_of(xml)["broken"]
    assert list(broken) == ["test_places_steps_at_60_and_80"], done.stdout
    assert "what this test said" in broken["test_places_steps_at_60_and_80"] and "crashed" in broken["test_places_steps_at_60_and_80"]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout


@pytest.mark.parametrize("code", [-11, 3], ids=["killed by a signal", "left by itself"])
def test_a_case_that_ends_the_process_is_left_out(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is recorded as the result of the case; a new process runs the remaining cases."""
    monkeypatch.delenv("OUT", raising=False)
    report = gpu_report.begin(tmp_path / "made-up.json", time.monotonic() + 100)
    line = {"operation": "noise", "contestant": "gclkern", "phase": "draw", "dtype": "fp32", "shape": "made up"}
    commands = []

    def run(command: list[str], seconds: float, environment: None = None, watch: Callable[[], bool] = bool) -> tuple[int, str]:
        commands.append(command)
        record = Path(command[command.index("--record") + 1])
        if len(commands) == 1:
            record.with_suffix(".begun").write_text(json.dumps({"key": "first", **line, "error": "ended"}))
            return code, ""
        assert [json.loads(text)["key"] for text in record.read_text().splitlines()] == ["first"]
        record.write_text(record.read_text() + json.dumps({"key": "second", **line, "seconds": 1.0}) + "\n")
        return 0, ""

    monkeypatch.setattr(gpu_report, "run", run)
    gpu_report.benchmark(report, "noise", gpu_report.REST)
    assert report.data["steps"]["benchmarks/bench_noise.py"] == {"status": "done", "attempts": 0, "cases": 2, "failed": 1}
    assert [result["key"] for result in report.data["benchmarks"]] == ["first", "second"]


def test_an_error_of_the_report_costs_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    report = gpu_report.begin(tmp_path / "made-up.json", time.monotonic() + 10)
    gpu_report.guarded(report, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    (error,) = json.loads((tmp_path / "made-up.json").read_text())["errors"]
    assert "ZeroDivisionError" in error


class FakeCUDA:
    """The functions of torch.cuda that timing by events and the peak of memory use, with a clock that advances with the work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.allocated = self.peak = 0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = -1.0

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.allocated))

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


def test_a_graphs_launch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host needs time to launch a graph, which does not show if the device is still busy with a first replay."""
    cuda = FakeCUDA(monkeypatch)
    idle = True

    def replay() -> None:
        nonlocal idle
        cuda.now += 1.0 + 0.25 * idle
        idle = False

    stream: Any = None
    assert timing._between_events(replay, stream, lead=True) == pytest.approx(1.0)
    idle = True
    assert timing._between_events(replay, stream) == pytest.approx(1.25)


def test_an_error_after_a_failed_capture_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark process ends when it sees that message, because torch's allocator would make the next case wait for ever."""
    FakeCUDA(monkeypatch)

    def fails(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    for name in ("Stream", "current_stream", "set_stream", "default_generators"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(timing, "_waits_for_the_device", lambda call, stream: False)
    for name in ("_graph", "_events"):
        monkeypatch.setattr(timing, name, fails)
    with pytest.raises(RuntimeError, match=timing.CAPTURE_FAILED):
        prepare([lambda: lambda: None], torch.device("cuda", 0), graph=True)


def test_peak_leaves_out_memory_that_stays_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix library's workspace comes from torch's allocator in the first call that needs it, and stays."""
    cuda = FakeCUDA(monkeypatch)
    workspace = 32 * 2**20

    def call() -> None:
        nonlocal workspace
        cuda.allocate(workspace)
        workspace = 0
        cuda.allocate(4000)
        cuda.allocate(-4000)

    assert allocated_peak(call, torch.device("cuda")) == 4000


@pytest.mark.slow
def test_the_terminal_shows_memory_and_what_is_included() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_noise.py", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", "CIFAR-100"]
    # benchmarks do not go with pytest-xdist, in whose processes these tests may run themselves
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    rows = done.stdout.partition("noise | CIFAR-100 | fp32 | draw\n")[2].splitlines()
    assert re.fullmatch(r"  gclkern +[\d.e-]+ ms +[\d.]+ MB  a pure function of seed, sample and class", rows[0]), done.stdout
    assert {row[2:36].rstrip() for row in rows} >= {"gclkern", "plain torch", "device fill"}


def test_every_case_of_a_gpu_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of torch.compile come last, and only for files that have such cases."""
    monkeypatch.setattr(gpu_report, "GPU", True)
    first, last = gpu_report.benchmark_parts()
    operations = {name: importlib.import_module(f"benchmarks.bench_{name}").OPERATION for name in gpu_report.BENCHMARKS}
    assert first == [(name, gpu_report.REST) for name in operations]
    with_compiled = [name for name, operation in operations.items() if any(case.contestant == gpu_report.COMPILED for case in operation.cases("cuda"))]
    assert last == [(name, gpu_report.COMPILED) for name in with_compiled]


def test_only_files_with_tests_for_a_gpu_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "GPU", True)
    assert gpu_report.device_tests("tests/test_weights.py", "tests/test_clouds.py") == ["test_clouds.py"]


@pytest.mark.parametrize("name", gpu_steps.STEPS)
def test_deciding_steps_at_tiny_sizes(name: str) -> None:
    """What the dry run of the report runs, in this process: it needs no pytest, no GPU and no data."""
    if name == "compilation":
        pytest.skip("starts processes: the dry run has it")
    results = Results()
    gpu_steps.STEPS[name][0](results, gpu_steps.TINY, True)
    verdict = results.data["verdict"]
    assert verdict and not results.errors
    assert not any(word in line for line in verdict for word in ("off by", "differ", "spreads", "nan")), verdict


def test_a_measurement_that_fails_costs_no_other(tmp_path: Path) -> None:
    """Nor does one that ends its process; another process continues the file, and repeats nothing."""
    results = Results(tmp_path / "step.json")
    assert math.isnan(results.seconds("a", "broken", lambda: lambda: 1 / 0))
    assert results.seconds("a", "works", lambda: lambda: None) > 0.0
    with pytest.raises(SystemExit), results.trying("ends"):
        sys.exit(1)
    again = Results(tmp_path / "step.json")
    assert again.errors["a, broken"].startswith("ZeroDivisionError") and again.errors["ends"] == ENDED
    assert again.seconds("a", "works", lambda: pytest.fail("measured again")) == results.data["seconds"]["a"]["works"]
    assert math.isnan(again.seconds("a", "broken", lambda: pytest.fail("tried again")))


def test_checks_of_kernels_notice_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results()

    def wrong(cosine: torch.Tensor, **options: Any) -> torch.Tensor:
        return gcl_cross_entropy(cosine * (1.01 if cosine.dtype == torch.float32 else 1.0), **options)

    monkeypatch.setattr(gpu_checks, "gcl_cross_entropy", wrong)
    gpu_checks.parts(True)["logits float32"](results, True)
    assert any("loss, plain, float32: cosine is off by" in line for line in results.data["verdict"])


def test_what_a_stopped_step_has_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: the step is stopped in a measurement that has just begun, it loses the device, it ends."""
    monkeypatch.delenv("OUT", raising=False)
    report = gpu_report.begin(tmp_path / "made-up.json", time.monotonic() + 1000)
    given = []

    def run(command: list[str], *args: Any, **options: Any) -> tuple[int | None, str]:
        path = Path(command[4])
        known = json.loads(path.read_text())
        given.append(known)
        path.write_text(json.dumps(known | {"seconds": {"a": {str(len(given)): 1.0}}, "begun": {"what": "x", "at": time.time()}}))
        return ((None, ""), (LOST, ""), (0, ""))[len(given) - 1]

    monkeypatch.setattr(gpu_report, "run", run)
    gpu_report.deciding(report, "timings")
    step = json.loads((tmp_path / "made-up.json").read_text())["steps"]["timings"]
    assert step == {"status": "open", "attempts": 1, "seconds": {"a": {"1": 1.0}}}
    gpu_report.deciding(report, "timings")
    assert given[1] == {"seconds": {"a": {"1": 1.0}}} and given[2]["begun"]["what"] == "x"
    assert report.step("timings")["status"] == "done"


@pytest.mark.slow
def test_a_dry_run_shows_the_schedule_and_runs_every_deciding_step() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_XDIST_WORKER": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ +\d+  kernels of iNaturalist, materialised$", done.stdout, re.MULTILINE)
    for name in (*gpu_steps.STEPS, "predictions", "kernels of smoke, materialised"):
        assert f"{name}: done" in done.stdout


def test_measured_times_stand_beside_predicted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    report = gpu_report.begin(tmp_path / "made-up.json", time.monotonic() + 10)
    launches = [{"shape": "1M classes", "what": "chunked", "name": "_cosine_kernel", "seconds": 2e-3}] * 2
    launches.append({"shape": "1M classes", "what": "chunked", "name": "torch.mm", "seconds": 1e-3})
    report.close("predictions", "done", found=launches)
    report.close("kernels of 1M classes, chunked", "done", times={
        "_cosine_kernel": {"launches": 2, "microseconds": 5000.0}, "other": {"microseconds": 1.0},
        "nvjet_sm90_tst_mma": {"microseconds": 500.0}, "sm90_xmma_gemm_bf16f32": {"microseconds": 600.0},
    })  # fmt: skip
    cosines, other, products = gpu_report.beside_predictions(report, "1M classes", "chunked").splitlines()
    assert cosines.split()[1:] == ["5000.0", "us", "4000.0", "predicted,", "1.25"]
    assert products.split() == ["torch.mm", "1100.0", "us", "1000.0", "predicted,", "1.10"]
    assert other.split() == ["other", "1.0", "us"]
