"""De-confound-TDE: a classifier of several normalised heads, whose predictions leave out what all features have in common."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.buffers import PreciseBuffers
from gclkern.devices import without_autocast
from gclkern.layers import unit_rows
from gclkern.validation import check_int, check_last_dimension, check_number


class TDEClassifier(PreciseBuffers):
    r"""The classifier of De-confound-TDE (Tang, Huang and Zhang, "Long-tailed classification by keeping the good and removing the bad momentum causal
    effect", NeurIPS 2020), as in its release.

    Features and weights are split into K heads of D / K columns. With x_k a head of a feature, u_k = x_k / \|x_k\| and w_jk that of class j, a logit is

        training:   z_ij = (scale / K) sum_k <w_jk, u_k> / (\|w_jk\| + gamma)
        prediction: z_ij = (scale / K) sum_k <w_jk, u_k - alpha <u_k, d_k> d_k> / (\|w_jk\| + gamma)

    d_k is the direction of head k of the mean feature, a moving average: momentum towards it favours frequent classes, and prediction subtracts that effect
    (the total direct effect). In training mode every forward pass updates the average, m <- momentum m + mean_i x_i; only its direction matters. Before the
    first pass it is 0 and nothing is subtracted.

    Prediction only changes the features, so any linear classifier or fused loss can follow: :meth:`directions` returns u or its correction, and
    :meth:`scaled_weight` the other factor. The logits are ``directions(features) @ scaled_weight().T``, to train with any loss over logits; the paper uses
    plain cross entropy. The fused form, which never holds the logits:

        gclkern.functional.linear_gcl_cross_entropy(classifier.directions(features), classifier.scaled_weight(), target, normalize=False, scale=1.0)

    Under torch.distributed, forward in training mode is a collective call: all ranks add the mean over the features of all of
    them, which must be equally many on each rank. The released code does not.

    Args:
        in_features: dimensions D of a feature, a multiple of `num_heads`.
        num_classes: classes C.
        num_heads: K; 2 in the paper.
        scale: 16 in the paper. In training the logits are within [-scale, scale], for any number of heads; in prediction only if alpha is at most 2.
        gamma: added to the norms of the weights, so that their length has an effect; 1 / 32 in the paper.
        alpha: strength of the correction. The paper takes 1.0 for CIFAR-10-LT, 1.5 for CIFAR-100-LT and 3.0 for ImageNet-LT and Places-LT. Training does not
            depend on it. It is a buffer: ``classifier.alpha.fill_(2.0)`` changes it.
        momentum: 0.9 is the release's for CIFAR-LT; on the large sets it has 1 - 0.1 min(1, 50 lr), set in each epoch. A buffer like alpha.
        device, dtype: of the weight, as in torch's layers. Buffers are float32.

    Attributes:
        weight: (C, D), learned; starts as uniform(-1, 1) / sqrt(D), as in the released code.
        mean_feature: (D,) float32, the moving average.

    Shapes: features (..., D) -> logits (..., C), in float32 or better.

    Raises:
        TypeError, ValueError: an argument out of its range; `in_features` that `num_heads` does not divide; features of another last dimension than D.

    Example:
        >>> import torch
        >>> classifier = TDEClassifier(8, 3)
        >>> features = torch.randn(5, 8) + 1
        >>> logits = classifier(features)
        >>> torch.equal(classifier.mean_feature, features.mean(0))
        True
        >>> classifier.eval()(features).shape
        torch.Size([5, 3])
    """

    mean_feature: Tensor
    alpha: Tensor
    momentum: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_heads: int = 2,
        scale: float = 16.0,
        gamma: float = 1 / 32,
        alpha: float = 1.5,
        momentum: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, 1)
        self.num_classes = check_int("num_classes", num_classes, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        if self.in_features % self.num_heads:
            raise ValueError(f"in_features must be a multiple of num_heads, got {in_features} and {num_heads}")
        self.scale = check_number("scale", scale, 0.0, open_low=True)
        self.gamma = check_number("gamma", gamma, 0.0)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.register_buffer("mean_feature", torch.zeros(in_features, device=device, dtype=torch.float32))
        # buffers, because a captured CUDA graph would keep numbers as they were; momentum only matters in training
        self.register_buffer("alpha", torch.full((), check_number("alpha", alpha, 0.0), device=device, dtype=torch.float32))
        self.register_buffer("momentum", torch.full((), check_number("momentum", momentum, 0.0, 1.0), device=device, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight again and forget the mean feature."""
        with torch.no_grad():
            self.weight.uniform_(-1.0, 1.0).mul_(self.in_features**-0.5)
            self.mean_feature.zero_()

    def directions(
        self,
        features: Tensor,  # (..., D)
    ) -> Tensor:  # (..., D)
        """In training mode the unit vectors u of all heads, and the mean feature is updated; in eval mode the corrected vectors u_k - alpha <u_k, d_k> d_k."""
        check_last_dimension("features", features, self.in_features)
        unit = unit_rows(self._heads(features))
        if self.training:
            self._update(features)
        else:
            mean = unit_rows(self._heads(self.mean_feature)).to(unit.dtype)
            unit = unit - self.alpha.to(unit.dtype) * (unit * mean).sum(-1, keepdim=True) * mean
        return unit.flatten(-2)

    def scaled_weight(self) -> Tensor:  # (C, D)
        """(scale / K) w_jk / (|w_jk| + gamma)."""
        heads = self._heads(self.weight)
        heads = heads.float() if heads.element_size() < 4 else heads
        # unit_rows, because with gamma = 0 a row of zeros would be 0 / 0
        shortened = heads / (torch.linalg.vector_norm(heads, dim=-1, keepdim=True) + self.gamma) if self.gamma > 0 else unit_rows(heads)
        return (self.scale / self.num_heads * shortened).flatten(-2)

    def forward(
        self,
        features: Tensor,  # (..., D)
    ) -> Tensor:  # (..., C)
        directions, weight = self.directions(features), self.scaled_weight()
        with without_autocast(features.device.type):
            dtype = torch.promote_types(directions.dtype, weight.dtype)
            return F.linear(directions.to(dtype), weight.to(dtype))

    @torch.no_grad()
    def _update(self, features: Tensor) -> None:
        rows = features.detach().reshape(-1, self.in_features)
        mean = rows.to(self.mean_feature.dtype).mean(0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.mean_feature.mul_(self.momentum).add_(mean)

    def _heads(self, rows: Tensor) -> Tensor:  # (..., K, D / K)
        return rows.unflatten(-1, (self.num_heads, -1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, num_heads={self.num_heads}, scale={self.scale:g}, gamma={self.gamma:g}"
