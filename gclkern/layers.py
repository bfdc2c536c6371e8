"""The cosine classifier, and a calibration of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.kernels.terms import SMALLEST_NORM
from gclkern.validation import check_int, check_last_dimension


def unit_rows(rows: Tensor, smallest_norm: float = SMALLEST_NORM) -> Tensor:  # an argument, because TorchScript cannot read the module's constant
    """Rows (..., D) over their norms, in float32 or better; a row of norm <= 1e-12 becomes 0 with gradient 0, where F.normalize has gradients of 1e12."""
    if rows.element_size() < 4:
        rows = rows.float()  # squares of float16 overflow from 256 on
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    zero = norms <= smallest_norm
    return torch.where(zero, 0.0, rows / norms.masked_fill(zero, 1.0))


class CosineLinear(nn.Module):
    r"""A classifier without bias whose outputs are cosines; the scale belongs to the loss.

        cosine_ij = <f_i, w_j> / (\|f_i\| \|w_j\|)

    (NormFace: Wang et al., "L2 hypersphere embedding for face verification", ACM MM 2017.) A row of norm <= 1e-12 has cosine 0 everywhere and gradient 0.

    It consists of torch operators, so it supports every dtype and derivatives of any order. Norms are computed in float32 or better, the product in the
    features' dtype or in autocast's. A bfloat16 cosine is off by up to 2^-9, which with a scale of 30 is an error of 6% in a probability. So for training
    prefer :class:`gclkern.LinearGCLLoss`, which takes this layer's `weight` and does not round to bfloat16, and call this layer to predict.

    Args:
        in_features: dimensions D of a feature.
        num_classes: classes C.
        device, dtype: of the weight, as in torch's layers.

    Attributes:
        weight: (C, D), learned; rows start as uniform(-1, 1) scaled to unit norm, as in the released code of LDAM and GCL. Their length has no effect.

    Shapes: features (..., D) -> cosine (..., C) in [-1, 1] up to rounding.

    Raises:
        TypeError, ValueError: a size that is not a positive int; features of another last dimension than D.

    Example:
        >>> import torch
        >>> classifier = CosineLinear(16, 10)
        >>> cosine = classifier(torch.randn(4, 16))
        >>> cosine.shape, bool(cosine.abs().max() <= 1.001)
        (torch.Size([4, 10]), True)
    """

    def __init__(self, in_features: int, num_classes: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, 1)
        self.num_classes = check_int("num_classes", num_classes, 1)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight again."""
        with torch.no_grad():
            self.weight.copy_(unit_rows(self.weight.uniform_(-1.0, 1.0)))

    def forward(
        self,
        features: Tensor,  # (..., D)
    ) -> Tensor:  # (..., C)
        check_last_dimension("features", features, self.in_features)
        return F.linear(unit_rows(features).to(features.dtype), unit_rows(self.weight).to(features.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


class AdaptiveCalibration(nn.Module):
    r"""Calibrates the logits of a trained classifier: a scale and an offset for each class, mixed with the original logits by a confidence (DisAlign).

        z'_ij = c_i (a_j z_ij + b_j) + (1 - c_i) z_ij,    c_i = sigmoid(<v, f_i> + d)

    (Zhang et al., "Distribution alignment: a unified framework for long-tail visual recognition", CVPR 2021, section 3.2.) It starts as the identity: a = 1,
    b = 0, and v = d = 0, so that every c is 1/2. The released code for classification has (1 + c a) z + c b with v = 0.1 instead: it starts from (1 + c) z,
    and with 2048 features after a ReLU c starts close to 1, where it hardly learns. The two are one family: a - 1 here is a there.

    Args:
        in_features: dimensions D of a feature.
        num_classes: classes C.
        device, dtype: of the parameters, as in torch's layers.

    Attributes:
        scale, offset: a and b, (C,). confidence: the linear layer of v and d.

    Shapes: logits (..., C), features (..., D) -> (..., C).

    Raises:
        TypeError, ValueError: a size that is not a positive int; logits or features of another last dimension.

    Example:
        >>> import torch
        >>> calibration = AdaptiveCalibration(16, 3)
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]])
        >>> calibration(logits, torch.randn(1, 16))
        tensor([[ 2.0000, -1.0000,  0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, in_features: int, num_classes: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, 1)
        self.scale = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.offset = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.confidence = nn.Linear(check_int("in_features", in_features, 1), 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Become the identity again."""
        nn.init.ones_(self.scale)
        for parameter in (self.offset, self.confidence.weight, self.confidence.bias):
            nn.init.zeros_(parameter)

    def forward(
        self,
        logits: Tensor,  # (..., C)
        features: Tensor,  # (..., D)
    ) -> Tensor:  # (..., C)
        check_last_dimension("logits", logits, self.num_classes)
        check_last_dimension("features", features, self.confidence.in_features)
        confidence = torch.sigmoid(self.confidence(features))
        return logits + confidence * ((self.scale - 1) * logits + self.offset)  # this form of the formula is exact for a = 1, b = 0

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"
