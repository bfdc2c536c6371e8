"""Second stages without gradients: nearest class means and tau-normalised classifiers (Kang et al., ICLR 2020, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.training.data import DataSplits
from gclkern.training.evaluation import epoch_centroids, predict
from gclkern.training.network import Network, ScaledClassifier, replace_head
from gclkern.training.processes import Processes
from gclkern.training.recipes import COSINE_SCALE


def retrain_without_gradients(kind: str, network: Network, data: DataSplits, processes: Processes, tau: float | None) -> None:
    """The phase "ncm" or "tau-norm". If `tau` is None it is searched on the held-out images, or 1 without them."""
    if kind == "ncm":
        nearest_class_mean(network, data, processes)
        return
    if tau is None and data.holdout is not None:
        tau = search_tau(network, predict(network, data.holdout, processes)[1], data.holdout.labels.to(processes.device))
    tau_normalise(network, 1.0 if tau is None else tau)


@torch.no_grad()
def nearest_class_mean(network: Network, data: DataSplits, processes: Processes) -> None:
    """Replace the classifier's weights by the class means of the training features, computed without augmentation."""
    indices = range(processes.rank, len(data.train), processes.world)
    batches = [indices[start : start + 500] for start in range(0, len(indices), 500)]
    means = epoch_centroids(network, data.train.loader(batches, device=processes.device), data.num_classes, processes)["centroids"]
    replace_head(network, "cosine", keep=False)
    network.head.weight.copy_(means)
    network.scale.fill_(COSINE_SCALE)


@torch.no_grad()
def tau_normalise(network: Network, tau: float) -> None:
    """Classify by w_j / |w_j|^tau without bias: tau = 0 keeps the weights, tau = 1 gives all classes the same norm.

    The head is a :class:`ScaledClassifier`. For a cosine classifier tau = 1 changes nothing; other values use norms that its loss did not train.
    """
    head = network.head
    assert isinstance(head, ScaledClassifier)
    norms = head.weight.norm(dim=1).clamp(min=1e-12)
    head.factor.copy_(norms ** (1 - tau if head.normalize else -tau))
    if head.bias is not None:
        head.bias.zero_()


@torch.no_grad()
def search_tau(network: Network, features: Tensor, labels: Tensor) -> float:
    """The tau among 0, 0.05, ..., 2 with the best balanced accuracy on held-out samples; among equals the one nearest to 1."""
    counts = labels.bincount(minlength=network.head.weight.shape[0])
    share = 1 / counts[labels]

    def score(tau: float) -> tuple[float, float]:
        tau_normalise(network, tau)
        return float((share * (network.classify(features).argmax(1) == labels)).sum()), -abs(tau - 1)

    return max((step / 20 for step in range(41)), key=score)
