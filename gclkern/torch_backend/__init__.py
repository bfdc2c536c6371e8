"""The losses' operators in plain torch, for any device. Importing this package registers `gclkern::torch_*`, of the kernels' signatures.

They serve the CPU and float64. Work is done in place, on blocks that fit the cache; gradients are analytic, and nothing waits for a GPU.
"""

from __future__ import annotations

from gclkern.torch_backend import centroids, contrastive_loss, dro_lt, head, logit_loss, noise

__all__ = ["centroids", "contrastive_loss", "dro_lt", "head", "logit_loss", "noise"]
