"""Contrastive losses: a softmax of each sample over the other samples of a batch, over class prototypes, or both.

Each passes its options to :func:`gclkern.functional.supervised_contrastive`. ProCo, which contrasts with distributions, is in proco.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gclkern.autograd import SupervisedContrast
from gclkern.devices import values_may_be_read
from gclkern.dispatch import BACKENDS, resolve_contrast_backend
from gclkern.functional import supervised_contrastive
from gclkern.kernels.terms import statistics_dtype
from gclkern.options import Backend, Reduction
from gclkern.validation import REDUCTIONS, check_choice, check_matrix, check_prototypes, check_target, check_temperature

if TYPE_CHECKING:
    from gclkern.losses.base import same_signature


class _ContrastiveLoss(nn.Module):
    """The options of :func:`gclkern.functional.supervised_contrastive` that stay the same from batch to batch."""

    def __init__(self, *, temperature: float = 0.1, reduction: Reduction = "mean", backend: Backend = "auto") -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        check_choice("backend", backend, BACKENDS)
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "reduction": self.reduction, "backend": self.backend}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


_ContrastiveLoss.__init__.__qualname__ = "SupConLoss.__init__"


class SupConLoss(_ContrastiveLoss):
    r"""Supervised contrastive loss (Khosla et al., "Supervised contrastive learning", NeurIPS 2020, Eq. 2).

        loss_i = log sum_{k != i} exp(<x_i, x_k> / temperature) - mean over p != i of class y_i of <x_i, x_p> / temperature

    Give it all views of a batch: ``features=torch.cat(views)``, ``target=target.repeat(len(views))``. A sample that is the only one of its class is left out of
    the loss.

    Args:
        temperature: 0.1 is the paper's.
        reduction, backend: as in :func:`gclkern.functional.supervised_contrastive`.

    Shapes: features (N, D), which are normalised here, target (N,) int64 -> () for "mean" and "sum", (N,) for "none".

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit.

    Example:
        >>> import torch
        >>> from gclkern import SupConLoss
        >>> views = torch.randn(2, 8, 16, requires_grad=True)
        >>> SupConLoss()(views.flatten(0, 1), torch.arange(8).repeat(2)).backward()
        >>> SupConLoss(temperature=1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))  # log(e + 2) - 1
        tensor(0.5514)
    """

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
    ) -> Tensor:
        return supervised_contrastive(features, target, **self._options())

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...


class BalancedContrastiveLoss(_ContrastiveLoss):
    r"""Balanced contrastive loss (Zhu et al., "Balanced contrastive learning for long-tailed visual recognition", CVPR 2022).

    The keys include a prototype of each class, so that every class is in every batch. The denominator takes the mean over the keys of a class instead of their
    sum, so that all classes count alike. With m_c keys of class c:

        loss_i = log sum_{k != i} exp(<x_i, k> / temperature) / (m_c(k) - [c(k) = y_i]) - mean over keys p != i of class y_i of <x_i, p> / temperature

    The paper trains with 2 logit_adjusted + 0.6 balanced_contrastive on CIFAR-LT, where the contrastive features are two views, each through an MLP, and the
    prototypes are the classifier's weight rows through another.

    Args:
        temperature: 0.1 is the paper's for CIFAR-LT, 0.07 that for the large sets.
        reduction, backend: as in :func:`gclkern.functional.supervised_contrastive`.

    Shapes: features (N, D) and prototypes (C, D), which are normalised here, target (N,) int64 -> () for "mean" and "sum", (N,) for "none".

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit.

    Example:
        >>> import torch
        >>> from gclkern import BalancedContrastiveLoss
        >>> features, prototypes = torch.randn(8, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
        >>> BalancedContrastiveLoss()(features, prototypes, torch.arange(8) % 5).backward()
        >>> BalancedContrastiveLoss(temperature=1.0)(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))  # log(e + 1) - 1
        tensor(0.3133)
    """

    def forward(
        self,
        features: Tensor,  # (N, D)
        prototypes: Tensor,  # (C, D)
        target: Tensor,  # (N,)
    ) -> Tensor:
        check_matrix("features", features)
        num_classes = check_prototypes(prototypes, features).shape[0]
        label = check_target("target", target, features.shape[0], num_classes, None, "features", features)
        # one for each class's prototype, plus its samples; the last entry counts labels that are out of range, which are there only if they cannot be read
        counts = torch.ones(num_classes + 1, dtype=statistics_dtype(features), device=features.device)
        inside = label if values_may_be_read(label) else torch.where(label.clamp(0, num_classes - 1) == label, label, num_classes)
        counts.index_put_((inside,), counts.new_ones(()), accumulate=True)
        chosen = resolve_contrast_backend(self.backend, features, self.temperature)
        options = (self.temperature, True, True, self.reduction, chosen)
        return SupervisedContrast.apply(features, prototypes, label, counts[:num_classes], *options)

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...


class PrototypicalContrastiveLoss(_ContrastiveLoss):
    r"""Prototypical supervised contrastive loss, PSC.

    (Wang et al., "Contrastive learning based hybrid networks for long-tailed image classification", CVPR 2021.)

        loss_i = log sum_{c != y_i} exp(<x_i, q_c> / temperature) - <x_i, q_{y_i}> / temperature

    The denominator leaves out the sample's own class, so the loss may be negative and never saturates.

    Args:
        temperature: 0.1 is the paper's for CIFAR-100-LT, 1 that for CIFAR-10-LT.
        reduction, backend: as in :func:`gclkern.functional.supervised_contrastive`.

    Shapes: features (N, D) and prototypes (C, D), which are normalised here, target (N,) int64 -> () for "mean" and "sum", (N,) for "none". The weight of a
    :class:`gclkern.CosineLinear` can be the learned prototypes.

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit.

    Example:
        >>> import torch
        >>> from gclkern import CosineLinear, PrototypicalContrastiveLoss
        >>> prototypes = CosineLinear(16, 5)
        >>> PrototypicalContrastiveLoss()(torch.randn(8, 16), prototypes.weight, torch.arange(8) % 5).backward()
        >>> PrototypicalContrastiveLoss(temperature=1.0)(torch.eye(3), torch.eye(3), torch.arange(3))  # log(2) - 1
        tensor(-0.3069)
    """

    def forward(
        self,
        features: Tensor,  # (N, D)
        prototypes: Tensor,  # (C, D)
        target: Tensor,  # (N,)
    ) -> Tensor:
        return supervised_contrastive(features, target, prototypes=prototypes, include_samples=False, include_own_class=False, **self._options())

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...
