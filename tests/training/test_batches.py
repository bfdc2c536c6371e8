"""Batches of a phase: further views, a second sampler, ranks and resuming."""

from __future__ import annotations

from dataclasses import replace

import torch

from gclkern.training.batches import PhaseBatches
from gclkern.training.data import load_data
from gclkern.training.objectives import Samples
from gclkern.training.processes import Processes
from gclkern.training.recipes import Phase, plan

DATA = load_data("digits-lt")
PHASE = replace(plan("ce", None, "digits-lt", DATA.class_counts)[0], views=("crop", "cutout"), second_sampler="class-balanced")


def steps(phase: Phase, *, start: int = 0, world: int = 1, rank: int = 0) -> list[Samples]:
    processes = Processes.single(torch.device("cpu"))
    processes.world, processes.rank = world, rank
    return list(PhaseBatches(phase, DATA.train, 0, processes).training(2, start))


def test_views_are_of_the_same_samples_and_the_second_batch_is_not() -> None:
    whole = steps(replace(PHASE, augment="none", views=("none", "crop")))
    for samples in whole:
        assert samples["views"].shape == (64, 2, 1, 8, 8)
        assert torch.equal(samples["views"][:, 0], samples["images"])
        assert not torch.equal(samples["views"][:, 1], samples["images"])
        assert not torch.equal(samples["second_images"], samples["images"])
    rare = {name: sum(int((samples[name] >= 5).sum()) for samples in whole) for name in ("target", "second_target")}  # type: ignore[literal-required]
    assert rare["second_target"] > 2 * rare["target"]


def test_two_views_by_one_augmentation_differ() -> None:
    first, *_ = steps(replace(PHASE, views=("crop", "crop")))
    assert not torch.equal(first["views"][:, 0], first["views"][:, 1])
    assert not torch.equal(first["views"][:, 0], first["images"])


def test_batches_do_not_depend_on_views_ranks_or_where_a_run_resumes() -> None:
    whole = steps(PHASE)
    for samples, plain in zip(whole, steps(replace(PHASE, views=(), second_sampler=None)), strict=True):
        assert torch.equal(samples["images"], plain["images"])
        assert plain.keys() == {"images", "target"}
    for samples, resumed in zip(whole[3:], steps(PHASE, start=3), strict=True):
        assert all(torch.equal(value, resumed[name]) for name, value in samples.items())  # type: ignore[literal-required]
    for rank in range(2):
        for samples, part in zip(whole, steps(PHASE, world=2, rank=rank), strict=True):
            assert all(torch.equal(value[rank::2], part[name]) for name, value in samples.items())  # type: ignore[literal-required, index]


def test_progressive_sampling_takes_the_epochs_of_its_phase() -> None:
    phase = replace(PHASE, views=(), second_sampler=None, epochs=3, sampler="progressive")
    rare = sum(int((samples["target"] >= 5).sum()) for samples in steps(phase))
    assert rare > sum(int((samples["target"] >= 5).sum()) for samples in steps(replace(phase, epochs=300)))
