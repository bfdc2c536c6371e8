"""Right and wrong uses of the losses, only for a type checker: nothing runs this file.

Each `type: ignore` names the error that the line must have; where a line has none, `mypy --strict` reports an unused ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gclkern
from gclkern import (
    AGCLLoss,
    ArcFaceLoss,
    BalancedContrastiveLoss,
    CosFaceLoss,
    DBMLoss,
    DROLTLoss,
    FocalLoss,
    GCLLoss,
    LabelAwareSmoothingLoss,
    LDAMLoss,
    LinearGCLLoss,
    LogitAdjustedLoss,
    ProCoLoss,
    PrototypicalContrastiveLoss,
    SupConLoss,
    functional,
)
from gclkern.distributed import ShardedLinearGCLLoss, gather_batch, sharded_dro_lt_loss, sharded_linear_gcl_cross_entropy

counts = [500, 50, 5]
cosine, features, weight = torch.randn(4, 3), torch.randn(4, 8), torch.randn(3, 8)
target, cloud = torch.tensor([0, 1, 2, 0]), gclkern.cloud_sizes(counts)


def right() -> list[Tensor]:
    centroids, _ = functional.class_centroids(features, target, num_classes=3)
    losses: list[Tensor] = [
        GCLLoss(counts, noise_mul=0.5, strategy="power", exponent=0.25, margin=weight, reduction="sum")(cosine, target, seed=1, row_offset=4),
        LinearGCLLoss(counts, plan="chunked", strategy="log", label_smoothing=0.1)(features, weight, target, target_b=target, lam=0.5),
        ShardedLinearGCLLoss(counts, sample_rate=0.5, noise_mul=0.5, reduction="none", backend="torch")(features, weight, target, seed=1),
        LDAMLoss(counts, max_margin=0.5, weight=cloud, ignore_index=-1)(cosine, target),
        LogitAdjustedLoss(counts, tau=1.0, reduction="none")(cosine, target, target_b=target, lam=cloud),
        CosFaceLoss(margin=0.3, label_smoothing=0.1)(cosine, target),
        FocalLoss(gamma=1.0, backend="triton")(cosine, target),
        LabelAwareSmoothingLoss(counts, shape="convex", reduction="sum")(cosine, target),
        ArcFaceLoss(margin=0.3, weight=cloud)(cosine, target),
        AGCLLoss(counts, easy_margin=True, reduction="none")(cosine, target, seed=1),
        DBMLoss(counts, noise_mul=0.5, label_smoothing=0.1)(cosine, target),
        DROLTLoss(counts, epsilon="sqrt", base_epsilon=1.0)(features, target, centroids),
        SupConLoss(temperature=0.2, reduction="sum")(*gather_batch(features, target, averaged_gradients=True)),
        BalancedContrastiveLoss(backend="torch")(features, weight, target),
        PrototypicalContrastiveLoss()(features, weight, target),
        ProCoLoss(counts, 16, tau=0.5)(features, target),
        functional.gcl_cross_entropy(cosine, target, cloud, scale=20.0, bias=None, seed=3),
        functional.linear_gcl_cross_entropy(features, weight, target, cloud, plan="auto", backend="auto"),
        functional.dro_lt_loss(features, target, centroids, 0.1, reduction="sum"),
        sharded_linear_gcl_cross_entropy(features, weight, target, cloud, normalize=False, scale=1.0, reduction="sum"),
        sharded_dro_lt_loss(features, target, centroids, 0.1, 3, temperature=2.0),
    ]
    return losses


def wrong_keywords() -> None:
    GCLLoss(counts, noize_mul=0.5)  # type: ignore[call-arg]
    LinearGCLLoss(counts, noize_mul=0.5)  # type: ignore[call-arg]
    ShardedLinearGCLLoss(counts, noize_mul=0.5)  # type: ignore[call-arg]
    LDAMLoss(counts, max_margn=0.5)  # type: ignore[call-arg]
    LogitAdjustedLoss(counts, label_smooting=0.1)  # type: ignore[call-arg]
    CosFaceLoss(margn=0.3)  # type: ignore[call-arg]
    FocalLoss(gama=2.0)  # type: ignore[call-arg]
    LabelAwareSmoothingLoss(counts, haed=0.3)  # type: ignore[call-arg]
    ArcFaceLoss(margn=0.3)  # type: ignore[call-arg]
    AGCLLoss(counts, noize_mul=0.5)  # type: ignore[call-arg]
    DBMLoss(counts, margn=0.1)  # type: ignore[call-arg]
    DROLTLoss(counts, temprature=1.0)  # type: ignore[call-arg]
    SupConLoss(temprature=1.0)  # type: ignore[call-arg]
    ProCoLoss(counts, 16, temprature=1.0)  # type: ignore[call-arg]
    functional.supervised_contrastive(features, target, temprature=1.0)  # type: ignore[call-arg]
    gather_batch(features, target, average=True)  # type: ignore[call-arg]
    functional.gcl_cross_entropy(cosine, target, cloud, sclae=30.0)  # type: ignore[call-arg]
    functional.linear_gcl_cross_entropy(features, weight, target, cloud, sclae=30.0)  # type: ignore[call-arg]
    functional.dro_lt_loss(features, target, weight, 0.1, temprature=1.0)  # type: ignore[call-arg]
    sharded_linear_gcl_cross_entropy(features, weight, target, cloud, sclae=30.0)  # type: ignore[call-arg]
    sharded_dro_lt_loss(features, target, weight, 0.1, 3, temprature=1.0)  # type: ignore[call-arg]


def wrong_choices() -> None:
    GCLLoss(counts, strategy="lgo")  # type: ignore[arg-type]
    LinearGCLLoss(counts, strategy="lgo")  # type: ignore[arg-type]
    ShardedLinearGCLLoss(counts, strategy="lgo")  # type: ignore[arg-type]
    gclkern.cloud_sizes(counts, "lgo")  # type: ignore[arg-type]
    GCLLoss(counts, reduction="avg")  # type: ignore[arg-type]
    LinearGCLLoss(counts, reduction="avg")  # type: ignore[arg-type]
    ShardedLinearGCLLoss(counts, reduction="avg")  # type: ignore[arg-type]
    LDAMLoss(counts, reduction="avg")  # type: ignore[arg-type]
    LogitAdjustedLoss(counts, reduction="avg")  # type: ignore[arg-type]
    CosFaceLoss(reduction="avg")  # type: ignore[arg-type]
    FocalLoss(reduction="avg")  # type: ignore[arg-type]
    LabelAwareSmoothingLoss(counts, shape="round")  # type: ignore[arg-type]
    gclkern.label_aware_smoothing(counts, shape="round")  # type: ignore[arg-type]
    ArcFaceLoss(reduction="avg")  # type: ignore[arg-type]
    AGCLLoss(counts, backend="cuda")  # type: ignore[arg-type]
    DBMLoss(counts, reduction="avg")  # type: ignore[arg-type]
    DROLTLoss(counts, reduction="avg")  # type: ignore[arg-type]
    DROLTLoss(counts, epsilon="learnt")  # type: ignore[arg-type]
    functional.gcl_cross_entropy(cosine, target, reduction="avg")  # type: ignore[arg-type]
    functional.linear_gcl_cross_entropy(features, weight, target, reduction="avg")  # type: ignore[arg-type]
    functional.dro_lt_loss(features, target, weight, 0.1, reduction="avg")  # type: ignore[arg-type]
    sharded_linear_gcl_cross_entropy(features, weight, target, reduction="avg")  # type: ignore[arg-type]
    sharded_dro_lt_loss(features, target, weight, 0.1, 3, reduction="avg")  # type: ignore[arg-type]
    LinearGCLLoss(counts, plan="chunk")  # type: ignore[arg-type]
    ShardedLinearGCLLoss(counts, plan="chunk")  # type: ignore[arg-type]
    functional.linear_gcl_cross_entropy(features, weight, target, plan="chunk")  # type: ignore[arg-type]
    LDAMLoss(counts, backend="cuda")  # type: ignore[arg-type]
    SupConLoss(reduction="avg")  # type: ignore[arg-type]
    ProCoLoss(counts, 16, backend="cuda")  # type: ignore[arg-type]


def missing_arguments() -> None:
    GCLLoss()  # type: ignore[call-arg]
    LinearGCLLoss()  # type: ignore[call-arg]
    ShardedLinearGCLLoss()  # type: ignore[call-arg]
    LDAMLoss()  # type: ignore[call-arg]
    LogitAdjustedLoss()  # type: ignore[call-arg]
    DROLTLoss()  # type: ignore[call-arg]
    GCLLoss(counts)(cosine)  # type: ignore[call-arg]
    LinearGCLLoss(counts)(features, target)  # type: ignore[call-arg]
    ShardedLinearGCLLoss(counts)(features, target)  # type: ignore[call-arg]
    LDAMLoss(counts)(cosine)  # type: ignore[call-arg]
    LogitAdjustedLoss(counts)(cosine)  # type: ignore[call-arg]
    CosFaceLoss()(cosine)  # type: ignore[call-arg]
    FocalLoss()(cosine)  # type: ignore[call-arg]
    DROLTLoss(counts)(features, target)  # type: ignore[call-arg]
    SupConLoss()(features)  # type: ignore[call-arg]
    BalancedContrastiveLoss()(features, target)  # type: ignore[call-arg]
    PrototypicalContrastiveLoss()(features, target)  # type: ignore[call-arg]
    ProCoLoss(counts, 16)(features)  # type: ignore[call-arg]
    sharded_linear_gcl_cross_entropy(features, weight)  # type: ignore[call-arg]
    LDAMLoss(counts)(cosine, target, seed=1)  # type: ignore[call-arg]
