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


def lines(config: RunConfig, folder: Path) -> list[str]:
    """The plan of a run, on digits."""
    data, processes = load_data("digits-lt"), Processes.single(torch.device("cpu"))
    phases = plan_run(config, data.class_counts, 1)
    network = prepare(phases[0], None, data, config, processes.device)
    return describe(RunFolder(folder, config, write=False), data, phases, network, processes).splitlines()


@pytest.mark.parametrize(("epochs", "words"), [(2, "too few epochs for class weights"), (3, "class weights from epoch 3")])
def test_when_class_weights_begin(epochs: int, words: str, tmp_path: Path) -> None:
    """DRW begins after four fifths of the epochs."""
    (line,) = [line for line in lines(RunConfig(method="ldam-drw", epochs=epochs, baseline=False), tmp_path) if line.startswith("stage-1")]
    assert line.endswith(f", {words}")


@pytest.mark.parametrize(("epochs", "warned"), [(99, True), (100, False)])
def test_short_training_of_a_set_of_ones_own(epochs: int, warned: bool, tmp_path: Path) -> None:
    """Half of the default: 200 epochs for a set as small as digits."""
    config = RunConfig(data="folder", method="ce", model="small-cnn", epochs=epochs)
    assert any(line.startswith(f"WARNING: {epochs} epochs instead of 200") for line in lines(config, tmp_path)) is warned


def test_every_phase_of_an_augmentation_is_named(tmp_path: Path) -> None:
    found = [line for line in lines(RunConfig(method="bcl", retrain="crt", baseline=True), tmp_path) if line.startswith("augmentation")]
    assert found == ["augmentation of training images of baseline and stage-2: crop", "augmentation of training images of stage-1: crop and sim and sim"]
