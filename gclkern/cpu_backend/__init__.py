"""The losses' operators on a CPU, as compiled loops over rows. Importing this package registers `gclkern::cpu_*`, of the kernels' signatures.

The loops (native/*.c) are compiled when the package is installed, where there is a C compiler. They compute in float32; float64 and GPUs are served by
gclkern.torch_backend, which is also their reference.
"""

from __future__ import annotations

from gclkern.cpu_backend import centroids, dro_lt, head, logit_loss, noise
from gclkern.cpu_backend.library import is_available, missing, summary

__all__ = ["centroids", "dro_lt", "head", "is_available", "logit_loss", "missing", "noise", "summary"]
