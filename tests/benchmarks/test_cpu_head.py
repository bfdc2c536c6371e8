"""The statistics of the benchmark of the head on a CPU, and what an interruption leaves of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_head, timing
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


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark with times and memory that take no time, interrupted before a round or before the memory of a process; returns the JSON's results."""

    def start(*, before_round: int | None = None, before_process: int | None = None) -> dict[str, Any]:
        rounds: list[int] = []
        processes: list[str] = []

        def rounds_in_turn(timed: list[Any], number: int) -> list[list[float]]:
            if len(rounds) == before_round:
                raise KeyboardInterrupt
            rounds.append(number)
            return [[1.0] for _ in timed]

        def in_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            if len(processes) == before_process:
                raise KeyboardInterrupt
            processes.append(command[-1])
            return subprocess.CompletedProcess(command, 0, stdout="5000000")

        monkeypatch.setattr(cpu_head, "wall_clock", lambda makers: None)
        monkeypatch.setattr(cpu_head, "rounds_in_turn", rounds_in_turn)
        monkeypatch.setattr(subprocess, "run", in_process)
        monkeypatch.setattr(cpu_head, "keep_freed_memory", lambda: None)  # else it would stay so for the other tests
        monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
        path = tmp_path / "cpu_head.json"
        monkeypatch.setattr(sys, "argv", ["cpu_head", "--rounds=3", f"--json={path}"])
        cpu_head.main()
        results: dict[str, Any] = json.loads(path.read_text())
        return {"rounds": results["shape"]["rounds"], "with memory": [name for name, row in results["results"].items() if "peak_bytes" in row]}

    return start


def test_a_whole_run_has_times_and_memory(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with_memory = [name for name in cpu_head.CONTESTANTS if name != "torch.compile"]
    assert run() == {"rounds": 3, "with memory": with_memory}
    assert "beyond gradients" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_measured(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the rounds it keeps the complete ones and measures no memory; of the memory it keeps the contestants that are done, beside all times."""
    assert run(before_round=2) == {"rounds": 2, "with memory": []}
    shown = capsys.readouterr()
    assert "times the bare products" in shown.out and "beyond gradients" not in shown.out
    assert "interrupted after 2 of 3 rounds" in shown.err and "memory of" not in shown.err
    assert run(before_process=4) == {"rounds": 3, "with memory": [next(iter(cpu_head.CONTESTANTS))]}
    shown = capsys.readouterr()
    assert "times the bare products" in shown.out
    assert "interrupted after the memory of 1 of" in shown.err


def test_an_interruption_before_the_first_round_ends_the_benchmark(run: Any) -> None:
    with pytest.raises(SystemExit, match="there are no times"):
        run(before_round=0)
