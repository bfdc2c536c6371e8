"""No objective reads a number of the device: see tests/test_resources_of_modules.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gclkern.training.objectives import Batch
from tests.training.objectives import test_laws as laws


@pytest.mark.parametrize("name", laws.METHODS)
def test_no_number_is_read(name: str) -> None:
    """Tensors of the device "meta" have none, so whatever trains does not make the host wait for a GPU either."""
    given = laws.problem(name, torch.Generator().manual_seed(0), 6)
    network, objective = (module.to("meta").train() for module in given.modules())
    batch = Batch(*(value.to("meta") if isinstance(value, Tensor) else value for value in given.batch))
    objective(network, batch).backward()
