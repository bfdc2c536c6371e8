"""Compiles the kernels that a launcher launches for GPUs that this machine does not have, and reads the machine code.

A case is a module-level function that calls operators with CPU tensors. A separate process, where kernels are compiled and not interpreted, records its
launches without running them and compiles them for the target, so a kernel gets the very signature, divisibility and constants of the real launch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.machine_code.launches import Launch, capture_launches
from benchmarks.machine_code.sass import Code, Program

KIB = 1024
WORKERS = 8  # at most; each holds torch and a compiler
# Shared memory one block may use. Triton compiles what exceeds it and fails at launch, so every test compares.
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class CompiledKernel:
    """One launch, compiled for one target."""

    name: str
    target: str
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion, ... as the launch gave them
    constants: dict[str, Any]  # the launch's constexpr arguments
    shared_bytes: int
    registers: int  # per thread
    stack: int  # per thread: NVIDIA: bytes, 0 where nothing spills; AMD: spilled vector registers
    binary: bytes  # cubin, or AMD assembly

    @property
    def shared_limit(self) -> int:
        return SHARED_LIMIT[self.target]

    @cached_property
    def program(self) -> Program:
        """Read on demand: to disassemble takes as long as to compile, and most kernels are only asked for their registers."""
        if self.target.startswith("gfx"):
            raise ValueError(f"loops are read from NVIDIA machine code, and this is {self.target}")
        return Program.parse(_cuobjdump("-sass", self.binary))

    def hot_loop(self, contains: str | None = None) -> Code:
        return self.program.hot_loop(contains)

    @property
    def spill_stores(self) -> int:
        """NVIDIA: bytes of a thread's registers that the code spills; AMD: spilled vector registers."""
        if self.target.startswith("gfx") or self.stack == 0:
            return self.stack
        return sum(i.bits for i in self.program.instructions if i.mnemonic == "STL") // 8

    @property
    def spills_in_loops(self) -> int:
        """Instructions in loops, or in a kernel without loops, that spill a register or load it back; for AMD all spilled registers.

        A register that is spilled once, before a loop, costs nothing: some versions of the assembler do so where others do not need to.
        """
        if self.target.startswith("gfx") or self.stack == 0:
            return self.stack
        loops = self.program.loops
        inside = frozenset[int]().union(*(loop.body for loop in loops))
        return sum(i.mnemonic in ("STL", "LDL") and (not loops or i.address in inside) for i in self.program.instructions)


def submit(case: Callable[[], object], target: str, kernel: str | None = None) -> Future[list[CompiledKernel]]:
    """Compile the launches of `case` (those of `kernel`, when named) for `target` in a worker; launches that compile to the same code appear once."""
    return _workers("hip" if target.startswith("gfx") else "cuda").submit(_compile_case, case, target, kernel)


def compile_case(case: Callable[[], object], target: str, kernel: str | None = None) -> list[CompiledKernel]:
    """`submit`, waited for."""
    return submit(case, target, kernel).result()


def in_worker(function: Callable[..., Any], *args: object) -> Future[Any]:
    """Run a module-level function where kernels are compiled for NVIDIA GPUs and not interpreted."""
    return _workers("cuda").submit(function, *args)


def specialisations(case: Callable[[], object], target: str) -> set[tuple[str, str]]:
    """The launches of `case` as Triton's cache tells them apart: kernel and key."""
    return _workers("hip" if target.startswith("gfx") else "cuda").submit(_specialise_case, case, target).result()


@functools.cache
def _workers(vendor: str) -> ProcessPoolExecutor:
    # A vendor has workers of its own, because kernel modules ask once, at import, whose GPU they run on.
    sharing = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # processes that share the cores with this one
    count = max(1, min(WORKERS, os.cpu_count() or 1) // sharing) if vendor == "cuda" else 1
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), prepare_worker, (vendor,))


def prepare_worker(vendor: str) -> None:
    """Runs in a fresh process before anything imports Triton, so that kernels are compiled there, for this vendor.

    They are kept in Triton's cache (TRITON_CACHE_DIR), whose keys cover the source, the options and the compiler, so no other process compiles them again.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)
    torch.version.cuda = "13.0" if vendor == "cuda" else None
    torch.version.hip = "7.0" if vendor == "hip" else None


@contextlib.contextmanager
def as_on(target: str) -> Iterator[None]:
    """Launchers inside choose as they would on such a GPU."""
    from gclkern.kernels import runtime

    with mock.patch.object(runtime, "is_hopper", return_value=target == "sm_90"):
        yield


@functools.cache
def _launches(case: Callable[[], object], target: str) -> list[Launch]:
    with as_on(target), capture_launches(execute=False) as launches:
        case()
    return list(launches)


_built: dict[str, CompiledKernel] = {}  # of this worker, because cases share kernels


def compiled(launch: Launch, target: str) -> CompiledKernel:
    """What a launch runs on `target`; in a worker."""
    specialised = specialise(launch, target)
    if specialised.key not in _built:
        _built[specialised.key] = _compile(launch, specialised)
    return _built[specialised.key]


def _compile_case(case: Callable[[], object], target: str, kernel: str | None) -> list[CompiledKernel]:
    launches = [launch for launch in _launches(case, target) if kernel in (None, launch.name)]
    if not launches:
        raise LookupError(f"{case.__name__} launched {sorted({launch.name for launch in _launches(case, target)})}, not {kernel}")
    return list({id(kernel): kernel for kernel in (compiled(launch, target) for launch in launches)}.values())


def _specialise_case(case: Callable[[], object], target: str) -> set[tuple[str, str]]:
    with as_on(target), capture_launches(execute=False) as launches:
        case()
    return {(launch.name, specialise(launch, target).key) for launch in launches}


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Specialised:
    """A launch as the JIT sees it: the source with its types, divisibilities and constants."""

    key: str  # equal for launches that compile to the same code
    target: str
    source: Any
    options: Any
    bound: dict[str, Any]  # the arguments by name
    constants: dict[str, Any]  # the constexpr arguments

    def compile(self) -> Any:
        import triton

        return triton.compile(self.source, target=_gpu_target(self.target), options=dict(self.options.__dict__))


def specialise(launch: Launch, target: str) -> Specialised:
    """The steps of `JITFunction.run` up to the compilation."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(_gpu_target(target))
    kwargs = {"debug": False, "instrumentation_mode": "", **launch.kwargs}
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items() if len(path) == 1}
    key = f"{target} {kernel.module} {launch.name} {specialization} {options}"
    return Specialised(key, target, ASTSource(kernel, signature, constants, attributes), options, bound, named)


def _compile(launch: Launch, specialised: Specialised) -> CompiledKernel:
    target, built = specialised.target, specialised.compile()
    shared = int(built.metadata.shared)
    if target.startswith("gfx"):
        assembly = built.asm["amdgcn"]
        registers, stack = _metadata_entry(assembly, "vgpr_count"), _metadata_entry(assembly, "vgpr_spill_count")
        shared = max(shared, _metadata_entry(assembly, "group_segment_fixed_size"))
        binary = assembly.encode()
    else:
        binary = built.asm["cubin"]
        report = _cuobjdump("-res-usage", binary)
        usage = _USAGE.search(report)
        if usage is None:
            raise RuntimeError(f"the report of a kernel's resources is not understood:\n{report}")
        registers, stack = int(usage[1]), int(usage[2])
    options = {name: value for name, value in launch.kwargs.items() if name not in launch.kernel.arg_names}
    constants = {name: value for name, value in specialised.constants.items() if isinstance(value, bool | int | float | str | None)}
    return CompiledKernel(launch.name, target, options, constants, shared, registers, stack, binary)


def _metadata_entry(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if match is None:
        raise RuntimeError(f"no {name} in the kernel's metadata")
    return int(match[1])


def _cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
