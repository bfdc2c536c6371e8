"""The losses' operators on a CPU, as compiled loops over rows. Importing this package registers `gclkern::cpu_*`, with the kernels' signatures.

The loops (native/*.c) are compiled when the package is installed, where there is a C compiler. They compute in float32; float64 tensors use
gclkern.torch_backend.
"""

from __future__ import annotations

from gclkern.cpu_backend import centroids, contrastive_loss, dro_lt, head, logit_loss, noise
from gclkern.cpu_backend.library import is_available, missing, summary

__all__ = ["centroids", "contrastive_loss", "dro_lt", "head", "is_available", "logit_loss", "missing", "noise", "summary"]
