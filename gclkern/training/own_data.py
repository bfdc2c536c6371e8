"""Settings for a data set without published ones: they are derived from the number and size of the images, and are the same for every method.

They start from CIFAR's recipes, since users' data sets are closer to CIFAR in size than to ImageNet-LT. Numbers that were chosen here have their reason beside
them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from gclkern.training.schedules import Schedule

# It has one stage, and in benchmarks/own_images.py its mean is above that of cross entropy and level with LDAM-DRW's or higher after 24, 60 and 200 epochs of
# CIFAR-100's images, and the highest on drawn photos after their default of 200. GCL's two stages are better after 200 epochs of CIFAR-100's, worse elsewhere.
METHOD = "gcl-ldam-drw"
BATCH_SIZE = 64  # GCL's on CIFAR
# Images seen in training: enough for a small network to learn a few thousand images from scratch, 145 epochs of 2,760. A network that starts from pretrained
# weights needs a quarter.
_IMAGES_SEEN = 400_000
_EPOCHS = (60, 200)  # fewer are too short for the learning rate schedule; 200 is that of the published recipes
_PRETRAINED_SHARE = 0.25
_LR, _PRETRAINED_LR = 0.05, 0.01  # CIFAR's 0.1 for batches of 128, halved with the batch; fine-tuning needs a lower rate
_WEIGHT_DECAY = 5e-4
# Second stage: on CIFAR, GCL's has 30 epochs after 200. How far the classifier can move is bounded by the sum of the learning rates of all steps, which on
# CIFAR-100-LT is 30 epochs of 169 steps at 0.002. Fewer steps get a higher rate with the same sum, up to the rate of stage 1.
_RETRAIN_SHARE = 0.15
_FEWEST_RETRAIN_EPOCHS = 10
_SUM_OF_RATES = 30 * 169 * 0.002
_SMALL = 64  # pixels
_MANY_IMAGES = 50_000  # train a larger network
# Share of the training images that is held out to fit a temperature.
HOLDOUT = 0.1
_FEWEST_HELD_OUT = 30  # a temperature fitted on as many has a standard deviation of about a fifth of it
_LARGEST_HELD_OUT_SHARE = 0.2  # of all training images: at least one image of each class is taken, which is more than a tenth of small classes
# DRO-LT's robust phase takes 80 epochs after 200 on CIFAR.
ROBUST_SHARE = 0.4


class Stage1(NamedTuple):
    """Settings of stage 1, in the order of :class:`gclkern.training.recipes.Phase`."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: Schedule
    mixup: float


def stage1_settings(class_counts: Sequence[int], *, pretrained: bool) -> Stage1:
    """Settings of stage 1 for a training set with these class counts.

    Example:
        >>> stage1_settings([1500, 1000, 260], pretrained=False)[:3]
        (145, 64, 0.05)
    """
    low, high = _EPOCHS
    epochs = min(high, max(low, round(_IMAGES_SEEN / sum(class_counts))))
    if pretrained:
        return Stage1(max(1, round(_PRETRAINED_SHARE * epochs)), BATCH_SIZE, _PRETRAINED_LR, _WEIGHT_DECAY, Schedule("cosine", warmup=5), 0.0)
    return Stage1(epochs, BATCH_SIZE, _LR, _WEIGHT_DECAY, Schedule("cosine", warmup=5), 0.0)


def short_training(epochs: int, class_counts: Sequence[int], *, pretrained: bool) -> str:
    """A warning for a stage 1 of fewer than half the default epochs; empty otherwise.

    Example:
        >>> short_training(24, [1500, 1000, 260], pretrained=False)
        'WARNING: 24 epochs instead of 145: the network may underfit, and re-balancing depends on good features'
        >>> short_training(73, [1500, 1000, 260], pretrained=False)
        ''
    """
    default = stage1_settings(class_counts, pretrained=pretrained).epochs
    if 2 * epochs >= default:
        return ""
    return f"WARNING: {epochs} epochs instead of {default}: the network may underfit, and re-balancing depends on good features"


def stage2_settings(epochs: int, batch_size: int, lr: float, images: int, *, new_head: bool) -> tuple[int, int, float]:
    """Epochs, batch size and learning rate of a second stage, from those of stage 1. With `new_head` it learns from scratch, so it gets stage 1's rate.

    Example:
        >>> stage2_settings(145, 64, 0.05, 2760, new_head=False)
        (22, 64, 0.0107)
    """
    epochs = max(_FEWEST_RETRAIN_EPOCHS, round(_RETRAIN_SHARE * epochs))
    steps = epochs * max(1, images // batch_size)
    return epochs, batch_size, lr if new_head else min(lr, round(_SUM_OF_RATES / steps, 4))


def default_model(image_size: int, images: int) -> str:
    """A backbone that suits the size and the number of the images.

    Example:
        >>> default_model(32, 2_760), default_model(224, 2_760), default_model(224, 400_000)
        ('resnet32', 'resnet18', 'resnet50')
    """
    if image_size <= _SMALL:
        return "resnet32"  # its first layer has no stride, which suits small images
    return "resnet18" if images < _MANY_IMAGES else "resnet50"


def holdout_problem(held_out: int, images: int) -> str:
    """Why a run holds out nothing by default: a note for the user. Empty if so many of the training images may be held out.

    Example:
        >>> holdout_problem(9, 80)
        'no images are held out to fit a temperature: a tenth of each class, at least one image, would be 9 of 80, too few; `holdout=0.1` takes them'
        >>> holdout_problem(276, 2760)
        ''
    """
    if held_out >= _FEWEST_HELD_OUT and held_out <= _LARGEST_HELD_OUT_SHARE * images:
        return ""
    amount = f"a tenth of each class, at least one image, would be {held_out:,} of {images:,}, too {'few' if held_out < _FEWEST_HELD_OUT else 'many'}"
    return f"no images are held out to fit a temperature: {amount}; `holdout={HOLDOUT:g}` takes them"


def reasons(
    method: str, class_counts: Sequence[int], image_size: int, augment: str, *, held_out: int, pretrained: bool, given: Container[str],
) -> str:  # fmt: skip
    """The defaults of a run with their reasons, which are printed before it starts.

    Args:
        method: of the run; only that of METHOD has a reason.
        class_counts, image_size, augment: of the training set.
        held_out: number of images that were held out.
        pretrained: whether stage 1 starts from pretrained weights.
        given: settings that the user has chosen, which are left out.

    Example:
        >>> print(reasons("ce", [1500, 1000, 260], 32, "crop", held_out=307, pretrained=False, given={"lr", "weight_decay", "mixup"}))
        defaults for your own images; those of training are the same for every method, clouds, margins and scales are those of CIFAR:
          `model=resnet32`: no stride in its first layer, for images of at most 64 pixels
          `augment=crop`: no `flip`, which would change letters and signs; add it if a mirrored image has the same class
          `epochs=145`: from scratch, 2,760 images; together they see 400,200 images
          `batch_size=64`: as GCL on CIFAR
          `holdout=0.1`: 307 images, to fit the temperature of the probabilities; `holdout=0` trains on them, too
          schedule: cosine as for ImageNet-LT, after a warm-up of up to 5 epochs as on CIFAR
    """
    images, settings = sum(class_counts), stage1_settings(class_counts, pretrained=pretrained)
    model = default_model(image_size, images)
    small = image_size <= _SMALL
    few = f"fewer than {_MANY_IMAGES:,}" if images < _MANY_IMAGES else f"{_MANY_IMAGES:,} or more"
    network = f"no stride in its first layer, for images of at most {_SMALL} pixels" if small else f"for {few} images of more than {_SMALL} pixels"
    if not small and "pretrained" not in given:
        network += "; `pretrained` would start from ImageNet weights" + ("" if "epochs" in given else ", in a quarter of the epochs")
    no_flip = "no `flip`, which would change letters and signs; add it if a mirrored image has the same class"
    all_parts = "the usual parts for photos; leave out `flip` for text and signs, `color` where colours tell classes apart"
    start = "from pretrained weights, a quarter of the epochs from scratch" if pretrained else "from scratch"
    why = {
        "model": (model, network),
        "augment": (augment, no_flip if small else all_parts),
        "epochs": (f"{settings.epochs}", f"{start}, {images:,} images; together they see {settings.epochs * images:,} images"),
        "batch_size": (f"{settings.batch_size}", "as GCL on CIFAR"),
        "lr": (f"{settings.lr:g}", "low, for fine-tuning" if pretrained else "CIFAR's 0.1 for batches of 128, halved with the batch"),
        "weight_decay": (f"{settings.weight_decay:g}", "as in most recipes for ImageNet-LT"),
    }
    if method == METHOD:
        why = {"method": (method, "composes clouds with margins in one stage; of four methods the highest mean top-1 on 600 drawn photos"), **why}
    if method != "mixup":
        why["mixup"] = (f"{settings.mixup:g}", "so that methods differ in their loss alone")
    if held_out:
        why["holdout"] = (f"{HOLDOUT:g}", f"{held_out:,} images, to fit the temperature of the probabilities; `holdout=0` trains on them, too")
    lines = ["defaults for your own images; those of training are the same for every method, clouds, margins and scales are those of CIFAR:"]
    lines += [f"  `{name}={value}`: {reason}" for name, (value, reason) in why.items() if name not in given]
    lines.append(f"  schedule: {settings.schedule.kind} as for ImageNet-LT, after a warm-up of up to {settings.schedule.warmup} epochs as on CIFAR")
    return "\n".join(lines)


def stage2_reasons(epochs: int, lr: float, stage1_lr: float, *, new_weights: bool, given: Container[str]) -> str:
    """The same for a stage 2 that trains, with `new_weights` or those of stage 1; empty if there is no default left.

    Example:
        >>> stage2_reasons(22, 0.0107, 0.05, new_weights=False, given={"lr"})
        '  stage 2: 22 epochs, 15% of stage 1 but at least 10; lr 0.0107: the classifier moves as far as on CIFAR'
        >>> stage2_reasons(5, 0.05, 0.05, new_weights=True, given={"retrain_epochs"})
        "  stage 2: lr 0.05: stage 1's, since it learns new weights"
    """
    parts = []
    if "retrain_epochs" not in given:
        parts.append(f"{epochs} epochs, {_RETRAIN_SHARE:.0%} of stage 1 but at least {_FEWEST_RETRAIN_EPOCHS}")
    # how far the classifier moves depends on the number of steps, too
    if "retrain_lr" not in given and (new_weights or not any(name in given for name in ("retrain_epochs", "retrain_batch_size"))):
        of_stage_1 = "stage 1's, since it learns new weights" if new_weights else "stage 1's, the highest that it may have"
        parts.append(f"lr {lr:g}: {'the classifier moves as far as on CIFAR' if lr < stage1_lr else of_stage_1}")
    return f"  stage 2: {'; '.join(parts)}" if parts else ""
