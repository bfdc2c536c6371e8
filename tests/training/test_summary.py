"""What a run says before it starts, and its results at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gclkern.training import own_data, summary
from gclkern.training.config import RunConfig
from gclkern.training.data import load_data
from gclkern.training.evaluation import evaluate
from gclkern.training.network import network_checkpoint, prepare
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan_run
from gclkern.training.run_folder import RunFolder
from gclkern.training.summary import conclude, describe


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


def defaults(folder: Path, **settings: Any) -> list[str]:
    """The lines of defaults, by the words before their colon."""
    found = lines(RunConfig(data="folder", model="small-cnn", **settings), folder)
    return [line.strip() for line in found if line.startswith("  ")]


@pytest.mark.parametrize(("settings", "shown"), [
    ({"method": "gcl"}, "30 epochs, 15% of stage 1 but at least 10; lr 0.0483: the classifier moves as far as on CIFAR"),
    ({"method": "gcl", "epochs": 20}, "10 epochs, 15% of stage 1 but at least 10; lr 0.05: stage 1's, the highest that it may have"),
    ({"method": "gcl", "retrain_epochs": 7}, ""),
    ({"method": "gcl", "retrain_lr": 0.01}, "30 epochs, 15% of stage 1 but at least 10"),
    ({"method": "ce", "retrain": "crt", "lr": 0.02}, "30 epochs, 15% of stage 1 but at least 10; lr 0.02: stage 1's, since it learns new weights"),
    ({"method": "ce", "retrain": "disalign", "retrain_epochs": 7}, "lr 0.05: stage 1's, since it learns new weights"),
    ({"method": "ce", "retrain": "tau-norm"}, ""),
    ({"method": "ce"}, ""),
])  # fmt: skip
def test_defaults_of_stage_2_are_those_of_its_phase(settings: dict[str, Any], shown: str, tmp_path: Path) -> None:
    found = [line.removeprefix("stage 2: ") for line in defaults(tmp_path, **settings) if line.startswith("stage 2")]
    assert found == ([shown] if shown else [])


def test_defaults_that_the_user_replaces_are_left_out(tmp_path: Path) -> None:
    names = [line.split(":")[0].split("=")[0].strip("`") for line in defaults(tmp_path, method="gcl-ldam-drw")]
    assert names == ["method", "augment", "epochs", "batch_size", "lr", "weight_decay", "mixup", "schedule"]
    given = {"method": "ce", "augment": "crop", "epochs_scale": 0.5, "batch_size": 32, "lr": 0.1, "weight_decay": 1e-4, "mixup": 0.1}
    assert [line.split(":")[0] for line in defaults(tmp_path, **given)] == ["schedule"]
    assert not any("mixup" in line for line in defaults(tmp_path, method="mixup")), "it has mixup of its own"


@pytest.mark.parametrize(("size", "given", "remedy"), [
    (65, set(), "; `pretrained` would start from ImageNet weights, in a quarter of the epochs"),
    (65, {"epochs"}, "; `pretrained` would start from ImageNet weights"),
    (65, {"pretrained"}, ""),
    (64, set(), ""),
])  # fmt: skip
def test_photos_are_better_learned_from_pretrained_weights(size: int, given: set[str], remedy: str) -> None:
    (line,) = [line for line in own_data.reasons("ce", [100, 10], size, "crop", held_out=0, pretrained=False, given=given).splitlines() if "model=" in line]
    assert line.endswith(f"pixels{remedy}")


def test_the_estimate_counts_the_cross_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains twice on half of the images; images of one's own are not trained on again."""
    monkeypatch.setattr(summary, "seconds_per_image", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(summary, "duration", lambda seconds: f"{seconds:g} seconds")
    images = int(load_data("digits-lt").train.labels.numel())
    once, again = images // 64 * 64, 2 * (images // 2 // 64 * 64)
    for settings, total in (({}, once + again), ({"data": "folder", "model": "small-cnn"}, once)):
        config = RunConfig(method="ce", epochs=10, batch_size=64, baseline=False, **settings)
        assert any(f"estimated time: {10 * total:,} seconds".replace(",", "") in line for line in lines(config, tmp_path))


def test_the_default_held_out_part_has_its_reason(tmp_path: Path) -> None:
    """For images of one's own, made of digits here; not where the user has chosen the share."""
    data, processes = load_data("digits-lt", holdout=0.1), Processes.single(torch.device("cpu"))
    found = []
    for holdout in (None, 0.1):
        config = RunConfig(data="folder", method="ce", model="small-cnn", holdout=holdout)
        phases = plan_run(config, data.class_counts, 1)
        network = prepare(phases[0], None, data, config, processes.device)
        text = describe(RunFolder(tmp_path, config, write=False), data, phases, network, processes)
        found.append([line for line in text.splitlines() if "`holdout" in line])
    assert found == [["  `holdout=0.1`: 48 images, to fit the temperature of the probabilities; `holdout=0` trains on them, too"], []]


def test_the_results_of_a_run_are_those_of_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch on held-out images has a row of its own in table and summary."""
    finished: list[Mapping[str, float]] = []
    monkeypatch.setattr(RunFolder, "finish", lambda _, results: finished.append(results))
    data, processes, config = load_data("digits-lt", holdout=0.1), Processes.single(torch.device("cpu")), RunConfig(method="ce", baseline=False)
    (phase,) = plan_run(config, data.class_counts, 1)
    run = RunFolder(tmp_path, config, write=True)
    last, best = (prepare(phase, None, data, replace(config, seed=seed), processes.device) for seed in (0, 1))
    run.reports[phase.name] = evaluate(last, data.test, data, processes).as_dict()
    run.save("best.pt", network_checkpoint(best, phase, data, config))
    conclude(run, data, processes.device, [phase], amp=None, pictures=False)
    run.close()
    reports = json.loads((tmp_path / "summary.json").read_text())["reports"]
    assert list(reports) == ["stage-1", "best on held-out"]
    assert finished[0]["nll"] == reports["stage-1"]["nll"] != reports["best on held-out"]["nll"]


def test_every_phase_of_an_augmentation_is_named(tmp_path: Path) -> None:
    found = [line for line in lines(RunConfig(method="bcl", retrain="crt", baseline=True), tmp_path) if line.startswith("augmentation")]
    assert found == ["augmentation of training images of baseline and stage-2: crop", "augmentation of training images of stage-1: crop and sim and sim"]
