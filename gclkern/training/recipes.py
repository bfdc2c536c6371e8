"""Methods by name, each with its published settings: what `train.py --method ... --retrain ...` runs, as a list of phases.

A phase is a part of a run with one loss, one sampler, one schedule and one set of trained parameters. Stage 1 is one phase, or two for DRO-LT,
which starts from a trained model; a re-training stage is another; the cross-entropy baseline is one more, on a network of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gclkern.distributed import ShardedLinearGCLLoss
from gclkern.losses import FocalLoss, GCLLoss, LDAMLoss, LinearGCLLoss, LogitAdjustedLoss
from gclkern.samplers import CBENSampler, ClassAwareSampler, ClassBalancedSampler, EffectiveNumberSampler, InstanceBalancedSampler
from gclkern.training import own_data
from gclkern.training.config import RunConfig
from gclkern.training.schedules import Schedule
from gclkern.weights import effective_number_weights, ldam_margins

METHODS = ("ce", "focal", "cb", "ldam-drw", "la", "balanced-softmax", "gcl", "gcl-ldam-drw", "dro-lt", "gcl+dro-lt")
RETRAINS = ("none", "crt", "lws", "tau-norm", "ncm", "gcl")
SAMPLERS = {
    "instance": InstanceBalancedSampler,
    "class-balanced": ClassBalancedSampler,
    "effective-number": EffectiveNumberSampler,
    "cben": CBENSampler,
    "class-aware": ClassAwareSampler,
}
# How cloud sizes follow from class counts: the strategies that GCL's paper compares.
CLOUDS: dict[str, dict[str, Any]] = {
    "log": {"strategy": "log"},
    "cosine": {"strategy": "cosine"},
    "power-1/3": {"strategy": "power", "exponent": 1 / 3},
    "power-1/4": {"strategy": "power", "exponent": 1 / 4},
}
COSINE_SCALE = 30.0


@dataclass(frozen=True)
class Phase:
    """A part of a run with one loss, one sampler, one schedule and one set of trained parameters."""

    name: str  # of its files and of its row in the table
    epochs: int
    batch_size: int  # of one optimizer step, total over ranks and accumulated parts
    lr: float
    weight_decay: float
    schedule: Schedule
    loss: str  # "ce", "focal", "cb", "ldam", "la" or "gcl"
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the loss
    mixup: float = 0.0  # alpha of the Beta distribution; 0 mixes nothing
    sampler: str = "instance"
    head: str = "linear"  # "linear" or "cosine"; "scaled" has a factor for each class as well
    trains: str = "all"  # or "last-block" and the classifier, "backbone", "head", "scale"; the rest is frozen, with batch normalisation in eval mode
    start: str = "previous"  # "fresh" network, the "previous" phase's, or that with a "new head"
    drw: float | None = None  # share of the epochs after which the class weights are used
    robust: float = 0.0  # weight of the DRO-LT bound, which is added to the loss
    sampler_options: dict[str, Any] = field(default_factory=dict)
    epoch_samples: int | None = None  # draws of an epoch; None is the size of the training set

    @property
    def title(self) -> str:
        """The name and the loss."""
        return f"{self.name}: {self.loss}" + (" + DRO-LT" if self.robust else "")


_STEPS = {"warmup": 5, "milestones": (0.8, 0.9)}
_LDAM_STEPS = Schedule("steps", factors=(0.01, 0.0001), **_STEPS)  # type: ignore[arg-type]
_MISLAS_STEPS = Schedule("steps", factors=(0.1, 0.01), **_STEPS)  # type: ignore[arg-type]
_PLACES_STEPS = Schedule("steps", milestones=(60 / 90, 80 / 90), factors=(0.1, 0.01))
_COSINE = Schedule("cosine")

# epochs, batch size, learning rate, weight decay, schedule and mixup of stage 1; "gcl" is for the clouded methods, "plain" for all others.
# CIFAR: the LDAM-DRW and GCL releases. Large sets: decoupling's release for "plain", MiSLAS's with GCL's epochs for "gcl"; Places-LT: GCL's release.
# Chosen here: Places-LT's "plain", which is GCL's without mixup, and digits, which take a minute on two cores.
_STAGE1: dict[str, dict[str, tuple[int, int, float, float, Schedule, float]]] = {
    "digits": {
        "plain": (80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5), 0.0),
        "gcl": (80, 64, 0.1, 5e-4, Schedule("cosine", warmup=5), 0.2),
    },
    "cifar": {"plain": (200, 128, 0.1, 2e-4, _LDAM_STEPS, 0.0), "gcl": (200, 64, 0.1, 2e-4, _MISLAS_STEPS, 1.0)},
    "imagenet": {"plain": (90, 512, 0.2, 5e-4, _COSINE, 0.0), "gcl": (200, 256, 0.1, 5e-4, _COSINE, 0.2)},
    "inat": {"plain": (90, 512, 0.2, 1e-4, _COSINE, 0.0), "gcl": (200, 256, 0.1, 1e-4, _COSINE, 0.2)},
    "places": {"plain": (90, 512, 0.2, 5e-4, _PLACES_STEPS, 0.0), "gcl": (90, 512, 0.2, 5e-4, _PLACES_STEPS, 0.2)},
}
# Epochs, batch size and learning rate of GCL's second stage. The release's `--lr 0.1` is 0.002 after its schedule has divided it. Published for CIFAR; the
# large sets use the same with stage 1's batch size. Digits have few steps and need a higher rate.
_GCL_STAGE2 = {"digits": (10, 64, 0.02), "cifar": (30, 64, 0.002), "imagenet": (30, 256, 0.002), "inat": (30, 256, 0.002), "places": (30, 512, 0.002)}
# Epochs of cRT and LWS after a plain stage 1 (decoupling's, published for the large sets): with stage 1's batch and learning rate, by cosine and without mixup.
_RETRAIN_EPOCHS = {"crt": 10, "lws": 5}
_INAT_CRT_EPOCHS = 30


def family(dataset: str) -> str:
    """The group of data sets with the same settings; "own" is for sets without published ones, see own_data.py."""
    known = {"digits-lt": "digits", "cifar10-lt": "cifar", "cifar100-lt": "cifar", "imagenet-lt": "imagenet", "places-lt": "places", "inat18": "inat"}
    return known.get(dataset, "own")


def default_model(dataset: str, image_size: int, images: int) -> str:
    """The backbone of the published results on a data set; for other sets it depends on the size and number of the images."""
    settings = family(dataset)
    if settings == "own":
        return own_data.default_model(image_size, images)
    return {"digits": "small-cnn", "cifar": "resnet32", "places": "resnet152"}.get(settings, "resnet50")


def _clouded(settings: str, stage: int) -> dict[str, Any]:
    """Arguments of GCL's loss (released recipes): the large sets take those of Places-LT, other sets without published settings those of CIFAR."""
    large = settings in ("imagenet", "inat", "places")
    if stage == 1:
        return {"noise_mul": 1.0 if large else 0.5, "scale": COSINE_SCALE}
    if large:
        return {"noise_mul": 1.0, "margin": 0.1, "scale": 15.0}
    return {"noise_mul": 0.5, "margin": 0.1, "scale": 20.0, "gamma": 1.0}


def _first_stage(method: str, settings: str, class_counts: list[int], *, pretrained: bool) -> list[Phase]:
    clouded = method in ("gcl", "gcl+dro-lt", "gcl-ldam-drw")
    if settings == "own":
        published: tuple[int, int, float, float, Schedule, float] = own_data.stage1_settings(class_counts, pretrained=pretrained)
    else:
        published = _STAGE1[settings]["gcl" if clouded and method != "gcl-ldam-drw" else "plain"]
    epochs, batch_size, lr, weight_decay, schedule, mixup = published
    loss = {"ldam-drw": "ldam", "balanced-softmax": "la", "gcl+dro-lt": "gcl", "gcl-ldam-drw": "gcl", "dro-lt": "ce"}.get(method, method)
    # LDAM-DRW with GCL's clouds on top, in one stage: LDAM's margins and schedule, no mixup
    options = _clouded(settings, 1) | ({"margin": "ldam"} if method == "gcl-ldam-drw" else {}) if clouded else {}
    phase = Phase(
        "stage-1", epochs, batch_size, lr, weight_decay, schedule, loss, mixup=mixup, options=options,
        head="cosine" if loss in ("gcl", "ldam") else "linear", start="fresh", drw=0.8 if method.endswith("ldam-drw") else None,
        # a pretrained ResNet-152, as in GCL's release and earlier ones
        trains="last-block" if settings == "places" else "all",
    )  # fmt: skip
    if not method.endswith("dro-lt"):
        return [phase]
    # The released recipe for CIFAR, used for all sets: 80 epochs train the features with a frozen classifier, then 20 train the classifier alone, with the
    # same sampler. Combined with GCL, the features are trained by GCL's loss instead of the weighted cross entropy, because the classifier is a cosine
    # classifier, and GCL's stage 2 replaces the 20 epochs.
    long = max(class_counts) * len(class_counts) if settings != "own" else None
    robust_epochs = {"digits": 10, "own": max(1, round(own_data.ROBUST_SHARE * epochs))}.get(settings, 80)
    weighted = {} if clouded else {"weight": "counts"}
    robust = replace(
        phase, name="stage-1-robust", epochs=robust_epochs, batch_size=128, lr=0.005, weight_decay=1e-4, schedule=Schedule(),
        mixup=0.0, options=phase.options | weighted, sampler="class-aware", sampler_options={"samples_per_class": 4}, trains="backbone", start="previous",
        robust=1.0, epoch_samples=long,
    )  # fmt: skip
    classifier = replace(robust, name="stage-1-classifier", epochs=max(1, robust.epochs // 4), lr=0.01, options={}, trains="head", robust=0.0)
    return [phase, robust] if clouded else [phase, robust, classifier]


def _second_stage(retrain: str, settings: str, first: Phase, class_counts: list[int]) -> Phase:
    new_head = retrain == "crt" or (retrain == "gcl" and first.head != "cosine")
    own = own_data.stage2_settings(first.epochs, first.batch_size, first.lr, sum(class_counts), new_head=new_head) if settings == "own" else None
    if retrain == "gcl" or (first.loss == "gcl" and retrain in ("crt", "lws")):
        # after a stage 1 with GCL's loss, all re-training methods use GCL's loss and differ in what they train, as in GCL's paper
        epochs, batch_size, lr = own or _GCL_STAGE2[settings]
        phase = replace(
            first, name="stage-2", epochs=epochs, batch_size=batch_size, lr=lr, schedule=_COSINE, loss="gcl", options=_clouded(settings, 2),
            sampler="cben", head="cosine", trains="head", start="new head" if new_head else "previous", drw=None,
        )  # fmt: skip
        return replace(phase, trains="scale", head="scaled cosine") if retrain == "lws" else phase
    epochs = _INAT_CRT_EPOCHS if (retrain, settings) == ("crt", "inat") else _RETRAIN_EPOCHS.get(retrain, 0)
    options = {"scale": COSINE_SCALE} if first.head == "cosine" else {}
    if own is not None and epochs:
        epochs = own[0]
    plain = replace(first, name="stage-2", epochs=epochs, schedule=_COSINE, loss="ce", options=options, mixup=0.0, sampler="class-balanced", drw=None)
    if retrain == "crt":
        return replace(plain, trains="head", start="new head")
    if retrain == "lws":
        return replace(plain, trains="scale", head=f"scaled {first.head}", start="previous")
    return replace(plain, trains=retrain, head=f"scaled {first.head}" if retrain == "tau-norm" else "cosine", start="previous")


def _scaled(phase: Phase, factor: float) -> Phase:
    """The phase with epochs and warm-up scaled by `factor`, but with at least one epoch if it had any."""
    epochs = max(min(1, phase.epochs), round(factor * phase.epochs))
    return replace(phase, epochs=epochs, schedule=replace(phase.schedule, warmup=math.ceil(factor * phase.schedule.warmup)))


def plan(
    method: str, retrain: str | None, dataset: str, class_counts: list[int], *, baseline: bool = False, epochs_scale: float = 1.0, cloud: str | None = None,
    stage1: dict[str, Any] | None = None, stage2: dict[str, Any] | None = None, pretrained: bool = False,
) -> list[Phase]:  # fmt: skip
    """The phases of a run.

    Args:
        method: one of METHODS.
        retrain: one of RETRAINS; None is the default of the method: "gcl" for "gcl" and "gcl+dro-lt", else "none".
        dataset: decides the published settings.
        class_counts: training images of each class.
        baseline: whether to train another network first, which differs from stage 1 only in its loss, cross entropy, and in its epochs, those of all other
            phases together.
        epochs_scale: factor on the published epochs and warm-up of every phase, which keeps at least one epoch. If it is 1 and `stage1` has `epochs`, later
            phases are scaled by the same ratio.
        cloud: one of CLOUDS; None is "log", the paper's choice.
        stage1, stage2: fields of :class:`Phase` that replace the published ones.
        pretrained: whether stage 1 starts from pretrained weights; it only affects data sets without published settings.

    Example:
        >>> [phase.name for phase in plan("gcl", None, "cifar100-lt", [500, 50, 5], baseline=True)]
        ['baseline', 'stage-1', 'stage-2']
    """
    settings = family(dataset)
    published = _first_stage(method, settings, class_counts, pretrained=pretrained)
    stage1 = stage1 or {}
    later_scale = stage1["epochs"] / published[0].epochs if "epochs" in stage1 and epochs_scale == 1 else epochs_scale
    phases = [replace(_scaled(published[0], epochs_scale), **stage1), *(_scaled(phase, later_scale) for phase in published[1:])]
    if settings == "cifar" and phases[0].mixup and method != "ldam-drw":  # published runs with mixup are MiSLAS's, whose steps are smaller
        phases[0] = replace(phases[0], schedule=replace(phases[0].schedule, factors=_MISLAS_STEPS.factors))
    phases[1:] = [replace(phase, weight_decay=stage1.get("weight_decay", phase.weight_decay)) for phase in phases[1:]]
    retrain = retrain or ("gcl" if method in ("gcl", "gcl+dro-lt") else "none")
    given = ", ".join("`sampler`" if name == "sampler" else f"`retrain_{name}`" for name in stage2 or {})
    if retrain != "none":
        second = _second_stage(retrain, settings, phases[0], class_counts)
        second = _scaled(second, 1.0 if settings == "own" else later_scale)  # own settings are derived from stage 1's, which are scaled already
        if stage2 and not second.epochs:
            raise ValueError(f"`retrain={retrain}` does not train; leave out the settings of stage 2: {given}")
        phases.append(replace(second, **(stage2 or {})))
    elif stage2:
        raise ValueError(f"there is no stage 2, so these settings of it would do nothing: {given}; leave them out or choose `retrain`")
    if cloud is not None:
        phases = [replace(phase, options=phase.options | CLOUDS[cloud]) if phase.loss == "gcl" else phase for phase in phases]
        if not any(phase.loss == "gcl" for phase in phases):
            raise ValueError(f"`cloud={cloud}`: the method {method} has no clouds; leave it out, or choose gcl")
    if baseline:
        epochs = sum(phase.epochs for phase in phases)
        phases.insert(0, replace(phases[0], name="baseline", epochs=epochs, loss="ce", options={}, head="linear", drw=None))
    return phases


# Arguments of losses that a run may set, and their names in each loss.
_LOSS_OPTIONS = {"gcl": {"noise_mul": "noise_mul", "margin": "margin", "scale": "scale"}, "ldam": {"margin": "max_margin", "scale": "scale"}}


def _with_loss_options(phases: list[Phase], given: dict[str, float | None]) -> list[Phase]:
    """The phases with the given arguments set in their losses; raises ValueError for an argument that no loss has."""
    for name, value in given.items():
        if value is None:
            continue
        if not any(name in _LOSS_OPTIONS.get(phase.loss, {}) for phase in phases):
            takers = " and ".join(loss for loss, names in _LOSS_OPTIONS.items() if name in names)
            raise ValueError(f"`{name}` does nothing here: only the losses {takers} have it; leave it out, or choose another method")
        phases = [
            replace(phase, options=phase.options | {_LOSS_OPTIONS[phase.loss][name]: value}) if name in _LOSS_OPTIONS.get(phase.loss, {}) else phase
            for phase in phases
        ]
    return phases


def plan_run(config: RunConfig, class_counts: list[int], processes: int) -> list[Phase]:
    """The phases of a run on a number of processes.

    Raises:
        ValueError: settings that do not go together; the message names them.
    """
    stage1 = {"epochs": config.epochs, "batch_size": config.batch_size, "lr": config.lr, "sampler": config.stage1_sampler, "mixup": config.mixup}
    stage1 |= {"weight_decay": config.weight_decay, "trains": config.train}
    stage2 = {"epochs": config.retrain_epochs, "batch_size": config.retrain_batch_size, "lr": config.retrain_lr, "sampler": config.sampler}
    phases = plan(
        config.method, config.retrain, config.data, class_counts, baseline=config.data == "digits-lt" if config.baseline is None else config.baseline,
        epochs_scale=config.epochs_scale, cloud=config.cloud, pretrained=bool(config.pretrained),
        stage1={name: value for name, value in stage1.items() if value is not None},
        stage2={name: value for name, value in stage2.items() if value is not None},
    )  # fmt: skip
    phases = _with_loss_options(phases, {"noise_mul": config.noise_mul, "margin": config.margin, "scale": config.scale})
    whole = [phase.name for phase in phases if phase.name != "baseline" and (phase.loss, phase.head) != ("gcl", "cosine")]
    if config.shard_classes and config.amp == "fp16":
        raise ValueError("`shard_classes`: with `amp=fp16` each process would skip steps of its own; take `amp=bf16`")
    if config.shard_classes and whole:
        remedy = "take `method=gcl` or `method=gcl+dro-lt`, with `retrain=gcl`, `retrain=crt` or `retrain=none`"
        raise ValueError(f"`shard_classes`: the loss of {whole[0]} takes the logits of all classes; {remedy}")
    if config.stage1 and phases[-1].name != "stage-2":
        raise ValueError(f"`stage1`: there is no stage 2 to go on with after {config.stage1}; choose one with `retrain`")
    for phase in phases:
        if phase.batch_size % (processes * config.accumulate):
            parts = f"{processes} processes times `accumulate={config.accumulate}`"
            raise ValueError(f"{phase.name}: a batch of {phase.batch_size} does not divide into {parts}")
    return phases


def build_loss(phase: Phase, class_counts: list[int], *, sharded: bool = False) -> nn.Module:
    """The loss of a phase. GCL's takes features and the weight of a cosine classifier, which may be `sharded`; all others, and GCL's with LWS, take logits."""
    options = dict(phase.options)
    if options.get("margin") == "ldam":
        options["margin"] = ldam_margins(class_counts)
    # all other arguments have the papers' values as defaults: beta 0.9999 of cb, tau 1 of la, margin 0.5 and scale 30 of ldam
    if phase.loss == "gcl" and sharded:
        return ShardedLinearGCLLoss(class_counts, averaged_gradients=True, **options)
    if phase.loss == "gcl":
        return LinearGCLLoss(class_counts, **options) if phase.head == "cosine" else GCLLoss(class_counts, **options)
    if phase.loss == "la":
        return LogitAdjustedLoss(class_counts, **options)
    if phase.loss == "ldam":
        return LDAMLoss(class_counts, **options)
    if phase.loss == "cb":
        options["weight"] = effective_number_weights(class_counts)
    elif options.get("weight") == "counts":
        options["weight"] = torch.tensor(class_counts) / max(class_counts)
    return FocalLoss(gamma=2.0 if phase.loss == "focal" else 0.0, **options)
