"""How a classifier head walks over its classes: in one buffer, in chunks, or never in memory."""

from __future__ import annotations

from torch import Tensor

from gclkern.validation import check_choice

PLANS = ("auto", "materialised", "chunked", "recompute")
# A buffer of logits up to this size saves the fourth product; beyond it memory decides.
MATERIALISED_BYTES = 2**30


def resolve_plan(plan: str, features: Tensor, num_classes: int, backend: str) -> str:
    """The plan that serves features (N, D) and `num_classes` classes when the caller asks for `plan`.

    "auto" takes "materialised" while the (N, C) buffer is at most MATERIALISED_BYTES, and "recompute" beyond.
    """
    check_choice("plan", plan, PLANS)
    if plan != "auto":
        return plan
    buffer = features.shape[0] * num_classes * (features.element_size() if backend == "triton" else max(features.element_size(), 4))
    return "materialised" if buffer <= MATERIALISED_BYTES else "recompute"
