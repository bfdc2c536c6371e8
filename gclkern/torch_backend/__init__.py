"""The losses' operators in plain torch, for any device. Importing this package registers `gclkern::torch_*`, with the kernels' signatures.

They are used for float64, for devices without kernels, and for CPUs without the compiled loops. They work in place, on blocks that fit into the cache;
gradients are analytic, and nothing waits for a GPU.
"""

from __future__ import annotations

from gclkern.torch_backend import centroids, contrastive_loss, dro_lt, head, logit_loss, noise, vmf

__all__ = ["centroids", "contrastive_loss", "dro_lt", "head", "logit_loss", "noise", "vmf"]
