"""The measurement beside other work, and the tables of the compiled loops."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import bench_logit_loss, cpu_busy, render_results
from benchmarks.common import SMOKE


def test_contestants_run_alone_and_beside_processes_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_busy, "cores", lambda: 1)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    first, second = cpu_busy.results_of(bench_logit_loss.OPERATION, SMOKE, ("gclkern", "plain torch"), 2, least=0.002)
    assert [row["contestant"] for row in (first, second)] == ["gclkern", "plain torch"]
    assert all(row["slowdown"] == row["busy_seconds"] / row["alone_seconds"] > 0 for row in (first, second))
    assert len(started) == 1 and started[0].returncode is not None


def test_the_loops_are_compared_with_their_peers(tmp_path: Path) -> None:
    sizes = {"rows": 4, "classes": 10, "dim": 8, "dtype": "fp32", "phase": "forward + backward", "includes": ""}
    names = {"gclkern": 1e-3, "gclkern, torch backend": 4e-3, "plain torch": 5e-3, "torch cross entropy": 2e-3}
    found = [
        {**sizes, "operation": "logit loss", "shape": shape, "contestant": name, "seconds": seconds * factor, "peak_bytes": int(1e9 * seconds)}
        for shape, factor in (("small", 1), ("large", 10)) for name, seconds in names.items()
    ]  # fmt: skip
    machine = {"cpu": "x86_64", "cpu_code": "compiled loops (avx2) on 2 threads", "versions": {"torch": "2.14"}}
    report = tmp_path / "cpu.json"
    report.write_text(json.dumps({"machine": machine, "complete": True, "torch_hash": "0123456789ab", "benchmarks": found}))
    text = render_results.render("cpu_loops", tmp_path)
    assert "| logit loss, 4 x 10 | 1 | 4 | 5 | 2 | 5.0 | 1 | 5 |" in text and "| logit loss, 4 x 10 | 10 | 40 | 50 | 20 | 5.0 | 1 | 5 |" in text
    assert "**Stale**" in text
    older = tmp_path / render_results.AVX2
    older.mkdir()
    (older / "cpu.json").write_text(report.read_text().replace("(avx2)", "(avx512)"))
    assert render_results.render("cpu_loops", tmp_path) == text + "\n" + text.replace("(avx2)", "(avx512)")
    machine["cpu_code"] = "torch operators (its loops are not compiled)"
    report.write_text(json.dumps({"machine": machine, "complete": True, "torch_hash": "0123456789ab", "benchmarks": found}))
    assert render_results.render("cpu_loops", tmp_path).startswith("Not measured yet")
