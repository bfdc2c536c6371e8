"""What the kernels know of the machine that they run on."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.triton

SOURCE = Path(__file__).resolve().parents[2] / "kernels" / "runtime.py"


@pytest.mark.parametrize(("interpreted", "cuda", "nvidia"), [(False, "12.8", True), (False, None, False), (True, "12.8", False), (True, None, False)])
def test_nvidias_instructions_are_for_its_gpus(monkeypatch: pytest.MonkeyPatch, interpreted: bool, cuda: str | None, nvidia: bool) -> None:
    """A torch for AMD's GPUs has no version of CUDA, and the interpreter knows no instructions."""
    import triton

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    found = runpy.run_path(str(SOURCE))
    assert (found["INTERPRETED"], found["NVIDIA"]) == (interpreted, nvidia)


@pytest.mark.parametrize(
    ("device", "nvidia", "capability", "hopper"),
    [
        ("cuda", True, (9, 0), True), ("cuda", True, (8, 9), False), ("cuda", True, (10, 0), False), ("cuda", True, (12, 0), False),
        ("cuda", False, (9, 4), False),  # AMD's MI300
        ("cpu", True, (9, 0), False),
    ],
)  # fmt: skip
def test_hopper_is_compute_capability_9(monkeypatch: pytest.MonkeyPatch, device: str, nvidia: bool, capability: tuple[int, int], hopper: bool) -> None:
    from gclkern.kernels import runtime

    monkeypatch.setattr(runtime, "NVIDIA", nvidia)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.is_hopper(torch.device(device)) is hopper
