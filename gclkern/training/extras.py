"""Packages that only training needs. The extra `train` installs them; they are imported where they are used, never by the loss library."""

from __future__ import annotations

import importlib
from typing import Any

# What to install for a package that is not in the extra `train`.
_INSTALL = {"timm": "timm", "wandb": "wandb", "mlflow": "mlflow", "onnx": "'gclkern[export]'", "onnxscript": "'gclkern[export]'"}


def need(module: str, purpose: str) -> Any:
    """The module, or an error that says how to install it.

    Raises:
        ImportError: it is not installed; the message names what needs it and the command.

    Example:
        >>> need("json", "the summary").dumps([1])
        '[1]'
        >>> need("no_such_module", "the summary")
        Traceback (most recent call last):
        ImportError: the summary needs no_such_module, which is not installed; run: pip install 'gclkern[train]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its dependencies is not
        install = _INSTALL.get(package, "'gclkern[train]'")
        raise ImportError(f"{purpose} needs {package}, which is not installed; run: pip install {install}", name=module) from None
