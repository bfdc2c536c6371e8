"""The loss of a classifier whose classes are spread over the ranks of a process group.

Rank r holds the weights of a range of classes and the features of its own samples. A step then is

    features of all ranks gathered   (N, D)
    each rank: products with its classes, noise, and the softmax statistics of its logits: peak_i, rest_i = sum_j exp(z_ij - peak_i)
    peaks: maximum over the ranks; rests, rescaled to it, and the targets' cosines: sum over the ranks
    every rank: the same losses (N,); then the gradient of its logits, its weights and, partly, of all features
    feature gradients summed over the ranks, each of which keeps its own rows

so ranks exchange 2 N D numbers and a few for each sample, for any number of classes. The noise depends on the global sample and class, so the loss and
all gradients equal those of one process that holds everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gclkern.autograd import save_terms, saved_terms
from gclkern.devices import without_autocast
from gclkern.dispatch import head_implementation, resolve_backend, resolve_plan
from gclkern.distributed.ranks import Ranks, untraced
from gclkern.distributed.shards import Shards, agree, agreed_form
from gclkern.functional import linear_gcl_cross_entropy
from gclkern.kernels.terms import LossTerms, statistics_dtype
from gclkern.options import LinearCrossEntropyOptions
from gclkern.torch_backend.rows import row_targets
from gclkern.validation import check_head, check_labels, check_number, check_offset, hard_labels, loss_terms, resolve_seed

_DEFAULTS: dict[str, Any] = linear_gcl_cross_entropy.__kwdefaults__ or {}
# Labels that belong to no class of this rank.
_IGNORED, _ELSEWHERE = -1, -(2**30)


@dataclass(frozen=True)
class _Call:
    """The arguments of the sharded loss that are not tensors."""

    ranks: Ranks
    shards: Shards
    normalize: bool
    plan: str
    backend: str
    for_backward: bool
    averaged_gradients: bool
    with_top1: bool


class _OtherClasses:
    """The classes of other ranks (gclkern.kernels.terms.ClassShards)."""

    def __init__(self, call: _Call, terms: LossTerms) -> None:
        self.call, self.terms, self.num_classes = call, terms, call.shards.num_classes

    def merge(
        self, peak: Tensor, rest: Tensor, blend: Tensor | None, hardest: Tensor | None, own: list[Tensor], factor: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        ranks, mine = self.call.ranks, self.call.shards.mine
        held = [(target >= mine.start) & (target < mine.stop) for target in row_targets(self.terms)]
        tops = ranks.max_(torch.stack([part.amax(0) for part in (peak, hardest) if part is not None]), "reducing the largest logits")
        top = tops[0]
        anchor = top.masked_fill(top == -torch.inf, 0.0)  # a row whose only classes are its targets: -inf minus -inf would be NaN
        parts = [(rest * torch.exp(factor * (peak - anchor))).sum(0)]
        parts += [torch.where(here, value, 0.0) for here, value in zip(held * (len(own) // len(held)), own, strict=True)]
        if blend is not None:
            parts.append(blend.sum(0))
        sums = ranks.sum_(torch.stack(parts), "reducing the softmax sums")
        return top[None], sums[:1], None if blend is None else sums[-1:], None if hardest is None else tops[1:], list(sums[1 : 1 + len(own)])

    def scatter(self, gradient: Tensor) -> Callable[[], Tensor]:
        if self.call.averaged_gradients:
            gradient.mul_(self.call.ranks.world)
        return self.call.ranks.start_scatter(gradient, "reducing the gradients of the features")


def _local_terms(terms: LossTerms, mine: slice) -> LossTerms:
    """The terms of this rank's classes, with labels relative to the first of them."""

    def local(target: Tensor | None) -> Tensor | None:
        if target is None:
            return None
        here = torch.where((target >= mine.start) & (target < mine.stop), target - mine.start, _ELSEWHERE)
        return torch.where(target == terms.ignore_index, _IGNORED, here)

    cloud, margin, bias, weight = (None if vector is None else vector[mine] for vector in (terms.cloud, terms.margin, terms.bias, terms.weight))
    target = local(terms.target)
    assert target is not None
    return terms._replace(
        target=target, target_b=local(terms.target_b), cloud=cloud, margin=margin, bias=bias, weight=weight, ignore_index=_IGNORED,
        class_offset=terms.class_offset + mine.start,
    )  # fmt: skip


class ShardedHeadLoss(torch.autograd.Function):
    """The collective version of :class:`gclkern.autograd.HeadLoss`; `features` are this rank's, `terms` are those of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, linear_weight: Tensor, bias: Tensor | None, terms: LossTerms, call: _Call
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        whole = call.ranks.gather_rows(features, "gathering the features")
        terms = terms._replace(bias=bias)
        local, others = _local_terms(terms, call.shards.mine), _OtherClasses(call, terms)
        options: tuple[Any, ...] = (call.normalize, call.plan)
        top1: Tensor | bool | None = call.with_top1
        if call.backend == "torch":
            options = (*options, call.for_backward)
        else:  # the kernels write into a tensor
            top1 = torch.empty(whole.shape[0], dtype=torch.float32, device=whole.device) if call.with_top1 else None
        with without_autocast(features.device.type):
            loss, saved = head_implementation(call.backend).run_forward(whole, linear_weight, local, *options, others, top1)
        if call.with_top1 and not isinstance(top1, Tensor):
            *saved, top1 = saved
        save_terms(ctx, (whole, linear_weight, *(saved if call.for_backward else ())), local)
        ctx.call, ctx.rows = call, features.shape[0]
        own = slice(call.ranks.rank * ctx.rows, (call.ranks.rank + 1) * ctx.rows)
        if local.reduction == "none":
            loss = loss[own].clone()
        if not isinstance(top1, Tensor):
            return loss
        top1 = top1[own].clone()
        ctx.mark_non_differentiable(top1)
        return loss, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[:3]
        (features, linear_weight, *saved), local = saved_terms(ctx)
        if local.reduction == "none":
            grad_loss = call.ranks.gather_rows(grad_loss, "gathering the gradients of the losses")
        run_backward, others = head_implementation(call.backend).run_backward, _OtherClasses(call, local)
        with without_autocast(features.device.type):
            grads = run_backward(grad_loss, features, linear_weight, saved, local, call.normalize, call.plan, *wanted, others)
        grad_features, grad_weight, grad_bias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        if grad_bias is not None:
            grad_bias = call.ranks.gather_parts(grad_bias, call.shards.sizes, "gathering the gradient of the bias")
        return grad_features, grad_weight, grad_bias, None, None


def local_shard(linear_weight: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's rows of a DTensor, and the group that shares it; a plain tensor and `group` are returned unchanged."""
    if not hasattr(linear_weight, "placements"):
        return linear_weight, group
    dims = [dim for dim, placement in enumerate(linear_weight.placements) if placement.is_shard(0)]
    others = [placement for placement in linear_weight.placements if not (placement.is_shard(0) or placement.is_replicate())]
    if len(dims) != 1 or others:
        raise ValueError(f"linear_weight is a DTensor placed {linear_weight.placements}; its classes must be sharded, Shard(0), over one mesh dimension")
    return linear_weight.to_local(), linear_weight.device_mesh.get_group(dims[0])  # type: ignore[attr-defined]


def sharded_linear_gcl_cross_entropy(
    features: Tensor,  # (n, D)
    linear_weight: Tensor,  # (classes of this rank, D)
    target: Tensor,  # (n,)
    cloud: Tensor | None = None,  # (C,)
    *,
    group: dist.ProcessGroup | None = None,
    averaged_gradients: bool = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor:
    r""":func:`gclkern.functional.linear_gcl_cross_entropy` with the classes spread over the ranks of a process group; a collective call.

    Each rank passes its own samples and the weights of its own classes: consecutive ranges in the order of the ranks, of any sizes. Per-class vectors are given
    for ALL classes, the same on every rank: `cloud`, `margin`, `bias` and `weight` are (C,), labels are in [0, C). Loss and gradients equal those of one
    process with all ranks' samples in the order of the ranks, up to rounding.

    Args:
        features: this rank's samples (n, D), as many on every rank.
        linear_weight: the rows of this rank's classes, or a DTensor (C, D) whose rows are sharded over one dimension of its mesh, which then is the group.
            Where it is replicated over another dimension, each group has its own samples, loss and gradient: average the gradients over that dimension.
        target: labels of this rank's samples (n,), int64, or soft labels (n, C).
        group: the ranks that share the classes; None is the default group. Without torch.distributed one process holds all classes.
        averaged_gradients: False returns the gradient of the loss. True multiplies the gradient of `features` by the number of ranks, for a backbone in
            DistributedDataParallel or FSDP, which average gradients over the ranks instead of summing them. The gradients of `linear_weight` and `bias` are
            complete on every rank in both cases and need no averaging.
        seed: as in the functional API; all ranks use the first rank's seed.
        row_offset: index of the first rank's first sample, the same on every rank.
        class_offset: index of the first rank's first class.
        target_b, lam: of this rank, like `target`; lam is a number, () or (n,).
        cloud, normalize, plan, scale, margin, bias, weight, gamma, focal_detach, label_smoothing, angular, difficulty_margin, easy_margin, ignore_index,
            reduction: as in :func:`gclkern.functional.linear_gcl_cross_entropy`; the same on every rank.
        backend: "auto", "triton", "cpu" or "torch", the same on every rank. On a CPU torch computes the loss for all of these but "triton": the compiled loops
            have no form for shards.

    Returns:
        The loss of all ranks' samples, () and the same on every rank, for "mean" and "sum"; those of this rank's samples (n,) for "none". Backward is a
        collective call, too, with the same upstream gradient on every rank for "mean" and "sum".

    Raises:
        ValueError, TypeError: as the functional API, on the rank whose argument is wrong; :class:`ShardError` on the others.
        ShardError: the ranks do not agree on shapes or options, or one has died: at the latest after the timeout of the process group.

    Example:
        >>> import torch
        >>> from gclkern.distributed import ShardedCosineLinear, sharded_linear_gcl_cross_entropy
        >>> classifier = ShardedCosineLinear(16, 1000)  # this rank's part of it under torchrun, all of it in one process
        >>> features, target = torch.randn(8, 16, requires_grad=True), torch.randint(1000, (8,))
        >>> loss = sharded_linear_gcl_cross_entropy(features, classifier.weight, target)
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([8, 16])
    """
    unknown = options.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"sharded_linear_gcl_cross_entropy() got an unexpected keyword argument {min(unknown)!r}")
    return sharded_loss(features, linear_weight, target, cloud, group=group, averaged_gradients=averaged_gradients, with_top1=False, **options)


def sharded_loss(
    features: Tensor, linear_weight: Tensor, target: Tensor, cloud: Tensor | None = None, *, group: dist.ProcessGroup | None, averaged_gradients: bool,
    with_top1: bool, **options: Unpack[LinearCrossEntropyOptions],
) -> Any:  # fmt: skip
    """:func:`sharded_linear_gcl_cross_entropy`, or with `with_top1` the pair of it and top-1 (n,) of this rank's samples."""
    loss = untraced(_sharded_loss) if torch.compiler.is_compiling() else _sharded_loss
    return loss(features, linear_weight, target, cloud, group, averaged_gradients, with_top1, {**_DEFAULTS, **options})


def _sharded_loss(
    features: Tensor, linear_weight: Tensor, target: Tensor, cloud: Tensor | None, group: dist.ProcessGroup | None, averaged_gradients: bool,
    with_top1: bool, terms_options: dict[str, Any],
) -> Any:  # fmt: skip
    """`terms_options` holds a value for every option of the loss; entries are removed as they are used."""
    normalize, plan, backend = (terms_options.pop(name) for name in ("normalize", "plan", "backend"))
    target_b, lam, seed, row_offset = (terms_options.pop(name) for name in ("target_b", "lam", "seed", "row_offset"))
    linear_weight, group = local_shard(linear_weight, group)
    ranks = Ranks(group)
    problem: Exception | None = None
    try:
        features = check_head(features, linear_weight, normalize=normalize)
        target, target_b, lam, terms_options["ignore_index"] = hard_labels(target, target_b, lam, terms_options["ignore_index"])
        for name, labels in (("target", target), ("target_b", target_b)):
            if labels is not None:
                check_labels(name, labels, features.shape[0], "features", features, or_soft=True)
        if isinstance(lam, Tensor) and lam.shape not in ((), features.shape[:1]):
            raise ValueError(f"lam must be a number, or a tensor of shape () or ({features.shape[0]},), got {tuple(lam.shape)}")
        if lam is not None and not isinstance(lam, Tensor) and target_b is not None:
            # it differs between ranks and steps, so it is passed as a tensor, not compared as an option
            dtype = statistics_dtype(features)
            lam = torch.full((), check_number("lam", lam, 0.0, 1.0), dtype=dtype, device=features.device)
        check_offset("row_offset", row_offset, features.shape[0] * ranks.world, 2**63)
        if cloud is not None:
            seed = resolve_seed(seed, features.device)
    except (ValueError, TypeError) as error:
        problem = error
    differentiable = (features, linear_weight, terms_options["bias"])
    needs = [torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad for tensor in differentiable]
    shared = (normalize, plan, backend, averaged_gradients, with_top1, needs, *map(agreed_form, (cloud, target_b, lam, *terms_options.values())))
    shards, verdict = agree(ranks, features, linear_weight, shared, problem, row_offset=row_offset)
    if ranks.world > 1:
        if cloud is not None:
            assert isinstance(seed, Tensor)
            seed = ranks.broadcast_(seed.clone(), "sharing the seed")
        target = ranks.gather_rows(target, "gathering the labels")
        target_b = None if target_b is None else ranks.gather_rows(target_b, "gathering the second labels")
        if isinstance(lam, Tensor):
            lam = ranks.gather_rows(lam.expand(features.shape[0]), "gathering the mixing shares")
    whole = features.new_empty((target.shape[0], 0))
    terms = loss_terms("features", whole, shards.num_classes, target, cloud, target_b=target_b, lam=lam, seed=seed, row_offset=row_offset, **terms_options)
    chosen = "triton" if resolve_backend(backend, features) == "triton" else "torch"  # the CPU's compiled loops do not support shards
    resolved = resolve_plan(plan, whole, max(shards.sizes), normalize=normalize, backend=chosen)
    call = _Call(ranks, shards, normalize, resolved, chosen, any(needs), averaged_gradients, with_top1)
    found = ShardedHeadLoss.apply(features, linear_weight, terms.bias, terms, call)
    if verdict is None:
        return found
    return (found[0] * verdict, found[1]) if with_top1 else found * verdict
