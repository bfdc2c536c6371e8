"""Mutation testing: does a test fail when the code is wrong? python -m tests.support.mutation [FILE ...] [--limit N] [--seconds S]

Each mutant (mutants.py, of C c_mutants.py) changes one place of a file. It is killed if one of the file's tests fails on it. The mutants of a file are tried in
a random order, so that the first N are a random sample, from which the report (tests/mutation.md) estimates how many of all would be killed. The tests of a
file run once to see how long each takes and which lines it runs; a mutant is tried on those that run its lines, in a fork of a process that has collected them.
Results are kept in a file: a run that is stopped goes on where it was, and a changed function is tried anew. A survivor becomes a test, or an entry of
tests/equivalent_mutants.toml that says why nothing can tell it from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.support.c_mutants import build, c_mutants
from tests.support.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "mutation.md"
REASONS = ROOT / "tests" / "equivalent_mutants.toml"
KEPT = ROOT / "build" / "mutants.jsonl"
SEED = 2026  # of the samples

NATIVE = "gclkern/cpu_backend/native"
LIBRARY = "gclkern/cpu_backend/_native.abi3.so"

_KERNELS, _TORCH, _CPU = "triton and not compiled", "not triton and not cpu", "cpu and not process and not compiles and not graph and not exports"
_LOGITS = ["tests/test_gcl_cross_entropy.py", "tests/test_angular_losses.py", "tests/test_operations.py"]
_HEAD = ["tests/test_linear_gcl_cross_entropy.py", "tests/test_operations.py"]
_CONTRASTIVE = ["tests/test_supervised_contrastive.py", "tests/test_operations.py"]
_BOUND = ["tests/test_dro_lt.py", "tests/test_operations.py"]
_LOOPS = [*_LOGITS, "tests/test_linear_gcl_cross_entropy.py", "tests/test_soft_labels.py", "tests/test_top1.py", "tests/test_cpu_backend.py"]
_ALL_LOOPS = [*_LOOPS, "tests/test_noise.py", "tests/test_dro_lt.py", "tests/test_centroids.py", "tests/test_supervised_contrastive.py"]
# What is changed, and the tests that should notice: files, and an expression of pytest's -k.
TESTS: dict[str, tuple[list[str], str]] = {
    "kernels/angles.py": (["tests/test_angular_losses.py"], _KERNELS),
    "kernels/centroids.py": (["tests/test_centroids.py"], _KERNELS),
    "kernels/contrastive_loss.py": (_CONTRASTIVE, f"{_KERNELS} and (not operations or contrastive)"),
    "kernels/dro_lt.py": (["tests/test_dro_lt.py", "tests/test_operations.py"], f"({_KERNELS} or tile) and (not operations or dro_lt)"),
    "kernels/exponentials.py": (["tests/kernels/test_exponentials.py"], ""),
    "kernels/head.py": (["tests/kernels/test_head.py", "tests/kernels/test_exponentials.py", *_HEAD], "(triton or kernels) and (not operations or linear)"),
    "kernels/logit_loss.py": (_LOGITS, f"{_KERNELS} and (not operations or gcl)"),
    "kernels/noise.py": (["tests/test_noise.py"], "triton or tile or kernel and not compiled"),
    "kernels/philox.py": (["tests/test_noise.py"], "triton or tile or kernel and not compiled"),
    "kernels/products.py": (
        ["tests/kernels/test_head.py", "tests/kernels/test_exponentials.py", *_HEAD, "tests/test_angular_losses.py"],
        "(triton or kernels) and (not operations or linear)",
    ),
    "kernels/row_loss.py": (_LOGITS, f"{_KERNELS} and (not operations or gcl)"),
    "kernels/runtime.py": (["tests/kernels/test_runtime.py", "tests/kernels/test_specialisation.py"], ""),
    "kernels/terms.py": (
        ["tests/test_operators.py", *_LOGITS, *_CONTRASTIVE[:1], "tests/test_dro_lt.py", "tests/test_proco.py"],
        "torch and not compiles and (not operations or soundly)",
    ),
    "kernels/vmf.py": (["tests/test_proco.py", "tests/test_operations.py"], f"{_KERNELS} and (not operations or vmf)"),
    "gclkern/torch_backend/angles.py": (["tests/test_angular_losses.py"], _TORCH),
    "gclkern/torch_backend/centroids.py": (["tests/test_centroids.py"], _TORCH),
    "gclkern/torch_backend/contrastive_loss.py": (_CONTRASTIVE, f"{_TORCH} and (not operations or contrast)"),
    "gclkern/torch_backend/dro_lt.py": (["tests/test_dro_lt.py", "tests/test_operations.py"], f"{_TORCH} and (not operations or dro_lt)"),
    "gclkern/torch_backend/head.py": (["tests/test_operators.py", *_HEAD], f"{_TORCH} and (not operations or linear)"),
    "gclkern/torch_backend/logit_loss.py": (["tests/test_operators.py", *_LOGITS], f"{_TORCH} and (not operations or gcl)"),
    "gclkern/torch_backend/noise.py": (["tests/test_noise.py"], _TORCH),
    "gclkern/torch_backend/rows.py": (["tests/test_operators.py", *_LOGITS, "tests/test_soft_labels.py"], f"{_TORCH} and (not operations or gcl)"),
    "gclkern/torch_backend/vmf.py": (["tests/test_proco.py", "tests/test_operations.py"], f"{_TORCH} and (not operations or vmf)"),
    "gclkern/cpu_backend/centroids.py": (["tests/test_centroids.py", "tests/test_operations.py"], f"{_CPU} and (not operations or centroids)"),
    "gclkern/cpu_backend/contrastive_loss.py": (_CONTRASTIVE, f"{_CPU} and (not operations or contrast)"),
    "gclkern/cpu_backend/dro_lt.py": (_BOUND, f"{_CPU} and (not operations or dro_lt)"),
    "gclkern/cpu_backend/head.py": ([*_HEAD, "tests/test_top1.py"], f"{_CPU} and (not operations or linear)"),
    "gclkern/cpu_backend/logit_loss.py": ([*_LOGITS, "tests/test_cpu_backend.py"], f"{_CPU} and (not operations or gcl)"),
    f"{NATIVE}/angles.h": (_LOOPS, f"{_CPU} and (not operations or angles)"),
    f"{NATIVE}/call.c": (["tests/test_cpu_backend.py", *_LOGITS[:1]], _CPU),
    f"{NATIVE}/contrastive_loss.h": (_CONTRASTIVE, f"{_CPU} and (not operations or contrast)"),
    f"{NATIVE}/dro_lt.h": (_BOUND, f"{_CPU} and (not operations or dro_lt)"),
    f"{NATIVE}/library.c": (_ALL_LOOPS, _CPU),
    f"{NATIVE}/loops.h": (_ALL_LOOPS, _CPU),
    f"{NATIVE}/native.h": (_ALL_LOOPS, _CPU),
    f"{NATIVE}/norms.h": ([*_HEAD, *_CONTRASTIVE[:1]], f"{_CPU} and (not operations or linear)"),
    f"{NATIVE}/philox.h": (["tests/test_noise.py", "tests/test_gcl_cross_entropy.py", "tests/test_cpu_backend.py"], _CPU),
    f"{NATIVE}/row_loss.h": (_LOOPS, f"{_CPU} and (not operations or gcl)"),
    f"{NATIVE}/vector.h": (_ALL_LOOPS, _CPU),
    "gclkern/samplers.py": (["tests/test_samplers.py"], ""),
}


def is_native(name: str) -> bool:
    return name.endswith((".c", ".h"))


def is_interpreted(name: str) -> bool:
    """Whether it holds kernels or launches them, and no import calls its functions."""
    return name.startswith("kernels/") and name not in ("kernels/runtime.py", "kernels/terms.py")


def mutants_of(name: str, source: str) -> list[Mutant]:
    return c_mutants(source) if is_native(name) else mutants(source)


def sample(name: str, source: str, reasons: Reasons) -> list[Mutant]:
    """The mutants of a file in a random order, which changes elsewhere leave as it is."""
    candidates = [mutant for mutant in mutants_of(name, source) if (name, mutant.function) not in reasons.functions]
    return sorted(candidates, key=lambda mutant: hashlib.sha256(f"{SEED} {mutant.key}".encode()).digest())


# ---- the tests of one mutant, in a process of their own


def in_fork(work: Callable[[Callable[[dict[str, Any]], None]], int], *, group: bool) -> Iterator[dict[str, Any]]:
    """What `work` tells in a fork of this process, and at last its exit code. With `group` it gets a process group, which is killed afterwards."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        if group:
            os.setpgrp()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with os.fdopen(writer, "w") as pipe:

            def tell(news: dict[str, Any]) -> None:
                pipe.write(json.dumps(news) + "\n")
                pipe.flush()

            code = 99
            try:
                code = work(tell)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                os._exit(code)
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            yield from map(json.loads, pipe)
        yield {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the tests have started, and at a signal the tests themselves
            (os.killpg if group else os.kill)(child, signal.SIGKILL if group else signal.SIGTERM)


@dataclass
class Test:
    """What is known of a test: its CPU time, and the lines of the changed file that it runs."""

    seconds: float
    lines: frozenset[int]

    def touches(self, span: tuple[int, int]) -> bool:
        return any(line in self.lines for line in range(span[0], span[1] + 1))


def by_variety(items: list[pytest.Item]) -> list[pytest.Item]:
    """One case of each test function, then another one of each; the next is always one whose parameters have come least often, or that has every option."""
    seen: Counter[str] = Counter()
    names = {item: re.split(r"[][-]", item.nodeid) for item in items}
    ordered: list[pytest.Item] = []
    waiting = list(items)
    while waiting and len(ordered) < 100:  # more do not fit into a budget
        item = min(waiting, key=lambda item: (seen[names[item][0]], sum(seen[name] for name in names[item][1:]), "everything" not in item.name))
        waiting.remove(item)
        ordered.append(item)
        seen.update(names[item])
    return ordered + waiting


def chosen_tests(mutant: Mutant, tests: dict[str, Test], kills: Counter[str], *, traced: bool) -> list[str]:
    """Those that run the changed lines, or where none is known the function; all for a change outside of functions or of a cached result, and without a trace.

    First come those that have killed the most in the least time, or have every option.
    """
    chosen = [name for name, test in tests.items() if test.touches(mutant.lines)] or [name for name, test in tests.items() if test.touches(mutant.around)]
    if not mutant.function or any("cache" in line for line in mutant.source.splitlines()[mutant.around[0] - 2 : mutant.around[1]]) or not traced:
        chosen = list(tests)
    return sorted(chosen, key=lambda name: tests[name].seconds / (kills[name] + 0.05 + 0.5 * ("everything" in name)))


class Tracer:
    """Which lines of functions of a file are run, while `sys.settrace` has it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.names: dict[str, bool] = {}  # whether a file's name is that of `path`
        self.lines: set[int] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in self.names:
            self.names[code.co_filename] = os.path.realpath(code.co_filename) == self.path
        return self.line if self.names[code.co_filename] and code.co_flags & inspect.CO_NEWLOCALS else None

    def line(self, frame: FrameType, event: str, argument: object) -> Any:
        self.lines.add(frame.f_lineno)
        return self.line


@dataclass
class Session:
    """A plugin of pytest: once the tests are collected, they run in forks, the first time without a change and then on each mutant.

    So neither imports nor the collection are repeated. A fork gives the changed code to the functions that exist. Triton's interpreter reads a function from
    the file when it first runs it, which for most functions takes longer than to run them: tests of kernels run in this process the first time, and a fork
    reads the changed function again. A mutant that changes what an import computes, or what only imports of other files call, is in the file before this
    process starts; `mutants` is empty then. A mutant of a C source is compiled, and the fork loads its library.
    """

    name: str  # of the changed file
    path: Path
    mutants: list[Mutant]
    tests: dict[str, Test]  # empty to find them, within `budget` seconds
    kills: Counter[str]
    budget: float
    until: float
    tell: Callable[[dict[str, Any]], None]
    imports: Tracer  # of what runs before the tests
    caches: list[Any] = field(default_factory=list)  # results of functions, which hold for the unchanged file

    def pytest_sessionstart(self) -> None:
        settings.register_profile("mutants", settings.default, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")  # a failure is enough: no simpler example of it is looked for

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        sys.settrace(None)
        items = {item.nodeid: item for item in session.items}
        tried: list[Mutant | None] = list(self.mutants) if self.mutants or not self.tests else [None]
        if not self.tests:
            for news in self.measure_here(session) if self.interpreted else in_fork(functools.partial(self.measure, session), group=True):
                self.tell(news)
                if "test" in news:
                    self.tests[news["test"]] = Test(news["seconds"], frozenset(news["lines"]))
                elif news.get("code") or "failed" in news:
                    return True
        functions: dict[str, list[FunctionType]] = {}
        self.caches = [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper and str(thing.__module__).startswith("gclkern")]
        for thing in gc.get_objects():
            if type(thing) is FunctionType and os.path.realpath(thing.__code__.co_filename) == str(self.path):
                functions.setdefault(thing.__code__.co_qualname, []).append(thing)
        gc.collect()
        gc.freeze()
        source = self.path.read_text(encoding="utf-8")
        changed = self.library.with_suffix(".sources")
        if self.native:
            shutil.copytree(self.path.parent, changed, dirs_exist_ok=True)
        for mutant in tried:
            if time.monotonic() > self.until:
                break
            names = sorted(self.tests, key=lambda name: self.tests[name].seconds)
            if mutant is not None:
                if not self.imports.lines.isdisjoint(range(mutant.lines[0], mutant.lines[1] + 1)):
                    self.tell({"imported": mutant.key})
                    continue
                names = chosen_tests(mutant, self.tests, self.kills, traced=self.traced)
                if not names:
                    continue  # none of the tests that fit into the budget runs it: a larger one decides
            session.items[:] = [items[name] for name in names if name in items]
            if mutant is not None and self.native:
                (changed / self.path.name).write_text(mutant.source, encoding="utf-8")
                if not build(changed, self.library):
                    continue  # no mutant: its types are wrong
            elif mutant is not None:
                self.path.write_text(mutant.source, encoding="utf-8")
            told: dict[str, Any] = {}
            for news in in_fork(functools.partial(self.try_one, session, mutant, functions), group=True):
                told |= news
            self.path.write_text(source, encoding="utf-8")
            if told["code"] in (-signal.SIGALRM, -signal.SIGPROF):
                told["failed"] = "a test that does not end"
            killer = told.get("failed", "the process's end" if told["code"] else None)
            self.kills[killer or ""] += 1
            self.tell({"mutant": mutant.key if mutant is not None else "", "killer": killer, "tests": len(names)})
        return True

    @property
    def native(self) -> bool:
        return is_native(self.name)

    @property
    def interpreted(self) -> bool:
        return is_interpreted(self.name)

    @property
    def traced(self) -> bool:
        """Not where that is impossible, and not where it takes several times as long as the tests, most of which run most lines of a kernel."""
        return not self.native and not self.interpreted

    @property
    def library(self) -> Path:
        """Of a mutant."""
        return self.path.parent.parent / "mutant.so"

    def measure_here(self, session: pytest.Session) -> list[dict[str, Any]]:
        news: list[dict[str, Any]] = []
        self.measure(session, news.append)
        return news

    def measure(self, session: pytest.Session, tell: Callable[[dict[str, Any]], None]) -> int:
        """Run the tests, one case of each function, then another one of each and so on."""
        session.items[:] = by_variety(session.items)
        end = time.process_time() + self.budget
        tracer = Tracer(self.path)

        def before_test(name: str) -> None:
            tracer.lines.clear()
            if self.traced:
                sys.settrace(tracer)

        def after_test(name: str, seconds: float) -> None:
            sys.settrace(None)
            tell({"test": name, "seconds": seconds, "lines": sorted(tracer.lines)})

        watch = Watch(before_test, after_test, tell, lambda: None)
        session.config.pluginmanager.register(watch)
        for item in session.items:
            if time.process_time() > end or watch.failed:
                break
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)  # so that nothing is left to tear down
        session.config.pluginmanager.unregister(watch)
        return 0

    def try_one(self, session: pytest.Session, mutant: Mutant | None, functions: dict[str, list[FunctionType]], tell: Callable[[dict[str, Any]], None]) -> int:
        if self.native:
            from gclkern import ready
            from gclkern.cpu_backend import library

            library._library = library.load(self.library)
            ready.connect(library.module_of(library._library))
        elif mutant is not None:
            from triton.runtime.interpreter import InterpretedFunction

            for name, code in function_codes(mutant.source):
                if name.partition(".")[0] == mutant.function:
                    for function in functions.get(name, ()):
                        function.__code__ = code.replace(co_filename=function.__code__.co_filename)
                        InterpretedFunction.rewritten_fn.pop(function, None)
            for cached in self.caches:
                cached.cache_clear()

        def before_test(name: str) -> None:
            signal.setitimer(signal.ITIMER_PROF, 20.0 + 3 * self.tests[name].seconds)  # the first test of a fork may import what another one imported before
            signal.alarm(600)  # for one that waits forever

        # at a failure, as pytest would take longer to end than most tests take
        session.config.pluginmanager.register(Watch(before_test, lambda name, seconds: None, tell, lambda: os._exit(1)))
        for item, following in itertools.zip_longest(session.items, session.items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return 0


@dataclass
class Watch:
    """A plugin of pytest: measures tests, and tells of one that fails."""

    before_test: Callable[[str], None]
    after_test: Callable[[str, float], None]
    tell: Callable[[dict[str, Any]], None]
    at_failure: Callable[[], None]
    started: float = 0.0
    failed: bool = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started = time.process_time()
        self.before_test(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tell({"failed": report.nodeid})
            self.failed = True
            self.at_failure()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.after_test(nodeid, time.process_time() - self.started)


def function_codes(source: str) -> list[tuple[str, CodeType]]:
    """The code of each function and method, by its qualified name."""
    found: list[tuple[str, CodeType]] = []
    waiting = [compile(source, "", "exec", dont_inherit=True)]
    while waiting:
        for constant in waiting.pop().co_consts:
            if isinstance(constant, CodeType):
                found.append((constant.co_qualname, constant))
                if not constant.co_flags & inspect.CO_NEWLOCALS:  # the body of a class
                    waiting.append(constant)
    return found


def at_import(source: str) -> list[tuple[object, ...]]:
    """What runs when the file is imported: bodies of the module and of classes, whose constants hold defaults of parameters, too."""
    module = compile(source, "", "exec", dont_inherit=True)
    bodies = [module, *(code for _, code in function_codes(source) if not code.co_flags & inspect.CO_NEWLOCALS)]
    return [(body.co_code, body.co_names, *(constant for constant in body.co_consts if not isinstance(constant, CodeType))) for body in bodies]


def session_of(
    name: str, tree: Path, mutants: list[Mutant], tests: dict[str, Test], kills: Counter[str], budget: float, until: float
) -> Iterator[dict[str, Any]]:
    """What a session in a fork of this process, which has the large libraries imported, tells of the tests of a file and its mutants."""

    def work(tell: Callable[[dict[str, Any]], None]) -> int:
        os.chdir(tree)
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
        for module in [module for module in sys.modules if module.partition(".")[0] in ("tests", "gclkern", "benchmarks")]:
            del sys.modules[module]
        files, expression = TESTS[name]
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        path = (tree / name).resolve()
        plugin = Session(name, path, mutants, tests, kills, budget, until, tell, Tracer(path))
        if mutants and plugin.traced:
            sys.settrace(plugin.imports)
        return pytest.main([*files, "-k", expression, "-q", "-p", "no:cacheprovider", "--assert=plain"], plugins=[plugin])

    return in_fork(work, group=False)


# ---- all mutants of a file


class Results:
    """What became of each mutant, kept from run to run: at first, and at last."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, str], str] = {}
        self.fates: dict[tuple[str, str], str] = {}
        for row in map(json.loads, KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []):
            self.set(row["file"], row["key"], row["fate"])

    def set(self, name: str, key: str, fate: str) -> None:
        self.first.setdefault((name, key), fate)
        self.fates[name, key] = fate

    def add(self, name: str, mutant: Mutant, fate: str) -> None:
        self.set(name, mutant.key, fate)
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
    """The files that git knows, without its history, and the compiled loops."""
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in os.fsdecode(listed).split("\0"):
        if name and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    if not build(tree / NATIVE, tree / LIBRARY):
        sys.exit("the loops for the CPU do not compile")
    return tree


def try_file(name: str, tree: Path, results: Results, reasons: Reasons, limit: int, until: float, budget: float, *, again: bool) -> None:
    source = (tree / name).read_text(encoding="utf-8")
    waiting = [
        mutant for mutant in sample(name, source, reasons)[:limit]
        if (fate := results.fates.get((name, mutant.key))) is None or (again and fate == "survived" and reasons.of(name, mutant) is None)
    ]  # fmt: skip
    usual = None if is_native(name) else at_import(source)
    alone = [] if usual is None else [mutant for mutant in waiting if at_import(mutant.source) != usual]
    waiting = [mutant for mutant in waiting if mutant not in alone]
    by_key = {mutant.key: mutant for mutant in waiting}
    tests: dict[str, Test] = {}
    kills: Counter[str] = Counter()

    def follow(events: Iterator[dict[str, Any]], mutant: Mutant | None = None) -> None:
        for event in events:
            if "seconds" in event:
                tests[event["test"]] = Test(event["seconds"], frozenset(event["lines"]))
            elif "imported" in event:
                alone.append(by_key[event["imported"]])
            elif "failed" in event:
                sys.exit(f"{name}: fails without any change: {event['failed']}")
            elif "mutant" in event:
                tried, killer = mutant or by_key[event["mutant"]], event["killer"]
                kills[killer or ""] += 1
                results.add(name, tried, "killed" if killer else "survived")
                print(f"{name}:{tried}: {f'killed by {killer}' if killer else 'SURVIVED'} ({event['tests']} tests)", flush=True)  # noqa: T201
            elif event.get("code") in (4, 5) and mutant is None:
                sys.exit(f"no tests for {name}")
            elif event.get("code") and mutant is None:
                sys.exit(f"{name}: the tests end with {event['code']}")
            elif event.get("code"):
                results.add(name, mutant, "killed")
                print(f"{name}:{mutant}: killed at the import", flush=True)  # noqa: T201

    if not waiting and not alone:
        return
    follow(session_of(name, tree, waiting, tests, kills, budget, until))
    print(f"{name}: {len(tests)} tests in {sum(test.seconds for test in tests.values()):.0f} s", flush=True)  # noqa: T201
    for mutant in alone:
        if time.monotonic() > until:
            break
        (tree / name).write_text(mutant.source, encoding="utf-8")
        follow(session_of(name, tree, [], tests, kills, budget, until), mutant)
    (tree / name).write_text(source, encoding="utf-8")


# ---- the report


def interval(share: float, count: float) -> str:
    """Wilson's interval of 95% for a share of a population, from its share in a random sample of `count`."""
    z = 1.96
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * min(high, 1.0):.1f})"


def overall(weights: list[tuple[int, int, float]]) -> str:
    """The share of several files, of each its mutants, those that count and their share: files are sampled at different rates, so each counts by its size, and
    the sample by what one at the same rate would need for this precision."""
    size = sum(whole for whole, _, _ in weights)
    share = sum(whole * killed for whole, _, killed in weights) / size
    return interval(share, size**2 / sum(whole**2 / decided for whole, decided, _ in weights))


def report(results: Results, reasons: Reasons) -> str:
    lines = [
        "# Mutants",
        "",
        "By `python -m tests.support.mutation`, which says how they are made and drawn. Set aside are mutants in functions that decide time or memory alone;",
        "of the others a random sample was tried. Equivalent are survivors with an argument below. Percentages are of the mutants that are not equivalent,",
        "with the interval of 95% for all mutants of the file: how many the suite killed when they were first tried, and how many it kills now. Those killed",
        "since then have got a test, which may notice others that nobody has tried, too: for all mutants, the truth lies between the two.",
        "What survives the tests that fit into `--budget` is tried with further tests of the suite by hand; until then it is among the survivors.",
        "",
        "| file | mutants | set aside | tried | equivalent | killed at first | killed since | survive | killed at first, % | killed now, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    survivors, arguments = [], []
    totals: dict[str, list[int]] = {}  # of each folder, and of all
    weights: dict[str, tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]] = {}
    for name in TESTS:
        source = (ROOT / name).read_text(encoding="utf-8")
        everything, candidates = mutants_of(name, source), sample(name, source, reasons)
        tried = [(mutant, results.fates[name, mutant.key]) for mutant in candidates if (name, mutant.key) in results.fates]
        survived = [mutant for mutant, fate in tried if fate == "survived"]
        argued = [mutant for mutant in survived if reasons.of(name, mutant) is not None]
        at_first = sum(results.first[name, mutant.key] == "killed" for mutant, _ in tried)
        decided, now = len(tried) - len(argued), len(tried) - len(survived)
        counts = [len(everything), len(everything) - len(candidates), len(tried), len(argued), at_first, now - at_first, len(survived) - len(argued)]
        for group in (f"all of {Path(name).parent}" if Path(name).parent != Path("gclkern") else "", "all"):
            if not group:
                continue
            totals[group] = [total + count for total, count in zip(totals.get(group, [0] * 7), counts, strict=True)]
            if decided:
                first, last = weights.setdefault(group, ([], []))
                first.append((len(candidates), decided, at_first / decided))
                last.append((len(candidates), decided, now / decided))
        shares = [interval(killed / decided, decided) if decided else "-" for killed in (at_first, now)]
        lines.append(f"| {name} | {' | '.join(map(str, [*counts, *shares]))} |")
        survivors += [f"- {name}:{mutant.lines[0]}: `{mutant.before}` -> `{mutant.after}`" for mutant in survived if mutant not in argued]
        arguments += [f"- {name}:{mutant.lines[0]}: `{mutant.before}` -> `{mutant.after}`: {reasons.of(name, mutant)}" for mutant in argued]
    for group, counts in sorted(totals.items(), key=lambda item: item[0] == "all"):
        shares = [overall(part) for part in weights[group]] if group in weights else ["-", "-"]
        lines.append(f"| {group}, each file by its size | {' | '.join(map(str, [*counts, *shares]))} |")
    lines += ["", "## Survivors", "", *(survivors or ["None."]), "", "## Equivalent", "", *arguments, "", "## Set aside", ""]
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
