"""The compiled loops of the CPU: what the tests of the losses, which run on them too, do not see."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gclkern import cloud_noise, cpu_backend
from gclkern import ready as ready_calls
from gclkern.cpu_backend import library
from gclkern.cpu_backend.centroids import sums_or_means
from gclkern.cpu_backend.noise import cloud_noise as noise_of_loops
from gclkern.dispatch import resolve_backend
from gclkern.functional import class_centroids, dro_lt_loss, gcl_cross_entropy, supervised_contrastive
from gclkern.options import Reduction
from gclkern.torch_backend.noise import cloud_noise as noise_of_torch
from tests.support.cases import labels, vector
from tests.support.operations import OPERATIONS, Operation, outcome
from tests.support.wrong_arguments import CENTROIDS, CLASSES, FAMILY, LOGITS, VALID

ShareOut: TypeAlias = Callable[[Callable[[int], None]], None]
ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "gclkern" / "cpu_backend" / "native"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    """Results of every operation but the head, whose products are torch's, at sizes that several threads share. Of samples, the loss: so are its gradient's."""
    torch.manual_seed(0)
    rows, classes, dim = 37, 1300, 40
    cosine, bias = torch.empty(rows, classes).uniform_(-1, 1).requires_grad_(), vector(classes).requires_grad_()
    features, centroids = torch.randn(rows, dim, requires_grad=True), torch.randn(classes, dim)
    target, cloud = labels(rows, classes), vector(classes, 0.0, 1.0)
    loss = gcl_cross_entropy(cosine, target, cloud, bias=bias, seed=3, backend="cpu")
    results = [loss, *torch.autograd.grad(loss, [cosine, bias])]
    epsilon = torch.full((classes,), 0.3, requires_grad=True)
    loss = dro_lt_loss(features, target % 10, centroids, epsilon, backend="cpu")
    results += [loss, *torch.autograd.grad(loss, [features, epsilon])]
    signs = torch.randint(2, (800, 16)).mul_(2).sub_(1).float()  # of unit rows whose products have no rounding errors; of two tiles
    results.append(supervised_contrastive(signs, labels(800, 7), reduction="none", backend="cpu"))
    for_parts = torch.randn(1200, 24)  # enough rows of each class that they are added up in parts
    results += [*class_centroids(features.detach(), target % 10, 10), *class_centroids(for_parts, labels(1200, 10), 10)]
    return [*results, cloud_noise(5, rows, classes)]


@pytest.fixture
def shared_out_by() -> Iterator[Callable[[ShareOut], None]]:
    """Puts a function in the place of torch's: it is given one that does the work of a thread, 0 for the calling one."""
    loops, kept = library._library, []
    assert loops is not None
    body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, body, ctypes.c_void_p)

    def replace(share_out: ShareOut) -> None:
        def parallel_for(_begin: int, _end: int, _grain: int, work: Callable[[int, int, int], None], context: int) -> int:
            share_out(lambda thread: work(thread, thread + 1, context))
            return 0

        kept.append(prototype(parallel_for))
        loops.gclkern_setup(ctypes.cast(kept[-1], ctypes.c_void_p))

    yield replace
    loops.gclkern_setup(library._parallel_for())


@pytest.mark.compiled
def test_results_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None], shared_out_by: Callable[[ShareOut], None]) -> None:
    """Of torch, whose help the loops do without where it comes late, and of two that do all the work."""
    threads(1)
    alone = everything()
    shares: list[int] = []

    def two_others(work: Callable[[int], None]) -> None:
        others = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        shares.append(1)

    for number in (2, 3):
        threads(number)
        assert all(map(torch.equal, alone, everything()))
    shared_out_by(two_others)
    assert all(map(torch.equal, alone, everything()))
    assert len(shares) >= 5


@pytest.mark.compiled
def test_where_sharing_lost_time_the_calling_thread_works_alone(shared_out_by: Callable[[ShareOut], None], threads: Callable[[int], None]) -> None:
    threads(2)
    expected = cloud_noise(1, 64, 1000)
    late: list[bool] = []

    def share_out(work: Callable[[int], None]) -> None:
        work(0)
        time.sleep(0.01)  # until the other thread has come
        late.append(True)

    shared_out_by(share_out)
    for _ in range(3):
        assert torch.equal(cloud_noise(1, 64, 1000), expected)
        assert len(late) == 1
    end = time.monotonic() + 30
    while len(late) == 1 and time.monotonic() < end:
        time.sleep(0.02)
        assert torch.equal(cloud_noise(1, 64, 1000), expected)
    assert len(late) == 2


EDGE = 64  # elements on either side of a new tensor, which keep its alignment


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What lies beside each new tensor, all 77: torch makes them within larger ones."""
    edges: list[Tensor] = []

    def within_a_larger_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def guarded(*args: Any, **options: Any) -> Tensor:
            made = function(*args, **options)
            larger = torch.full((made.numel() + 2 * EDGE,), 77, dtype=made.dtype)
            edges.extend([larger[:EDGE], larger[-EDGE:]])
            return larger[EDGE:-EDGE].view(made.shape)

        return guarded

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, within_a_larger_one(getattr(owner, name)))
    return edges


@pytest.mark.compiled
@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if "cpu" in operation.backends], ids=str)
def test_nothing_is_written_beside_a_buffer(operation: Operation, edges: list[Tensor]) -> None:
    """Whether rows of it stay unused or all are used. What a program has after a buffer is its own."""
    for name, arguments in operation.samples(7).items():
        distinct = {"target": torch.arange(7)} if name == "more classes than rows" else {}
        outcome(functools.partial(operation.function, backend="cpu"), arguments | distinct, operation.differentiable(arguments))
        assert edges
        assert all((edge == 77).all() for edge in edges), name


@pytest.mark.compiled
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_that_forward_makes_is_given_away_once(reduction: Reduction) -> None:
    """The last backward of a graph hands out the saved gradient itself; the ones before must not, or changing what they return would change the next."""
    cosine = vector(9 * 1100, -1.0, 1.0).view(9, 1100).requires_grad_()
    loss = gcl_cross_entropy(cosine, labels(9, 1100), vector(1100, 0.0, 1.0, seed=1), seed=3, reduction=reduction, backend="cpu")
    for upstream in (torch.ones(loss.shape), torch.full(loss.shape, 0.5)):
        first, second = (torch.autograd.grad(loss, cosine, upstream, retain_graph=True)[0] for _ in range(2))
        expected = first.clone()
        first.zero_()
        assert torch.equal(second, expected)
    second.zero_()
    (last,) = torch.autograd.grad(loss, cosine, upstream)
    assert torch.equal(last, expected)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("upstream", "times"),
    [
        (torch._neg_view(torch.ones(())), -1.0), (torch._efficientzerotensor(()), 0.0), (torch.ones((), dtype=torch.complex64).conj().imag, 0.0),
        (torch.full((), 2.0), 2.0), (torch.ones((), dtype=torch.float16), 1.0), (torch.ones((), dtype=torch.float64), 1.0),
    ],
    ids=["minus one in the memory of one", "zeros without memory", "no sign", "two", "half", "double"],
)  # fmt: skip
def test_only_an_upstream_gradient_of_one_is_taken_for_it(upstream: Tensor, times: float) -> None:
    cosine, target = vector(20, -1.0, 1.0).view(4, 5).requires_grad_(), labels(4, 5)
    expected, found = (torch.autograd.grad(gcl_cross_entropy(cosine, target, backend="cpu"), cosine, given)[0] for given in (None, upstream))
    assert torch.equal(found, expected * times)


@pytest.mark.compiled
@pytest.mark.parametrize(("dtype", "dropped"), [(torch.float16, 13), (torch.bfloat16, 16)])
def test_gradients_are_rounded_to_the_nearest_half_and_ties_to_even(dtype: torch.dtype, dropped: int) -> None:
    """Of so many, some lie exactly between two numbers."""
    cosine, target = vector(1024 * 400, -1.0, 1.0).view(1024, 400).to(dtype), labels(1024, 400)

    def gradient(cosine: Tensor) -> Tensor:
        cosine.requires_grad_()
        loss = gcl_cross_entropy(cosine, target, scale=4.0, reduction="sum", backend="cpu")
        return torch.autograd.grad(loss, cosine)[0]

    exact = gradient(cosine.float())
    ties = (exact.view(torch.int32) & ((1 << dropped) - 1)) == 1 << (dropped - 1)
    assert ties.any()
    assert torch.equal(gradient(cosine), exact.to(dtype))


@pytest.mark.compiled
def test_noise_is_that_of_torch() -> None:
    """Within 2e-7, as docs/cpu.md says: a hundredth in a coefficient of the logarithm would be more."""
    loops, expected = (noise(torch.tensor(7), 1000, 1000, 0, 0) for noise in (noise_of_loops, noise_of_torch))
    assert (loops - expected).abs().max() <= 2e-7


@pytest.mark.compiled
def test_nothing_is_written_beside_sums_of_whole_vectors(edges: list[Tensor]) -> None:
    for dim in (32, 64):
        class_centroids(torch.ones(9, dim), torch.arange(9) % 3, 3)
    assert edges
    assert all((edge == 77).all() for edge in edges)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leave_no_memory_behind() -> None:
    """A loss without a gradient has statistics of its own, here 3 MB a call."""
    cosine, target = torch.zeros(100_000, 2), torch.zeros(100_000, dtype=torch.int64)
    gcl_cross_entropy(cosine, target, backend="cpu")
    before = resident_bytes()
    for _ in range(30):
        gcl_cross_entropy(cosine, target, backend="cpu")
    assert resident_bytes() - before < 40 * 2**20


@pytest.mark.compiled
def test_an_ignored_row_has_no_gradient_even_of_nan() -> None:
    cosine = vector(3 * 20, -1.0, 1.0).view(3, 20).requires_grad_()
    loss = gcl_cross_entropy(cosine, torch.tensor([1, -100, 2]), reduction="none", backend="cpu")
    (gradient,) = torch.autograd.grad(loss, cosine, torch.full((3,), torch.nan))
    assert gradient[[0, 2]].isnan().all() and torch.equal(gradient[1], torch.zeros(20))


@pytest.mark.compiled
def test_a_forked_process_computes_alone() -> None:
    """A forked process has none of its parent's threads; if this test hangs, the process waits for them."""
    code = """
        import os, torch
        from gclkern import cloud_noise
        torch.set_num_threads(2)
        expected = cloud_noise(1, 64, 1000).numpy().tobytes()
        child = os.fork()
        if child == 0:  # torch's own operators may hang here
            os._exit(0 if cloud_noise(1, 64, 1000).numpy().tobytes() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert cloud_noise(1, 64, 1000).numpy().tobytes() == expected
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.compiled
def test_the_cpu_takes_the_loops_and_float64_torch() -> None:
    assert resolve_backend("auto", torch.zeros(1)) == resolve_backend("cpu", torch.zeros(1)) == "cpu"
    assert resolve_backend("auto", torch.zeros(1, dtype=torch.float64)) == "torch"
    assert resolve_backend("torch", torch.zeros(1)) == "torch"
    with pytest.raises(TypeError, match='backend="cpu" computes in float32 and refuses float64 tensors; use backend="torch" or "auto"'):
        resolve_backend("cpu", torch.zeros(1, dtype=torch.float64))


def usual(**changed: Any) -> dict[str, Any]:
    """The arguments of a usual call of gcl_cross_entropy, but for those `changed`."""
    given = {"cosine": torch.rand(4, 6), "target": torch.arange(4), "cloud": torch.rand(6), "margin": torch.rand(6), "bias": torch.rand(6)}
    return given | changed


def ready(**arguments: Any) -> bool:
    """Whether a call of gcl_cross_entropy skips the checks."""
    found = []

    def logit_loss(*given: Any) -> Any:
        found.append(called(*given))
        return found[-1]

    called = ready_calls.logit_loss
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Exception):  # of the checks
        patch.setattr(ready_calls, "logit_loss", logit_loss)
        gcl_cross_entropy(**arguments)
    return found[0] is not None


@pytest.fixture
def checked() -> Iterator[Callable[[], None]]:
    """Lets every call go through the checks, as where the library was compiled without Python's headers."""
    yield lambda: ready_calls.connect(None)
    ready_calls.connect(library.module_of(library._library))


def not_in_memory(*shape: int) -> list[Tensor]:
    """float32 tensors whose memory does not hold their elements: with the other sign, none, and sparse."""
    return [torch.rand(*shape, dtype=torch.complex64).conj().imag, torch._efficientzerotensor(shape), torch.rand(shape).to_sparse()]


NEEDS_GRAD = torch.rand(6, requires_grad=True)
READY: tuple[dict[str, Any], ...] = (
    {}, {"cosine": torch.rand(6, 4).t().requires_grad_()}, {"cosine": torch.rand(4, 6).half().requires_grad_()}, {"cosine": torch.rand(4, 6).bfloat16()},
    {"cosine": torch.nn.Parameter(torch.rand(4, 6))}, {"cosine": torch.rand(4, 12)[:, ::2]}, {"cosine": torch.rand(1, 6), "target": torch.arange(2)[::2]},
    {"bias": NEEDS_GRAD}, {"bias": None}, {"margin": None}, {"margin": 0.1}, {"margin": 1}, {"margin": 0}, {"weight": torch.rand(6)}, {"cloud": None},
    {"cloud": torch.rand(7)[1:]}, {"seed": 2}, {"seed": -1}, {"seed": torch.tensor(3)}, {"scale": 1}, {"gamma": 2, "focal_detach": False}, {"ignore_index": 0},
    {"reduction": "none"}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"label_smoothing": 1}, {"backend": "cpu"}, {"row_offset": 2**63 - 4},
    {"class_offset": 2**35 - 6},
)  # fmt: skip
NOT_READY: tuple[dict[str, Any], ...] = (
    {"cosine": torch.rand(4, 6).double()}, {"cosine": torch.rand(4, 6, device="meta")}, {"cosine": torch.rand(24)}, {"cosine": torch.rand(4, 0)},
    {"cosine": torch.rand(0, 6)}, {"cosine": torch.rand(4, 6, 1)}, {"cosine": [[0.0]]}, {"cosine": torch.randint(9, (4, 6))}, {"target": torch.arange(3)},
    {"target": torch.arange(4).int()}, {"target": torch.arange(8)[::2]}, {"target": torch.rand(4, 6)}, {"target": torch.arange(4)[:, None]}, {"target": None},
    {"target_b": torch.arange(4)}, {"lam": 0.5}, {"angular": True}, {"difficulty_margin": True}, {"easy_margin": True}, {"angular": 1}, {"scale": 0.0},
    {"scale": torch.ones(())}, {"scale": float("nan")}, {"scale": float("inf")}, {"scale": 10**400}, {"scale": True}, {"gamma": True}, {"gamma": -0.1},
    {"label_smoothing": torch.rand(6)}, {"label_smoothing": 1.1}, {"label_smoothing": float("nan")}, {"ignore_index": 0.5}, {"ignore_index": 2**63},
    {"margin": float("inf")}, {"margin": 10**400}, {"margin": True}, {"reduction": "all"}, {"reduction": None}, {"seed": 2**64}, {"seed": 0.5},
    {"seed": torch.ones(1, dtype=torch.int64)}, {"seed": torch.ones(())}, {"row_offset": -1}, {"row_offset": 2**63 - 3}, {"row_offset": 0.0},
    {"class_offset": None}, {"class_offset": 2**35 - 5}, {"class_offset": True}, {"focal_detach": 1}, {"focal_detach": None}, {"backend": "torch"},
    {"backend": "any"}, {"backend": None}, {"target": torch.full((4,), 6)}, {"cloud": torch.full((6,), -1.0)}, {"weight": torch.full((6,), torch.inf)},
)  # fmt: skip


@pytest.mark.compiled
def test_only_arguments_that_need_no_check_skip_the_checks() -> None:
    for changed in READY:
        assert ready(**usual(**changed)), changed
    for changed in NOT_READY:
        assert not ready(**usual(**changed)), changed
    for name in ("cloud", "margin", "bias", "weight"):
        for unfit in (torch.rand(5), torch.rand(6).double(), torch.rand(12)[::2], torch.rand(6, device="meta"), [0.0] * 6, *not_in_memory(6)):
            assert not ready(**usual(**{name: unfit})), (name, unfit)
        assert name == "bias" or not ready(**usual(**{name: NEEDS_GRAD})), name
    assert not any(ready(**usual(cosine=cosine)) for cosine in not_in_memory(4, 6))
    arguments = usual()
    with torch.utils._python_dispatch.TorchDispatchMode():  # which would miss the loops
        assert not ready(**arguments)
    assert not bool(torch.func.grad(lambda factor: factor * ready(**arguments))(torch.ones(())))
    assert ready(**arguments)


@pytest.mark.compiled
@pytest.mark.parametrize("changed", READY, ids=lambda changed: ",".join(changed))
def test_a_call_that_skips_the_checks_computes_what_one_that_does_not(changed: dict[str, Any], checked: Callable[[], None]) -> None:
    def results() -> list[Tensor]:
        torch.manual_seed(3)
        loss = gcl_cross_entropy(**arguments)
        leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
        upstreams = (torch.ones(loss.shape), torch.full(loss.shape, 0.5)) if leaves else ()
        grads = [torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for upstream in upstreams]
        last = torch.autograd.grad(loss.sum(), leaves) if leaves else ()
        return [loss, torch.rand(2), *itertools.chain(*grads), *last]  # and the state of torch's generator

    arguments = usual(**changed)
    found = results()
    checked()
    assert all(map(torch.equal, found, results()))


def refusal(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[type[BaseException], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    return caught.type, str(caught.value)


@pytest.mark.compiled
def test_a_call_that_skips_the_checks_is_refused_as_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gclkern.ready` and the loops repeat rules of `gclkern.validation`."""
    vectors = {name: torch.rand(CLASSES) for name in ("cloud", "margin", "bias", "weight")}
    for wrong, others in itertools.product((*FAMILY, *LOGITS), ({}, vectors)):
        arguments = {**VALID["gcl_cross_entropy"], **others, **wrong.changes}
        found = refusal(gcl_cross_entropy, arguments)
        assert found[0] is wrong.error and wrong.named in found[1], wrong
        with monkeypatch.context() as patch:
            patch.setattr(ready_calls, "logit_loss", lambda *_: None)
            assert refusal(gcl_cross_entropy, arguments) == found, wrong
    for wrong in CENTROIDS:
        arguments = {**VALID["class_centroids"], **wrong.changes}
        found = refusal(class_centroids, arguments)
        with monkeypatch.context() as patch:
            patch.setattr(ready_calls, "ready_rows", lambda *_: False)
            assert refusal(class_centroids, arguments) == found, wrong


class NoRandom(TorchFunctionMode):
    """Refuses the operator that draws the seed of a usual call."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is Tensor.random_:
            raise RuntimeError("no number is drawn here")
        return function(*arguments, **(options or {}))


@pytest.mark.compiled
def test_where_no_seed_can_be_drawn_the_checks_draw_one(checked: Callable[[], None]) -> None:
    arguments = usual(seed=None)
    assert ready(**arguments)  # so a seed has been drawn before
    with NoRandom():
        assert not ready(**arguments)
        torch.manual_seed(0)
        found = gcl_cross_entropy(**arguments)
    checked()
    torch.manual_seed(0)
    assert torch.equal(found, gcl_cross_entropy(**arguments))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 1200])  # in the order of their classes, and in parts
def test_means_are_sums_over_counts(rows: int, dtype: torch.dtype) -> None:
    features, target = torch.randn(rows, 40).to(dtype), labels(rows, 9)
    sums, counts, valid = sums_or_means(features, target, 10, means=False)
    means, same, valid_too = sums_or_means(features, target, 10, means=True)
    assert valid and valid_too and torch.equal(counts, same) and counts[9] == 0
    assert torch.equal(means, sums / counts.clamp(min=1)[:, None])
    target[3] = 10
    *_, valid = sums_or_means(features, target, 10, means=True)
    assert not valid


def test_threads_take_the_seeds_that_one_takes() -> None:
    """Each call has a seed of its own, also while another thread draws one."""
    cosine, target, cloud = torch.zeros(2, 3), torch.tensor([0, 1]), torch.full((3,), 0.5)

    def loss(_: int) -> float:
        return float(gcl_cross_entropy(cosine, target, cloud))

    torch.manual_seed(0)
    expected = [loss(call) for call in range(400)]
    torch.manual_seed(0)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(loss, range(400)))
    assert sorted(found) == sorted(expected)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match='backend="cpu" needs tensors on a CPU, got device meta; move them, or use backend="auto"'):
        resolve_backend("cpu", torch.zeros(1, device="meta"))


def test_without_the_library_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "is_available", False)
    monkeypatch.setattr(cpu_backend, "missing", "its loops are not compiled")
    assert resolve_backend("auto", torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match='backend="cpu" cannot run: its loops are not compiled; or use backend="torch"'):
        resolve_backend("cpu", torch.zeros(1))


@pytest.mark.compiled
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "source_hash", lambda: "0123456789abcdef")
    with pytest.warns(UserWarning, match="compiled loops are not used: .* run `python setup.py build_ext --inplace` again"):
        found, missing = library._find()
    assert found is None and "was compiled from other sources: run `python setup.py build_ext --inplace` again" in missing


def test_one_line_says_what_serves_the_cpu() -> None:
    shown = subprocess.run([sys.executable, "-m", "gclkern"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("CPU: compiled loops (" if cpu_backend.is_available else "CPU: torch operators (") in shown


# ---- the loops built otherwise

COMPILER = shutil.which(str(sysconfig.get_config_var("CC") or "cc").split()[0])
VARIANTS = {
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"],
    "avx2": ["-DGCLKERN_WITHOUT_AVX512"],
    "baseline": ["-DGCLKERN_BASELINE"],
}


def instructions() -> str:
    """The instruction set whose loops are in use."""
    assert library._library is not None
    return str(library._library.gclkern_instructions().decode())


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_run_on_a_library_built_otherwise(variant: str, tmp_path: Path) -> None:
    """Built with the address and undefined-behaviour sanitizers, and without the loops of the best instruction sets, which serve all other tests."""
    if variant == "avx2" and instructions() != "avx512":
        pytest.skip("the processor has no AVX-512, so all tests run on its best loops without it")
    expected = instructions() if variant == "sanitized" else variant
    path = tmp_path / "variant.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", '-DGCLKERN_SOURCES="variant"']
    flags += [f"-I{sysconfig.get_path('include')}", "-shared", "-fPIC"]
    sources = sorted(map(str, NATIVE.glob("*.c")))
    subprocess.run([str(COMPILER), *flags, *VARIANTS[variant], "-o", str(path), *sources, "-lm"], check=True)
    names = (
        "operators",
        "gcl_cross_entropy",
        "linear_gcl_cross_entropy",
        "angular_losses",
        "soft_labels",
        "dro_lt",
        "noise",
        "centroids",
        "supervised_contrastive",
    )
    tests = [f"tests/test_{name}.py" for name in names]
    code = f"""
        import sys, pytest
        from pathlib import Path
        from gclkern import ready
        from gclkern.cpu_backend import library
        library._library = library.load(Path({str(path)!r}))
        assert library._library.gclkern_instructions().decode() == {expected!r}
        ready.connect(library.module_of(library._library))
        assert ready.logit_loss.__self__.__file__ == {str(path)!r}
        selected = ["-m", "compiled and not slow", "-k", "not soundly and not under_compile and not process"]  # without compilers and other processes
        sys.exit(pytest.main([*{tests!r}, "-q", "-x", "-p", "no:cacheprovider", "-n", "0", *selected]))
    """
    environment = dict(os.environ)
    environment.pop("PYTEST_ADDOPTS", None)
    if variant == "sanitized":
        runtimes = [
            subprocess.run([str(COMPILER), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout for name in ("asan", "ubsan")
        ]
        environment |= {"LD_PRELOAD": ":".join(map(str.strip, runtimes)), "ASAN_OPTIONS": "detect_leaks=0"}  # what Python keeps at its end is no leak of ours
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 300, done.stdout[-4000:]  # the selection has not lost the loops' tests
