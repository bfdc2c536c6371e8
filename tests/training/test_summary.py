"""What a run says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gclkern.training.config import RunConfig
from gclkern.training.data import load_data
from gclkern.training.network import prepare
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan_run
from gclkern.training.run_folder import RunFolder
from gclkern.training.summary import describe


@pytest.mark.parametrize(("epochs", "words"), [(2, "too few epochs for class weights"), (3, "class weights from epoch 3")])
def test_when_class_weights_begin(epochs: int, words: str, tmp_path: Path) -> None:
    """DRW begins after four fifths of the epochs."""
    config, processes = RunConfig(method="ldam-drw", epochs=epochs, baseline=False), Processes.single(torch.device("cpu"))
    data = load_data(config.data)
    phases = plan_run(config, data.class_counts, 1)
    network = prepare(phases[0], None, data, config, processes.device)
    (line,) = [line for line in describe(RunFolder(tmp_path, config, write=False), data, phases, network, processes).splitlines() if line.startswith("stage-1")]
    assert line.endswith(f", {words}")
