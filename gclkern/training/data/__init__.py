"""Long-tailed data sets by name: :func:`load_data`."""

from __future__ import annotations

import os

from gclkern.training import own_data
from gclkern.training.data.cifar import CIFAR, load_cifar
from gclkern.training.data.decode import CorruptImageError
from gclkern.training.data.digits import load_digits
from gclkern.training.data.files import DEFAULT_WORKERS, OWN, FileImages
from gclkern.training.data.folders import load_folder
from gclkern.training.data.identity import DataIdentity, class_difference, data_difference
from gclkern.training.data.images import DataSplits, DeviceImages, Epoch, EvaluationTransform, ImageSet
from gclkern.training.data.lists import LISTS, load_lists
from gclkern.training.data.longtail import stratified_split

__all__ = [
    "CIFAR", "DATASETS", "CorruptImageError", "DataIdentity", "DataSplits", "DeviceImages", "Epoch", "EvaluationTransform", "FileImages", "ImageSet",
    "class_difference", "data_difference", "load_data",
]  # fmt: skip

DATASETS = ("digits-lt", *CIFAR, *LISTS, "list", "folder")


def load_data(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    imbalance: float | None = None,
    profile: str = "exp",
    seed: int = 0,
    holdout: float | None = 0.0,
    download: bool = False,
    image_size: int | None = None,
    workers: int = DEFAULT_WORKERS,
    skip_corrupt: bool = False,
    train_list: str | os.PathLike[str] | None = None,
    test_list: str | os.PathLike[str] | None = None,
) -> DataSplits:
    """The data set `name`, split into a long-tailed training set and a test set.

    Args:
        name: one of DATASETS. digits-lt comes with scikit-learn; cifar10-lt and cifar100-lt read the official files of the Python version; imagenet-lt,
            places-lt and inat18 read their published lists, "list" a user's own, "folder" train/ and test/ (or val/) with one folder for each class, or
            only the class folders, of which a fifth of the images becomes the test set.
        data_dir: where the files are; "data" when not given.
        imbalance: ratio of the largest to the smallest class of digits-lt (default 20) and CIFAR (default 100); other data sets are used as they are.
        profile: "exp" or "step", for digits-lt and CIFAR.
        seed: of the choice of the long-tailed subset and of the held-out part; 0 is the reference subset of CIFAR-LT.
        holdout: the share of every training class that is held out, to fit and select on; 0 for none. None is train.py's default: a tenth for "list" and
            "folder", unless that is too few or too many images, which a note says; 0 for other data sets.
        download: download CIFAR through torchvision if it is missing.
        image_size: height and width in pixels for image files; None is their usual size, at most 224.
        workers: processes that read image files, by default up to four; 0 reads them in this process.
        skip_corrupt: leave out image files that cannot be read, and report how many. Without it, the first such file raises an error.
        train_list, test_list: text files with a line `relative/path label` for each image.

    Raises:
        CorruptImageError: an image file cannot be read (raised by a loader too), or, with `skip_corrupt`, none of them can.
        FileNotFoundError, ValueError: data is missing or invalid; the message says what to do.
        ImportError: an extra package is missing; the message names the command to install it.

    Example:
        >>> splits = load_data("digits-lt")
        >>> splits.class_counts
        [140, 100, 71, 51, 36, 26, 19, 13, 9, 7]
        >>> images, labels = next(splits.train.loader([[0, 1, 2]], device=torch.device("cpu"), epoch=Epoch(seed=1)))
        >>> images.shape, labels
        (torch.Size([3, 1, 8, 8]), tensor([0, 0, 0]))
    """
    if holdout is not None and not 0 <= holdout < 1:
        raise ValueError(f"holdout must be at least 0 and below 1, got {holdout}")
    root = "data" if data_dir is None else data_dir
    if name == "digits-lt":
        splits = load_digits(20.0 if imbalance is None else imbalance, profile, seed)
    elif name in CIFAR:
        splits = load_cifar(name, root, 100.0 if imbalance is None else imbalance, profile, seed, download)
    elif name in (*LISTS, "list"):
        splits = load_lists(name, root, train_list, test_list, image_size=image_size, workers=workers, skip_corrupt=skip_corrupt)
    elif name == "folder":
        splits = load_folder(root, image_size=image_size, workers=workers, skip_corrupt=skip_corrupt, seed=seed)
    else:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if share := own_data.HOLDOUT if holdout is None and name in OWN else holdout:
        whole = splits.train
        kept, taken = stratified_split(whole.labels, share, seed)
        if holdout is None and (problem := own_data.holdout_problem(len(taken), len(whole))):
            splits.notes.append(problem)
            return splits
        if not taken.numel():
            raise ValueError(f"holdout {share:g} takes no image, since no class has a second one; leave out `holdout` or add images")
        splits.train, splits.holdout = whole.subset(kept), whole.subset(taken)
        splits.class_counts = splits.train.labels.bincount(minlength=splits.num_classes).tolist()
    return splits
