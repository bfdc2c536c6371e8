"""Fixtures that every test shares. Importing this file decides, before Triton is imported, whether kernels are compiled or interpreted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # else the processes of pytest-xdist would take each other's cores
PTX_TARGET = os.environ.get("PTX_TARGET")  # see compiled.py

if TRITON and not GPU and PTX_TARGET is None:
    os.environ["TRITON_INTERPRET"] = "1"

# Triton reads the variable above when it is imported.
from benchmarks.machine_code.launches import Launches, capture_launches  # noqa: E402
from gclkern import cpu_backend  # noqa: E402

if PTX_TARGET is not None:
    from tests.support.gpu_free import compiled

    compiled.install(PTX_TARGET)
elif TRITON and not GPU:
    from tests.support import checked_memory

    checked_memory.install()


# Few examples, the same in every run: `python -m pytest -m hypothesis --hypothesis-profile thorough` has many, and `minimal` is for interpreted kernels.
settings.register_profile("quick", max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=40)
settings.register_profile("minimal", settings.get_profile("quick"), max_examples=3)
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process for each core, up to eight, unless the command says how many (-n), measures time or debugs."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or "PYTEST_XDIST_WORKER" in os.environ:
        return  # not the whole suite, or one of the processes, which start no others
    option = config.option
    if config.pluginmanager.hasplugin("xdist") and option.numprocesses is None and not (option.benchmark_only or option.usepdb or option.collectonly):
        option.numprocesses = min(os.cpu_count() or 1, 8)
        if option.dist == "no":
            option.dist = "loadfile"  # tests of a file share what takes long to prepare
            option.loadscopereorder = False  # in their order, in which files of few but long tests do not come last


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs = {
        "gpu": (GPU, "needs a CUDA device"),
        "triton": (TRITON, "needs Triton"),
        "compiled": (cpu_backend.is_available and not GPU, cpu_backend.missing or "runs where there is no GPU"),
        "interpreter": (TRITON and not GPU and PTX_TARGET is None, "needs Triton's interpreter, which runs where there is no GPU"),
    }
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) or item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.device)
        for marker, (available, reason) in needs.items():
            if not available and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line where the compiled loops were not tested; their tests are skipped, and most others would pass."""
    if not cpu_backend.is_available:
        terminalreporter.write_line(f"The CPU's compiled loops were not tested: {cpu_backend.missing}", yellow=True)


def device_is_lost() -> bool:
    """Whether the tests to come would fail with the last one: a failed kernel takes the CUDA context along, and a failed capture leaves its stream current."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(torch.cuda.current_stream() != torch.cuda.default_stream())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A process of pytest-xdist that has lost the device ends, and another one goes on with its tests."""
    handled = yield
    if GPU and "PYTEST_XDIST_WORKER" in os.environ and device_is_lost():
        os._exit(1)
    return handled


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels run on: a GPU, or the CPU where Triton interprets them."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def launches() -> Iterator[Launches]:
    """The kernel launches of this test: `assert "kernel_name" in launches.names` shows that it did not measure a fallback."""
    if not TRITON:
        pytest.skip("needs Triton")
    with capture_launches() as recorded:
        yield recorded


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.compiled), pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation, by the name that `backend=` takes: the compiled loops where there are some, the kernels where Triton is installed."""
    return str(request.param)


@pytest.fixture
def small_panels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers in which the plans "chunked" and "recompute" pass over the classes hold the fewest: 64 classes at a time for a few rows, 128 in kernels."""
    if backend == "triton":
        monkeypatch.setattr("gclkern.kernels.head.PANEL_ELEMENTS", 1)
    else:
        for name in ("_CHUNK_BYTES", "_PANEL_BYTES", "_WEIGHT_BYTES"):
            monkeypatch.setattr(f"gclkern.{backend}_backend.head.{name}", 1)


@pytest.fixture(autouse=True)
def _operation_has_the_backend(request: pytest.FixtureRequest) -> None:
    """Skips a test of the table of operations on a backend that the operation does not have."""
    given = getattr(request.node, "callspec", None)
    if given is None or not {"operation", "backend"} <= given.params.keys():
        return
    if given.params["backend"] not in ("auto", *given.params["operation"].backends):
        pytest.skip("has no such backend")
    if given.params["backend"] == "triton" and not given.params["operation"].interpreted and not GPU:
        pytest.skip("another operation's kernels are interpreted")
