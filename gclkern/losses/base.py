"""What losses of cosines or features share: per-class vectors and options, which a module passes to one function of gclkern.functional.

Per-class vectors (`cloud`, `margin`, `bias`, `weight`) are buffers, so they follow ``.to(device)``, but they stay float32 whatever dtype the module is given.
They are not in the state_dict: they follow from the arguments, and a checkpoint with them would silently override the arguments of the stage that loads it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gclkern.buffers import PreciseBuffers
from gclkern.devices import refuse_transforms, values_may_be_read
from gclkern.dispatch import BACKENDS
from gclkern.functional import gcl_cross_entropy
from gclkern.options import Backend, Reduction
from gclkern.validation import check_choice, loss_terms

VECTORS = ("cloud", "margin", "bias", "weight", "label_smoothing")  # arguments that may have one value for each class

if TYPE_CHECKING:
    Function = TypeVar("Function", bound=Callable[..., Any])

    def same_signature(forward: Function) -> Callable[[Any], Function]:
        """Give `__call__` of a module the signature of its `forward`, for type checkers; nn.Module's accepts any arguments."""


class _ClassLoss(PreciseBuffers):
    """Holds the arguments of :func:`gclkern.functional.gcl_cross_entropy` that stay the same from batch to batch."""

    cloud: Tensor | None
    margin: Tensor | float | None
    bias: Tensor | None
    weight: Tensor | None
    label_smoothing: Tensor | float
    _takes_cosines = True
    _seen = False

    def __init__(
        self,
        num_classes: int | None,  # of class_counts; None for a loss that has none
        *,
        cloud: Tensor | None = None,
        margin: Tensor | float | None = None,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        scale: float,
        gamma: float = 0.0,
        focal_detach: bool = True,
        angular: bool = False,
        difficulty_margin: bool = False,
        easy_margin: bool = False,
        label_smoothing: Tensor | float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.angular = angular
        self.difficulty_margin = difficulty_margin
        self.easy_margin = easy_margin
        self.scale = scale
        self.gamma = gamma
        self.focal_detach = focal_detach
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        vectors = {"cloud": cloud, "margin": margin, "bias": bias, "weight": weight, "label_smoothing": label_smoothing}
        self.num_classes = num_classes
        self._check(vectors)
        for name, value in sorted(vectors.items(), key=lambda item: item[1] is None):  # torch.export miscounts buffers behind one that is None
            if value is None:
                self.register_buffer(name, None)
            elif isinstance(value, Tensor):
                # a copy, so that weights written into the buffer for a new epoch only change this loss
                self.register_buffer(name, value.detach().to(torch.float32, copy=True), persistent=False)
            else:
                setattr(self, name, value)

    def _check(self, vectors: dict[str, Any]) -> None:
        """Check the arguments now, so that errors are raised on construction and not by the first batch."""
        check_choice("backend", self.backend, BACKENDS)
        vectors = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vectors.items()}
        num_classes = self.num_classes or next((value.numel() for value in vectors.values() if isinstance(value, Tensor)), 1)
        loss_terms(
            "the class counts", torch.zeros(1, num_classes, device="cpu"), num_classes, torch.zeros(1, dtype=torch.int64, device="cpu"), target_b=None,
            lam=None, seed=0, row_offset=0, class_offset=0, **vectors, **self._options(),
        )  # fmt: skip

    def _check_classes(self, name: str, matrix: object, dim: int) -> None:
        """Check that `matrix` has one row or column for each class. The error names class_counts, which the user gave, not the vectors made of it."""
        if isinstance(matrix, Tensor):
            refuse_transforms(name, matrix)
        if self.num_classes is not None and isinstance(matrix, Tensor) and matrix.dim() == 2 and matrix.shape[dim] != self.num_classes:
            what = "columns" if dim == 1 else "rows"
            raise ValueError(f"{name} must have {self.num_classes} {what}, one for each of class_counts, got shape {tuple(matrix.shape)}")

    def _check_cosines(self, cosine: Tensor) -> None:
        """Warn if a loss of cosines is given logits, which raise no error. Only the first batch is checked."""
        if self._takes_cosines and not self._seen and isinstance(cosine, Tensor) and values_may_be_read(cosine):
            self._seen = True
            largest = float(cosine.detach().abs().max()) if cosine.numel() > 0 else 0.0
            if 1.05 < largest < math.inf:
                warnings.warn(
                    f"{type(self).__name__} takes cosines in [-1, 1], but the largest here is {largest:.3g}; if these are the logits of a linear layer, "
                    f"use a gclkern.CosineLinear classifier instead",
                    stacklevel=3,
                )

    def _options(self) -> dict[str, Any]:
        angles = [name for name in ("angular", "difficulty_margin", "easy_margin") if getattr(self, name) is not False]
        return {name: getattr(self, name) for name in ("scale", "gamma", "focal_detach", "ignore_index", "reduction", *angles)}

    def _arguments(self) -> dict[str, Any]:
        """The keywords that this loss passes to the functional layer."""
        vectors = {name: getattr(self, name) for name in VECTORS}
        if not self.training:
            vectors["cloud"] = None
        return {**vectors, "backend": self.backend, **self._options()}

    def plain_cross_entropy(self, *inputs: Tensor) -> Tensor:
        """The cross entropy of the prediction, softmax(scale * cosine): without noise, margins, bias, class weights, smoothing and focal factor.

        Unlike the loss itself, it has the same value in training and eval mode, so training and validation can be compared, and so can different losses of the
        same scale.

        Args:
            inputs: those of the loss itself: (cosine, target), or (features, linear_weight, target).

        Example:
            >>> import torch
            >>> from gclkern import GCLLoss
            >>> cosine, target = torch.tensor([[0.5, 0.25]]), torch.tensor([0])
            >>> loss = GCLLoss([9, 1], margin=0.1, scale=4.0).plain_cross_entropy(cosine, target)
            >>> torch.allclose(loss, torch.nn.functional.cross_entropy(4 * cosine, target))
            True
        """
        return self._cross_entropy(*inputs, **{name: getattr(self, name) for name in ("scale", "ignore_index", "reduction", "backend")})

    def logits(
        self,
        cosine: Tensor,  # (..., C)
    ) -> Tensor:  # (..., C)
        """The logits scale * cosine, without margins and bias, in float32 or better: to fit a temperature, to export a network or to average networks.

        Args:
            cosine: the output of the classifier (..., C): cosines, also for :class:`gclkern.LinearGCLLoss`, or logits for a loss of logits.

        Raises:
            ValueError: the last dimension is not the number of classes, for example because features were passed. Losses without class_counts do not check it.

        Example:
            >>> import torch
            >>> from gclkern import GCLLoss
            >>> GCLLoss([9, 1], scale=30.0).logits(torch.tensor([[0.5, 0.25]]))
            tensor([[15.0000,  7.5000]])
        """
        if self.num_classes is not None and cosine.shape[-1] != self.num_classes:
            shape = tuple(cosine.shape)
            raise ValueError(f"cosine must have {self.num_classes} columns, one for each of class_counts, got shape {shape}; pass classifier(features)")
        return self.scale * (cosine.float() if cosine.element_size() < 4 else cosine)

    def predict_proba(
        self,
        cosine: Tensor,  # (..., C)
    ) -> Tensor:  # (..., C)
        """The probability of each class: the softmax of :meth:`logits`. :meth:`plain_cross_entropy` is the cross entropy of these probabilities.

        Without the scale, the softmax of cosines is nearly uniform: of 10 classes, none has a probability above 0.46.

        Args:
            cosine: as for :meth:`logits`.

        Raises:
            ValueError: as for :meth:`logits`.

        Example:
            >>> import torch
            >>> from gclkern import GCLLoss
            >>> cosine = torch.tensor([[0.5, 0.25]])
            >>> GCLLoss([9, 1], scale=30.0).predict_proba(cosine), cosine.softmax(1)
            (tensor([[9.9945e-01, 5.5278e-04]]), tensor([[0.5622, 0.4378]]))
        """
        return self.logits(cosine).softmax(-1)

    def _cross_entropy(self, *inputs: Any, **options: Any) -> Tensor:
        return gcl_cross_entropy(*inputs, **options)

    def extra_repr(self) -> str:
        parts = []
        for name in VECTORS:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                parts.append(f"{name}=({value.numel()},)" if value.is_meta else f"{name}=({value.min():.4g} to {value.max():.4g})")
            elif value is not None:
                parts.append(f"{name}={value}")
        parts += [f"{name}={value!r}" for name, value in self._options().items()]
        return ", ".join([*parts, f"backend={self.backend!r}"])


_ClassLoss.__init__.__qualname__ = "GCLLoss.__init__"  # a misspelt argument is refused in this name


class _LogitLoss(_ClassLoss):
    """A loss of cosines or logits without noise."""

    def forward(
        self,
        cosine: Tensor,  # (N, C)
        target: Tensor,  # (N,)
        *,
        target_b: Tensor | None = None,  # (N,)
        lam: Tensor | float | None = None,
    ) -> Tensor:
        self._check_classes("cosine", cosine, 1)
        self._check_cosines(cosine)
        return gcl_cross_entropy(cosine, target, target_b=target_b, lam=lam, **self._arguments())

    if TYPE_CHECKING:

        @same_signature(forward)
        def __call__(self) -> None: ...
