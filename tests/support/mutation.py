"""Mutation testing: does a test fail when the code is wrong? python -m tests.support.mutation [FILE ...] [--limit N] [--seconds S]

Each mutant changes one place of a file, in Triton or in Python: a comparison, an operator, a constant, a maximum, or a term left out of a sum or a mask.
It is killed if one of the file's tests fails on it. The mutants of a file are tried in an order that is drawn once, so that the first N are a fair sample. The
report is tests/mutation.md; a survivor becomes a test, or an argument there why nothing can tell it from the original.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "mutation.md"
SECONDS = 180  # for the tests of one mutant; one that does not end is killed

# What is changed, and the tests that should notice.
TESTS: dict[str, list[str]] = {
    "kernels/centroids.py": ["tests/test_centroids.py", "-k", "triton"],
    "kernels/dro_lt.py": ["tests/test_dro_lt.py", "-k", "triton or tile"],
    "kernels/noise.py": ["tests/test_noise.py", "-k", "triton or tile or kernel and not compiled"],
    "kernels/row_loss.py": ["tests/test_gcl_cross_entropy.py", "-k", "triton"],
    "kernels/logit_loss.py": ["tests/test_gcl_cross_entropy.py", "-k", "triton"],
    "kernels/head.py": ["tests/test_linear_gcl_cross_entropy.py", "tests/kernels/test_head.py", "-k", "triton or kernels"],
    "gclkern/torch_backend/centroids.py": ["tests/test_centroids.py", "-k", "not triton"],
    "gclkern/torch_backend/dro_lt.py": ["tests/test_dro_lt.py", "-k", "not triton"],
    "gclkern/torch_backend/rows.py": ["tests/test_torch_backend.py", "tests/test_gcl_cross_entropy.py", "-k", "not triton"],
    "gclkern/torch_backend/logit_loss.py": ["tests/test_torch_backend.py", "tests/test_gcl_cross_entropy.py", "-k", "not triton"],
    "gclkern/torch_backend/head.py": ["tests/test_torch_backend.py", "tests/test_linear_gcl_cross_entropy.py", "-k", "not triton"],
    "gclkern/samplers.py": ["tests/test_samplers.py"],
}

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin", "amin": "amax"}
# Where a change says nothing about the numbers: errors and their words, imports, decorators, annotations.
_SKIPPED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)


@dataclass(frozen=True)
class Mutant:
    line: int
    before: str
    after: str
    source: str


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in this one's place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        changed = copy.copy(node)
        changed.ops = [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        yield changed
    elif isinstance(node, ast.BinOp):
        if type(node.op) in _OPERATORS:
            changed_operator = copy.copy(node)
            changed_operator.op = _OPERATORS[type(node.op)]()
            yield changed_operator
        if isinstance(node.op, ast.Add | ast.Sub | ast.BitAnd):
            yield node.left
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        renamed = copy.copy(node)
        renamed.attr = _NAMES[node.attr]
        yield renamed


def _expressions(node: ast.AST) -> Iterator[ast.AST]:
    """What may be changed below a node."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, _SKIPPED):
                yield child
                yield from _expressions(child)


def mutants(source: str) -> list[Mutant]:
    """Every change of one place."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node in _expressions(ast.parse(source)):
        for changed in _changes(node):
            assert isinstance(node, ast.expr) and node.end_lineno is not None and node.end_col_offset is not None
            first = starts[node.lineno - 1] + len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
            last = starts[node.end_lineno - 1] + len(lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode())
            text = f"({ast.unparse(changed)})" if isinstance(changed, ast.Compare | ast.BinOp) else ast.unparse(changed)
            found.append(Mutant(node.lineno, ast.unparse(node), ast.unparse(changed), source[:first] + text + source[last:]))
    return found


def killed(tree: Path, tests: list[str]) -> bool:
    """Whether the tests fail on a tree. They run in a fork of this process, which has the large libraries imported already."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "gclkern", "benchmarks")]:
            del sys.modules[name]
        import pytest

        os._exit(int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"])))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def try_file(name: str, limit: int, until: float) -> tuple[int, int, list[Mutant]]:
    """How many mutants the file has, how many were tried, and those that survived."""
    original = (ROOT / name).read_text(encoding="utf-8")
    everything = mutants(original)
    chosen = random.Random(0).sample(everything, min(limit, len(everything)))
    tried, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "results", "runs", "data", "docs", "build"))
        shutil.copytree(ROOT / "gclkern" / "training" / "data", tree / "gclkern" / "training" / "data", dirs_exist_ok=True)
        if killed(tree, TESTS[name]):
            sys.exit(f"{name}: its tests fail without any change: python -m pytest {' '.join(TESTS[name])}")
        for mutant in chosen:
            if time.monotonic() > until:
                break
            (tree / name).write_text(mutant.source, encoding="utf-8")
            tried += 1
            dead = killed(tree, TESTS[name])
            if not dead:
                survivors.append(mutant)
            print(f"{name}:{mutant.line}: {'killed  ' if dead else 'SURVIVED'} {mutant.before} -> {mutant.after}", flush=True)  # noqa: T201
    return len(everything), tried, survivors


def report(results: dict[str, tuple[int, int, list[Mutant]]]) -> str:
    lines = [
        "# Mutants",
        "",
        f"By `python -m tests.support.mutation {' '.join(results)}`.",
        "",
        "| file | mutants | tried | killed |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, (count, tried, survivors) in results.items():
        lines.append(f"| {name} | {count} | {tried} | {tried - len(survivors)} |")
    lines += ["", "Survivors:", ""]
    for name, (_, _, survivors) in results.items():
        lines += [f"- {name}:{mutant.line}: `{mutant.before}` -> `{mutant.after}`" for mutant in survivors]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("files", nargs="*", default=list(TESTS), choices=list(TESTS), metavar="FILE", help="of " + ", ".join(TESTS))
    parser.add_argument("--limit", type=int, default=10**6, help="mutants of each file (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for each file (default: no limit)")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    sys.dont_write_bytecode = True  # a file that changes within a second would be taken from its bytecode
    import hypothesis  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    results = {name: try_file(name, args.limit, time.monotonic() + args.seconds) for name in args.files}
    REPORT.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
