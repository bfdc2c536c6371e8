"""The contrast with von Mises-Fisher distributions as a function of the cosine, and its derivative, in tiles of rows: autograd keeps nothing.

With v = dim / 2 - 1, base_j^2 = v^2 + kappa_j^2 and root_ij^2 = base_j^2 + 1 / t^2 + 2 kappa_j cosine_ij / t, the uniform asymptotic series of
log I_v(k) - v log k (Abramowitz and Stegun, 9.7.7) with one correction is, up to a constant and with p = v / root,

    root - v log(v + root) - log(root) / 2 + log(1 + c(root)),    c(root) = p (3 - 5 p^2) / (24 v)

of which the contrast takes the difference between root and base, without cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gclkern.kernels.terms import implements

_CPU_TILE = 1 << 16  # cosines that a CPU passes through all operators at a time, so that they stay in its caches


def _tiles(cosine: Tensor) -> Iterator[slice]:
    rows = cosine.shape[0]
    step = max(1, _CPU_TILE // cosine.shape[1]) if cosine.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _correction(root: Tensor, order: float) -> Tensor:
    p = order / root
    return p * (3 - 5 * p.square()) / (24 * order)


def _grown(cosine: Tensor, concentration: Tensor, temperature: float) -> Tensor:
    """root^2 - base^2."""
    return torch.addcmul(cosine.new_full((), 1 / temperature**2), cosine, concentration, value=2 / temperature)


@implements("vmf_forward", "torch")
def vmf_forward(cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    """The contrast (N, C) of cosines (N, C) and concentrations (C,)."""
    base = (order**2 + concentration.square()).sqrt()
    at_base = torch.log1p(_correction(base, order))
    out = torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device)
    for rows in _tiles(cosine):
        grown = _grown(cosine[rows], concentration, temperature)
        root = (base.square() + grown).clamp_(min=order**2).sqrt_()
        step = grown.div_(root + base)  # root - base
        value = _correction(root, order).log1p_().sub_(at_base).add_(step)
        value.sub_((step / (order + base)).log1p_(), alpha=order)
        out[rows] = value.sub_(step.div_(base).log1p_(), alpha=0.5)
    return out


@implements("vmf_backward", "torch")
def vmf_backward(grad: Tensor, cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    """The gradient of the cosines from that of the contrast: times d root / d cosine = kappa / (t root), and the derivative of the series by root."""
    base_square = order**2 + concentration.square()
    out = torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device)
    for rows in _tiles(cosine):
        root = _grown(cosine[rows], concentration, temperature).add_(base_square).clamp_(min=order**2).sqrt_()
        square = (order / root).square_()
        change = (15 * square).sub_(3).mul_(square).div_(24 * order**2).div_(1 + _correction(root, order))  # of log(1 + c)
        slope = (root / (order + root)).sub_(root.reciprocal(), alpha=0.5).add_(change)
        out[rows] = slope.mul_(concentration / temperature).div_(root).mul_(grad[rows])
    return out
