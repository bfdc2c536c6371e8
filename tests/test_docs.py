"""The examples of docstrings and pages run, links lead somewhere, and the site shows every public name."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gclkern
import gclkern.distributed
import train
from gclkern.training import export, predict

ROOT = Path(__file__).parent.parent
LIBRARY = "gclkern.cpu_backend._native"  # compiled C, loaded by ctypes
MODULES = ["gclkern", *(m.name for m in pkgutil.walk_packages(gclkern.__path__, "gclkern.") if not m.name.startswith(("gclkern.kernels", LIBRARY)))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "gclkern": gclkern}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


# test_frameworks.py runs the other page, whose blocks need a library each
@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text()) and page.name != "frameworks.md"], ids=lambda page: page.name)
def test_python_of_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of a page runs from top to bottom."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile("\n".join(PYTHON.findall(page.read_text())), page.name, "exec"), {"__name__": page.name})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = [link for link in links if not link.startswith("https://") and not (page.parent / link.partition("#")[0]).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_of_pages_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(r"`((?:gclkern|kernels|tests|benchmarks|docs|\.ci)/[\w./-]*)`", text)
    modules = re.findall(r"python -m ((?:gclkern|benchmarks)[\w.]*)", text)
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_commands_of_pages_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that README and the page on training name exists, and train.py takes the values that they give it."""
    for main in (train.parse_arguments, predict.main, export.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "training.md").read_text()
    commands = [shlex.split(line, comments=True) for line in f"{readme}\n{page}".splitlines() if re.match(r"(python|torchrun .*) train\.py", line)]
    assert len(commands) > 5
    for command in commands:
        arguments = command[command.index("train.py") + 1 :]
        if not {"--resume", "--evaluate", "--help"} & set(arguments):  # those need a finished run
            train.parse_arguments(arguments)
    named = set(re.findall(r"--[a-z][\w-]*", page)) | {part for command in commands for part in command if part.startswith("--")}
    assert named - known - {"--nproc-per-node"} == set()


def test_the_first_code_of_the_readme_is_what_ci_runs() -> None:
    """Two commands, which do all the set-up themselves: .ci/run takes the first code block and runs it."""
    first = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    commands = [line for line in first[1].splitlines() if not line.startswith("#")]
    assert first[0] == "bash" and len(commands) == 2
    assert commands[0].endswith("python train.py") and commands[1].endswith("python -m pytest")
    assert all(command.startswith("python -m pip install ") for command in commands)


def test_the_api_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)) - {"gclkern.options"}
    public = {f"gclkern.{name}" for name in gclkern.__all__ if not isinstance(getattr(gclkern, name), ModuleType)}
    public |= {f"{module.__name__}.{name}" for module in (gclkern.functional, gclkern.distributed, gclkern.training) for name in module.__all__}
    samplers = vars(gclkern.samplers).items()
    public |= {f"gclkern.samplers.{name}" for name, value in samplers if isinstance(value, type) and name.endswith("Sampler") and is_ours(name, value)}
    assert shown == public


def is_ours(name: str, value: type) -> bool:
    return not name.startswith("_") and value.__module__ == "gclkern.samplers"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "api" / "index.html").read_text()
    assert 'id="gclkern.LinearGCLLoss"' in reference and ":func:" not in reference and ":class:" not in reference
