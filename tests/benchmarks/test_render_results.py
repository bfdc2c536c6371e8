"""The README shows what the committed results hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render_results


def test_readme_agrees_with_the_results() -> None:
    assert render_results.disagreements() == [], "`python -m benchmarks.render_results` writes the README's tables and charts"


def _result(shape: str, classes: int, contestant: str, seconds: float) -> dict[str, Any]:
    names = {"operation": "head", "shape": shape, "dtype": "bf16", "contestant": contestant, "phase": "forward + backward", "includes": "everything"}
    return {**names, "rows": 4, "classes": classes, "dim": 8, "seconds": seconds, "fastest_seconds": seconds, "peak_bytes": int(1e9 * seconds)}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A made-up report of a GPU, with its charts."""
    sweep = [
        _result(f"sweep C {classes}", classes, name, classes * factor) for classes in (10, 1000) for name, factor in (("gclkern", 1e-6), ("plain torch", 4e-6))
    ]
    failed = {**_result("iNaturalist", 8142, "Liger", 1.0), "error": "out of memory"}
    benchmarks = [_result("iNaturalist", 8142, "gclkern", 0.00125), _result("iNaturalist", 8142, "plain torch", 0.004), failed, *sweep]
    machine = {"device": "A made-up GPU", "versions": {"torch": "2.11"}}
    report = tmp_path / "made-up.json"
    report.write_text(json.dumps({"machine": machine, "complete": True, "kernels_hash": "0123456789ab", "benchmarks": benchmarks}))
    for path, svg in render_results.charts(report).items():
        path.write_text(svg)
    return tmp_path


def test_tables_and_charts_come_from_the_results(results: Path) -> None:
    page = results / "README.md"
    page.write_text("before\n<!-- results:begin gpu -->\nold\n<!-- results:end -->\nafter\n")
    assert render_results.disagreements(page, results) == ["section gpu"]
    page.write_text(render_results.wanted(page.read_text(), results))
    assert render_results.disagreements(page, results) == []
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| iNaturalist, bf16 | 1.25 ms, 1.25 MB | 4 ms, 4 MB |" in text
    assert "`0123456789ab`" in text and "made-up-time-C.svg" in text and "Liger" not in text
    assert "| gclkern | 1.00 | 1.00 |" in text  # the made-up costs grow linearly


def test_a_changed_number_is_found(results: Path) -> None:
    page = results / "README.md"
    page.write_text(render_results.wanted("<!-- results:begin gpu -->\n<!-- results:end -->\n", results))
    page.write_text(page.read_text().replace("1.25 ms", "0.25 ms"))
    (results / "made-up-memory-C.svg").write_text("<svg/>")
    assert render_results.disagreements(page, results) == ["section gpu", "made-up-memory-C.svg"]


def test_a_result_without_a_section_is_found(results: Path) -> None:
    page = results / "README.md"
    page.write_text("no tables\n")
    assert render_results.disagreements(page, results) == ["no section gpu"]


def test_a_report_that_still_runs_is_no_result(results: Path) -> None:
    report = results / "made-up.json"
    report.write_text(report.read_text().replace('"complete": true', '"complete": false'))
    assert render_results.render("gpu", results).startswith("Not measured yet")


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tpu'"):
        render_results.render("tpu", tmp_path)


def test_without_results_the_readme_says_so(tmp_path: Path) -> None:
    assert [render_results.render(name, tmp_path).startswith("Not measured yet") for name in render_results.SECTIONS] == [True] * 4
