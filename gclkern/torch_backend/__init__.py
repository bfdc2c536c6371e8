"""The losses' operators in plain torch, for any device. Importing this package registers `gclkern::torch_*`, of the kernels' signatures.

It is the path of the CPU and of float64. Work goes by blocks that stay in cache and in place, backward is analytic, and nothing waits for a GPU.
"""

from __future__ import annotations

from gclkern.torch_backend import centroids, dro_lt, head, logit_loss, noise

__all__ = ["centroids", "dro_lt", "head", "logit_loss", "noise"]
