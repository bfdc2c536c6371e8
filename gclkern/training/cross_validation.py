"""Temperatures without a held-out part, by cross-validation: for data sets so small that training three times as much takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gclkern.training.calibration import temperature_of
from gclkern.training.config import RunConfig
from gclkern.training.data import DataSplits
from gclkern.training.data.longtail import stratified_split
from gclkern.training.evaluation import predict
from gclkern.training.network import Network, prepare
from gclkern.training.phase_training import PhaseTraining
from gclkern.training.processes import Processes
from gclkern.training.recipes import Phase
from gclkern.training.retrain import retrain_without_gradients
from gclkern.training.trainer import AMP


def is_cross_validated(data: DataSplits, config: RunConfig, processes: Processes) -> bool:
    """Whether a run fits its temperatures by cross-validation."""
    return config.data == "digits-lt" and data.holdout is None and not config.stage1 and processes.world == 1


def cross_validated_temperatures(phases: Sequence[Phase], data: DataSplits, config: RunConfig, processes: Processes) -> dict[str, float]:
    """The temperature of each phase, fitted on the training images: each half gets its logits from networks that were trained on the other one.

    Those networks have seen half of the images, so they are a little less accurate than the one that the temperature is for, which makes it a little too large.
    Without phases whose networks diverged; empty if a class has a single image.
    """
    if min(data.class_counts) < 2:
        return {}
    halves = stratified_split(data.train.labels, 0.5, config.seed)
    logits: dict[str, list[torch.Tensor]] = {phase.name: [] for phase in phases}
    for kept, taken in (halves, halves[::-1]):
        train, held_out = data.train.subset(kept), data.train.subset(taken)
        part = replace(data, train=train, class_counts=train.labels.bincount(minlength=data.num_classes).tolist())
        network: Network | None = None
        for phase in phases:
            network = prepare(phase, network, part, config, processes.device)
            if phase.epochs:
                _train(phase, network, part, config, processes)
            else:
                retrain_without_gradients(phase.trains, network, part, processes, config.tau)
            logits[phase.name].append(predict(network, held_out, processes, amp=AMP[config.amp])[0])
    labels = torch.cat([data.train.labels[taken] for taken in halves[::-1]])
    found = {name: temperature_of(torch.cat(parts), labels, data) for name, parts in logits.items()}
    return {name: temperature for name, temperature in found.items() if temperature is not None}


def _train(phase: Phase, network: Network, data: DataSplits, config: RunConfig, processes: Processes) -> None:
    """Train the network in place, without checkpoints and evaluations."""
    training = PhaseTraining(phase, network, data, config, processes)
    while training.progress.epoch < phase.epochs:
        for _ in training.steps():
            pass
        training.progress.next_epoch()
    training.finish()
