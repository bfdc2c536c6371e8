"""Mutation testing: does a test fail when the code is wrong? python -m tests.support.mutation [FILE ...] [--limit N] [--seconds S]

Each mutant (mutants.py) changes one place of a file. It is killed if one of the file's tests fails on it. The mutants of a file are taken in an order that is
drawn once and spreads every prefix evenly over the file, so that the first N are a fair sample. Libraries are imported once, in the process that each mutant is
forked from, and the tests that have killed the most in the least time run first. Results are kept in a file: a run that is stopped goes on where it was, and a
changed function is tried anew. The report is tests/mutation.md. A survivor becomes a test, or an entry of tests/equivalent_mutants.toml that says why nothing
can tell it from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.support.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "mutation.md"
REASONS = ROOT / "tests" / "equivalent_mutants.toml"
KEPT = ROOT / "build" / "mutants.jsonl"

_KERNELS, _TORCH = "triton and not compiled", "not triton and not cpu"
_LOGITS = ["tests/test_operations.py", "tests/test_gcl_cross_entropy.py", "tests/test_angular_losses.py"]
_HEAD = ["tests/test_operations.py", "tests/test_linear_gcl_cross_entropy.py"]
_CONTRASTIVE = ["tests/test_operations.py", "tests/test_supervised_contrastive.py"]
# What is changed, and the tests that should notice: files, and an expression of pytest's -k.
TESTS: dict[str, tuple[list[str], str]] = {
    "kernels/centroids.py": (["tests/test_centroids.py"], _KERNELS),
    "kernels/contrastive_loss.py": (_CONTRASTIVE, f"{_KERNELS} and (not operations or contrastive)"),
    "kernels/contrastive_terms.py": (_CONTRASTIVE, "not operations or contrastive"),
    "kernels/dro_lt.py": (["tests/test_dro_lt.py", "tests/test_operations.py"], f"({_KERNELS} or tile) and (not operations or dro_lt)"),
    "kernels/head.py": ([*_HEAD, "tests/kernels/test_head.py"], "(triton or kernels) and (not operations or linear)"),
    "kernels/logit_loss.py": (_LOGITS, f"{_KERNELS} and (not operations or gcl)"),
    "kernels/noise.py": (["tests/test_noise.py"], "triton or tile or kernel and not compiled"),
    "kernels/philox.py": (["tests/test_noise.py"], "triton or tile or kernel and not compiled"),
    "kernels/products.py": ([*_HEAD, "tests/kernels/test_head.py"], "(triton or kernels) and (not operations or linear)"),
    "kernels/row_loss.py": (_LOGITS, f"{_KERNELS} and (not operations or gcl)"),
    "gclkern/torch_backend/centroids.py": (["tests/test_centroids.py"], _TORCH),
    "gclkern/torch_backend/contrastive_loss.py": (_CONTRASTIVE, f"{_TORCH} and (not operations or contrast)"),
    "gclkern/torch_backend/dro_lt.py": (["tests/test_dro_lt.py", "tests/test_operations.py"], f"{_TORCH} and (not operations or dro_lt)"),
    "gclkern/torch_backend/head.py": (["tests/test_operators.py", *_HEAD], f"{_TORCH} and (not operations or linear)"),
    "gclkern/torch_backend/logit_loss.py": (["tests/test_operators.py", *_LOGITS], f"{_TORCH} and (not operations or gcl)"),
    "gclkern/torch_backend/noise.py": (["tests/test_noise.py"], _TORCH),
    "gclkern/torch_backend/rows.py": (["tests/test_operators.py", *_LOGITS, "tests/test_soft_labels.py"], f"{_TORCH} and (not operations or gcl)"),
    "gclkern/samplers.py": (["tests/test_samplers.py"], ""),
}


def sample_order(count: int) -> list[int]:
    """A permutation of `count` places: halves of halves, each time the middle of what is widest, so that every prefix covers the file evenly."""
    bits = max(count - 1, 1).bit_length()
    shift = random.Random(0).randrange(1 << bits)
    places = (int(f"{number:0{bits}b}"[::-1], 2) ^ shift for number in range(1 << bits))
    return [place for place in places if place < count]


# ---- the tests of one mutant, in a process of their own


@dataclass
class Watch:
    """A plugin of pytest: chooses and orders the tests, measures the CPU time of each and tells which one fails. One that takes far longer ends all."""

    usual: dict[str, float]  # seconds by the test's id; empty to measure, for `budget` seconds at most
    rank: dict[str, float]  # lower is earlier
    budget: float
    report: Any  # a pipe
    times: dict[str, float] = field(default_factory=dict)
    started: float = 0.0

    def pytest_sessionstart(self) -> None:
        settings.register_profile("mutants", settings.default, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")  # a failure is enough: no simpler example of it is looked for

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.usual:
            items[:] = sorted((item for item in items if item.nodeid in self.usual), key=lambda item: self.rank[item.nodeid])
            return
        before: Counter[str] = Counter()  # one case of each test function, then the second of each
        places = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            places[item] = before[function]
            before[function] += 1
        items.sort(key=lambda item: places[item])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started = time.process_time()
        if self.usual:
            signal.setitimer(signal.ITIMER_PROF, 2.0 + 3 * self.usual[nodeid])
            signal.alarm(600)  # for one that waits forever

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tell({"failed": report.nodeid})
            os._exit(1)  # pytest would take longer to end than most tests take

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.times[nodeid] = time.process_time() - self.started
        if not self.usual and sum(self.times.values()) > self.budget:
            self.tell({"times": self.times})
            os._exit(0)

    def pytest_sessionfinish(self) -> None:
        self.tell({"times": self.times})

    def tell(self, news: dict[str, Any]) -> None:
        self.report.write(json.dumps(news) + "\n")
        self.report.flush()


def run_tests(tree: Path, tests: tuple[list[str], str], usual: dict[str, float], rank: dict[str, float], budget: float) -> tuple[bool, dict[str, Any]]:
    """Whether they pass, and what the watch reports. They run in a fork of this process, which has the large libraries imported already."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgrp()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "gclkern", "benchmarks")]:
            del sys.modules[name]
        files, expression = tests
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        with os.fdopen(writer, "w") as report:
            code = pytest.main([*files, "-k", expression, "-q", "-p", "no:cacheprovider", "--assert=plain"], plugins=[Watch(usual, rank, budget, report)])
            os._exit(code)
    os.close(writer)
    told: dict[str, Any] = {}
    try:
        with os.fdopen(reader) as report:
            for line in report:
                told |= json.loads(line)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started, and at a signal the tests themselves
    if code in (4, 5):
        sys.exit(f"no tests for {tests}")
    if code in (-signal.SIGALRM, -signal.SIGPROF):
        told["failed"] = "a test that does not end"
    return code == 0, told


# ---- all mutants of a file


class Results:
    """What became of each mutant, kept from run to run."""

    def __init__(self) -> None:
        lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
        self.fates: dict[tuple[str, str], str] = {(row["file"], row["key"]): row["fate"] for row in map(json.loads, lines)}

    def add(self, name: str, mutant: Mutant, fate: str) -> None:
        self.fates[name, mutant.key] = fate
        KEPT.parent.mkdir(exist_ok=True)
        with KEPT.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "key": mutant.key, "fate": fate, "mutant": str(mutant)}) + "\n")


@dataclass(frozen=True)
class Reasons:
    """Why nothing can tell some mutants from the original: those of one place, and all of a function that decides time or memory alone."""

    mutants: dict[tuple[str, str, str, str], str]
    functions: dict[tuple[str, str], str]

    @staticmethod
    def read() -> Reasons:
        content = tomllib.loads(REASONS.read_text(encoding="utf-8"))
        return Reasons(
            {(row["file"], row["line"], row["before"], row["after"]): row["reason"] for row in content.get("mutant", [])},
            {(row["file"], row["function"]): row["reason"] for row in content.get("function", [])},
        )

    def of(self, name: str, mutant: Mutant) -> str | None:
        return self.mutants.get((name, mutant.text, mutant.before, mutant.after))


def copy_tree(folder: Path) -> Path:
    """The files that git knows, without its history."""
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in os.fsdecode(listed).split("\0"):
        if name and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


def try_file(name: str, tree: Path, results: Results, reasons: Reasons, limit: int, until: float, budget: float, *, again: bool) -> None:
    source = (tree / name).read_text(encoding="utf-8")
    everything = mutants(source)
    candidates = [mutant for mutant in everything if (name, mutant.function) not in reasons.functions]
    chosen = [candidates[place] for place in sample_order(len(candidates))[:limit]]
    tests = TESTS[name]
    waiting = [
        mutant for mutant in chosen
        if (fate := results.fates.get((name, mutant.key))) is None or (again and fate == "survived" and reasons.of(name, mutant) is None)
    ]  # fmt: skip
    if not waiting or time.monotonic() > until:
        return
    passed, told = run_tests(tree, tests, {}, {}, budget)
    if not passed:
        sys.exit(f"{name}: fails without any change: {told.get('failed', 'its tests')}")
    times = told["times"]
    kills: Counter[str] = Counter()
    print(f"{name}: {len(waiting)} of {len(everything)} mutants, {len(times)} tests in {sum(times.values()):.0f} s", flush=True)  # noqa: T201
    for mutant in waiting:
        if time.monotonic() > until:
            break
        (tree / name).write_text(mutant.source, encoding="utf-8")
        rank = {test: seconds / (kills[test] + 0.05) for test, seconds in times.items()}
        passed, told = run_tests(tree, tests, times, rank, budget)
        killer = told.get("failed", "the process's end")
        kills[killer] += 1
        results.add(name, mutant, "survived" if passed else "killed")
        print(f"{name}:{mutant}: {'SURVIVED' if passed else f'killed by {killer}'}", flush=True)  # noqa: T201
    (tree / name).write_text(source, encoding="utf-8")


# ---- the report


def report(results: Results, reasons: Reasons) -> str:
    lines = [
        "# Mutants",
        "",
        "By `python -m tests.support.mutation`, which says how they are made and drawn. Set aside are mutants in functions that decide time or memory alone;",
        "equivalent are survivors with an argument below. All others that were tried should be killed. What survived the tests",
        "that fit into `--budget` was tried with further tests of the suite before it was called a survivor here.",
        "",
        "| file | mutants | set aside | tried | killed | equivalent | survived |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    totals, survivors, arguments = [0] * 6, [], []
    for name in TESTS:
        everything = mutants((ROOT / name).read_text(encoding="utf-8"))
        aside = [mutant for mutant in everything if (name, mutant.function) in reasons.functions]
        tried = [(mutant, results.fates[name, mutant.key]) for mutant in everything if mutant not in aside and (name, mutant.key) in results.fates]
        survived = [mutant for mutant, fate in tried if fate == "survived"]
        argued = [mutant for mutant in survived if reasons.of(name, mutant) is not None]
        counts = [len(everything), len(aside), len(tried), len(tried) - len(survived), len(argued), len(survived) - len(argued)]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
        survivors += [f"- {name}:{mutant.line}: `{mutant.before}` -> `{mutant.after}`" for mutant in survived if mutant not in argued]
        arguments += [f"- {name}:{mutant.line}: `{mutant.before}` -> `{mutant.after}`: {reasons.of(name, mutant)}" for mutant in argued]
    decided = totals[2] - totals[4]
    lines += [f"| all | {' | '.join(map(str, totals))} |", "", f"Killed of those not equivalent: {100 * totals[3] / max(decided, 1):.1f}%.", ""]
    lines += ["## Survivors", "", *(survivors or ["None."]), "", "## Equivalent", "", *arguments, "", "## Set aside", ""]
    lines += [f"- {name}, `{function}`: {reason}" for (name, function), reason in reasons.functions.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("files", nargs="*", metavar="FILE", help="of " + ", ".join(TESTS))
    parser.add_argument("--limit", type=int, default=10**6, help="mutants of each file (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for each file (default: no limit)")
    parser.add_argument("--budget", type=float, default=25.0, help="CPU seconds of each file's tests; a case of each test function comes first (default: 25)")
    parser.add_argument("--again", action="store_true", help="try survivors without an argument again, after new tests")
    parser.add_argument("--report", action="store_true", help="only write the report of the results so far")
    args = parser.parse_args()
    if unknown := set(args.files) - set(TESTS):
        parser.error(f"no tests are known for {', '.join(unknown)}")
    results, reasons = Results(), Reasons.read()
    if not args.report:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        os.environ["TRITON_INTERPRET"] = "1"
        sys.dont_write_bytecode = True  # a file that changes within a second would be taken from its bytecode
        import scipy.stats  # noqa: F401
        import torch._dynamo.testing
        import triton.runtime.interpreter  # noqa: F401

        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()
        gc.disable()  # in the forks, too: collections take longer than most tests
        with tempfile.TemporaryDirectory() as folder:
            tree = copy_tree(Path(folder))
            for name in args.files or TESTS:
                try_file(name, tree, results, reasons, args.limit, time.monotonic() + args.seconds, args.budget, again=args.again)
    REPORT.write_text(report(results, reasons), encoding="utf-8")


if __name__ == "__main__":
    main()
