"""Compiles what a launcher launches for NVIDIA GPUs that this machine does not have, and runs it all the same: see ptx.py.

`PTX_TARGET=sm_90 python -m pytest tests/test_gcl_cross_entropy.py` runs the tests of that file so, in place of Triton's interpreter.
"""

from __future__ import annotations

import struct
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.machine_code import aot
from benchmarks.machine_code.launches import Launch
from tests.support.gpu_free import ptx


def install(target: str) -> None:
    """From now on kernels of this process are compiled for `target` and run on CPU tensors. Nothing may have imported Triton yet."""
    aot.prepare_worker("cuda")
    from triton.runtime.jit import JITFunction

    import gclkern.kernels.products  # noqa: F401 (which shall see that kernels are compiled)
    from gclkern.kernels import runtime

    runtime.INTERPRETED = True  # so that backend="triton" takes CPU tensors
    aot.as_on(target).__enter__()  # for as long as the process lives
    built: dict[str, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch.of(self, args, kwargs, grid)
        specialised = aot.specialise(launch, target)
        if specialised.key not in built:
            built[specialised.key] = specialised.compile()
        _execute(built[specialised.key], launch, specialised)

    mock.patch.object(JITFunction, "run", run).start()


def _execute(kernel: Any, launch: Launch, specialised: aot.Specialised) -> None:
    arguments: list[int] = []
    spans: list[tuple[int, int]] = []
    for name, kind in specialised.source.signature.items():
        value = specialised.bound[name]
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            arguments.append(value.data_ptr())
            spans.append((value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()))
        elif kind.startswith("fp"):
            arguments.append(int.from_bytes(struct.pack({"fp32": "<f", "fp64": "<d"}[kind], value), "little"))
        else:
            arguments.append(int(value))
    scratch = [0, 0]  # two pointers that the compiler appends and these kernels do not use
    ptx.run(kernel.asm["ptx"], launch.grid, 32 * specialised.options.num_warps, arguments + scratch, spans, kernel.metadata.shared)
