"""Long-tailed data sets by name."""

from __future__ import annotations

import os

from gclkern.data.digits import load_digits
from gclkern.data.images import DataSplits, DeviceImages, ImageSet
from gclkern.data.longtail import stratified_split

__all__ = ["DATASETS", "DataSplits", "DeviceImages", "ImageSet", "load_data"]

DATASETS = ("digits-lt",)


def load_data(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    imbalance: float | None = None,
    profile: str = "exp",
    seed: int = 0,
    holdout: float = 0.0,
    download: bool = False,
    image_size: int = 224,
    workers: int = 4,
    skip_corrupt: bool = False,
    train_list: str | os.PathLike[str] | None = None,
    test_list: str | os.PathLike[str] | None = None,
) -> DataSplits:
    """The data set `name`, split into a long-tailed training set and a test set."""
    if name != "digits-lt":
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    splits = load_digits(20.0 if imbalance is None else imbalance, profile, seed)
    if holdout:
        whole = splits.train
        kept, taken = stratified_split(whole.labels, holdout, seed)
        splits.train, splits.holdout = whole.subset(kept), whole.subset(taken)
        splits.class_counts = splits.train.labels.bincount(minlength=splits.num_classes).tolist()
    return splits
