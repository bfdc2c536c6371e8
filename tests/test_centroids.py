"""Class centroids against the sums of each class's rows in float64, and over many batches. Across processes: test_sharded_classifier.py."""

from __future__ import annotations

import importlib
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.machine_code.launches import Launches
from gclkern.centroids import ClassCentroids
from gclkern.functional import class_centroids
from gclkern.kernels.terms import PREFIXES
from tests.support.cases import HALVES


def operator(backend: str) -> Any:
    if backend == "triton":
        importlib.import_module("gclkern.kernels.centroids")
    return getattr(torch.ops.gclkern, f"{PREFIXES[backend]}segment_sums")


def problem(rows: int, classes: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features, and labels with a long tail: about half of them are class 0."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(rows, generator=generator).pow(4) * classes).long().clamp(max=classes - 1)
    return torch.randn(rows, dim, generator=generator).to(dtype), target[torch.randperm(rows, generator=generator)]


def check(features: Tensor, target: Tensor, classes: int, backend: str, device: torch.device) -> None:
    sums, counts = operator(backend)(features.to(device), target.to(device), classes)
    assert sums.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32) and counts.dtype == torch.int64
    double = features.double()
    for c in range(classes):
        own = double[target == c]
        assert int(counts[c]) == len(own)
        # a float32 sum of n terms, in a tree: a few roundings of the sum of their sizes
        allowed = 4e-7 * own.abs().sum(0) if len(own) else torch.zeros(features.shape[1], dtype=torch.float64)
        assert ((sums[c].cpu().double() - own.sum(0)).abs() <= allowed).all(), c


@given(rows=st.integers(1, 200), classes=st.integers(1, 20), dim=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_any_shape(rows: int, classes: int, dim: int, seed: int, backend: str, device: torch.device) -> None:
    check(*problem(rows, classes, dim, seed), classes, backend, device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_features(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """16-bit features are added in float32, where they are exact."""
    check(*problem(150, 5, 33, dtype=dtype), 5, backend, device)


def test_torch_adds_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gclkern.torch_backend.centroids.is_on_cpu", lambda tensor: False)
    monkeypatch.setattr("gclkern.torch_backend.centroids._DEVICE_BLOCK", 7 * 33)
    check(*problem(150, 5, 33), 5, "torch", torch.device("cpu"))


def test_several_column_tiles(backend: str, device: torch.device) -> None:
    for dim in (300, 700):
        check(*problem(70, 3, dim), 3, backend, device)


# 65536 programs are too many for the interpreter
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled), pytest.param("triton", marks=pytest.mark.gpu)])
def test_more_classes_than_16_bits_hold(backend: str, device: torch.device) -> None:
    target = torch.tensor([40000, 0, 32767, 40000, 65535, 32768])
    features = torch.arange(6.0)[:, None]
    sums, counts = operator(backend)(features.to(device), target.to(device), 65536)
    assert sums[[0, 32767, 32768, 40000, 65535], 0].tolist() == [1.0, 2.0, 5.0, 3.0, 4.0]
    assert int(counts.sum()) == 6 and sums.count_nonzero() == 5


@pytest.mark.triton
@pytest.mark.parametrize("num_classes", [2**15 - 2, 2**15 - 1, 2**15, 2**16 - 2])
def test_the_type_of_labels_holds_all_of_them(num_classes: int) -> None:
    from gclkern.kernels.centroids import _label_dtype

    assert torch.iinfo(_label_dtype(num_classes)).max >= num_classes


@pytest.mark.parametrize("wrong", [-1, 5, 6, 2**40, -(2**63)])
def test_a_label_out_of_range_belongs_to_no_class(wrong: int, backend: str, device: torch.device) -> None:
    """As on a GPU, where the public function does not read labels; the operators behave so on every device."""
    features, target = problem(90, 5, 8)
    target[17] = wrong
    features[17] = float("nan")
    keep = torch.arange(90) != 17
    sums, counts = operator(backend)(features.to(device), target.to(device), 5)
    expected_sums, expected_counts = operator(backend)(features[keep].to(device), target[keep].to(device), 5)
    torch.testing.assert_close(sums, expected_sums)
    assert torch.equal(counts, expected_counts) and int(counts.sum()) == 89


@pytest.mark.triton
def test_kernels_run(launches: Launches, device: torch.device) -> None:
    features, target = (part.to(device) for part in problem(100, 3, 20))
    operator("triton")(features, target, 3)
    assert launches.names == ["_piece_kernel", "_combine_kernel"]


@pytest.mark.gpu
def test_a_gpu_gets_the_kernels_and_is_not_waited_for(launches: Launches, device: torch.device) -> None:
    features, target = (part.to(device) for part in problem(5000, 30, 100))
    centroids = ClassCentroids(30, 100).to(device)
    class_centroids(features, target, 30)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        means, counts = class_centroids(features, target, 30)
        centroids.update(features, target)
        again, _ = centroids.compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "_piece_kernel" in launches.names
    torch.testing.assert_close(means, again)
    check(features.cpu(), target.cpu(), 30, "triton", device)
    assert int(counts.sum()) == 5000


def test_means_and_counts(device: torch.device) -> None:
    features, target = problem(50, 4, 6)
    target[target == 2] = 1
    centroids, counts = class_centroids(features.to(device), target.to(device), 4)
    assert int(counts[2]) == 0 and centroids[2].eq(0).all()
    for c in (0, 1, 3):
        torch.testing.assert_close(centroids[c].cpu(), features[target == c].mean(0))


# ---- over many batches


def test_batches_add_up_to_the_whole(device: torch.device) -> None:
    features, target = (part.to(device) for part in problem(90, 5, 7))
    running = ClassCentroids(5, 7).to(device)
    for start in range(0, 90, 13):
        running.update(features[start : start + 13].requires_grad_(), target[start : start + 13])
    centroids, counts = running.compute()
    expected, expected_counts = class_centroids(features.detach(), target, 5)
    torch.testing.assert_close(centroids, expected)
    assert torch.equal(counts, expected_counts) and torch.equal(running.compute()[0], centroids), "compute may be repeated"
    assert centroids.dtype == torch.float32 and not centroids.requires_grad
    running.reset()
    assert running.compute()[1].eq(0).all() and running.compute()[0].eq(0).all()


def test_an_epoch_of_batches_keeps_its_digits() -> None:
    """In float32 the sum of 3000 batches of 1.1 would be off by 1e-5; the running sums are float64."""
    running = ClassCentroids(1, 1)
    for _ in range(3000):
        running.update(torch.full((1, 1), 1.1), torch.zeros(1, dtype=torch.int64))
    assert running.compute()[0].item() == pytest.approx(torch.tensor(1.1).item(), rel=1e-7)


def test_sums_stay_float64_and_are_saved() -> None:
    running = ClassCentroids(3, 4)
    running.update(torch.rand(9, 4) / 3, torch.arange(9) % 3)
    before = running.sums.clone()
    model = torch.nn.Sequential(running).half().to(torch.bfloat16)
    assert running.sums.dtype == torch.float64 and torch.equal(running.sums, before)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ClassCentroids(3, 4)
    other.load_state_dict({key.removeprefix("0."): value for key, value in torch.load(file).items()})
    assert torch.equal(other.sums, before) and torch.equal(other.counts, running.counts)
    assert ClassCentroids(3, 4).to("meta").sums.is_meta


def test_bad_updates() -> None:
    running = ClassCentroids(3, 4)
    with pytest.raises(ValueError, match="features must have 4 columns"):
        running.update(torch.zeros(2, 5), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"target\[0\] is 3"):
        running.update(torch.zeros(1, 4), torch.tensor([3]))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        ClassCentroids(3, 0)
    assert running.counts.eq(0).all()
