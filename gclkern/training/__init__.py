"""The library behind train.py: data sets, recipes, networks, the optimizer step, checkpoints and run folders. Needs the extra `train`.

:func:`load_classifier` and :class:`Classifier` are public; the rest is for train.py and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gclkern.training.classifier import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]


def __getattr__(name: str) -> Any:
    """The public names are imported on first use, because other modules of this package work without their dependencies."""
    if name in __all__:
        return getattr(importlib.import_module(".classifier", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
