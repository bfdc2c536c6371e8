"""Temperatures without a held-out part, by cross-validation: for data sets so small that training three times as much takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gclkern.training.batches import PhaseBatches
from gclkern.training.calibration import fit_temperature
from gclkern.training.config import RunConfig
from gclkern.training.data import DataSplits
from gclkern.training.data.longtail import stratified_split
from gclkern.training.evaluation import predict
from gclkern.training.network import Network, gather_classifier, prepare
from gclkern.training.processes import Processes
from gclkern.training.progress import Progress
from gclkern.training.recipes import Phase
from gclkern.training.retrain import retrain_without_gradients
from gclkern.training.seeds import derive_seed
from gclkern.training.trainer import AMP, begin_epoch, build_trainer


def cross_validated_temperatures(phases: Sequence[Phase], data: DataSplits, config: RunConfig, processes: Processes) -> dict[str, float]:
    """The temperature of each phase, fitted on the training images: each half gets its logits from networks that were trained on the other one.

    Those networks have seen half of the images, so they are a little less accurate than the one that the temperature is for, which makes it a little too large.
    Empty if a class has a single image, or a network diverged.
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
    found = {name: torch.cat(parts) for name, parts in logits.items()}
    return {name: fit_temperature(part, labels) for name, part in found.items()} if all(bool(part.isfinite().all()) for part in found.values()) else {}


def _train(phase: Phase, network: Network, data: DataSplits, config: RunConfig, processes: Processes) -> None:
    """Train the network in place, without checkpoints and evaluations."""
    batches = PhaseBatches(phase, data.train, config.seed, processes)
    trainer = build_trainer(phase, network, data.class_counts, config, processes)
    progress = Progress.start(processes.device)
    while progress.epoch < phase.epochs:
        begin_epoch(phase, trainer, batches, progress, data.num_classes)
        for samples in batches.training(progress.epoch):
            seed = derive_seed(config.seed, phase.name, progress.epoch, progress.step)
            trainer.step(samples, seed, progress.epoch * batches.steps + progress.step, **progress.centroids)
            progress.step += 1
        progress.next_epoch()
    network.load_state_dict(trainer.eval_network.state_dict())
    gather_classifier(network)
