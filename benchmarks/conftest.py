"""How a benchmark case is run: `pytest --benchmark-only` measures, plain `pytest` makes sure that every case runs, on tiny shapes.

--record PATH         append each case's result to a JSON-lines file, and leave out the cases that it already holds
--stop-after SECONDS  end cleanly when this much time is over
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import BROKEN, STOPPED, Case
from benchmarks.memory import allocated_peak
from benchmarks.timing import CAPTURE_FAILED, Stopwatch, cold_copies, keep_freed_memory, load_warning, number_of_rounds, prepare, rounds_in_turn

STOPWATCH = Stopwatch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="append each benchmark's result to this file, and leave out those that it holds")
    parser.addoption("--stop-after", type=float, help="seconds after which no further benchmark starts")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()
    config.stash[_ROUNDS] = {}
    config.stash[_MEASURED] = []
    if not any(str(argument).startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]  # the table of all columns is wider than a terminal
    if not any(str(argument).startswith("--benchmark-sort") for argument in config.invocation_params.args):
        config.option.benchmark_sort = "median"
    config.stash[_WARNING] = load_warning(torch.get_num_threads())
    keep_freed_memory()


_START = pytest.StashKey[float]()
_WARNING = pytest.StashKey[str]()
_SELECTED = pytest.StashKey[list[Case]]()
_MEASURED = pytest.StashKey[list[tuple[Case, dict[str, Any]]]]()
_ROUNDS = pytest.StashKey[dict[str, tuple[list[float], str]]]()  # by the case's key: seconds of its rounds, and how they were timed


def _recorded(config: pytest.Config) -> set[str]:
    path: Path | None = config.getoption("--record")
    return set() if path is None or not path.exists() else {json.loads(line)["key"] for line in path.read_text().splitlines()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    grid = ("cuda" if torch.cuda.is_available() else "cpu") if metafunc.config.getoption("benchmark_only") else "smoke"
    cases = metafunc.module.OPERATION.cases(grid)
    done = _recorded(metafunc.config)
    cases = [case for case in cases if case.key not in done]
    metafunc.parametrize("case", cases, ids=map(str, cases))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=STOPWATCH))


def pytest_collection_finish(session: pytest.Session) -> None:
    parameters = [item.callspec.params for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    selected: list[Case] = [params["case"] for params in parameters if "case" in params and isinstance(params["case"], Case)]
    session.config.stash[_SELECTED] = selected
    if session.config.getoption("benchmark_only"):
        gc.freeze()  # so that the garbage collection of each case skips the objects that exist by now


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What pytest-benchmark's tables of times leave out: memory, and what of the operation each contestant does."""
    measured = config.stash[_MEASURED]
    if measured:
        terminalreporter.section("summary")
        terminalreporter.write_line("median time; peak memory beyond the inputs, with what is returned; what forward and backward together include")
    for group in dict.fromkeys(case.group for case, _ in measured):
        terminalreporter.write_line(f"\n{group}")
        for case, result in measured:
            if case.group == group:
                figures = f"{1e3 * result['seconds']:11.4g} ms{result['peak_bytes'] / 1e6:11.4g} MB"
                terminalreporter.write_line(f"  {case.contestant:34}{figures}  {result['includes']}")
    warning = config.stash[_WARNING]
    if measured and warning:
        terminalreporter.write_line(f"\n{warning}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - item.config.stash[_START] > limit:
        pytest.exit("the time given by --stop-after is over", returncode=STOPPED)


def _line(case: Case, result: dict[str, Any]) -> str:
    names = {"operation": case.operation.name, "shape": case.shape.name, "dtype": case.dtype, "contestant": case.contestant, "phase": case.phase}
    sizes = {"rows": case.shape.rows, "classes": case.shape.classes, "dim": case.shape.dim}
    return json.dumps({"key": case.key, **names, **sizes, **result})


def _record(config: pytest.Config, case: Case, result: dict[str, Any]) -> None:
    path: Path | None = config.getoption("--record")
    if path is not None:
        with path.open("a") as file:
            file.write(_line(case, result) + "\n")


@contextlib.contextmanager
def _announced(config: pytest.Config, case: Case) -> Iterator[None]:
    """While the case runs, a file beside the record holds the result to record if the process dies."""
    path: Path | None = config.getoption("--record")
    if path is None:
        yield
        return
    begun = path.with_suffix(".begun")
    begun.write_text(_line(case, {"error": "the process ended or hung in this case"}))
    try:
        yield
    finally:
        begun.unlink()


def _rates(case: Case, seconds: float) -> dict[str, float]:
    """GB/s and TFLOP/s of the least work that the operation takes, where it has such a bound."""
    contestant = case.operation.contestants[case.contestant]
    moved = contestant.bytes_factor * case.operation.least_bytes(case.shape, case.dtype, case.phase)
    flops = case.operation.least_flops(case.shape, case.dtype, case.phase)
    return {name: amount / seconds / unit for name, amount, unit in (("gb_per_s", moved, 1e9), ("tflop_per_s", flops, 1e12)) if amount}


def _time(case: Case, inputs: Any, device: torch.device, config: pytest.Config) -> tuple[list[float], str]:
    """Seconds of the case's rounds, and how they were timed. What they allocated is free again when this returns.

    On a CPU the contestants of a group take turns: the first case to come measures them all. A GPU's own time needs no turns, and its memory has no room
    for all contestants at once.
    """
    known = config.stash[_ROUNDS]
    if case.key not in known:
        others = [] if device.type == "cuda" else [other for other in config.stash[_SELECTED] if other.group == case.group and other != case]
        copies = cold_copies(inputs.leaf_bytes, device) if case.operation.cold else 1
        sets = [inputs, *(case.operation.make_inputs(case.shape, case.dtype, device) for _ in range(copies - 1))]
        timed = {}
        for other in (case, *others):
            contestant = other.operation.contestants[other.contestant]
            try:
                makers = [functools.partial(contestant.prepare, chosen, other.phase) for chosen in sets]
                timed[other.key] = prepare(makers, device, graph=other.operation.graph)
            except Exception:
                if other is case:
                    raise  # another's failure shows when its own turn comes
        turns = list(timed.values())
        for key, turn, rounds in zip(timed, turns, rounds_in_turn(turns, number_of_rounds(turns, device)), strict=True):
            known[key] = rounds, turn.how
    return known[case.key]


def _run(case: Case, config: pytest.Config, benchmark: Any) -> str:
    """How the case was timed."""
    operation, contestant = case.operation, case.operation.contestants[case.contestant]
    device = torch.device("cuda" if operation.on_device and torch.cuda.is_available() else "cpu")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    inputs = operation.make_inputs(case.shape, case.dtype, device)
    if not config.getoption("benchmark_only"):
        benchmark.disabled = True  # runs once
        benchmark.pedantic(contestant.prepare(inputs, case.phase))
        return ""
    benchmark.group, benchmark.name = case.group, case.contestant  # the group names the rest of the case
    rounds, how = _time(case, inputs, device, config)
    replay = iter(rounds)

    def next_round() -> None:
        STOPWATCH.seconds += next(replay)

    benchmark.pedantic(next_round, rounds=len(rounds))
    result: dict[str, Any] = {"seconds": statistics.median(rounds), "fastest_seconds": min(rounds), "rounds": len(rounds), "timed_by": how}
    result["peak_bytes"] = allocated_peak(contestant.prepare(inputs, case.phase), device)
    result |= {**_rates(case, result["seconds"]), "includes": contestant.includes}
    benchmark.extra_info.update(result)
    config.stash[_MEASURED].append((case, result))
    _record(config, case, result)
    return how


def _context_is_gone() -> bool:
    """Whether a kernel has failed on the GPU, so that every later call of this process fails as well."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Case], None]:
    """Runs a case: with --benchmark-only it is timed, its memory measured and the result recorded, also a failure; else it runs once."""

    def run(case: Case) -> None:
        try:
            with _announced(pytestconfig, case):
                how = _run(case, pytestconfig, benchmark)
        except Exception as error:
            _record(pytestconfig, case, {"error": f"{type(error).__name__}: {error}"[:500]})
            if _context_is_gone() or CAPTURE_FAILED in str(error):
                pytest.exit("the CUDA context is gone, or torch's allocator waits for a capture that failed", returncode=BROKEN)
            raise
        if CAPTURE_FAILED in how:
            pytest.exit("a capture failed, and torch cannot empty its cache after that", returncode=BROKEN)

    return run
