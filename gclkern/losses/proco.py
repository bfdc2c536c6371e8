"""Probabilistic contrastive learning: each class is a distribution on the sphere, and its contrast with a sample is a function of one cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gclkern.autograd import VMFContrast
from gclkern.buffers import RankState
from gclkern.devices import without_autocast
from gclkern.dispatch import backend_without_loops, call_operator, resolve_backend
from gclkern.functional import gcl_cross_entropy
from gclkern.kernels.terms import statistics_dtype
from gclkern.layers import unit_rows
from gclkern.losses.contrastive import _ContrastiveLoss
from gclkern.options import Backend, Reduction
from gclkern.validation import ClassCounts, check_int, check_matrix, check_number, check_same_device, check_target, refuse_gradient
from gclkern.weights import log_prior

if TYPE_CHECKING:
    from gclkern.losses.base import same_signature

_MOST_CONCENTRATED = 1e5  # kappa of a class whose features are all equal
_SMALLEST_DIM = 16  # the asymptotic series is off by 6e-4 there, and by less in more dimensions


def vmf_contrast(cosine: Tensor, concentration: Tensor, dim: int, temperature: float, backend: Backend = "auto") -> Tensor:
    r"""Logarithm of the mean of exp(<x, k> / temperature) over keys k that are von Mises-Fisher distributed, for unit vectors x and each class.

        F(k_ij) - F(kappa_j),    F(k) = log I_v(k) - v log k,    k_ij^2 = kappa_j^2 + 1 / t^2 + 2 kappa_j cosine_ij / t,    v = dim / 2 - 1

    with the modified Bessel function I_v by its uniform asymptotic series with one correction (Abramowitz and Stegun, 9.7.7). The difference is taken without
    cancellation.

    Args:
        cosine: of a sample and the mean direction of a class (N, C), float32 or float64. May require a gradient.
        concentration: kappa_j (C,), at least 0.
        dim: dimensions D of the sphere's space, at least 16. The error is below 6e-4 at 16, 4e-5 at 64, 1e-5 at 128, 2e-7 at 1024.
        temperature: t.
        backend: "auto" (kernels on a GPU, of NVIDIA's from compute capability 8.0 on; torch elsewhere and for float64), "triton" or "torch".

    Returns:
        (N, C), in the dtype of `cosine`.

    Raises:
        TypeError, ValueError: `cosine` is not a floating-point matrix, `concentration` requires a gradient, or the backend cannot run.

    Example:
        >>> import torch
        >>> from gclkern.losses.proco import vmf_contrast
        >>> contrast = vmf_contrast(torch.tensor([[0.9, 0.0]]), torch.tensor([50.0, 50.0]), dim=32, temperature=0.1)
        >>> bool(contrast[0, 0] > contrast[0, 1])
        True
    """
    check_matrix("cosine", cosine)
    refuse_gradient("concentration", concentration)
    chosen = backend_without_loops(backend, cosine, "vmf_contrast")
    return VMFContrast.apply(cosine, concentration, dim / 2 - 1, temperature, chosen)


class ProCoLoss(_ContrastiveLoss, RankState):
    r"""Probabilistic contrastive loss (Du, Wang, Song and Huang, "Probabilistic contrastive learning for long-tailed visual recognition", TPAMI 2024).

    The features of a class are von Mises-Fisher distributed with mean direction mu_c and concentration kappa_c. Contrast with infinitely many keys of every
    class is then a closed form, and the loss is logit adjustment over it:

        M_c = mean unit feature of class c,    R = \|M_c\|,    mu_c = M_c / R,    kappa_c = D R / (1 - R^2), at most 1e5
        z_c = F(k_c) - F(kappa_c),    F(k) = log I_v(k) - v log k,    v = D / 2 - 1,    k_c^2 = kappa_c^2 + 1 / t^2 + 2 kappa_c <x, mu_c> / t
        loss = cross_entropy(z + tau * log prior, target)

    t is the temperature and I_v the modified Bessel function, computed by its uniform asymptotic series (off by less than 6e-4 at D = 16, 1e-5 at D = 128).

    The means are averages of the features that this module is given in training mode: over the previous epoch and the current one so far, as in the release.
    Call :meth:`start_epoch` at the start of each epoch. A class that was never seen has concentration 0. Under data parallelism each rank averages its own
    samples; :func:`gclkern.distributed.gather_batch` gives it those of all ranks. Nothing of size (N, C, D) is ever in memory.

    Args:
        class_counts: training samples of each class (C,), all positive.
        dim: D, columns of the features, at least 16, below which the series is not accurate enough; 128 in the paper.
        temperature: 0.1 is the paper's for CIFAR-LT.
        tau: strength of the logit adjustment; 1 is the paper's.
        reduction, backend: as in :func:`gclkern.functional.gcl_cross_entropy`.

    Shapes: features (N, D), which are normalised here, target (N,) int64 -> () for "mean" and "sum", (N,) for "none".

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit.

    Example:
        >>> import torch
        >>> from gclkern import ProCoLoss
        >>> criterion = ProCoLoss([500, 50, 5], dim=32)
        >>> criterion.start_epoch()
        >>> features = torch.randn(8, 32, requires_grad=True)
        >>> criterion(features, torch.arange(8) % 3).backward()
        >>> fresh = ProCoLoss([75, 25], dim=16).eval()
        >>> fresh(torch.randn(4, 16), torch.tensor([1, 1, 1, 1]))  # no class was seen yet, so only the prior counts: log(4)
        tensor(1.3863)
    """

    sums: Tensor  # (2, C, D) of unit features: since the start of the previous epoch, and since the start of this one
    counts: Tensor  # (2, C)
    bias: Tensor  # (C,)

    def __init__(
        self,
        class_counts: ClassCounts,
        dim: int,
        *,
        temperature: float = 0.1,
        tau: float = 1.0,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, backend=backend)
        bias = check_number("tau", tau) * log_prior(class_counts)
        self.num_classes, self.dim = bias.numel(), check_int("dim", dim, _SMALLEST_DIM)
        self.register_buffer("bias", bias, persistent=False)
        self.add_state("sums", torch.zeros((2, self.num_classes, self.dim), dtype=torch.float32, device=bias.device))
        self.add_state("counts", torch.zeros((2, self.num_classes), dtype=torch.int64, device=bias.device))

    def start_epoch(self) -> None:
        """Drop the samples from before the epoch that has just ended."""
        self.sums[0] = self.sums[1]
        self.counts[0] = self.counts[1]
        self.sums[1].zero_()
        self.counts[1].zero_()

    @torch.no_grad()
    def distributions(self) -> tuple[Tensor, Tensor]:
        """Mean directions (C, D), 0 for a class that was never seen, and concentrations (C,)."""
        means = self.sums[0] / self.counts[0].clamp(min=1)[:, None]
        length = torch.linalg.vector_norm(means, dim=1).clamp(max=1.0)
        concentration = (self.dim * length / (1 - length.square())).clamp(max=_MOST_CONCENTRATED)
        return unit_rows(means), concentration

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
    ) -> Tensor:
        check_matrix("features", features)
        if features.shape[1] != self.dim:
            raise ValueError(f"features must have {self.dim} columns, got shape {tuple(features.shape)}")
        check_same_device("features", features, "this loss", self.sums)
        target = check_target("target", target, features.shape[0], self.num_classes, None, "features", features)
        unit = unit_rows(features)
        if self.training:
            detached = unit.detach().float()
            sums, counts = call_operator("segment_sums", resolve_backend("auto", detached), detached, target, self.num_classes)
            self.sums += sums
            self.counts += counts
        directions, concentration = self.distributions()
        dtype = statistics_dtype(features)
        with without_autocast(features.device.type):
            cosine = unit @ directions.to(dtype).t()
        logits = vmf_contrast(cosine, concentration.to(dtype), self.dim, self.temperature, "auto" if self.backend == "cpu" else self.backend)
        return gcl_cross_entropy(logits, target, scale=1.0, bias=self.bias, reduction=self.reduction, backend=self.backend)

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, dim={self.dim}, {super().extra_repr()}"
