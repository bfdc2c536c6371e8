"""Chooses the backend of a call, the plan of a classifier head, and the operator to call. No other module makes this choice."""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import torch
from torch import Tensor

from gclkern import cpu_backend, torch_backend
from gclkern.devices import autocast_is_on, is_ordinary, is_traced, without_autocast
from gclkern.kernels.terms import FLOAT32_TEMPERATURE, FUNCTIONS, NAMESPACE, PREFIXES
from gclkern.options import Backend, Plan
from gclkern.validation import check_choice

BACKENDS: tuple[Backend, ...] = get_args(Backend)
PLANS: tuple[Plan, ...] = get_args(Plan)

# Looked up once, because a function that torch.compile traces cannot search for packages, and without importing Triton.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# The oldest NVIDIA GPU that Triton supports, and that has bfloat16 instructions.
_OLDEST_CAPABILITY = (8, 0)
# A buffer of logits saves the fourth matrix product; above this size it takes too much memory. On a GPU it is the size at which 1024 samples meet a million
# classes: the model of benchmarks/predict_times.py puts "chunked" at 1.6 times "materialised" there, and "recompute" above that.
_MATERIALISED_BYTES = 2**31
_MATERIALISED_BYTES_CPU = 2**27


def _too_old(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU too old for the kernels. False before CUDA is initialised, when only fake tensors exist."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_initialized():
        return False
    return torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The backend for `tensor`, "triton", "cpu" or "torch", if the caller asks for `backend`.

    "auto" takes the Triton kernels for tensors on a GPU, the compiled loops, if available, for tensors on a CPU, and torch elsewhere, including NVIDIA GPUs
    below compute capability 8.0. float64 always uses torch, because the other backends compute statistics in float32.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch"
    on_cpu = tensor.device.type == "cpu"
    if backend == "cpu":
        if not on_cpu:
            raise ValueError(f'backend="cpu" needs tensors on a CPU, got device {tensor.device}; move them, or use backend="auto"')
        if tensor.dtype == torch.float64:
            raise TypeError('backend="cpu" computes in float32 and refuses float64 tensors; use backend="torch" or "auto"')
        if not cpu_backend.is_available:
            raise ValueError(f'backend="cpu" cannot run: {cpu_backend.missing}; or use backend="torch"')
        return "cpu"
    if backend == "auto":
        if on_cpu and tensor.dtype != torch.float64 and cpu_backend.is_available:
            return "cpu"
        usable = tensor.device.type == "cuda" and tensor.dtype != torch.float64 and HAS_TRITON and not _too_old(tensor.device)
        return "triton" if usable else "torch"
    if not HAS_TRITON:
        raise ValueError('backend="triton" cannot run: Triton is not installed; install it, or use backend="torch"')
    if tensor.dtype == torch.float64:
        raise TypeError('backend="triton" computes in float32 and refuses float64 tensors; use backend="torch" or "auto"')
    if _too_old(tensor.device):
        found = ".".join(map(str, torch.cuda.get_device_capability(tensor.device)))
        raise ValueError(f'backend="triton" needs a GPU of compute capability 8.0 or more, got {found} of {tensor.device}; use backend="torch" or "auto"')
    if on_cpu:
        from gclkern.kernels.runtime import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                'backend="triton" needs tensors on a GPU, got device cpu; move them, use backend="torch", '
                "or set TRITON_INTERPRET=1 before the first import of Triton to interpret the kernels"
            )
    return "triton"


def backend_without_loops(backend: str, tensor: Tensor, what: str) -> str:
    """`resolve_backend` for something that the CPU's compiled loops lack: torch serves it there."""
    chosen = resolve_backend(backend, tensor)
    if chosen != "cpu":
        return chosen
    if backend == "cpu":
        raise ValueError(f'backend="cpu" has no {what}; use backend="torch" or "auto"')
    return "torch"


def resolve_contrast_backend(backend: str, features: Tensor, temperature: float) -> str:
    """`resolve_backend` for a contrast of samples. At low temperatures it takes float64 on a CPU, and so torch: float32 lacks the smallest exponentials."""
    if temperature < FLOAT32_TEMPERATURE:
        return backend_without_loops(backend, features, f"supervised_contrastive at temperatures below {FLOAT32_TEMPERATURE}")
    return resolve_backend(backend, features)


def resolve_plan(plan: str, features: Tensor, num_classes: int, *, normalize: bool, backend: str) -> str:
    """The plan for features (N, D) and `num_classes` classes if the caller asks for `plan`; `backend` is the resolved one.

    "auto" takes "materialised" while the (N, C) buffer is at most 2 GiB, on a CPU 128 MiB. Beyond, the kernels take "chunked", the other backends "recompute".
    """
    check_choice("plan", plan, PLANS)
    if plan != "auto":
        return plan
    small = backend == "triton" and normalize and features.element_size() == 2  # cosines fit 16 bits, plain products do not
    buffer = features.shape[0] * num_classes * (2 if small else max(features.element_size(), 4))
    limit = _MATERIALISED_BYTES_CPU if features.device.type == "cpu" else _MATERIALISED_BYTES
    if buffer <= limit:
        return "materialised"
    return "chunked" if backend == "triton" else "recompute"


def call_operator(name: str, backend: str, tensor: Tensor, *others: Any) -> Any:
    """Calls the operator of a resolved backend for `name`, one of gclkern.kernels.terms.SCHEMAS, with autocast off.

    At small sizes torch's dispatcher takes longer than the compiled loops. So if it has nothing to do, the function behind the operator is called directly.
    """
    arguments = (tensor, *others)
    if calls_directly(backend, *arguments) and not (torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)):
        function = FUNCTIONS[PREFIXES[backend] + name]
    else:
        if backend == "triton":
            from gclkern.kernels import centroids, contrastive_loss, dro_lt, head, logit_loss, noise, vmf  # noqa: F401 (each registers its operators)
        function = getattr(getattr(torch.ops, NAMESPACE), PREFIXES[backend] + name).default
    if autocast_is_on(tensor.device.type):
        with without_autocast(tensor.device.type):
            return function(*arguments)
    return function(*arguments)


def calls_directly(backend: str, *arguments: Any) -> bool:
    """Whether a call may go around torch's dispatcher: it is the CPU's, nothing is traced, and all tensors are in memory. The caller looks after gradients."""
    return backend == "cpu" and not is_traced() and all(is_ordinary(value) for value in arguments if isinstance(value, Tensor))


def head_implementation(backend: str) -> Any:
    """The module of a resolved backend with `run_forward` and `run_backward`, which compute a head that holds a shard of the classes."""
    if backend == "torch":
        return torch_backend.head
    from gclkern.kernels import head

    return head
