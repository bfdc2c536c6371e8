"""The identity of a data set, compared when a run is resumed or a checkpoint is evaluated: class names, counts, and digests of the images and labels."""

from __future__ import annotations

from typing import TypedDict


class DataIdentity(TypedDict):
    """Facts about a data set that do not depend on where its files are."""

    name: str
    class_names: list[str] | None  # None where the data set has none
    class_counts: list[int]  # training images of each class
    images: dict[str, int]  # number of images of each part: "training", "held-out", "test"
    digests: dict[str, str]  # of the labels and of the pixels or file names of each part


def class_difference(then: DataIdentity, now: DataIdentity) -> str | None:
    """How the classes of two data sets differ, as a sentence; None if they are the same.

    Classes without names are compared by their training counts.

    Example:
        >>> a = DataIdentity(name="folder", class_names=["cat", "dog"], class_counts=[9, 3], images={}, digests={})
        >>> class_difference(a, a | {"class_names": ["cat", "fox"]})
        "class 1 is 'dog' in the checkpoint and 'fox' in folder"
    """
    classes, found = len(then["class_counts"]), len(now["class_counts"])
    if classes != found:
        return f"the checkpoint has {classes} classes, {now['name']} has {found}"
    if then["class_names"] is None or now["class_names"] is None:
        return _count_difference(then, now)
    for label, (old, new) in enumerate(zip(then["class_names"], now["class_names"], strict=True)):
        if old != new:
            return f"class {label} is {old!r} in the checkpoint and {new!r} in {now['name']}"
    return None


def _count_difference(then: DataIdentity, now: DataIdentity) -> str | None:
    for label, (old, new) in enumerate(zip(then["class_counts"], now["class_counts"], strict=True)):
        if old != new:
            return f"class {label} has {old} training images in the checkpoint and {new} in {now['name']}"
    return None


def data_difference(then: DataIdentity, now: DataIdentity) -> str | None:
    """How two data sets differ in classes or images, as a sentence; None if they are the same."""
    if difference := class_difference(then, now) or _count_difference(then, now):
        return difference
    for part in sorted(then["images"].keys() | now["images"].keys()):
        old, new = then["images"].get(part, 0), now["images"].get(part, 0)
        if old != new:
            return f"the checkpoint was trained with {old} {part} images, {now['name']} has {new}"
        if then["digests"][part] != now["digests"][part]:
            return f"the {part} images of {now['name']} are not those of the checkpoint, or have other labels"
    return None
