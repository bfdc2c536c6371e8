"""From a method, a re-training and a data set to the phases of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gclkern.training import own_data
from gclkern.training.config import RunConfig
from gclkern.training.data.augment import parse_augmentation
from gclkern.training.recipes.losses import CLOUDS, FUSED, LOSS_OPTIONS
from gclkern.training.recipes.methods import METHODS
from gclkern.training.recipes.phase import Phase
from gclkern.training.recipes.second_stage import PLAIN, plain_head, plain_options, second_stage
from gclkern.training.recipes.settings import (
    CLASS_AWARE,
    LDAM_MARGIN,
    LDAM_STEPS,
    MEMORY_STAGE,
    MISLAS_STEPS,
    PLACES_NETWORK,
    ROBUST,
    ROBUST_AUGMENT,
    ROBUST_CLASSIFIER_LR,
    ROBUST_EPOCHS,
    THIRDS,
    Stage,
    family,
    loss_options,
    stage1_settings,
)


def _of_stage(name: str, stage: Stage, **more: Any) -> Phase:
    """A phase with these settings; `more` are fields that the settings do not decide."""
    fields = {**more, **stage.more, "options": {**more.get("options", {}), **stage.more.get("options", {})}}
    return Phase(name, stage.epochs, stage.batch_size, stage.lr, stage.weight_decay, stage.schedule, mixup=stage.mixup, **fields)


def _first_stage(name: str, dataset: str, class_counts: list[int], *, pretrained: bool) -> list[Phase]:
    """Stage 1 of a method: a phase, and for DRO-LT and OLTR those that follow it."""
    method, group = METHODS[name], family(dataset)
    options = loss_options(method.loss, group)[0]
    if method.drw and method.loss == "gcl":  # LDAM-DRW with GCL's clouds on top
        options = options | {"max_margin": LDAM_MARGIN}
    first = _of_stage(
        "stage-1", stage1_settings(dataset, method.settings, class_counts, pretrained=pretrained), loss=method.loss, options=options, head=method.head,
        start="fresh", drw=method.drw, augment=ROBUST_AUGMENT if method.robust and group == "cifar" else None,
        **{**(PLACES_NETWORK if group == "places" else {}), **method.more},
    )  # fmt: skip
    if method.memory:
        return [first, _memory_phase(first, group)]
    return [first, *(_robust_phases(first, group, class_counts) if method.robust else [])]


def _robust_phases(first: Phase, group: str, class_counts: list[int]) -> list[Phase]:
    """DRO-LT's phases after a trained model: the features with the robust loss, then the classifier alone.

    After a first phase with GCL's loss the features are trained with that loss and GCL's cosine classifier in place of cross entropy and a linear one, and
    GCL's stage 2 takes the place of the last phase. Both losses have the class weights of the release, which undo the class-aware sampling: GCL's clouds are
    made for class frequencies that are those of the training set.
    """
    clouded = first.loss == "gcl"
    epochs = max(1, round(own_data.ROBUST_SHARE * first.epochs)) if group == "own" else ROBUST_EPOCHS.get(group, ROBUST.epochs)
    features = replace(
        first, name="stage-1-robust", epochs=epochs, batch_size=ROBUST.batch_size, lr=ROBUST.lr, weight_decay=ROBUST.weight_decay, schedule=ROBUST.schedule,
        mixup=0.0, options=first.options | {"weight": "counts"}, trains="backbone", start="previous", robust=1.0,
        epoch_samples=None if group == "own" else max(class_counts) * len(class_counts), **ROBUST.more,
    )  # fmt: skip
    classifier = replace(
        features, name="stage-1-classifier", epochs=max(1, epochs // 4), lr=ROBUST_CLASSIFIER_LR, options={}, trains="head", robust=0.0, lr_factors={}
    )  # fmt: skip
    return [features] if clouded else [features, classifier]


def _memory_phase(first: Phase, group: str) -> Phase:
    """OLTR's second phase: attention, an embedding and a classifier with a memory, on class-aware batches."""
    if group == "own":
        epochs = max(1, round(own_data.ROBUST_SHARE * first.epochs))
        stage = Stage(epochs, first.batch_size, first.lr / 10, first.weight_decay, THIRDS, more=MEMORY_STAGE["digits"].more)
    else:
        stage = MEMORY_STAGE[group]
    return _of_stage("stage-1-memory", stage, loss="oltr", head="meta-embedding", backbone="modulated", **CLASS_AWARE)


def _scaled(phase: Phase, factor: float) -> Phase:
    """The phase with epochs and warm-up scaled by `factor`, but with at least one epoch if it had any."""
    epochs = max(min(1, phase.epochs), round(factor * phase.epochs))
    return replace(phase, epochs=epochs, schedule=replace(phase.schedule, warmup=math.ceil(factor * phase.schedule.warmup)))


def _given(phase: Phase, fields: dict[str, Any]) -> Phase:
    """The phase with the given fields. Another sampler than the published one does not get its options."""
    if fields.get("sampler", phase.sampler) != phase.sampler:
        phase = replace(phase, sampler_options={})
    return replace(phase, **fields)


def _re_training(
    method: str, retrain: str, dataset: str, first: Phase, class_counts: list[int], scale: float, fields: dict[str, Any]
) -> list[Phase]:  # fmt: skip
    """The phase of stage 2, if there is one, with scaled epochs and the given fields.

    Raises:
        ValueError: the classifier of the method cannot be re-trained in this way, or nothing trains for which fields are given.
    """
    possible = METHODS[method].retrains
    if possible is not None and retrain not in possible:
        raise ValueError(
            f"`retrain={retrain}`: the classifier of {method} cannot be re-trained this way; take {' or '.join(f'`retrain={r}`' for r in sorted(possible))}"
        )
    given = ", ".join("`sampler`" if name == "sampler" else f"`retrain_{name}`" for name in fields)
    if retrain == "none":
        if fields:
            raise ValueError(f"there is no stage 2, so these settings of it would do nothing: {given}; leave them out or choose `retrain`")
        return []
    phase = second_stage(retrain, dataset, first, class_counts)
    if fields and not phase.epochs:
        raise ValueError(f"`retrain={retrain}` does not train; leave out the settings of stage 2: {given}")
    # Settings of own data sets are derived from stage 1's, which are scaled already.
    return [_given(phase if family(dataset) == "own" else _scaled(phase, scale), fields)]


def plan(
    method: str, retrain: str | None, dataset: str, class_counts: list[int], *, baseline: bool = False, epochs_scale: float = 1.0, cloud: str | None = None,
    stage1: dict[str, Any] | None = None, stage2: dict[str, Any] | None = None, pretrained: bool = False, augment: str | None = None,
) -> list[Phase]:  # fmt: skip
    """The phases of a run.

    Args:
        method: one of METHODS.
        retrain: one of RETRAINS; None is that of the method: "gcl" for "gcl", "agcl" and "gcl+dro-lt", else "none".
        dataset: decides the published settings.
        class_counts: training images of each class.
        baseline: whether to train another network first, which differs from stage 1 only in its loss, cross entropy, and in its epochs, those of all other
            phases together. Its classifier is a cosine classifier where stage 1's is one, else linear.
        epochs_scale: factor on the published epochs and warm-up of every phase, which keeps at least one epoch. If it is 1 and `stage1` has `epochs`, later
            phases are scaled by the same ratio.
        cloud: one of CLOUDS; None is "log", the paper's choice.
        stage1, stage2: fields of :class:`Phase` that replace the published ones.
        pretrained: whether stage 1 starts from pretrained weights; it only affects data sets without published settings.
        augment: augmentation of all phases; None is the published one.

    Raises:
        ValueError: settings that do not go together, such as `cloud` for a method without clouds, or a re-training that the method's classifier does not allow.

    Example:
        >>> [phase.name for phase in plan("gcl", None, "cifar100-lt", [500, 50, 5], baseline=True)]
        ['baseline', 'stage-1', 'stage-2']
    """
    published = _first_stage(method, dataset, class_counts, pretrained=pretrained)
    given1 = stage1 or {}
    later_scale = given1["epochs"] / published[0].epochs if "epochs" in given1 and epochs_scale == 1 else epochs_scale
    phases = [_given(_scaled(published[0], epochs_scale), given1), *(_scaled(phase, later_scale) for phase in published[1:])]
    if phases[0].mixup and published[0].schedule == LDAM_STEPS and method != "ldam-drw":
        # published runs with mixup are MiSLAS's, whose steps are smaller
        phases[0] = replace(phases[0], schedule=replace(phases[0].schedule, factors=MISLAS_STEPS.factors))
    phases[1:] = [replace(phase, weight_decay=given1.get("weight_decay", phase.weight_decay)) for phase in phases[1:]]
    phases += _re_training(method, retrain or METHODS[method].retrain, dataset, phases[0], class_counts, later_scale, stage2 or {})
    if cloud is not None:
        phases = [replace(phase, options=phase.options | CLOUDS[cloud]) if "noise_mul" in phase.options else phase for phase in phases]
        if not any("noise_mul" in phase.options for phase in phases):
            raise ValueError(f"`cloud={cloud}`: the method {method} has no clouds; leave it out, or take `method=gcl`")
    if augment is not None:
        parse_augmentation(augment)
        phases = [replace(phase, augment=augment) for phase in phases]
    if baseline:
        first, epochs = phases[0], sum(phase.epochs for phase in phases)
        phases.insert(0, replace(first, name="baseline", epochs=epochs, loss="ce", options=plain_options(first), head=plain_head(first), drw=None, **PLAIN))
    return phases


def _options(phase: Phase) -> dict[str, str]:
    """Arguments of the phase's loss that a run may set, and their names there. A baseline and a re-training of a cosine classifier have stage 1's scale."""
    of_head = {"scale": "scale"} if phase.name in ("baseline", "stage-2") and "scale" in phase.options else {}
    ldam = {"margin": "max_margin"} if "max_margin" in phase.options else {}  # GCL's loss with LDAM's margins
    return of_head | LOSS_OPTIONS.get(phase.loss, {}) | ldam


def _with_loss_options(phases: list[Phase], given: dict[str, float | None]) -> list[Phase]:
    """The phases with the given arguments set in their losses; raises ValueError for an argument that no loss has."""
    for name, value in given.items():
        if value is None:
            continue
        if not any(name in _options(phase) for phase in phases if phase.name != "baseline"):
            *some, last = (loss for loss, names in LOSS_OPTIONS.items() if name in names)
            takers = f"{', '.join(some)} and {last}"
            raise ValueError(f"`{name}` does nothing here: only the losses {takers} have it; leave it out, or choose another method")
        phases = [replace(phase, options=phase.options | {_options(phase)[name]: value}) if name in _options(phase) else phase for phase in phases]
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
        epochs_scale=config.epochs_scale, cloud=config.cloud, pretrained=bool(config.pretrained), augment=config.augment,
        stage1={name: value for name, value in stage1.items() if value is not None},
        stage2={name: value for name, value in stage2.items() if value is not None},
    )  # fmt: skip
    phases = _with_loss_options(phases, {"noise_mul": config.noise_mul, "margin": config.margin, "scale": config.scale})
    whole = [phase.name for phase in phases if phase.name != "baseline" and not (phase.loss in FUSED and phase.head == "cosine")]
    if config.shard_classes and config.amp == "fp16":
        raise ValueError("`shard_classes`: with `amp=fp16` each process would skip other steps; take `amp=bf16`")
    if config.shard_classes and whole:
        methods = " or ".join(f"`method={name}`" for name, method in METHODS.items() if method.loss in FUSED)
        remedy = f"take {methods}, with `retrain=gcl` or `retrain=none`"
        raise ValueError(f"`shard_classes`: the loss of {whole[0]} takes the logits of all classes; {remedy}")
    if config.robust_layers is not None:
        layers = tuple(name.strip() for name in config.robust_layers.split(","))
        if not any(phase.robust for phase in phases):
            raise ValueError(f"`robust_layers`: the method {config.method} has no robust phase; leave it out, or take `method=dro-lt`")
        if len(set(layers)) < len(layers):
            raise ValueError(f"`robust_layers={config.robust_layers}` names a layer twice; name each once")
        phases = [replace(phase, robust_layers=layers) if phase.robust else phase for phase in phases]
    if config.stage1 and phases[-1].name != "stage-2":
        raise ValueError(f"`stage1`: there is no stage 2 to follow {config.stage1}; choose one with `retrain`")
    if config.stage1 and config.baseline:
        raise ValueError("`baseline` does nothing with `stage1`, which leaves stage 2 alone to train; leave one of them out")
    for phase in phases:
        if phase.batch_size % (processes * config.accumulate):
            parts = f"{processes} processes times `accumulate={config.accumulate}`"
            remedy = " or ".join(["`accumulate`", *phase.overrides("batch_size")])
            raise ValueError(f"{phase.name}: a batch of {phase.batch_size} does not divide into {parts}; take another {remedy}, or another number of processes")
    return phases
