"""Which Triton kernels a piece of code launched, with the arguments it gave them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch `kernel[grid](*args, **kwargs)`, seen after `triton.heuristics` has added its values."""

    kernel: Any  # the jitted (or interpreted) function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]  # named arguments and options such as num_warps
    grid: tuple[int, ...]

    @staticmethod
    def of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Launch:
        """What `kernel.run` was called with."""
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        shape = grid(bound) if callable(grid) else grid
        return Launch(kernel, args, kwargs, tuple(int(extent) for extent in shape))

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def argument(self, name: str) -> Any:
        """The value given to the kernel's parameter `name`."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.kernel.arg_names.index(name)]


@dataclass(frozen=True)
class LibraryProduct:
    """A matrix product (rows, depth) @ (depth, columns) that the vendor's library computes."""

    rows: int
    depth: int
    columns: int
    itemsize: int  # of the matrices
    out_itemsize: int


class Launches(list[Launch]):
    """The launches of a `with` block, in order; apart, the products of the vendor's library that did not run."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[LibraryProduct] = []

    @property
    def names(self) -> list[str]:
        return [launch.name for launch in self]


def _not_computed(launches: Launches) -> Callable[..., Tensor]:
    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
        launches.products.append(LibraryProduct(a.shape[0], a.shape[1], b.shape[1], a.element_size(), out.element_size()))
        return out

    return product


@contextlib.contextmanager
def capture_launches(*, execute: bool = True) -> Iterator[Launches]:
    """Record every kernel launch of the block, whether kernels are compiled or interpreted.

    With `execute=False` nothing runs and outputs keep whatever their memory holds: enough to learn how a launcher calls its kernels where there is no GPU.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = Launches()

    def recording(original: Any) -> Any:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if not warmup:
                launches.append(Launch.of(self, args, kwargs, grid))
            return original(self, *args, grid=grid, warmup=warmup, **kwargs) if execute else None

        return run

    with contextlib.ExitStack() as patches:
        for kind in (InterpretedFunction, JITFunction):
            patches.enter_context(mock.patch.object(kind, "run", recording(kind.run)))
        if not execute:
            patches.enter_context(mock.patch("gclkern.kernels.products.library_product", _not_computed(launches)))
        yield launches
