"""Interpreted kernels that read or write outside of their tensors fail, in every test.

A GPU may answer such an access with an illegal address, with another tensor's numbers, or with nothing that a test of results notices: what is read too much
is often discarded by a later selection. The interpreter reads and writes any address of the process. Here it checks that those of each load and store lie
in the memory of one of the tensors that the kernel was launched with.
"""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any


def _storages(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _storages(part)
    elif hasattr(value, "base") and not hasattr(value, "untyped_storage"):  # a descriptor, or a tensor by another dtype
        yield from _storages(value.base)
    elif hasattr(value, "untyped_storage"):
        yield value.untyped_storage()


def install() -> None:
    """From now on, in this process."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    ranges: list[tuple[int, int]] = []  # of addresses, ascending

    def checked(access: Callable[..., Any], place_of_mask: int) -> Callable[..., Any]:
        @functools.wraps(access)
        def within(builder: Any, pointers: Any, *arguments: Any, **options: Any) -> Any:
            addresses = pointers.data[arguments[place_of_mask].data.astype(bool)]
            if addresses.size:
                first, end = int(addresses.min()), int(addresses.max()) + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
                start, stop = ranges[max(bisect.bisect(ranges, first, key=operator.itemgetter(0)) - 1, 0)]
                assert start <= first and end <= stop, f"{access.__name__}: bytes {first - start} to {end - start} of a tensor that has {stop - start}"
            return access(builder, pointers, *arguments, **options)

        return within

    for name, place_of_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), place_of_mask))
    to_host = GridExecutor._init_args_hst

    def remember(executor: Any, *arguments: Any) -> Any:
        found = to_host(executor, *arguments)
        storages = list(_storages((found[0], tuple(found[1].values()))))
        ranges[:] = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages if storage.nbytes()})
        return found

    GridExecutor._init_args_hst = remember
