"""The losses and the noise in float64, in the plainest style: the reference that the package is tested against.

Nothing here comes from the package. The noise is written with Python's integers and `math`, the losses sample by sample from their definitions, and every
gradient is autograd's. Slow and obvious on purpose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(key: int, counter: Sequence[int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox4x32 (Salmon et al., SC'11): four 32-bit words of a 64-bit key and a counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(rounds):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product2 >> 32) ^ c1 ^ k0, product2 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def draw(seed: int, row: int, column: int) -> float:
    """e of one sample and class: min(|N(0, 1/3)|, 1) by Box and Muller's formula on a quarter circle."""
    words = philox(seed, (column // 8, row & MASK, (row >> 32) & MASK, 0))
    word = words[column % 8 // 2]
    uniform = ((word & 0xFFFF) + 0.5) / 65536
    angle = math.pi / 2 * ((word >> 16) + 0.5) / 65536
    radius = math.sqrt(-2 * math.log(uniform)) / 3
    return min(radius * (math.sin(angle) if column % 2 else math.cos(angle)), 1.0)


@functools.lru_cache(maxsize=256)
def noise(seed: int, rows: int, columns: int, row_offset: int = 0, class_offset: int = 0) -> Tensor:
    """e (rows, columns) in float64. The lists are cached: do not write to the result."""
    grid = [[draw(seed, row_offset + row, class_offset + column) for column in range(columns)] for row in range(rows)]
    return torch.tensor(grid, dtype=torch.float64)


def added_to_angle(cosine: Tensor, angle: Tensor, easy: bool) -> Tensor:
    """The cosine of the sum of the cosine's angle and `angle`."""
    if easy and cosine <= 0:
        return cosine
    theta = torch.acos(cosine)
    return torch.cos(theta + angle) if theta + angle < math.pi else cosine - angle * torch.sin(angle)


def clouded_logits(
    cosine: Tensor,  # (N, C)
    target: Tensor,  # (N,)
    e: Tensor | None,  # (N, C)
    cloud: Tensor | None,  # (C,)
    scale: float,
    margin: Tensor | float | None,
    bias: Tensor | None,  # (C,)
    angular: bool = False,
    difficulty_margin: bool = False,
    easy_margin: bool = False,
) -> Tensor:
    """z_ij = s (cos_ij - cloud_j e_ij - margin_j [j = t_i]) + bias_j, sample by sample; cloud and margin may add to the angle instead."""
    rows, columns = cosine.shape
    margins = torch.zeros(columns, dtype=torch.float64) if margin is None else torch.as_tensor(margin, dtype=torch.float64).expand(columns)
    logits = []
    for i in range(rows):
        is_target = torch.arange(columns) == target[i]
        subtracted = torch.zeros(columns, dtype=torch.float64) if cloud is None or e is None else cloud * e[i]
        if angular or difficulty_margin:
            own, added = cosine[i, target[i]] if target[i] in range(columns) else cosine[i, 0], margins * is_target
            if difficulty_margin and (cosine[i].detach() > own.detach()).any():
                added = added * (1 + (1 - own) / 2)
            if angular:
                added, subtracted = added + math.pi / 2 * subtracted, torch.zeros(columns, dtype=torch.float64)
            row = torch.stack([added_to_angle(c, angle, easy_margin) for c, angle in zip(cosine[i], added, strict=True)]) - subtracted
        else:
            row = cosine[i] - margins * is_target - subtracted
        logits.append(scale * row + (0.0 if bias is None else bias))
    return torch.stack(logits)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, label_smoothing: Tensor | float, kept: Tensor) -> Tensor:
    """torch's cross entropy, unreduced, by its definition; 0 for a sample that is not kept.

    -log p_t is written as log1p(sum of exp(z_j - z_t) over the others), so that the gradient of a target of probability 1 - 1e-14 keeps float64's digits too:
    torch's own p - 1 would be off by 1%. Exponents up to 700 fit.
    """
    losses = []
    for row, label, keep in zip(logits, target.tolist(), kept.tolist(), strict=True):
        if not keep:
            losses.append(0 * row.sum())
            continue
        others = torch.cat([row[:label], row[label + 1 :]])
        nll = torch.log1p(torch.exp(others - row[label]).sum())
        log_normaliser = nll + row[label]
        smoothing = label_smoothing[label] if isinstance(label_smoothing, Tensor) else label_smoothing
        smooth = (weight * (log_normaliser - row)).sum() / len(row) if smoothing else 0.0
        losses.append((1 - smoothing) * weight[label] * nll + smoothing * smooth)
    return torch.stack(losses)


def focal(loss: Tensor, gamma: float, detach: bool) -> Tensor:
    """loss (1 - exp(-loss))^gamma."""
    if gamma == 0:
        return loss
    # The floor keeps autograd from 0 * inf where the loss is exactly 0 and gamma < 1; the product is 0 there.
    factor = (-torch.expm1(-loss.clamp_min(1e-300))) ** gamma
    return loss * (factor.detach() if detach else factor)


def gcl_cross_entropy(
    cosine: Tensor,
    target: Tensor,
    cloud: Tensor | None = None,
    *,
    scale: float = 30.0,
    margin: Tensor | float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    gamma: float = 0.0,
    focal_detach: bool = True,
    label_smoothing: Tensor | float = 0.0,
    angular: bool = False,
    difficulty_margin: bool = False,
    easy_margin: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    seed: int = 0,
    row_offset: int = 0,
    class_offset: int = 0,
) -> Tensor:
    """The loss of float64 cosines (N, C) on the CPU. Autograd differentiates it."""
    rows, columns = cosine.shape
    e = None if cloud is None else noise(seed, rows, columns, row_offset, class_offset)
    weights = torch.ones(columns, dtype=torch.float64) if weight is None else weight
    share = torch.ones(rows, dtype=torch.float64) if lam is None else torch.as_tensor(lam, dtype=torch.float64).expand(rows)
    pairs = [(target, share)] if target_b is None else [(target, share), (target_b, 1 - share)]

    kept = torch.ones(rows, dtype=torch.bool)
    for labels, _ in pairs:
        kept &= labels != ignore_index
    # A sample that is dropped adds exactly nothing, whatever its cosines hold.
    cosine = torch.where(kept[:, None], cosine, torch.zeros_like(cosine))

    losses = torch.zeros(rows, dtype=torch.float64)
    denominator = torch.zeros((), dtype=torch.float64)
    for labels, part in pairs:
        logits = clouded_logits(cosine, labels, e, cloud, scale, margin, bias, angular, difficulty_margin, easy_margin)
        loss = cross_entropy(logits, labels, weights, label_smoothing, kept)
        losses = losses + part * focal(loss, gamma, focal_detach)
        for i in range(rows):
            if kept[i]:
                denominator += part[i] * (1.0 if gamma > 0 else weights[labels[i]])
    if reduction == "none":
        return losses
    if reduction == "mean" and not kept.any():
        return losses.sum() + math.nan  # as torch: the loss is NaN, all gradients are 0
    return losses.sum() / denominator if reduction == "mean" else losses.sum()


def unit_rows(matrix: Tensor) -> Tensor:
    """Rows over their length; a row of length <= 1e-12 is 0 with gradient 0."""
    rows = []
    for row in matrix:
        length = row.detach().norm()
        rows.append(row / row.norm() if length > 1e-12 or length.isnan() else torch.zeros_like(row))
    return torch.stack(rows)


def linear_gcl_cross_entropy(
    features: Tensor, linear_weight: Tensor, target: Tensor, cloud: Tensor | None = None, *, normalize: bool = True, **options: object
) -> Tensor:
    """The loss of float64 features (N, D) against the rows of linear_weight (C, D)."""
    product = unit_rows(features) @ unit_rows(linear_weight).T if normalize else features @ linear_weight.T
    return gcl_cross_entropy(product, target, cloud, **options)  # type: ignore[arg-type]


def dro_lt_loss(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    centroids: Tensor,  # (C, D)
    epsilon: Tensor | float,  # (), (C,)
    *,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,  # (C,)
    reduction: str = "mean",
) -> Tensor:
    """The double sum of the DRO-LT paper, over the classes of the batch, on float64 tensors."""
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64)
    terms = torch.zeros(len(target), dtype=torch.float64)
    weights = torch.zeros((), dtype=torch.float64)
    for c in sorted(set(target.tolist())):
        weight = 1.0 if class_weight is None else float(class_weight[c])
        if weight == 0.0:
            continue
        own = (target == c).nonzero()[:, 0]
        radius = epsilon if epsilon.dim() == 0 else epsilon[c]
        squares = (centroids[c] - features).square().sum(1)
        # the norm of 0 has no gradient: 0 is what the package promises
        distance = torch.where(squares == 0, squares * 0.0, squares.where(squares != 0, torch.ones_like(squares)).sqrt())
        row = -(distance + 2 * radius * (target == c).double()) / temperature
        terms = terms.index_add(0, own, weight / len(own) * (row.logsumexp(0) - row[own]))
        weights = weights + weight
    return terms if reduction == "none" else terms.sum() / (weights if reduction == "mean" else 1.0)


def class_centroids(features: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The mean of each class's rows (C, D), 0 without any."""
    own = [features[target == c] for c in range(num_classes)]
    return torch.stack([rows.mean(0) if len(rows) else torch.zeros(features.shape[1], dtype=features.dtype) for rows in own])


def supervised_contrastive(
    features: Tensor, target: Tensor, prototypes: Tensor | None = None, class_counts: Tensor | None = None, temperature: float = 0.1,
    include_samples: bool = True, include_own_class: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Each sample's softmax over its keys, the other samples and the prototypes, on float64 tensors."""
    x, terms, anchors = unit_rows(features), [], 0
    keys, classes = (x, target) if include_samples else (x[:0], target[:0])
    if prototypes is not None:
        keys, classes = torch.cat((keys, unit_rows(prototypes))), torch.cat((classes, torch.arange(len(prototypes))))
    for i, label in enumerate(target.tolist()):
        logits = keys @ x[i] / temperature
        other = torch.ones(len(keys), dtype=torch.bool)
        if include_samples:
            other[i] = False
        positive = other & (classes == label)
        if not positive.any():
            terms.append(x[i].sum() * 0)
            continue
        anchors += 1
        counted = other if include_own_class else other & ~positive
        counts = torch.ones(len(keys), dtype=torch.float64) if class_counts is None else class_counts[classes] - positive.double()
        terms.append((logits - counts.log())[counted].logsumexp(0) - logits[positive].mean())
    stacked = torch.stack(terms)
    return stacked if reduction == "none" else stacked.sum() / (anchors if reduction == "mean" else 1)


def vmf_contrast(cosine: Tensor, concentration: Tensor, dim: int, temperature: float) -> Tensor:
    """F(k) - F(kappa), each by the series for log I_v(k) - v log k as Abramowitz and Stegun write it (9.7.7), of which ProCo keeps one correction."""
    order = dim / 2 - 1

    def log_f(k: Tensor) -> Tensor:
        root = (order**2 + k.square()).sqrt()
        p = order / root
        return root - order * (order + root).log() - root.log() / 2 + (1 + p * (3 - 5 * p**2) / (24 * order)).log()

    k = (concentration.square() + 1 / temperature**2 + 2 * concentration * cosine / temperature).sqrt()
    return log_f(k) - log_f(concentration)


def top1(
    features: Tensor, weight: Tensor, target: Tensor, target_b: Tensor | None = None, lam: Tensor | float | None = None, *, ignore_index: int = -100,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """The share of each sample's targets that its prediction, the class of the largest cosine, has (N,)."""
    cosine = unit_rows(features) @ unit_rows(weight).T if normalize else features @ weight.T
    predicted = cosine.detach().argmax(1)
    share = torch.ones(len(target), dtype=torch.float64) if lam is None else torch.as_tensor(lam, dtype=torch.float64).expand(len(target))
    found = share * (predicted == target)
    dropped = target == ignore_index
    if target_b is not None:
        found = found + (1 - share) * (predicted == target_b)
        dropped = dropped | (target_b == ignore_index)
    return torch.where(dropped, 0.0, found)
