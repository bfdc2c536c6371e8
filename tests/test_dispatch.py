"""Which implementation serves tensors on a GPU, by the age of that GPU: fake tensors, and capabilities that no machine here has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gclkern.dispatch import resolve_backend

pytestmark = pytest.mark.triton  # without it "auto" is torch everywhere
T4, A100, RTX_3090, H100 = (7, 5), (8, 0), (8, 6), (9, 0)


@pytest.fixture
def on_gpu() -> Tensor:
    with FakeTensorMode():
        return torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    # what the public functions read: torch.compile knows these by identity, so that they stay as they are
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability[0], minor=capability[1]))
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize("capability", [A100, RTX_3090, H100])
def test_kernels_serve_gpus_that_can_run_them(on_gpu: Tensor, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    assert resolve_backend("auto", on_gpu) == resolve_backend("triton", on_gpu) == "triton"


def test_torch_serves_an_older_gpu(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, T4)
    assert resolve_backend("auto", on_gpu) == "torch"
    with pytest.raises(ValueError, match=r'backend="triton" needs .* compute capability 8\.0 or more, got 7\.5 of cuda:0; use backend="torch"'):
        resolve_backend("triton", on_gpu)


def test_numbers_of_amd_are_others(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, T4, hip="7.0")
    assert resolve_backend("auto", on_gpu) == "triton"


@pytest.mark.parametrize(("capability", "expected"), [(T4, "torch"), (H100, "triton")])
def test_the_choice_is_traced(on_gpu: Tensor, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    torch.compiler.reset()
    chosen = torch.compile(lambda x: (x + 1, resolve_backend("auto", x))[1], fullgraph=True, backend="eager")(on_gpu)
    assert chosen == expected
