"""Which implementation serves a call: the Triton kernels or plain torch."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
# Found out without importing Triton, and once: a traced function may not look for packages.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# The oldest NVIDIA GPU that Triton supports, and that has bfloat16 instructions.
_OLDEST_CAPABILITY = (8, 0)


def _too_old(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that cannot run the kernels. One that only fake tensors are on, before CUDA has started, is taken for new enough."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_initialized():
        return False
    return torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The backend, "triton" or "torch", that serves `tensor` when the caller asks for `backend`.

    "auto" takes the kernels for tensors on a GPU and torch elsewhere, also on NVIDIA GPUs older than compute capability 8.0; float64 always runs on torch,
    because the kernels keep their statistics in float32.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        usable = tensor.device.type == "cuda" and tensor.dtype != torch.float64 and _HAS_TRITON and not _too_old(tensor.device)
        return "triton" if usable else "torch"
    if not _HAS_TRITON:
        raise ValueError('backend="triton" cannot run: Triton is not installed; install it, or use backend="torch"')
    if tensor.dtype == torch.float64:
        raise TypeError('backend="triton" computes in float32 and refuses float64 tensors; use backend="torch" or "auto"')
    if _too_old(tensor.device):
        found = ".".join(map(str, torch.cuda.get_device_capability(tensor.device)))
        raise ValueError(f'backend="triton" needs a GPU of compute capability 8.0 or more, got {found} of {tensor.device}; use backend="torch" or "auto"')
    if tensor.device.type == "cpu":
        from gclkern.kernels.runtime import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                'backend="triton" needs tensors on a GPU, got device cpu; move them, use backend="torch", '
                "or set TRITON_INTERPRET=1 before the first import of Triton to interpret the kernels"
            )
    return "triton"


def autocast_is_on(device_type: str) -> bool:
    """Whether operators on such a device are autocast; the meta device has no autocast, and torch refuses the question."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
