"""The phase of a re-training, which follows stage 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gclkern.training import own_data
from gclkern.training.recipes.phase import Phase
from gclkern.training.recipes.settings import (
    CLASS_AWARE,
    COSINE,
    COSINE_SCALE,
    DISALIGN_EPOCHS,
    DISALIGN_EXPONENT,
    DISALIGN_EXPONENTS,
    DISALIGN_STAGE_2,
    GCL_STAGE_2,
    INAT_CRT_EPOCHS,
    MISLAS_STAGE_2,
    RETRAIN_EPOCHS,
    RETRAIN_RATES,
    RETRAIN_SAMPLERS,
    Stage2,
    family,
    loss_options,
    mislas,
)

# What other phases do not take over from a stage 1 whose loss needs it.
PLAIN: dict[str, Any] = {"views": (), "second_sampler": None, "lr_factors": {}, "nesterov": False, "batch_norm": "train"}
_CLOUDED = ("gcl", "agcl")  # losses with a second stage of their own


def plain_options(first: Phase) -> dict[str, Any]:
    """Options of cross entropy for stage 1's kind of classifier: a cosine classifier keeps its scale."""
    return {"scale": first.options.get("scale", COSINE_SCALE)} if first.head == "cosine" else {}


def plain_head(first: Phase) -> str:
    """The kind of a classifier with cross entropy in place of stage 1's: a cosine classifier only where that is one."""
    return "cosine" if first.head == "cosine" else "linear"


def second_stage(retrain: str, dataset: str, first: Phase, class_counts: list[int]) -> Phase:
    """The phase of a re-training after `first`, whose other fields it keeps; without epochs where it is computed.

    After a stage 1 with the loss of GCL or AGCL, crt and lws have that loss, too, and differ from gcl in what they train, as in GCL's paper. After all other
    stages 1 they have cross entropy.
    """
    group = family(dataset)
    stage = replace(first, name="stage-2", schedule=COSINE, drw=None, start="previous", **PLAIN)
    if retrain == "gcl" or (first.loss in _CLOUDED and retrain in ("crt", "lws")):
        return _with_clouds(retrain, group, stage, class_counts)
    stage = replace(stage, loss="ce", options=plain_options(first), mixup=0.0, sampler="class-balanced")
    heads = {"tau-norm": f"scaled {first.head}", "ncm": "nearest mean", "post-hoc-la": "adjusted cosine" if first.head == "cosine" else first.head}
    if retrain in heads:
        return replace(stage, epochs=0, trains=retrain, head=heads[retrain])
    stage = _of_length(stage, _length(retrain, group, first, class_counts))
    if retrain == "crt":
        return replace(stage, trains="head", head=plain_head(first), start="new head", **RETRAIN_SAMPLERS.get(group, {}))
    if retrain == "lws":
        return replace(stage, trains="scale", head=f"scaled {first.head}", **RETRAIN_SAMPLERS.get(group, {}))
    if retrain == "disalign":
        exponent = DISALIGN_EXPONENTS.get(group, DISALIGN_EXPONENT)
        return replace(
            stage, loss="inverse-frequency", options=stage.options | {"exponent": exponent}, trains="calibration", head=f"calibrated {first.head}",
            sampler="instance",
        )  # fmt: skip
    assert retrain == "mislas"
    values = mislas(dataset, class_counts)
    batch_norm = "shifted-last-block" if values.batch_norm == "shifted" and first.trains_last_block else values.batch_norm
    return replace(
        stage, loss="label-aware-smoothing", options=stage.options | {"head": values.head, "tail": values.tail}, trains="head-and-scale",
        head=f"scaled {first.head}", lr_factors={f"network.head.{name}": values.lr_factor for name in ("weight", "bias")}, batch_norm=batch_norm,
        **CLASS_AWARE,
    )  # fmt: skip


def _with_clouds(retrain: str, group: str, stage: Phase, class_counts: list[int]) -> Phase:
    """GCL's second stage, with the loss of AGCL after AGCL. It trains the classifier (gcl), a new one (crt), or a factor for each class (lws)."""
    loss = stage.loss if stage.loss in _CLOUDED else "gcl"
    new_head = retrain == "crt" or stage.head != "cosine"  # its loss takes a cosine classifier
    length = _own_length(stage, class_counts, new_head=new_head) if group == "own" else GCL_STAGE_2[group]
    stage = replace(_of_length(stage, length), loss=loss, options=loss_options(loss, group)[1], sampler="cben")
    if retrain == "lws":
        return replace(stage, trains="scale", head="scaled cosine")
    return replace(stage, trains="head", head="cosine", start="new head" if new_head else "previous")


def _length(retrain: str, group: str, first: Phase, class_counts: list[int]) -> Stage2:
    """Of a re-training with cross entropy. What is not published is that of stage 1."""
    if group == "own":
        return Stage2(_own_length(first, class_counts, new_head=True).epochs, first.batch_size, first.lr)
    if retrain == "mislas":
        epochs, lr = MISLAS_STAGE_2
        return Stage2(epochs, first.batch_size, lr)
    if retrain == "disalign":
        return DISALIGN_STAGE_2.get(group, Stage2(DISALIGN_EPOCHS, first.batch_size, first.lr))
    epochs = INAT_CRT_EPOCHS if (retrain, group) == ("crt", "inat") else RETRAIN_EPOCHS[retrain]
    return Stage2(epochs, *RETRAIN_RATES.get(group, (first.batch_size, first.lr)))


def _own_length(first: Phase, class_counts: list[int], *, new_head: bool) -> Stage2:
    """For a data set without published settings."""
    return Stage2(*own_data.stage2_settings(first.epochs, first.batch_size, first.lr, sum(class_counts), new_head=new_head))


def _of_length(phase: Phase, length: Stage2) -> Phase:
    return replace(phase, epochs=length.epochs, batch_size=length.batch_size, lr=length.lr)
