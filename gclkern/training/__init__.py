"""What train.py stands on: data sets, recipes, networks, the optimizer step, checkpoints and run folders. Needs the extra `train`.

Public are :func:`load_classifier` and :class:`Classifier`; the rest serves train.py and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gclkern.training.classifier import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]


def __getattr__(name: str) -> Any:
    """The public names are imported when they are asked for: the modules beside them need less."""
    if name in __all__:
        return getattr(importlib.import_module(".classifier", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
