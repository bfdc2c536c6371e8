"""The statistics of the benchmark of the head on a CPU."""

from __future__ import annotations

import random

import pytest

from benchmarks import timing
from benchmarks.cpu_head import median_interval, rows_of, verdict


@pytest.mark.parametrize(("count", "low", "high"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (15, 4, 12), (50, 18, 33)])
def test_interval_of_the_median(count: int, low: int, high: int) -> None:
    """The ranks of the values at the ends of the interval are those of published tables of the sign test."""
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, high)


def test_verdict_says_what_was_measured() -> None:
    seconds = {"gclkern materialised": [0.2] * 9, "gclkern chunked": [0.3] * 9, "plain torch": [0.4] * 9, "bare products": [0.1] * 9}
    assert verdict(seconds) == (
        "gclkern materialised: 2.00 times the bare products (2.00 to 2.00); faster than plain torch, which takes 2.00 times as long (2.00 to 2.00)"
    )
    seconds["plain torch"] = [0.1, 0.3] * 4 + [0.2]
    assert "level with plain torch" in verdict(seconds)
    assert rows_of(seconds)["gclkern chunked"]["times_bare_products"] == pytest.approx(3)


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(timing, "load_average", lambda: 2.4)
    assert timing.load_warning(2) == ""
    assert "2.4 on 4 cores" in timing.load_warning(3)
