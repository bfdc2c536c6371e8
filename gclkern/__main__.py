"""``python -m gclkern`` prints the version and the backend of each device."""

from __future__ import annotations

from gclkern import __version__, cpu_backend
from gclkern.dispatch import HAS_TRITON

gpu = "Triton kernels from compute capability 8.0 on" if HAS_TRITON else "torch operators (Triton is not installed)"
print(f"gclkern {__version__}; CPU: {cpu_backend.summary()}; GPU: {gpu}")  # noqa: T201
