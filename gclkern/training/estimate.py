"""How long a run will take, before it starts."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gclkern.training.batches import steps_of
from gclkern.training.recipes import Phase

_IMAGES = 16  # enough for their time to grow in proportion on a CPU, few enough for a large network there


def seconds_per_image(backbone: nn.Module, size: tuple[int, int, int], device: torch.device) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and backward pass, for an image of `size` (channels, height, width): the second of two tries.

    It works on a copy of the backbone and leaves torch's generators as they are.
    """
    backbone = copy.deepcopy(backbone).eval()
    images = torch.zeros(_IMAGES, *size, device=device)
    times = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):
            marks = [_now(device)]
            features: Tensor = backbone(images)
            marks.append(_now(device))
            features.sum().backward()
            marks.append(_now(device))
            times = [(mark - marks[0]) / _IMAGES for mark in marks[1:]]
    return times[0], times[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def estimated_seconds(phases: Sequence[Phase], training_images: int, test_images: int, per_image: tuple[float, float], eval_every: int | None) -> float:
    """Seconds of all phases on one process: their steps, and the evaluations between them."""
    evaluations = sum(phase.epochs / (eval_every or max(1, phase.epochs // 20)) for phase in phases)
    return step_seconds(phases, training_images, per_image) + evaluations * test_images * per_image[0]


def step_seconds(phases: Sequence[Phase], training_images: int, per_image: tuple[float, float]) -> float:
    """Seconds of the steps of all phases on one process."""
    forward, both = per_image
    total = 0.0
    for phase in phases:
        drawn = phase.epochs * steps_of(phase, training_images) * phase.batch_size * (1 + len(phase.views) + (phase.second_sampler is not None))
        total += drawn * (both if phase.trains_backbone else forward)
    return total


def duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> [duration(seconds) for seconds in (5, 80, 4000, 200_000)]
        ['less than a minute', '1 minute', '1.1 hours', '2.3 days']
    """
    if seconds < 60:
        return "less than a minute"
    for name, unit, limit in (("minute", 60, 3600), ("hour", 3600, 86_400)):
        if seconds < limit:
            amount = f"{seconds / unit:.0f}" if unit == 60 else f"{seconds / unit:.1f}"
            return f"{amount} {name}{'' if amount == '1' else 's'}"
    return f"{seconds / 86_400:.1f} days"
