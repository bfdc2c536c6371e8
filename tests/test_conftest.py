"""How many processes a test run gets."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from gclkern import cpu_backend
from tests.conftest import pytest_cmdline_main, pytest_terminal_summary

WHOLE = pytest.Config.ArgsSource.TESTPATHS


@pytest.fixture(autouse=True)
def _main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def processes(source: pytest.Config.ArgsSource = WHOLE, **given: Any) -> tuple[int | None, str]:
    option = SimpleNamespace(**{"numprocesses": None, "dist": "no", "benchmark_only": False, "usepdb": False, "collectonly": False} | given)
    config: Any = SimpleNamespace(args_source=source, option=option, pluginmanager=SimpleNamespace(hasplugin=lambda name: name == "xdist"))
    pytest_cmdline_main(config)
    return option.numprocesses, option.dist


def test_the_whole_suite_has_several() -> None:
    assert processes() == (8, "loadfile")
    assert processes(dist="worksteal") == (8, "worksteal")


def test_each_of_them_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert processes() == (None, "no")


@pytest.mark.parametrize("given", [{"numprocesses": 0}, {"benchmark_only": True}, {"usepdb": True}, {"source": pytest.Config.ArgsSource.ARGS}])
def test_a_command_that_says_otherwise_has_its_way(given: dict[str, Any]) -> None:
    assert processes(**given) == (given.get("numprocesses"), "no")


@pytest.mark.parametrize("available", [True, False])
def test_a_run_without_the_compiled_loops_ends_with_the_remedy(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "is_available", available)
    monkeypatch.setattr(cpu_backend, "missing", "run `python setup.py build_ext --inplace` again")
    lines: list[str] = []
    reporter: Any = SimpleNamespace(write_line=lambda line, **_: lines.append(line))
    pytest_terminal_summary(reporter)
    assert lines == ([] if available else ["The CPU's compiled loops were not tested: run `python setup.py build_ext --inplace` again"])
