"""Classifiers that re-training stages put in the place of stage 1's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.layers import AdaptiveCalibration, unit_rows


class _Classifier(nn.Module):
    """The output of a linear or a cosine classifier, with the names of their parameters."""

    def __init__(self, in_features: int, num_classes: int, *, normalize: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None
        self.normalize = normalize

    def outputs(self, features: Tensor) -> Tensor:
        if self.normalize:
            return F.linear(unit_rows(features), unit_rows(self.weight), self.bias)
        return F.linear(features, self.weight, self.bias)


class ScaledClassifier(_Classifier):
    """A classifier with a factor for each class: LWS learns it and tau-norm sets it (Kang et al., ICLR 2020, section 4.2), MiSLAS learns it with the weights.

    logit_ij = factor_j * (<f_i, w_j> + bias_j); with `normalize` f and w have unit length, as in a cosine classifier. A cosine classifier has no `bias`;
    post-hoc logit adjustment adds one.
    """

    def __init__(self, in_features: int, num_classes: int, *, normalize: bool, bias: bool) -> None:
        super().__init__(in_features, num_classes, normalize=normalize, bias=bias)
        self.factor = nn.Parameter(torch.ones(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.outputs(features) * self.factor


class CalibratedClassifier(_Classifier):
    """A classifier whose logits are calibrated, by features that a cosine classifier normalises (DisAlign, see :class:`gclkern.AdaptiveCalibration`)."""

    def __init__(self, in_features: int, num_classes: int, *, normalize: bool) -> None:
        super().__init__(in_features, num_classes, normalize=normalize, bias=not normalize)
        self.calibration = AdaptiveCalibration(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        calibrated: Tensor = self.calibration(self.outputs(features), unit_rows(features) if self.normalize else features)
        return calibrated


class NearestClassMean(nn.Module):
    """The nearest class mean by Euclidean distance, of features that are centred and then normalised (Kang et al., ICLR 2020, section 4.2; release, "cl2n").

    logit_ij = <u_i, m_j> - |m_j|^2 / 2,  u_i = (f_i - centre) / |f_i - centre|:  -|u_i - m_j|^2 / 2 up to a number that is the same for all classes. The means
    m_j of such vectors are not normalised again.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.centre = nn.Parameter(torch.zeros(in_features))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(unit_rows(features - self.centre), self.weight, -self.weight.square().sum(1) / 2)
