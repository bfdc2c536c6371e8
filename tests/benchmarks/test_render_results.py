"""README and docs/ show what the committed results hold, and say so where the code has changed since."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance, render_results
from benchmarks.common import RESULTS


def test_pages_agree_with_the_results() -> None:
    assert render_results.disagreements() == [], "`python -m benchmarks.render_results` writes the tables and charts of README and docs/"


def test_figures_of_other_code_are_called_stale() -> None:
    """Checked independently of the renderer: where a page shows the hash of other code than the present one, the word stale stands beside it."""
    now = {"CPU code": provenance.torch_hash(), "kernels": provenance.kernels_hash(), "training code": provenance.training_hash()}
    said = []
    for page in render_results.PAGES:
        for line in page.read_text().splitlines():
            for what, hashes in re.findall(r"easured at (CPU code|kernels|training code) ((?:`[0-9a-f]{12}`(?:, )?)+)", line):
                said.append(what)
                current = set(re.findall(r"[0-9a-f]{12}", hashes)) == {now[what]}
                assert current or "stale" in line.lower(), f"{page.name} shows figures of other {what}"
    recorded = [json.loads(path.read_text()) for path in RESULTS.rglob("*.json")]
    assert all({"torch_hash", "kernels_hash", "code"} & set(data) for data in recorded), "a result file does not say which code it measured"
    assert {"CPU code", "training code"} <= set(said)


def test_no_figures_are_written_by_hand() -> None:
    """Outside of the generated sections, pages contain no times, memory sizes or accuracies, which would go out of date unnoticed."""
    pages = {*render_results.PAGES, provenance.ROOT / "docs" / "losses.md", provenance.ROOT / "docs" / "training.md"}
    for page in pages:
        prose = re.sub(r"<!-- results:begin .*?<!-- results:end -->", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"\d[\d.,]* ?(?:%|ms\b|[MG]B\b|times (?:faster|slower))", prose) == [], page.name


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
    for name, svg in render_results.charts(report).items():
        (tmp_path / name).write_text(svg)
    return tmp_path


def disagreements(page: Path) -> list[str]:
    return render_results.disagreements([page], page.parent, page.parent)


def test_tables_and_charts_come_from_the_results(results: Path) -> None:
    page = results / "README.md"
    page.write_text("before\n<!-- results:begin gpu -->\nold\n<!-- results:end -->\nafter\n")
    assert disagreements(page) == ["section gpu"]
    page.write_text(render_results.wanted(page.read_text(), results))
    assert disagreements(page) == []
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
    assert disagreements(page) == ["section gpu", "made-up-memory-C.svg"]


def test_a_result_without_a_section_is_found(results: Path) -> None:
    page = results / "README.md"
    page.write_text("no tables\n")
    assert disagreements(page) == ["no section gpu"]


def test_a_report_that_still_runs_is_no_result(results: Path) -> None:
    report = results / "made-up.json"
    report.write_text(report.read_text().replace('"complete": true', '"complete": false'))
    assert render_results.render("gpu", results).startswith("Not measured yet")


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tpu'"):
        render_results.render("tpu", tmp_path)


def test_without_results_the_readme_says_so(tmp_path: Path) -> None:
    names = [name for name in render_results.SECTIONS if name != "status"]
    assert [render_results.render(name, tmp_path).startswith("Not measured yet") for name in names] == [True] * len(names)


def test_the_status_names_the_gpus_that_have_run_it(results: Path) -> None:
    assert "measured on CPUs and on A made-up GPU." in render_results.render("status", results)
    (results / "made-up.json").unlink()
    assert "the kernels have not run on a GPU yet" in render_results.render("status", results)


def test_figures_are_stale_until_the_code_is_what_they_measured(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "**Stale**: measured at kernels `0123456789ab`" in render_results.render("gpu", results)
    monkeypatch.setattr(render_results, "kernels_hash", lambda: "0123456789ab")
    assert "tale" not in render_results.render("gpu", results)
    assert render_results.measured_at("code", ["a", "b"], "a").startswith("**Stale**")
