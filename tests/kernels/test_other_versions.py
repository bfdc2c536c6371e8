"""The kernels as another version of Triton compiles them: GPU machines have older ones than the newest.

GCLKERN_OTHER_PYTHON names an interpreter that has it, with torch and pytest; CI and developers who have none skip this file.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get("GCLKERN_OTHER_PYTHON")

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.skipif(OTHER is None, reason="GCLKERN_OTHER_PYTHON names no interpreter")]


@pytest.mark.parametrize("file", ["test_static_budget.py", "test_compiled_kernels.py"])
def test_under_another_triton(file: str) -> None:
    assert OTHER is not None
    command = [OTHER, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"tests/kernels/{file}", "-m", ""]
    environment = {name: value for name, value in os.environ.items() if name not in ("GCLKERN_OTHER_PYTHON", "TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
