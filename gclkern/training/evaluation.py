"""Evaluation: overall, group and class accuracy, calibration, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gclkern.centroids import ClassCentroids
from gclkern.training.data import DataSplits, ImageSet
from gclkern.training.data.groups import GROUPS
from gclkern.training.network import Network
from gclkern.training.processes import Processes

_BINS = 15
_ROWS = 4096
_WIDTH = 9  # of a column of the table


class Calibrated(NamedTuple):
    """The calibration of logits divided by a temperature, which does not change accuracies."""

    temperature: float
    ece: float
    nll: float


@dataclass(frozen=True)
class Report:
    """The results of a model on a test set, in [0, 1]."""

    top1: float
    groups: dict[str, float]  # "many", "medium", "few": mean of the accuracies of the group's classes; an empty group is absent
    per_class: list[float]  # NaN for a class without test samples
    ece: float  # expected calibration error
    nll: float  # mean negative log-likelihood, in nats
    calibrated: Calibrated | None = None  # where a temperature was fitted

    @property
    def balanced(self) -> float:
        """Balanced accuracy: the mean of the class accuracies, equal to top-1 on a balanced test set. NaN without classes."""
        known = [share for share in self.per_class if not math.isnan(share)]
        return sum(known) / len(known) if known else math.nan

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the balanced accuracy; values that are not finite become None, because JSON has no NaN."""
        calibrated = None if self.calibrated is None else self.calibrated._asdict()
        values: dict[str, Any] = _without_nan({**asdict(self), "calibrated": calibrated, "balanced": self.balanced})
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`as_dict`."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        numbers = {name: math.nan if known[name] is None else known[name] for name in ("ece", "nll")}
        per_class = [math.nan if share is None else share for share in known["per_class"]]
        calibrated = None if known["calibrated"] is None else Calibrated(**known["calibrated"])
        return cls(**{**known, **numbers, "per_class": per_class, "calibrated": calibrated})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_logits(
    logits: Tensor, labels: Tensor, groups: Mapping[str, Sequence[int]], num_classes: int, *, temperature: float | None = None
) -> Report:  # fmt: skip
    """The report on logits (M, C) with labels (M,); `groups` holds class indices. With a `temperature`, it includes the calibration of logits / temperature.

    The calibration error is the sum over 15 confidence bins of equal width of |accuracy - mean confidence| * share of samples (Guo et al., "On
    calibration of modern neural networks", ICML 2017, Eq. 3).

    A row with NaN or +Inf has no probabilities: it counts as wrong, and the calibration error and the negative log-likelihood become NaN.

    Raises:
        ValueError: shapes that do not match, no samples, or a label outside [0, C).

    Example:
        >>> report = evaluate_logits(torch.tensor([[4.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]), {"many": [0], "few": [1]}, 2)
        >>> report.top1, report.groups, report.per_class
        (0.5, {'many': 1.0, 'few': 0.0}, [1.0, 0.0])
    """
    if logits.dim() != 2 or logits.shape[1] != num_classes or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (M, {num_classes}) and labels (M,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if labels.numel() == 0:
        raise ValueError("there are no samples to evaluate")
    labels = labels.to(logits.device)
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
    right, ece, nll = _judge(logits, labels)
    hits = torch.zeros(num_classes, dtype=torch.float64, device=logits.device).index_add_(0, labels, right)
    per_class = hits / labels.bincount(minlength=num_classes)  # 0 / 0 is NaN: a class without test samples
    shares = {name: float(per_class[list(classes)].nanmean()) for name, classes in groups.items()}
    return Report(
        top1=float(right.mean()),
        groups={name: share for name, share in shares.items() if not math.isnan(share)},
        per_class=per_class.tolist(),
        ece=ece,
        nll=nll,
        calibrated=None if temperature is None else Calibrated(temperature, *_judge(logits / temperature, labels)[1:]),
    )


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """Whether the prediction of each row is right (M,) float64, the expected calibration error and the mean negative log-likelihood."""
    parts = [_judge_rows(rows, targets) for rows, targets in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)]
    confidence, right, nll = (torch.cat(column).double() for column in zip(*parts, strict=True))
    bins = (confidence * _BINS).ceil().sub(1).clamp(0, _BINS - 1).nan_to_num(0).long()  # NaN goes to bin 0; the result is NaN anyway
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=logits.device).index_add_(0, bins, right - confidence)
    return right, float(gaps.abs().sum() / labels.numel()), float(nll.mean())


def _judge_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, whether the prediction is right, and the negative log-likelihood of each row."""
    log_shares = logits.float().log_softmax(1)
    best, predicted = log_shares.max(1)
    return best.exp(), (predicted == labels) & ~best.isnan(), -log_shares.gather(1, labels[:, None]).squeeze(1)


def format_table(rows: Sequence[tuple[str, Report]]) -> str:
    """A table of reports in percent, one row each; a dash where a group is empty or a value is NaN.

    If a report has a temperature, two more columns show the calibration after division by it.

    Example:
        >>> print(format_table([("cross-entropy", Report(0.8, {"many": 0.95, "few": 0.6}, [0.95, 0.6], 0.1, 0.7))]))
                         top-1 balanced     many   medium      few      ECE      NLL
        cross-entropy    80.00    77.50    95.00        -    60.00    10.00    0.700
        ECE and NLL are without a temperature. With --holdout 0.1 one is fitted on held-out images; it changes no prediction.
    """
    width = max((len(name) for name, _ in rows), default=0)
    calibrated = any(report.calibrated is not None for _, report in rows)
    titles = ("top-1", "balanced", *GROUPS, "ECE", "NLL", *(("ECE/T", "NLL/T") if calibrated else ()))
    lines = [" " * width + "".join(f"{title:>{_WIDTH}}" for title in titles)]
    for name, report in rows:
        shares = [report.top1, report.balanced, *(report.groups.get(group) for group in GROUPS), report.ece]
        cells = [*map(_percent, shares), f"{report.nll:.3f}"]
        if calibrated:
            cells += ["-", "-"] if report.calibrated is None else [_percent(report.calibrated.ece), f"{report.calibrated.nll:.3f}"]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    if calibrated:
        lines.append("ECE/T and NLL/T: after division of the logits by a temperature, fitted on images that were not trained on; it changes no prediction.")
    else:
        lines.append("ECE and NLL are without a temperature. With --holdout 0.1 one is fitted on held-out images; it changes no prediction.")
    return "\n".join(lines)


def share_interval(share: float, counts: Sequence[int]) -> tuple[float, float]:
    """The 95% interval of an accuracy that is the mean over classes with these numbers of test images.

    Wilson's score interval (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927), with the number of images that a single
    class would need for the same variance: C^2 / sum_c 1 / n_c. Classes without test images do not count.

    Example:
        >>> [round(end, 3) for end in share_interval(0.9, [50, 50])]
        [0.826, 0.945]
    """
    known = [count for count in counts if count]
    size = len(known) ** 2 / sum(1 / count for count in known)
    square = 1.959964**2 / size
    middle, half = (share + square / 2) / (1 + square), math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.2f}"


@torch.no_grad()
def predict(network: Network, images: ImageSet, processes: Processes, *, amp: torch.dtype | None = None, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits (M, C) and features (M, D) of all images, float32, in eval mode, on every rank."""
    network.eval()
    total = len(images)
    mine = [index % total for index in range(processes.rank, -(-total // processes.world) * processes.world, processes.world)]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    logits, features = [], []
    with torch.autocast(processes.device.type, dtype=amp, enabled=amp is not None):
        for batch, _ in images.loader(batches, device=processes.device):
            found = network.backbone(batch).float()
            features.append(found)
            logits.append(network.scale * network.classify(found))
    return processes.gather_rows(torch.cat(logits), total), processes.gather_rows(torch.cat(features), total)


@torch.no_grad()
def epoch_centroids(
    network: Network, loader: Iterator[tuple[Tensor, Tensor]], num_classes: int, processes: Processes,
    features: Callable[[Network, Tensor], Tensor] = lambda network, images: network.backbone(images), *, amp: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean and count of each class over an epoch's batches of all processes, in eval mode, as "centroids" and "counts".

    Args:
        features: from the network and images to what is averaged, (N, D); default the features.
        amp: the type of autocast in which the features are computed, that of the training whose loss compares with the means; None for none. The means are
            float32 in any case.
    """
    network.eval()
    means: ClassCentroids | None = None
    for images, target in loader:
        with torch.autocast(processes.device.type, dtype=amp, enabled=amp is not None):
            found = features(network, images)
        found = found.float()
        if means is None:
            means = ClassCentroids(num_classes, found.shape[1]).to(processes.device)
        means.update(found, target)
    assert means is not None  # every process has a batch
    return dict(zip(("centroids", "counts"), means.compute(), strict=True))


def evaluate(
    network: Network, images: ImageSet, data: DataSplits, processes: Processes, amp: torch.dtype | None = None, *, temperature: float | None = None
) -> Report:  # fmt: skip
    """The report of a network on `images`, a part of `data`."""
    logits, _ = predict(network, images, processes, amp=amp)
    return evaluate_logits(logits, images.labels, data.groups, data.num_classes, temperature=temperature)
