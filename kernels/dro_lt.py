"""The DRO-LT bound: a softmax over the SAMPLES of a batch around each class centroid (ICCV 2021).

    l_cj = -(|mu_c - z_j| + 2 eps_c [y_j == c]) / T          term_i = w_c / n_c * (logsumexp_j l_cj - l_ci),   c = y_i,   n_c samples of c in the batch

This is attention with queries mu and keys z. Samples of one class share their query, so the rows are the batch's classes, found on the device
without a sort and without the host knowing how many there are: buffers hold min(N, C) of them and programs beyond the last return at once.

    _leaders_kernel     which samples are the first of their class
    _anchors_kernel     their classes, packed, and the mean's denominator
    _distance_kernel    |mu_c - z_j| by direct differences: where a sample is its centroid, exactly 0. The expanded square would lose the digits
    _softmax_kernel     statistics of each row, terms of its members
    _pull_kernel        backward: dL/d|mu_c - z_j| / |mu_c - z_j|, and the gradient of epsilon
    _features_kernel    backward: dL/dz_j = sum over c of pull_cj * (z_j - mu_c), again by differences

No number is subtracted from 1. With peak the row's largest logit and around = sum of exp(l - peak) over all but one sample that attains it, logsumexp - l_j
is log1p(around) + (peak - l_j), two terms of one sign; 1 - p_j is around / (1 + around) at the peak, and p_j <= 1/2 elsewhere. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_loss import log1p
from .runtime import batch_kernel, on_device
from .terms import implements, shapes_of

STATS = 4  # of a row: peak, around, rest (the sum over samples of other classes), share w_c / (n_c * denominator)
SAMPLE_ALIGNMENT = 16  # rows of (anchors, samples) buffers are padded to it, and read without a mask
ANCHOR_ALIGNMENT = 4
ROW_BLOCK = 512  # samples that a program holds at a time, whatever the batch: a smaller last batch compiles nothing


def padded(extent: int, alignment: int) -> int:
    return (extent + alignment - 1) // alignment * alignment


@triton.jit
def _kept(target_ptr, class_weight_ptr, rows, num_rows, num_classes):
    """Labels, whether each is in range, and the weight of its class, 0 for labels out of range."""
    label = tl.load(target_ptr + rows, mask=rows < num_rows, other=-1)
    valid = (label >= 0) & (label < num_classes)
    weight = tl.where(valid, 1.0, 0.0)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + label, mask=valid, other=0.0)
    return label, valid, weight


@batch_kernel
def _leaders_kernel(target_ptr, class_weight_ptr, leader_ptr, term_ptr, num_rows, num_classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label, valid, weight = _kept(target_ptr, class_weight_ptr, rows, num_rows, num_classes)
    earlier = tl.zeros((ROWS,), tl.int32)
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * ROWS, num_rows), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        other = tl.load(target_ptr + columns, mask=columns < num_rows, other=-1)
        same = (label[:, None] == other[None, :]) & (columns[None, :] < rows[:, None])
        earlier += tl.sum(same.to(tl.int32), axis=1)
    tl.store(leader_ptr + rows, ((earlier == 0) & (weight != 0.0)).to(tl.int32), mask=rows < num_rows)
    # the terms of samples that no row writes: NaN for a label out of range, 0 for a class of weight 0
    tl.store(term_ptr + rows, tl.where(valid, 0.0, float("nan")), mask=(rows < num_rows) & (weight == 0.0))


@batch_kernel
def _anchors_kernel(
    target_ptr, class_weight_ptr, leader_ptr, class_ptr, num_anchors_ptr, denominator_ptr, num_rows, num_classes,
    MEAN: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    packed = 0
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        label, _, weight = _kept(target_ptr, class_weight_ptr, rows, num_rows, num_classes)
        leader = tl.load(leader_ptr + rows, mask=rows < num_rows, other=0)
        tl.store(class_ptr + packed + tl.cumsum(leader, axis=0) - 1, label, mask=leader == 1)
        total += tl.where(leader == 1, weight, 0.0)
        packed += tl.sum(leader, axis=0)
    padding = packed + tl.arange(0, ALIGNMENT)
    tl.store(class_ptr + padding, tl.zeros((ALIGNMENT,), tl.int64), mask=padding < (packed + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)
    tl.store(num_anchors_ptr, packed)
    if MEAN:
        tl.store(denominator_ptr, tl.sum(total, axis=0))
    else:
        tl.store(denominator_ptr, 1.0)


@batch_kernel
def _distance_kernel(
    features_ptr, features_stride_n, features_stride_d,  # (N, D)
    centroids_ptr, centroids_stride_c, centroids_stride_d,  # (C, D)
    class_ptr, num_anchors_ptr, distance_ptr, distance_stride, num_rows, dim,
    ANCHORS: tl.constexpr, SAMPLES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    num_anchors = tl.load(num_anchors_ptr)
    first = tl.program_id(1) * ANCHORS
    if first >= num_anchors:
        return
    anchors = first + tl.arange(0, ANCHORS)
    samples = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    columns = tl.arange(0, DIM)
    # rows beyond the last one repeat it: their loads need no mask, and their distances are not stored
    classes = tl.load(class_ptr + tl.minimum(anchors, num_anchors - 1))
    rows = tl.minimum(samples, num_rows - 1).to(tl.int64)
    mu_ptr = centroids_ptr + (classes * centroids_stride_c)[:, None, None] + (columns.to(tl.int64) * centroids_stride_d)[None, None, :]
    z_ptr = features_ptr + (rows * features_stride_n)[None, :, None] + (columns.to(tl.int64) * features_stride_d)[None, None, :]
    within = (columns < dim)[None, None, :]
    mu = tl.load(mu_ptr, mask=within, other=0.0)
    z = tl.load(z_ptr, mask=within, other=0.0)
    # partial sums stay in the threads until the end: the loop has no reduction, and the next tile loads while this one is used
    total = tl.zeros((ANCHORS, SAMPLES, DIM), tl.float32)
    for start in range(DIM, dim + DIM, DIM):
        within = (start + columns < dim)[None, None, :]
        mu_ptr += DIM * centroids_stride_d
        z_ptr += DIM * features_stride_d
        next_mu = tl.load(mu_ptr, mask=within, other=0.0)
        next_z = tl.load(z_ptr, mask=within, other=0.0)
        difference = mu.to(tl.float32) - z.to(tl.float32)
        total += difference * difference
        mu = next_mu
        z = next_z
    distance = tl.sqrt(tl.sum(total, axis=2))
    at = anchors.to(tl.int64)[:, None] * distance_stride + samples[None, :]
    tl.store(distance_ptr + at, distance, mask=(anchors < num_anchors)[:, None] & (samples < num_rows)[None, :])


@triton.jit
def _logits(distance_ptr, target_ptr, samples, num_rows, label, radius, inverse_temperature):
    present = samples < num_rows
    distance = tl.load(distance_ptr + samples, mask=present, other=float("inf"))
    own = present & (tl.load(target_ptr + samples, mask=present, other=-1) == label)
    return distance, own, -(distance + tl.where(own, radius, 0.0)) * inverse_temperature


@triton.jit
def _load_radius(epsilon_ptr, label, PER_CLASS: tl.constexpr):
    """The number that is added to the distance of the class's own samples, 2 epsilon."""
    if PER_CLASS:
        epsilon = tl.load(epsilon_ptr + label)
    else:
        epsilon = tl.load(epsilon_ptr)
    return 2.0 * epsilon


@batch_kernel
def _softmax_kernel(
    distance_ptr, distance_stride, target_ptr, epsilon_ptr, class_weight_ptr, class_ptr, num_anchors_ptr, denominator_ptr,
    term_ptr, stats_ptr, stats_stride, num_rows, inverse_temperature, PER_CLASS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    anchor = tl.program_id(0)
    if anchor >= tl.load(num_anchors_ptr):
        return
    label = tl.load(class_ptr + anchor)
    radius = _load_radius(epsilon_ptr, label, PER_CLASS)
    weight = 1.0
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + label)
    distance_ptr += anchor.to(tl.int64) * distance_stride
    offsets = tl.arange(0, SAMPLES)
    peaks = tl.full((SAMPLES,), -float("inf"), tl.float32)
    members = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, num_rows, SAMPLES):
        _, own, logit = _logits(distance_ptr, target_ptr, start + offsets, num_rows, label, radius, inverse_temperature)
        peaks = tl.maximum(peaks, logit)
        members += own.to(tl.float32)
    peak = tl.max(peaks, axis=0)
    count = tl.sum(members, axis=0)
    below = tl.zeros((SAMPLES,), tl.float32)
    ties = tl.zeros((SAMPLES,), tl.float32)
    others = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, num_rows, SAMPLES):
        samples = start + offsets
        _, own, logit = _logits(distance_ptr, target_ptr, samples, num_rows, label, radius, inverse_temperature)
        exponential = tl.where(samples < num_rows, tl.exp(logit - peak), 0.0)
        below += tl.where(logit == peak, 0.0, exponential)
        ties += tl.where(logit == peak, 1.0, 0.0)
        others += tl.where(own, 0.0, exponential)
    around = tl.sum(below, axis=0) + (tl.sum(ties, axis=0) - 1.0)
    share = weight / count
    log_total = log1p(around)
    for start in range(0, num_rows, SAMPLES):
        samples = start + offsets
        _, own, logit = _logits(distance_ptr, target_ptr, samples, num_rows, label, radius, inverse_temperature)
        tl.store(term_ptr + samples, share * (log_total + (peak - logit)), mask=own)
    tl.store(stats_ptr + anchor, peak)
    tl.store(stats_ptr + stats_stride + anchor, around)
    tl.store(stats_ptr + 2 * stats_stride + anchor, tl.sum(others, axis=0))
    tl.store(stats_ptr + 3 * stats_stride + anchor, share / tl.load(denominator_ptr))


@batch_kernel
def _reduce_kernel(term_ptr, denominator_ptr, loss_ptr, num_rows, ROWS: tl.constexpr):
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        total += tl.load(term_ptr + rows, mask=rows < num_rows, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / tl.load(denominator_ptr))


@triton.jit
def _upstream(grad_loss_ptr, samples, own, share, PER_SAMPLE: tl.constexpr):
    """The upstream gradient of logsumexp - logit of each sample of the class."""
    if PER_SAMPLE:
        grad = tl.load(grad_loss_ptr + samples, mask=own, other=0.0)
    else:
        grad = tl.load(grad_loss_ptr)
    return tl.where(own, grad * share, 0.0)


@batch_kernel
def _pull_kernel(
    grad_loss_ptr, distance_ptr, distance_stride, target_ptr, epsilon_ptr, class_ptr, num_anchors_ptr, stats_ptr, stats_stride,
    pull_ptr, grad_epsilon_ptr, num_rows, inverse_temperature,
    PER_CLASS: tl.constexpr, PER_SAMPLE: tl.constexpr, ALIGNMENT: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    anchor = tl.program_id(0)
    num_anchors = tl.load(num_anchors_ptr)
    if anchor >= (num_anchors + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT:
        return
    pull_ptr += anchor.to(tl.int64) * distance_stride
    offsets = tl.arange(0, SAMPLES)
    if anchor >= num_anchors:
        # padding that _features_kernel reads
        for start in range(0, num_rows, SAMPLES):
            tl.store(pull_ptr + start + offsets, tl.zeros((SAMPLES,), tl.float32), mask=start + offsets < distance_stride)
        return
    label = tl.load(class_ptr + anchor)
    radius = _load_radius(epsilon_ptr, label, PER_CLASS)
    peak = tl.load(stats_ptr + anchor)
    around = tl.load(stats_ptr + stats_stride + anchor)
    rest = tl.load(stats_ptr + 2 * stats_stride + anchor)
    share = tl.load(stats_ptr + 3 * stats_stride + anchor)
    distance_ptr += anchor.to(tl.int64) * distance_stride
    masses = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, num_rows, SAMPLES):
        samples = start + offsets
        own = (samples < num_rows) & (tl.load(target_ptr + samples, mask=samples < num_rows, other=-1) == label)
        masses += _upstream(grad_loss_ptr, samples, own, share, PER_SAMPLE)
    mass = tl.sum(masses, axis=0)
    inverse_total = 1.0 / (1.0 + around)
    for start in range(0, num_rows, SAMPLES):
        samples = start + offsets
        distance, own, logit = _logits(distance_ptr, target_ptr, samples, num_rows, label, radius, inverse_temperature)
        upstream = _upstream(grad_loss_ptr, samples, own, share, PER_SAMPLE)
        probability = tl.exp(logit - peak) * inverse_total
        missed = tl.where(logit == peak, around * inverse_total, 1.0 - probability)
        # for the only sample of its class mass - upstream is exactly 0, and its gradient -missed keeps all digits
        grad_logit = (mass - upstream) * probability - upstream * missed
        pull = tl.where((samples < num_rows) & (distance > 0.0), -grad_logit * inverse_temperature / distance, 0.0)
        # the comparison above would drop a NaN
        pull = tl.where(distance != distance, distance, pull)
        tl.store(pull_ptr + samples, pull, mask=samples < distance_stride)
    if grad_epsilon_ptr is not None:
        tl.store(grad_epsilon_ptr + (label if PER_CLASS else anchor), 2.0 * inverse_temperature * mass * (rest * inverse_total))


@batch_kernel
def _features_kernel(
    features_ptr, features_stride_n, features_stride_d,  # (N, D)
    centroids_ptr, centroids_stride_c, centroids_stride_d,  # (C, D)
    target_ptr, class_ptr, num_anchors_ptr, pull_ptr, pull_stride, grad_ptr, num_rows, num_classes, dim,
    ANCHORS: tl.constexpr, SAMPLES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    num_anchors = tl.load(num_anchors_ptr)
    samples = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    columns = tl.program_id(1) * DIM + tl.arange(0, DIM)
    lanes = tl.arange(0, ANCHORS)
    rows = tl.minimum(samples, num_rows - 1).to(tl.int64)
    z_ptr = features_ptr + (rows * features_stride_n)[None, :, None] + (columns.to(tl.int64) * features_stride_d)[None, None, :]
    mu_ptr = centroids_ptr + (columns.to(tl.int64) * centroids_stride_d)[None, None, :]
    within = (columns < dim)[None, None, :]
    z = tl.load(z_ptr, mask=within, other=0.0).to(tl.float32)
    total = tl.zeros((ANCHORS, SAMPLES, DIM), tl.float32)
    for start in tl.range(0, num_anchors, ANCHORS):
        # both buffers are padded, with a pull of 0; but 0 times the centroid of a class that stays out may be NaN
        anchors = start + lanes
        classes = tl.load(class_ptr + anchors)
        wanted = within & (anchors < num_anchors)[:, None, None]
        mu = tl.load(mu_ptr + (classes * centroids_stride_c)[:, None, None], mask=wanted, other=0.0).to(tl.float32)
        pull = tl.load(pull_ptr + (anchors.to(tl.int64) * pull_stride)[:, None, None] + samples[None, :, None])
        total += pull * (z - mu)
    grad = tl.sum(total, axis=0)
    label = tl.load(target_ptr + rows)
    grad = tl.where(((label >= 0) & (label < num_classes))[:, None], grad, float("nan"))
    at = rows[:, None] * dim + columns[None, :]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=(samples < num_rows)[:, None] & (columns < dim)[None, :])


def _distance_tile(num_anchors: int, num_rows: int) -> tuple[int, int, int]:
    """Anchors, samples and dimensions of a program: the largest tile that still makes several programs for each processor of a large GPU."""
    for anchors, samples, dim in ((16, 32, 32), (16, 16, 32)):
        if triton.cdiv(num_anchors, anchors) * triton.cdiv(num_rows, samples) >= (2048 if samples == 32 else 256):
            return anchors, samples, dim
    return 8, 8, 128


@implements("dro_lt_forward", "triton")
def dro_lt_forward(
    features: Tensor,  # (N, D)
    target: Tensor,  # (N,) int64
    centroids: Tensor,  # (C, D) float32
    epsilon: Tensor,  # () or (C,) float32
    class_weight: Tensor | None,  # (C,) float32
    temperature: float,
    reduction: str,
) -> tuple[Tensor, list[Tensor]]:
    """Loss ((), or (N,) unreduced); distances (anchors, N), row statistics, the anchors' classes and their number, for backward."""
    (num_rows, dim), num_classes = features.shape, centroids.shape[0]
    anchors = min(num_rows, num_classes)
    distance, stats, classes, num_anchors = _saved(features, num_classes)
    leader = torch.empty(num_rows, dtype=torch.int32, device=features.device)
    terms = torch.empty(num_rows, dtype=torch.float32, device=features.device)
    denominator = torch.empty((), dtype=torch.float32, device=features.device)
    tile_anchors, tile_samples, tile_dim = _distance_tile(anchors, num_rows)
    with on_device(features):
        _leaders_kernel[(triton.cdiv(num_rows, 32),)](
            target, class_weight, leader, terms, num_rows, num_classes, ROWS=32, COLUMNS=128, num_warps=4, enable_fp_fusion=True
        )
        _anchors_kernel[(1,)](
            target, class_weight, leader, classes, num_anchors, denominator, num_rows, num_classes,
            MEAN=reduction == "mean", ALIGNMENT=ANCHOR_ALIGNMENT, ROWS=ROW_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _distance_kernel[(triton.cdiv(num_rows, tile_samples), triton.cdiv(anchors, tile_anchors))](
            features, *features.stride(), centroids, *centroids.stride(), classes, num_anchors, distance, distance.stride(0), num_rows, dim,
            ANCHORS=tile_anchors, SAMPLES=tile_samples, DIM=tile_dim, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        # without contraction to fused multiply-adds: the largest logit minus the peak must be exactly 0
        _softmax_kernel[(anchors,)](
            distance, distance.stride(0), target, epsilon, class_weight, classes, num_anchors, denominator, terms, stats, stats.stride(0),
            num_rows, 1.0 / temperature, PER_CLASS=epsilon.dim() == 1, SAMPLES=ROW_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        loss = terms
        if reduction != "none":
            loss = torch.empty((), dtype=torch.float32, device=features.device)
            _reduce_kernel[(1,)](terms, denominator, loss, num_rows, ROWS=ROW_BLOCK, num_warps=4, enable_fp_fusion=True)
    return loss, [distance, stats, classes, num_anchors]


def _saved(features: Tensor, num_classes: int) -> list[Tensor]:
    num_rows = features.shape[0]
    anchors: Any = torch.sym_min(num_rows, num_classes)
    return [
        features.new_empty((anchors, padded(num_rows, SAMPLE_ALIGNMENT)), dtype=torch.float32),
        features.new_empty((STATS, anchors), dtype=torch.float32),
        features.new_empty(padded(anchors, ANCHOR_ALIGNMENT), dtype=torch.int64),
        features.new_empty((), dtype=torch.int32),
    ]


@shapes_of("dro_lt_forward", "triton")
def _(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    loss = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    return loss, _saved(features, centroids.shape[0])


@implements("dro_lt_backward", "triton")
def dro_lt_backward(
    grad_loss: Tensor,  # () or (N,)
    features: Tensor,
    target: Tensor,
    centroids: Tensor,
    epsilon: Tensor,
    saved: list[Tensor],
    temperature: float,
    reduction: str,
    features_grad: bool,
    epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the features and of epsilon, each in its dtype and shape; one that was not requested is empty, (0,)."""
    distance, stats, classes, num_anchors = saved
    (num_rows, dim), (num_classes, _) = features.shape, centroids.shape
    per_class = epsilon.dim() == 1
    pull = features.new_empty((classes.shape[0], distance.shape[1]), dtype=torch.float32)
    # one entry for each class, or for each anchor to be summed: those of absent classes stay 0
    grad_epsilon = features.new_zeros(num_classes if per_class else stats.shape[1], dtype=torch.float32) if epsilon_grad else None
    grad_features = torch.empty((num_rows, dim) if features_grad else (0,), dtype=features.dtype, device=features.device)
    with on_device(features):
        # without contraction to fused multiply-adds: mass - upstream of the only sample of a class must be exactly 0
        _pull_kernel[(pull.shape[0],)](
            grad_loss.contiguous(), distance, distance.stride(0), target, epsilon, classes, num_anchors, stats, stats.stride(0),
            pull, grad_epsilon, num_rows, 1.0 / temperature,
            PER_CLASS=per_class, PER_SAMPLE=reduction == "none", ALIGNMENT=ANCHOR_ALIGNMENT, SAMPLES=ROW_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if features_grad:
            _features_kernel[(triton.cdiv(num_rows, SAMPLE_ALIGNMENT), triton.cdiv(dim, 128))](
                features, *features.stride(), centroids, *centroids.stride(), target, classes, num_anchors, pull, pull.stride(0),
                grad_features, num_rows, num_classes, dim, ANCHORS=ANCHOR_ALIGNMENT, SAMPLES=SAMPLE_ALIGNMENT, DIM=128, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    if grad_epsilon is None:
        return grad_features, features.new_empty(0, dtype=torch.float32)
    return grad_features, grad_epsilon if per_class else grad_epsilon.sum()
