"""Calls whose arguments are ready: no check of gclkern.validation would refuse them, and the compiled loops take them without a conversion.

A check looks at one argument at a time, to name it in an error. For a small batch on a CPU all checks take longer than the loss itself, so the usual call of
a training loop is recognised in one pass, by compiled code (cpu_backend/native/call.c). A call that is not recognised goes through the checks.
Nothing about a tensor is remembered between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gclkern import cpu_backend
from gclkern.devices import ORDINARY_KEYS, PLAIN, is_ordinary, is_traced, saved_tensors_are_freed
from gclkern.validation import resolve_seed

_SCALAR, _SEED = torch.empty((), device="cpu"), torch.empty((), dtype=torch.int64, device="cpu")  # `empty_like` takes less time than `empty`
_SEEDS = (-(2**63), 2**63 - 1)  # those that `resolve_seed` draws
_MATRICES = (torch.float32, torch.bfloat16, torch.float16)


def _no_loss(*arguments: Any) -> tuple[Tensor, Tensor | None] | None:
    return None


def _never(value: Any) -> bool:
    return False


# Takes the arguments of `gcl_cross_entropy` in the order of call.c. If they are ready: the loss, and the gradient of the cosines for an upstream gradient of 1
# where there will be a backward, else None. None alone for other calls, and for wrong values of labels and class vectors.
logit_loss: Callable[..., tuple[Tensor, Tensor | None] | None] = _no_loss
# Whether the backward that runs now, for this upstream gradient, is the usual one of a training loop: the last of its graph, without a second derivative, and
# for an ordinary float32 1.
is_usual_backward: Callable[[Tensor], bool] = _never


def _find_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """As `resolve_seed`, whose `randint` draws the same number, but takes longer."""
    return torch.empty_like(_SEED).random_(*_SEEDS) if seed is None else resolve_seed(seed, device)


def connect(module: ModuleType | None) -> None:
    """Takes the functions above from the compiled module, if there is one and torch has what it needs."""
    global logit_loss, is_usual_backward
    logit_loss, is_usual_backward = _no_loss, _never
    if module is None:
        return
    try:
        module.connect(
            torch, torch.Tensor.__dlpack_c_exchange_api__, PLAIN, torch._C._dispatch_keys, ORDINARY_KEYS, torch._C._len_torch_dispatch_stack,
            torch._C._are_functorch_transforms_active, torch.is_grad_enabled, torch.get_num_threads, _find_seed, torch.device("cpu"),
            _SCALAR, {"dtype": torch.float32, "memory_format": torch.contiguous_format}, saved_tensors_are_freed, _SEED, _SEED.random_, _SEEDS,
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # another torch
        return
    logit_loss, is_usual_backward = module.logit_loss, module.is_usual_backward


connect(cpu_backend.library.module_of(cpu_backend.library._library))


def ready_rows(matrix: Any, target: Any) -> bool:
    """Whether a matrix and one label for each of its rows are ready. The loops check the values of the labels."""
    if is_traced() or torch._C._are_functorch_transforms_active() or not cpu_backend.is_available or not is_ordinary(matrix) or not is_ordinary(target):
        return False
    shape = matrix.shape
    if len(shape) != 2 or matrix.numel() == 0 or matrix.dtype not in _MATRICES:
        return False
    return target.shape == shape[:1] and target.dtype == torch.int64 and target.is_contiguous()
