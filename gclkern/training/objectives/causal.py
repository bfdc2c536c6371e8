"""De-confound-TDE: cross entropy, and the settings of its classifier that depend on the data set and on the learning rate."""

from __future__ import annotations

from gclkern.losses import FocalLoss
from gclkern.training.network import Network
from gclkern.training.objectives.classification import Classification


class CausalClassification(Classification):
    """Cross entropy of a :class:`gclkern.TDEClassifier`, which updates its mean feature itself.

    Args:
        alpha: strength of the correction in predictions. 1 is the release's for CIFAR-10-LT, and by its rule of thumb alpha times the mean cosine between
            features and their mean is about 1.
        momentum_by_rate: whether the momentum of the mean feature is 1 - 0.1 min(1, 50 rate), which averages over longer as the learning rate falls; else it
            is 0.9.
    """

    def __init__(self, alpha: float = 1.0, *, momentum_by_rate: bool = False) -> None:
        super().__init__(FocalLoss(gamma=0.0))
        self.alpha, self.momentum_by_rate = alpha, momentum_by_rate

    def set_epoch(self, network: Network, epoch: int, epochs: int, rate: float) -> None:
        network.head.alpha.fill_(self.alpha)
        network.head.momentum.fill_(1.0 - 0.1 * (min(1.0, 50.0 * rate) if self.momentum_by_rate else 1.0))
