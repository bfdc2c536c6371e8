"""Second stages without gradients.

Nearest class means and tau-normalised classifiers (Kang et al., ICLR 2020, section 4.2), and logit adjustment of a trained network (Menon et al., ICLR 2021,
section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gclkern.layers import unit_rows
from gclkern.training.batches import plain_batches
from gclkern.training.data import DataSplits
from gclkern.training.evaluation import epoch_centroids, predict
from gclkern.training.heads import ScaledClassifier
from gclkern.training.network import Network, replace_head
from gclkern.training.processes import Processes
from gclkern.training.recipes import COSINE_SCALE
from gclkern.weights import log_prior


def retrain_without_gradients(kind: str, network: Network, data: DataSplits, processes: Processes, tau: float | None) -> None:
    """The phase "ncm", "tau-norm" or "post-hoc-la". If `tau` is None it is searched on the held-out images, or 1 without them."""
    if kind == "ncm":
        nearest_class_mean(network, data, processes)
        return
    if kind == "post-hoc-la":
        apply = logit_adjustment(network, log_prior(data.class_counts))
    else:
        assert kind == "tau-norm", kind
        apply = partial(tau_normalise, network)
    if tau is None and data.holdout is not None:
        tau = search_tau(network, apply, predict(network, data.holdout, processes)[1], data.holdout.labels.to(processes.device))
    apply(1.0 if tau is None else tau)


@torch.no_grad()
def nearest_class_mean(network: Network, data: DataSplits, processes: Processes) -> None:
    """Replace the classifier by the nearest class mean of the training features without augmentation, centred by their mean over all samples and normalised."""
    means, counts = epoch_centroids(network, plain_batches(data.train, processes), data.num_classes, processes).values()
    centre = (means.double() * counts[:, None]).sum(0).div(counts.sum()).float()

    def centred(network: Network, images: Tensor) -> Tensor:
        return unit_rows(network.backbone(images).float() - centre)

    normalised = epoch_centroids(network, plain_batches(data.train, processes), data.num_classes, processes, centred)
    replace_head(network, "nearest mean", keep=False)
    network.head.weight.copy_(normalised["centroids"])
    network.head.centre.copy_(centre)
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
def logit_adjustment(network: Network, prior: Tensor) -> Callable[[float], None]:
    """A function of tau that sets the classifier's bias so that the logits are z_ij - tau log prior_j; `prior` is log prior (C,)."""
    before = network.head.bias.clone()
    step = prior.to(before.device) / network.scale

    @torch.no_grad()
    def apply(tau: float) -> None:
        network.head.bias.copy_(before - tau * step)

    return apply


@torch.no_grad()
def search_tau(network: Network, apply: Callable[[float], None], features: Tensor, labels: Tensor) -> float:
    """The tau among 0, 0.05, ..., 2 with the best balanced accuracy on held-out samples after `apply(tau)`; among equals the one nearest to 1."""
    counts = labels.bincount(minlength=network.head.weight.shape[0])
    share = 1 / counts[labels]

    def score(tau: float) -> tuple[float, float]:
        apply(tau)
        return float((share * (network.classify(features).argmax(1) == labels)).sum()), -abs(tau - 1)

    return max((step / 20 for step in range(41)), key=score)
