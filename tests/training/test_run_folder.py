"""What a run leaves behind."""

from __future__ import annotations

import pytest

from gclkern.training.recipes import plan
from gclkern.training.summary import compared

COUNTS = [50, 20, 5]


@pytest.mark.parametrize(("method", "retrain", "baseline", "expected"), [
    ("gcl", "gcl", True, ["baseline", "stage-1"]),
    ("gcl", "gcl", False, ["stage-1"]),
    ("dro-lt", "none", False, ["stage-1", "stage-1-robust"]),
    ("ce", "ncm", True, ["baseline", "stage-1"]),
])  # fmt: skip
def test_embeddings_are_those_of_phases_that_train_them(method: str, retrain: str, baseline: bool, expected: list[str]) -> None:
    """Stage 2 leaves the backbone as it is: beside stage 1 it would be the same picture twice."""
    assert [phase.name for phase in compared(plan(method, retrain, "cifar10-lt", COUNTS, baseline=baseline))] == expected


def test_embeddings_of_a_run_that_only_retrains() -> None:
    second = plan("gcl", "gcl", "cifar10-lt", COUNTS)[1:]
    assert compared(second) == second
