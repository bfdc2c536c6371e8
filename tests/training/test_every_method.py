"""Every method and every re-training on digits, on few epochs: it prints its table, goes on bitwise where it was killed, and trains alike in two processes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gclkern.training import load_classifier
from gclkern.training.checkpoint import load_checkpoint, save_checkpoint
from gclkern.training.config import RunConfig
from gclkern.training.data import load_data
from gclkern.training.network import load_network, network_checkpoint, prepare
from gclkern.training.phase_training import PhaseTraining
from gclkern.training.processes import Processes
from gclkern.training.recipes import METHODS, RETRAINS, plan
from tests.support.processes import run_ranks, start_train, train

# They compare samples of all processes, but only within a part of an accumulated batch, so that two processes are one that does not accumulate: see
# test_contrast.py, which also kills them.
CONTRAST_OF_SAMPLES = ("bcl", "gcl+bcl", "proco", "hybrid-sc")
# A run for each kind of network, and those of several phases. Phases of all methods are compared step by step.
RUNS_IN_TWO_PROCESSES = ("ce", "gcl+dro-lt", "tde", "bbn", "oltr")
SHORT = ["--epochs-scale", "0.1", "--eval-every", "4", "--no-baseline", "--no-pictures", "--device", "cpu", "--holdout", "0.1"]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def check_killed(folder: Path, *settings: object) -> None:
    """A run that is killed and resumed leaves the metrics of the one in `folder / "whole"`."""
    run = start_train(*settings, "--accumulate", "2", "--checkpoint-seconds", "0", "--out", folder / "killed")
    run.kill_after_checkpoint(folder / "killed", seconds=0.2)  # some steps further on, perhaps in a later phase
    if not (folder / "killed" / "summary.json").exists():
        train("--resume", folder / "killed")
    assert metrics(folder / "killed") == metrics(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "dro-lt --retrain gcl"])  # GCL's second stage, with a new classifier, after three phases with a linear one
def test_every_method(method: str, tmp_path: Path) -> None:
    settings = [*SHORT, "--method", *method.split()]
    output = train(*settings, "--accumulate", "2", "--out", tmp_path / "whole")
    assert output.count("top-1") == 1
    reports = json.loads((tmp_path / "whole" / "summary.json").read_text())["reports"]
    assert all(report["calibrated"] for report in reports.values())

    check_killed(tmp_path, *settings)

    if method in RUNS_IN_TWO_PROCESSES:
        train(*settings, "--out", tmp_path / "two", ranks=2)
        # two epochs of the first phase: later ones multiply the rounding
        one, two = ([float(row["loss"]) for row in metrics(tmp_path / name) if row["phase"] == "stage-1"][:2] for name in ("whole", "two"))
        assert two == pytest.approx(one, rel=2e-3)  # rounding, which the steps carry along

    for name in reports:
        if (checkpoint := tmp_path / "whole" / f"{name}.pt").exists():
            assert not load_classifier(checkpoint).training


DATA = load_data("digits-lt")
ALONE = Processes.single(torch.device("cpu"))


def take_steps(training: PhaseTraining, stop: int) -> list[float]:
    """The sum of the epoch's losses after each step up to `stop`."""
    return [float(training.progress.total) for _ in islice(training.steps(), stop - training.progress.step)]


def method_of(name: str) -> str:
    """The method of an entry of LAST_PHASES."""
    return name.split()[0] if name.split()[0] in METHODS else "ce"


LAST_PHASES = {method: plan(method, "none", "digits-lt", DATA.class_counts)[-1] for method in METHODS}
for name in ("ce crt", "ce lws", "gcl gcl", "dro-lt gcl", "tde crt", "ce mislas", "gcl mislas", "ce disalign", "gcl disalign"):
    LAST_PHASES[name] = plan(method_of(name), name.split()[1], "digits-lt", DATA.class_counts)[-1]
LAST_PHASES["shifted"] = replace(LAST_PHASES["ce mislas"], batch_norm="shifted")
LAST_PHASES["robust layers"] = replace(plan("dro-lt", "none", "digits-lt", DATA.class_counts)[1], robust_layers=("layers.2", "features"))
COMPARED = [name for name in LAST_PHASES if name not in CONTRAST_OF_SAMPLES]


@pytest.mark.parametrize("name", LAST_PHASES)
def test_the_state_of_every_phase_is_in_its_checkpoint(name: str, tmp_path: Path) -> None:
    """The last phase of each method and re-training, with an average of the weights: steps after loading a checkpoint are bitwise those without it."""
    torch.manual_seed(0)
    phase = LAST_PHASES[name]
    config = RunConfig(method=method_of(name), ema=0.9)
    first = plan(config.method, "none", "digits-lt", DATA.class_counts)[0]
    network = None if phase.start == "fresh" else prepare(first, None, DATA, config, ALONE.device)
    network = prepare(phase, network, DATA, config, ALONE.device)
    training = PhaseTraining(phase, network, DATA, config, ALONE)
    take_steps(training, 2)
    training.progress.next_epoch()
    take_steps(training, 2)
    state = {"trainer": training.trainer.state_dict(), "progress": training.progress.state_dict(ALONE)}
    save_checkpoint(tmp_path / "last.pt", {**network_checkpoint(network, phase, DATA, config), **state})
    losses = take_steps(training, 4)
    assert len(losses) == 2 and all(map(math.isfinite, losses))

    checkpoint = load_checkpoint(tmp_path / "last.pt")
    again = PhaseTraining(phase, load_network(checkpoint, ALONE.device), DATA, config, ALONE, checkpoint)
    assert take_steps(again, 4) == losses
    for name, value in training.trainer.eval_network.state_dict().items():
        assert torch.equal(again.trainer.eval_network.state_dict()[name], value), name


def trained(name: str, processes: Processes, accumulate: int) -> dict[str, Tensor]:
    """The network after two steps of each of two epochs of a phase, with an average of the weights, and the losses of these steps."""
    torch.manual_seed(0)
    phase, config = LAST_PHASES[name], RunConfig(ema=0.9, accumulate=accumulate)
    first = plan(method_of(name), "none", "digits-lt", DATA.class_counts)[0]
    network = prepare(first, None, DATA, config, ALONE.device)
    if phase.start != "fresh":
        network = prepare(phase, network, DATA, config, ALONE.device)
    training = PhaseTraining(phase, network, DATA, config, processes)
    losses = []
    for _ in range(2):
        take_steps(training, 2)
        losses.append(processes.mean(training.progress.total.clone()))
        training.progress.next_epoch()
    average = {f"average.{key}": value for key, value in training.trainer.eval_network.state_dict().items()}
    state = {key: value for key, value in (network.state_dict() | average).items() if not key.endswith("num_batches_tracked")}
    return {key: value.clone() for key, value in (state | {"losses": torch.stack(losses)}).items()}


def in_two_processes(rank: int, world: int, folder: Path) -> None:
    processes = Processes.single(torch.device("cpu"))
    processes.rank, processes.world = rank, world
    for name in COMPARED:
        torch.save(trained(name, processes, 1), folder / f"{name} {rank}.pt")


@pytest.mark.slow
def test_every_phase_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """Weights and running statistics after two epochs, whose centroids come from those of the epoch before, up to rounding."""
    run_ranks(2, in_two_processes, tmp_path)
    for name in COMPARED:
        alone = trained(name, ALONE, 2)
        for rank in range(2):
            for key, value in torch.load(tmp_path / f"{name} {rank}.pt").items():
                # float32 sums in another order, carried along by four steps
                assert torch.allclose(value, alone[key], rtol=1e-4, atol=1e-5), (name, rank, key, float((value - alone[key]).abs().max()))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one stage 1, by the number of parts of a step for which a run takes it to be trained."""
    folder = tmp_path_factory.mktemp("stage1")
    train(*SHORT, "--method", "dro-lt", "--out", folder / "run")
    checkpoint = load_checkpoint(folder / "run" / "stage-1-classifier.pt")
    for parts in (1, 2):
        save_checkpoint(folder / f"{parts}.pt", {**checkpoint, "config": {**checkpoint["config"], "accumulate": parts}})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("retrain", [name for name in RETRAINS if name != "none"])
def test_every_re_training(retrain: str, stage1: Path, tmp_path: Path) -> None:
    """All start from one stage 1, because rounding grows over its epochs: that of DRO-LT, which trains cross entropy first."""
    settings = [*SHORT, "--method", "dro-lt", "--retrain", retrain, "--stage1"]
    in_parts = [*settings, stage1 / "2.pt"]
    output = train(*in_parts, "--accumulate", "2", "--out", tmp_path / "whole")
    assert output.count("top-1") == 1
    train(*settings, stage1 / "1.pt", "--out", tmp_path / "two", ranks=2)
    if (tmp_path / "whole" / "metrics.csv").exists():  # it trains
        check_killed(tmp_path, *in_parts)
        one, two = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("whole", "two"))
        assert two == pytest.approx(one, rel=2e-3)  # rounding, which the steps carry along
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["reports"]["stage-2"]["top1"] for name in ("whole", "two"))
    assert two == pytest.approx(one, abs=0.01)  # four images, whose largest logits may be close
    assert not load_classifier(tmp_path / "whole" / "stage-2.pt").training
