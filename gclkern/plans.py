"""How a classifier head walks over its classes: in one buffer, in chunks, or never in memory."""

from __future__ import annotations

from torch import Tensor

from gclkern.validation import check_choice

PLANS = ("auto", "materialised", "chunked", "recompute")
# A buffer of logits up to this size saves the fourth product; beyond it memory decides.
MATERIALISED_BYTES = 2**30
MATERIALISED_BYTES_CPU = 2**27


def resolve_plan(plan: str, features: Tensor, num_classes: int, *, normalize: bool, backend: str) -> str:
    """The plan that serves features (N, D) and `num_classes` classes when the caller asks for `plan`.

    "auto" takes "materialised" while the (N, C) buffer is at most MATERIALISED_BYTES, on a CPU MATERIALISED_BYTES_CPU, and "recompute" beyond.
    """
    check_choice("plan", plan, PLANS)
    if plan != "auto":
        return plan
    small = backend == "triton" and normalize and features.element_size() == 2  # cosines fit 16 bits, plain products do not
    buffer = features.shape[0] * num_classes * (2 if small else max(features.element_size(), 4))
    limit = MATERIALISED_BYTES_CPU if features.device.type == "cpu" else MATERIALISED_BYTES
    return "materialised" if buffer <= limit else "recompute"
