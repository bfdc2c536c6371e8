"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import gclkern

MODULES = ["gclkern", *(m.name for m in pkgutil.walk_packages(gclkern.__path__, "gclkern.") if not m.name.startswith("gclkern.kernels"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "gclkern": gclkern}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
