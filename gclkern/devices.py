"""The state of torch and of its tensors: autocast, transforms, backward; and debug mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_debug = False
PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may do anything
with torch.inference_mode():
    ORDINARY_KEYS = {torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()}
ORDINARY_KEYS.add(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())


def set_debug(enabled: bool) -> None:
    """Check the values of labels, class vectors and mixup weights on a GPU too, at the cost of synchronising every call.

    Without it a label out of range on a GPU makes the loss of that row NaN; with it, it raises the ValueError that CPU tensors always raise.

    Args:
        enabled: False at first, because reading values makes the host wait for the GPU.

    Raises:
        TypeError: not a bool.

    Example:
        >>> import gclkern
        >>> gclkern.set_debug(True)
        >>> gclkern.set_debug(False)
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    _debug = enabled


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether a check may read the tensor's values: always on a CPU, on a GPU in debug mode, never for a traced graph or tensors without values."""
    if torch.compiler.is_compiling() or tensor.is_meta or (type(tensor) is not Tensor and isinstance(tensor, FakeTensor)):
        return False
    return _debug or tensor.device.type == "cpu"


def is_transformed(tensor: Tensor) -> bool:
    """Whether the tensor is inside of torch.func's grad and vmap, or of torch.autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_traced() -> bool:
    """Whether torch.compile, or a mode such as FakeTensorMode, follows the operators that are called."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_ordinary(value: Any) -> bool:
    """Whether the value is a dense tensor on a CPU whose memory holds its elements, and which no tracer or transform follows.

    Torch's dispatcher has keys for everything else: sparse and nested tensors, other devices, elements with the other sign, as those of `.imag` of a conjugate,
    or without memory, as autograd's zeros, and the tensors inside of torch.func's transforms and of fake modes.
    """
    return type(value) in PLAIN and torch._C._dispatch_keys(value).raw_repr() in ORDINARY_KEYS


def refuse_transforms(name: str, tensor: Tensor) -> None:
    """Raise for a tensor inside of torch.func's grad and vmap, or of torch.autograd.grad(is_grads_batched=True), which the operators have no rules for."""
    if not torch.compiler.is_compiling() and is_transformed(tensor):
        raise RuntimeError(
            f"{name} is inside of a torch.func transform (grad, vmap) or of is_grads_batched=True, which the losses of gclkern do not support; "
            f"call loss.backward() or torch.autograd.grad, once for each gradient"
        )


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a type of device. The meta device has none, and torch raises an error when asked about it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off for operators, which compute in the dtypes of their arguments. Asking first is cheaper than always turning it off."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else nullcontext()


def saved_tensors_are_freed() -> bool:
    """Whether the backward that runs now is the last of its graph: torch then frees the saved tensors, so a gradient may take the place of one.

    A version of torch that does not say (its function is private) counts as one that keeps them.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()
