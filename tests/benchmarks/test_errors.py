"""The committed table of errors is what this code has, and says what the library promises."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks import errors
from benchmarks.errors import LIBRARY, PATH, SMALL, Problem

TABLE: dict[str, Any] = json.loads(PATH.read_text())
COMMITTED: dict[Problem, dict[str, dict[str, Any]]] = {
    Problem(**row["problem"]): {name: dict(zip(TABLE["columns"], found, strict=True)) for name, found in row["errors"].items()} for row in TABLE["rows"]
}
MEASURED_AGAIN = [problem for problem in COMMITTED if (problem.classes or 0) <= SMALL]
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def test_every_problem_is_committed() -> None:
    assert {problem: list(found) for problem, found in COMMITTED.items()} == {problem: errors.implementations(problem) for problem in errors.problems()}


slow_kernels = [pytest.mark.triton, pytest.mark.interpreter, pytest.mark.slow]


@pytest.mark.parametrize(
    ("implementation", "every"),
    [
        ("torch", 11),  # which is no factor of the grid, so that all of its values are met
        pytest.param("cpu", 11, marks=pytest.mark.compiled),
        pytest.param("triton", 11, marks=slow_kernels),
        pytest.param("torch", 1, marks=pytest.mark.slow),
        pytest.param("cpu", 1, marks=[pytest.mark.compiled, pytest.mark.slow]),
    ],
)
def test_measured_again(implementation: str, every: int) -> None:
    """Up to four times the committed error and two roundings, because another processor or number of threads adds up in another order."""
    for problem in [problem for problem in MEASURED_AGAIN if implementation in COMMITTED[problem]][::every]:
        committed = COMMITTED[problem][implementation]
        for name, found in asdict(errors.measure(problem, [implementation])[implementation]).items():
            if found is not None:
                assert found <= 4 * committed[name] + (2.0 if name == "loss_ulp" else 2.4e-7), (problem, name)


def allowed(problem: Problem, implementation: str) -> float:
    """The largest relative error of the gradient of a target."""
    assert problem.p is not None and problem.scale is not None
    error = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[problem.dtype]  # the last two round the gradient
    if problem.dtype == "float16":
        error += errors.DIM**0.5 * 2**-25 / (1 - problem.p)  # of a row of features, whose elements may be below float16's normal numbers
    if problem.operation == "angular margin":
        error += 2 * problem.scale * 2**-24  # the target's logit has the roundings of a sine and two products
    elif problem.operation == "DRO-LT bound":
        error += 16 * problem.scale * 2**-24  # a logit is a distance over the temperature, which is a sum of 64 squares
    elif problem.operation == "head" and implementation == "triton" and problem.dtype != "float32":
        error += problem.scale * 2**-11 + 2**-8  # cosines and their gradients have 16 bits; the roundings of the cosines cancel for the most part
    return error


def test_the_target_keeps_its_digits() -> None:
    """However close to 1 its probability is: without an offset, which rounds the logits themselves."""
    for problem, found in COMMITTED.items():
        if problem.p is not None and (not problem.offset or problem.operation == "DRO-LT bound"):
            for implementation in found.keys() & set(LIBRARY):
                assert found[implementation]["target_relative"] <= allowed(problem, implementation), (problem, implementation)
