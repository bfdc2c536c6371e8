"""The pieces of a training run: the network, seeds, ranks, stopping cleanly and prediction.

Whatever is random in a run is a pure function of (seed of the run, phase, epoch, step): the order of the samples, their augmentation, mixup, the noise of the
loss, dropout. So a checkpoint needs no state of a generator, and a run that is resumed from any step goes on bit by bit as it would have.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.centroids import ClassCentroids
from gclkern.data import DataSplits, ImageSet
from gclkern.layers import CosineLinear, unit_rows
from gclkern.metrics import Report, evaluate_logits


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed of 63 bits for a purpose, such as ("noise", epoch, step); unrelated for different seeds and purposes.

    Example:
        >>> derive_seed(0, "noise", 1) == derive_seed(0, "noise", 1), derive_seed(0, "noise", 1) == derive_seed(0, "noise", 2)
        (True, False)
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class ScaledClassifier(nn.Module):
    """A classifier with a factor for each class: what LWS learns and tau-norm sets (Kang et al., ICLR 2020, section 4.2).

    logit_ij = factor_j * (<f_i, w_j> + bias_j); with `normalize` f and w have unit length, as in a cosine classifier.
    """

    def __init__(self, in_features: int, num_classes: int, *, normalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.bias = None if normalize else nn.Parameter(torch.zeros(num_classes))
        self.factor = nn.Parameter(torch.ones(num_classes))
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        if self.normalize:
            return F.linear(unit_rows(features), unit_rows(self.weight), self.bias) * self.factor
        return F.linear(features, self.weight, self.bias) * self.factor


def build_head(kind: str, in_features: int, num_classes: int) -> nn.Module:
    """The classifier of a phase: "linear", "cosine", "scaled linear" or "scaled cosine"."""
    if kind == "linear":
        return nn.Linear(in_features, num_classes)
    if kind == "cosine":
        return CosineLinear(in_features, num_classes)
    return ScaledClassifier(in_features, num_classes, normalize=kind == "scaled cosine")


class Network(nn.Module):
    """A backbone, a classifier, and the scale that turns the classifier's output into logits."""

    backbone: Any  # a module with an attribute feature_dim
    head: Any
    scale: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.classify(self.backbone(images))

    def classify(self, features: Tensor) -> Tensor:
        """Cosines or logits in float32, whatever autocast says: bfloat16 would cost a third of their digits."""
        with torch.autocast(features.device.type, enabled=False):
            output: Tensor = self.head(features.float())
        return output


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an int or a finite float in [low, high]."""

    def parse(text: str) -> float:
        bounds = f"a {'whole ' if kind is int else ''}number " + (f"of at least {low}" if high == math.inf else f"from {low} to {high}")
        try:
            value: float = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}") from None
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


class Ranks:
    """This process among those that ``torchrun`` started; alone without it."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("--device cuda: torch sees no CUDA device here; leave --device out to run on the CPU")
            if local >= torch.cuda.device_count():
                found = torch.cuda.device_count()
                raise ValueError(f"process {local} of this machine has no GPU of its own, torch sees {found}; start torchrun with --nproc-per-node {found}")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @classmethod
    def alone(cls, device: torch.device) -> Ranks:
        """One process, whatever runs beside it."""
        ranks = object.__new__(cls)
        ranks.world, ranks.rank, ranks.device = 1, 0, device
        return ranks

    def share_buffers(self, network: nn.Module) -> None:
        """Give all ranks the first one's batch statistics, as DistributedDataParallel does before each forward pass."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """Rows (ceil(total / world), ...) of every rank, of which rank r holds r, r + world, ...; in their order (total, ...)."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a collective call."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def close(self) -> None:
        """Leave the process group; a collective call, at the end of a run in order.

        A process that fails just ends: with NCCL this would wait for the others, which wait for it, and nobody would see the error until a timeout.
        """
        if self.world > 1:
            dist.destroy_process_group()


@contextmanager
def stop_requests() -> Iterator[list[float]]:
    """A list that is empty until Ctrl-C or SIGTERM: the run then ends its step, writes a checkpoint and leaves. A second Ctrl-C interrupts at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun: what comes within a second counts once.
    """
    requests: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(time.monotonic())
        if requests[-1] - requests[0] > 1.0:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def predict(network: Network, images: ImageSet, ranks: Ranks, *, amp: torch.dtype | None = None, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits (M, C) and features (M, D) of all images, float32, in eval mode, on every rank."""
    network.eval()
    ranks.share_buffers(network)
    total = len(images)
    mine = [index % total for index in range(ranks.rank, -(-total // ranks.world) * ranks.world, ranks.world)]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    logits, features = [], []
    with torch.autocast(ranks.device.type, dtype=amp, enabled=amp is not None):
        for batch, _ in images.loader(batches, device=ranks.device):
            found = network.backbone(batch).float()
            features.append(found)
            logits.append(network.scale * network.classify(found))
    return ranks.gather_rows(torch.cat(logits), total), ranks.gather_rows(torch.cat(features), total)


@torch.no_grad()
def epoch_centroids(network: Network, loader: Iterator[tuple[Tensor, Tensor]], num_classes: int, ranks: Ranks) -> dict[str, Tensor]:
    """Mean feature and count of each class over an epoch's batches of all ranks, in eval mode: DRO-LT's "centroids" and "counts"."""
    network.eval()
    ranks.share_buffers(network)
    means = ClassCentroids(num_classes, network.backbone.feature_dim).to(ranks.device)
    for images, target in loader:
        means.update(network.backbone(images).float(), target)
    return dict(zip(("centroids", "counts"), means.compute(), strict=True))


def measure(network: Network, images: ImageSet, data: DataSplits, ranks: Ranks, amp: torch.dtype | None = None) -> Report:
    """The report of a network on a part of the data."""
    return evaluate_logits(predict(network, images, ranks, amp=amp)[0], images.labels, data.groups, data.num_classes)
