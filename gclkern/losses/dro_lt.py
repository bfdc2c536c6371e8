"""The DRO-LT bound as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from gclkern.buffers import PreciseBuffers
from gclkern.dispatch import BACKENDS
from gclkern.functional import dro_lt_loss
from gclkern.options import Backend, LearnedEpsilon, Reduction
from gclkern.validation import REDUCTIONS, ClassCounts, check_choice, check_class_counts, check_number, check_values, class_vector, device_of

_INITIAL_EPSILON = 0.5

if TYPE_CHECKING:
    from gclkern.losses.base import same_signature


class DROLTLoss(PreciseBuffers):
    r"""The DRO-LT bound (Samuel and Chechik, "Distributional robustness loss for long-tail learning", ICCV 2021) as a module.

        l_cj   = -(\|mu_c - z_j\|_2 + 2 epsilon_c [y_j == c]) / temperature
        loss_c = mean over i in B with y_i = c of (logsumexp_{j in B} l_cj - l_ci)
        loss   = sum_{c in B} w_c loss_c / sum_{c in B} w_c

    with the features z and labels y of a batch B, and class centroids mu; see :func:`gclkern.functional.dro_lt_loss`. It is added to a cross entropy: the paper
    weights the two by lam and 1 - lam, the released recipe by 1 and 1.

    It follows the paper. Differences from the released code:

    - The paper's bound has 2 epsilon; the release subtracts epsilon once. So the learned epsilon starts at 0.5 here, and at 1 in the release.
    - max(epsilon, 0) is used. The release lets epsilon go negative, where the bound no longer holds.
    - Each sample gets the epsilon of its class. The release applies epsilons in batch order to rows in class order, so samples get those of other classes.
    - The logarithm of the sum of exponentials is stable. The release takes log(sum(exp)), which is -inf for distances over about 100 temperatures.
    - Class weights are normalised over the classes of the batch; the release includes absent classes.
    - Centroids are an argument, computed for example once per epoch by :class:`gclkern.ClassCentroids`. The release computes them from all features in every
      batch.

    The gradient of a learned epsilon is never negative, 2 / temperature times a sum of probabilities, so gradient descent can only decrease it, down to 0.
    Weight decay, which also decreases it, is part of the recipe: put this parameter in the optimizer's group with weight decay, although it is a vector.

    Args:
        class_counts: training images of each class (C,), all positive.
        epsilon: "learned", one parameter for each class (the module then owns a parameter: give it to an optimizer); "sqrt", the constants
            base_epsilon / sqrt(class_counts); or a number >= 0 for all classes.
        temperature: T > 0; 1 in the paper.
        base_epsilon: initial value of "learned", or the numerator of "sqrt"; None is 0.5, which with the factor 2 equals the release's 1.
        class_weight: weight of each class (C,), >= 0; None gives all the same weight.
        reduction: "mean", "sum" or "none", see :func:`gclkern.functional.dro_lt_loss`.
        backend: "auto", "triton", "cpu" or "torch".

    Shapes: features (N, D), target (N,) int64, centroids (C, D), counts (C,) or None -> loss () for "mean" and "sum", (N,) for "none".

    Raises:
        TypeError, ValueError: when built, for any argument above; when called, for tensors that do not fit. Messages name the argument and the value.

    Example:
        >>> import torch
        >>> from gclkern import ClassCentroids, DROLTLoss
        >>> features, target = torch.randn(8, 16, requires_grad=True), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        >>> centroids = ClassCentroids(num_classes=3, dim=16)
        >>> centroids.update(features, target)
        >>> loss = DROLTLoss([500, 50, 5])(features, target, *centroids.compute())
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([8, 16])
    """

    class_weight: Tensor | None
    epsilon: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        epsilon: LearnedEpsilon | float = "learned",
        temperature: float = 1.0,
        base_epsilon: float | None = None,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        counts = check_class_counts(class_counts).to(device_of(class_counts))
        if isinstance(epsilon, str):
            check_choice("epsilon", epsilon, get_args(LearnedEpsilon))
            base = _INITIAL_EPSILON if base_epsilon is None else check_number("base_epsilon", base_epsilon, 0.0)
        elif base_epsilon is not None:
            raise ValueError(f'base_epsilon is given ({base_epsilon}) but serves only epsilon="learned" or "sqrt", and epsilon is {epsilon}')
        if epsilon == "learned":
            self._base = base
            self.epsilon = nn.Parameter(torch.empty_like(counts, dtype=torch.float32))
            self.reset_parameters()
        else:
            value = base / counts.sqrt() if epsilon == "sqrt" else counts.new_tensor(check_number("epsilon", epsilon, 0.0))
            self.register_buffer("epsilon", value.to(torch.float32), persistent=False)
        weight = class_vector("class_weight", class_weight, counts.numel(), "class_counts", counts, torch.float32)
        if weight is not None:
            check_values("class_weight", weight, 0.0)
        self.register_buffer("class_weight", None if weight is None else weight.detach().clone(), persistent=False)
        self.mode = epsilon if isinstance(epsilon, str) else "constant"
        self.num_classes = counts.numel()
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        check_choice("backend", backend, BACKENDS)
        self.backend = backend

    def reset_parameters(self) -> None:
        """Let a learned epsilon start again. Call it after ``.to_empty()``, as for torch's layers."""
        if isinstance(self.epsilon, nn.Parameter):
            nn.init.constant_(self.epsilon, self._base)

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        centroids: Tensor,  # (C, D)
        counts: Tensor | None = None,  # (C,)
    ) -> Tensor:
        """The loss of a batch. With `counts`, the sample counts of the centroids, classes without samples are left out of the loss."""
        if isinstance(centroids, Tensor) and centroids.dim() == 2 and centroids.shape[0] != self.num_classes:
            raise ValueError(f"centroids must have {self.num_classes} rows, one for each of class_counts, got shape {tuple(centroids.shape)}")
        weight = self.class_weight
        if counts is not None:
            if not isinstance(counts, Tensor):
                raise TypeError(f"counts must be a tensor or None, got {type(counts).__name__}")
            if counts.shape != (self.num_classes,):
                raise ValueError(f"counts must have shape ({self.num_classes},), one for each class, got {tuple(counts.shape)}")
            seen = counts > 0
            weight = seen.to(torch.float32) if weight is None else torch.where(seen, weight, 0.0)
        epsilon = self.epsilon.clamp(min=0.0)
        return dro_lt_loss(
            features, target, centroids, epsilon, temperature=self.temperature, class_weight=weight, reduction=self.reduction, backend=self.backend
        )

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        epsilon = f"{float(self.epsilon):g}" if self.mode == "constant" else repr(self.mode)
        return f"num_classes={self.num_classes}, epsilon={epsilon}, temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"
