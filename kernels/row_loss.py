"""From softmax statistics to losses: the formula of a sample's loss and of its gradient, shared by all kernels that compute logits.

Kernels that compute the logits z_ij = s * v_ij store, for each row, over the classes that are NOT one of its targets,

    peak = max_j v_ij,   rest = sum_j exp(s * (v_ij - peak)),   and, with label smoothing, blend = sum over ALL classes of weight_j * v_ij.

`row_losses` adds the targets in closed form. No probability is subtracted from 1: the sum over the other classes is stored separately, so the
target's gradient stays accurate where its probability is close to 1. It stores four numbers per row, from which backward computes the gradient, given v_ij:

    dz_ij = exp2(s * log2(e) * v_ij - offset_i) - smooth_i * weight_j      (j not a target),       dz_ia = grad_a,   dz_ib = grad_b

If an angle is added to those of the targets (`LossTerms.adds_target_angles`), grad_a and grad_b are gradients by s * cosine. A difficulty margin and
top-1 need one more statistic of each row: hardest, the largest cosine of a class that is no target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .angles import HALF_PI, add_angle
from .philox import noise_at
from .runtime import NVIDIA, batch_kernel
from .terms import LossTerms

LOG2E = 1.4426950408889634
ROW_STATS = 4  # offset, grad_a, grad_b, smooth
_ROWS = 128
# Up to this many rows, one program finishes and reduces a batch, which saves a launch. A smaller last batch compiles that program once more.
MAX_ROWS_OF_ONE_PROGRAM = 512


@triton.jit
def log1p(x):
    # log(1 + x) times x / ((1 + x) - 1): the rounding error of 1 + x cancels (Kahan)
    grown = 1.0 + x
    return tl.where(grown == 1.0, x, tl.log(grown) * (x / (grown - 1.0)))


@triton.jit
def one_minus_exp_neg(x):
    # 1 - exp(-x), x >= 0, without cancellation at small x
    decayed = tl.exp(-x)
    small = tl.where(decayed == 1.0, x, (1.0 - decayed) * (x / -tl.log(tl.maximum(decayed, 1e-30))))
    return tl.where(x < 1.0, small, 1.0 - decayed)


@triton.jit
def _load_class(ptr, classes, present, absent):
    return tl.load(ptr + classes, mask=present, other=0.0) if ptr is not None else absent


@triton.jit
def _target_cosine(cosine_ptr, stride_n, stride_c, class_ptr, rows, in_batch, num_classes, GATHER: tl.constexpr):
    """The target's class, whether it is in range, and its cosine."""
    classes = tl.load(class_ptr + rows, mask=in_batch, other=0)
    present = in_batch & (classes >= 0) & (classes < num_classes)
    if GATHER:
        cosine = tl.load(cosine_ptr + rows * stride_n + classes * stride_c, mask=present, other=0.0).to(tl.float32)
    else:
        cosine = tl.load(cosine_ptr + rows, mask=in_batch, other=0.0)
    return classes, present, cosine


@triton.jit
def _target_logit(
    cosine, hardest, rows, classes, present, cloud_ptr, margin_ptr, bias_ptr, seed_ptr, row_offset, class_offset, inverse_scale,
    ANGULAR: tl.constexpr, DIFFICULTY: tl.constexpr, EASY: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The target's v without and with its margin, the difference, and the derivatives of both v by the cosine."""
    margin = _load_class(margin_ptr, classes, present, 0.0)
    value = cosine
    cloud = 0.0
    if cloud_ptr is not None:
        cloud = tl.load(cloud_ptr + classes, mask=present, other=0.0) * noise_at(tl.load(seed_ptr), rows + row_offset, classes + class_offset, NVIDIA)
        if not ANGULAR:
            value -= cloud
    slope = 1.0
    own_slope = 1.0
    if ANGULAR or DIFFICULTY:
        angle = tl.zeros_like(cosine) + margin
        grown = 0.0  # derivative of the margin
        if DIFFICULTY:
            hard = hardest > cosine
            angle *= tl.where(hard, 1.0 + 0.5 * (1.0 - cosine), 1.0)
            grown = tl.where(hard, -0.5 * margin, 0.0)
        if ANGULAR:
            value, slope, _ = add_angle(cosine, tl.zeros_like(cosine) + HALF_PI * cloud, EASY, NVIDIA)
            angle += HALF_PI * cloud
        own, by_cosine, by_angle = add_angle(cosine, angle, EASY, NVIDIA)
        own_slope = by_cosine + by_angle * grown
        if not ANGULAR:
            own -= cloud
        drop = value - own
    else:
        drop = margin
    if bias_ptr is not None:
        value += tl.load(bias_ptr + classes, mask=present, other=0.0) * inverse_scale
    return value, value - drop, drop, slope, own_slope


@triton.jit
def _one_target(
    peak, rest, blend, own, other, share, weight, total_weight, scale, scale2, smoothing, class_share, gamma, FOCAL: tl.constexpr, DETACH: tl.constexpr
):  # fmt: skip
    """One target's part of a row, times the target's share: loss, log2 of the slope, gradient at the target, and chain factor.

    `own` is the target's v with its margin, `other` the second target's v without margin (-inf if there is none, or if it is the same class). The
    gradient at a class that is no target is exp2(s * log2(e) * v + slope).
    """
    top = tl.maximum(tl.maximum(peak, own), other)
    around = tl.where(rest > 0.0, rest * tl.exp2(scale2 * (peak - top)), rest) + tl.exp2(scale2 * (other - top))
    target = tl.exp2(scale2 * (own - top))
    total = around + target
    nll = tl.where(around <= target, log1p(around / target), scale * (top - own) + tl.log(total))
    mass = weight
    loss = weight * nll
    spread = 0.0
    if class_share is not None:
        mass = (1.0 - smoothing) * weight + class_share * total_weight
        loss = (1.0 - smoothing) * loss + class_share * (total_weight * (scale * top + tl.log(total)) - blend)
        spread = class_share * (total_weight - weight)
    chain = share
    if FOCAL:
        loss = tl.where(loss < 0.0, 0.0, loss)  # a maximum would drop a NaN
        missed = one_minus_exp_neg(loss)
        factor = tl.where(missed > 0.0, tl.exp2(gamma * tl.log2(missed)), missed)
        chain = share * factor
        if not DETACH:
            chain *= 1.0 + gamma * tl.where(missed > 0.0, loss * tl.exp(-loss) / missed, 1.0)
        loss *= factor
    slope = tl.log2(chain * mass / total) - scale2 * top
    return share * loss, slope, chain * (spread - mass * (around / total)), chain


@batch_kernel
def _row_losses_kernel(
    cosine_a_ptr, cosine_b_ptr, stride_n, stride_c,  # the matrix (N, C) twice, or the targets' own cosines (N,) of each
    peak_ptr, rest_ptr, blend_ptr, hardest_ptr,  # (splits, N)
    target_ptr, target_b_ptr, lam_ptr, cloud_ptr, margin_ptr, bias_ptr, weight_ptr, smoothing_ptr, total_weight_ptr, seed_ptr,
    loss_ptr, kept_ptr, stats_ptr,  # (N,), (N,), (4, N)
    reduced_ptr, denominator_ptr,  # (), where one program has all rows and reduces them, too; else None
    top1_ptr,  # (N,) share of the targets with the largest cosine, or None
    num_rows, num_classes, splits, row_offset, class_offset, ignore_index, scale, scale2, inverse_scale,
    smoothing, class_share,  # of all classes, and over their number; 1 over their number where each class has its own
    gamma,
    GATHER: tl.constexpr, FOCAL: tl.constexpr, DETACH: tl.constexpr, MEAN: tl.constexpr, ANGULAR: tl.constexpr, DIFFICULTY: tl.constexpr,
    EASY: tl.constexpr, ROWS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    blend = tl.zeros((ROWS,), tl.float32)
    hardest = peak
    at = rows
    for _ in range(splits):
        part_peak = tl.load(peak_ptr + at, mask=in_batch, other=-float("inf"))
        part_rest = tl.load(rest_ptr + at, mask=in_batch, other=0.0)
        top = tl.maximum(peak, part_peak)
        anchor = tl.where(top == -float("inf"), 0.0, top)  # no class yet: both sums are 0
        rest = rest * tl.exp2(scale2 * (peak - anchor)) + part_rest * tl.exp2(scale2 * (part_peak - anchor))
        peak = top
        if class_share is not None:
            blend += tl.load(blend_ptr + at, mask=in_batch, other=0.0)
        if hardest_ptr is not None:
            hardest = tl.maximum(hardest, tl.load(hardest_ptr + at, mask=in_batch, other=-float("inf")))
        at += num_rows

    class_a, present_a, cosine_a = _target_cosine(cosine_a_ptr, stride_n, stride_c, target_ptr, rows, in_batch, num_classes, GATHER)
    hardest_a = hardest
    if target_b_ptr is not None:
        class_b, present_b, cosine_b = _target_cosine(cosine_b_ptr, stride_n, stride_c, target_b_ptr, rows, in_batch, num_classes, GATHER)
        same = class_a == class_b
        if hardest_ptr is not None:  # to each target, the other one is one of the other classes
            hardest_a = tl.where(same, hardest, tl.maximum(hardest, cosine_b))
            hardest = tl.where(same, hardest, tl.maximum(hardest, cosine_a))
    value_a, own_a, drop_a, slope_a, own_slope_a = _target_logit(
        cosine_a, hardest_a, rows, class_a, present_a, cloud_ptr, margin_ptr, bias_ptr, seed_ptr, row_offset, class_offset, inverse_scale,
        ANGULAR, DIFFICULTY, EASY, NVIDIA,
    )  # fmt: skip
    weight_a = _load_class(weight_ptr, class_a, present_a, 1.0)
    total_weight = tl.load(total_weight_ptr) if total_weight_ptr is not None else num_classes * 1.0
    ignored = class_a == ignore_index
    known = present_a
    share = 1.0
    kept_weight = weight_a
    absent = tl.full((ROWS,), -float("inf"), tl.float32)
    smoothing_a = smoothing
    share_a = class_share
    if smoothing_ptr is not None:
        smoothing_a = tl.load(smoothing_ptr + class_a, mask=present_a, other=0.0)
        share_a = smoothing_a * class_share
    if target_b_ptr is None:
        loss, slope, grad_a, chain = _one_target(
            peak, rest, scale * (blend - weight_a * drop_a), own_a, absent, share, weight_a, total_weight, scale, scale2, smoothing_a, share_a, gamma,
            FOCAL, DETACH,
        )  # fmt: skip
        grad_a *= own_slope_a
        if class_share is not None:
            smooth = chain * share_a
    else:
        value_b, own_b, drop_b, slope_b, own_slope_b = _target_logit(
            cosine_b, hardest, rows, class_b, present_b, cloud_ptr, margin_ptr, bias_ptr, seed_ptr, row_offset, class_offset, inverse_scale,
            ANGULAR, DIFFICULTY, EASY, NVIDIA,
        )  # fmt: skip
        weight_b = _load_class(weight_ptr, class_b, present_b, 1.0)
        share = tl.load(lam_ptr + rows, mask=in_batch, other=1.0)
        smoothing_b = smoothing
        share_b = class_share
        if smoothing_ptr is not None:
            smoothing_b = tl.load(smoothing_ptr + class_b, mask=present_b, other=0.0)
            share_b = smoothing_b * class_share
        loss, log_slope_a, grad_a, chain = _one_target(
            peak, rest, scale * (blend - weight_a * drop_a), own_a, tl.where(same, absent, value_b), share, weight_a, total_weight,
            scale, scale2, smoothing_a, share_a, gamma, FOCAL, DETACH,
        )  # fmt: skip
        loss_b, log_slope_b, grad_b, chain_b = _one_target(
            peak, rest, scale * (blend - weight_b * drop_b), own_b, tl.where(same, absent, value_a), 1.0 - share, weight_b,
            total_weight, scale, scale2, smoothing_b, share_b, gamma, FOCAL, DETACH,
        )  # fmt: skip
        # each target is an ordinary class of the other's softmax
        crossed_a = tl.exp2(scale2 * value_a + log_slope_b)
        crossed_b = tl.exp2(scale2 * value_b + log_slope_a)
        if class_share is not None:
            crossed_a -= chain_b * share_b * weight_a
            crossed_b -= chain * share_a * weight_b
            smooth = chain * share_a + chain_b * share_b
        grad_a *= own_slope_a
        grad_b *= own_slope_b
        both = grad_a + grad_b
        grad_a = tl.where(same, both, grad_a + crossed_a * slope_a)
        grad_b = tl.where(same, both, grad_b + crossed_b * slope_b)
        top_slope = tl.maximum(log_slope_a, log_slope_b)
        anchor = tl.where(top_slope == -float("inf"), 0.0, top_slope)
        slope = tl.log2(tl.exp2(log_slope_a - anchor) + tl.exp2(log_slope_b - anchor)) + anchor
        loss += loss_b
        ignored |= class_b == ignore_index
        known &= present_b
        kept_weight = share * weight_a + (1.0 - share) * weight_b

    # a label out of range makes its own row NaN; an ignored row has an infinite offset, which also tells backward not to read it
    nan = float("nan")
    loss = tl.where(ignored, 0.0, tl.where(known, loss, nan))
    kept = tl.where(ignored, 0.0, 1.0 if FOCAL else kept_weight)
    if reduced_ptr is None:
        tl.store(loss_ptr + rows, loss, mask=in_batch)
        tl.store(kept_ptr + rows, kept, mask=in_batch)
    else:
        denominator = tl.sum(tl.where(in_batch, kept, 0.0)) if MEAN else 1.0
        tl.store(reduced_ptr, tl.sum(tl.where(in_batch, loss, 0.0)) / denominator)
        tl.store(denominator_ptr, denominator)
    tl.store(stats_ptr + rows, tl.where(ignored, float("inf"), tl.where(known, -slope, nan)), mask=in_batch)
    tl.store(stats_ptr + num_rows + rows, tl.where(ignored, 0.0, tl.where(known, grad_a, nan)), mask=in_batch)
    if target_b_ptr is not None:
        tl.store(stats_ptr + num_rows * 2 + rows, tl.where(ignored, 0.0, tl.where(known, grad_b, nan)), mask=in_batch)
    if top1_ptr is not None:
        top1 = tl.where(cosine_a > hardest_a, share, 0.0)
        if target_b_ptr is not None:
            top1 += tl.where(cosine_b > hardest, 1.0 - share, 0.0)
        tl.store(top1_ptr + rows, tl.where(ignored, 0.0, tl.where(known, top1, nan)), mask=in_batch)
    if class_share is not None:
        tl.store(stats_ptr + num_rows * 3 + rows, tl.where(ignored, 0.0, smooth), mask=in_batch)


@batch_kernel
def _reduce_rows_kernel(loss_ptr, kept_ptr, reduced_ptr, denominator_ptr, num_rows, MEAN: tl.constexpr, ROWS: tl.constexpr):
    loss = tl.zeros((ROWS,), tl.float32)
    kept = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        loss += tl.load(loss_ptr + rows, mask=rows < num_rows, other=0.0)
        kept += tl.load(kept_ptr + rows, mask=rows < num_rows, other=0.0)
    denominator = tl.sum(kept) if MEAN else 1.0
    tl.store(reduced_ptr, tl.sum(loss) / denominator)
    tl.store(denominator_ptr, denominator)


def row_losses(
    cosine_a: Tensor,  # (N, C), or (N,) cosines of the targets
    cosine_b: Tensor | None,  # the same for the second target
    peak: Tensor,  # (splits, N)
    rest: Tensor,  # (splits, N)
    blend: Tensor | None,  # (splits, N), with label smoothing
    hardest: Tensor | None,  # (splits, N), with a difficulty margin or top-1
    num_classes: int,
    terms: LossTerms,
    top1: Tensor | None = None,  # (N,) receives the share of the targets that have the largest cosine
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ((), or (N,) unreduced), row statistics (4, N) and the mean's denominator ()."""
    splits, num_rows = peak.shape
    gather = cosine_a.dim() == 2
    each = terms.reduction == "none"
    one_program = num_rows <= MAX_ROWS_OF_ONE_PROGRAM and not each
    loss, kept = (torch.empty(0 if one_program else num_rows, dtype=torch.float32, device=peak.device) for _ in range(2))
    reduced, denominator = (None, None) if each else (torch.empty((), dtype=torch.float32, device=peak.device) for _ in range(2))
    stats = torch.empty((ROW_STATS, num_rows), dtype=torch.float32, device=peak.device)
    smoothed = terms.smoothed
    smoothing = terms.label_smoothing if terms.smoothing is None else 1.0
    total_weight = terms.weight.sum() if smoothed and terms.weight is not None else None
    _row_losses_kernel[(1 if one_program else triton.cdiv(num_rows, _ROWS),)](
        cosine_a, cosine_b, cosine_a.stride(0), cosine_a.stride(1) if gather else 0, peak, rest, blend, hardest,
        terms.target, terms.target_b, terms.lam, terms.cloud, terms.margin, terms.bias, terms.weight, terms.smoothing, total_weight, terms.seed,
        loss, kept, stats, reduced if one_program else None, denominator if one_program else None, top1,
        num_rows, num_classes, splits, terms.row_offset, terms.class_offset, terms.ignore_index, terms.scale, terms.scale * LOG2E, 1.0 / terms.scale,
        smoothing, smoothing / num_classes if smoothed else None, terms.gamma,
        GATHER=gather, FOCAL=terms.gamma > 0.0, DETACH=terms.focal_detach, MEAN=terms.reduction == "mean", ANGULAR=terms.angular,
        DIFFICULTY=terms.difficulty_margin, EASY=terms.easy_margin, ROWS=MAX_ROWS_OF_ONE_PROGRAM if one_program else _ROWS, NVIDIA=NVIDIA,
        num_warps=8 if one_program else 4, enable_fp_fusion=True,
    )  # fmt: skip
    if reduced is None or denominator is None:
        return loss, stats, torch.ones((), dtype=torch.float32, device=loss.device)
    if not one_program:
        _reduce_rows_kernel[(1,)](loss, kept, reduced, denominator, num_rows, MEAN=terms.reduction == "mean", ROWS=1024, num_warps=4, enable_fp_fusion=True)
    return reduced, stats, denominator
