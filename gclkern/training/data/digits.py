"""digits-lt: a long-tailed split of the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn contains, so nothing is downloaded."""

from __future__ import annotations

import torch

from gclkern.training.data.groups import tercile_groups
from gclkern.training.data.images import DataSplits, DeviceImages
from gclkern.training.data.longtail import choose_subset, profile_counts, stratified_split
from gclkern.training.extras import need

_LARGEST = 140


def load_digits(imbalance: float, profile: str, seed: int) -> DataSplits:
    """A stratified fifth as test set and a long-tailed subset of the rest. Groups are terciles, because limits of 100 and 20 samples would not divide them."""
    digits = need("sklearn.datasets", "the data set digits-lt").load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    kept, test = stratified_split(labels, 0.2, seed)
    available = labels[kept].bincount().tolist()
    counts = [min(count, most) for count, most in zip(profile_counts(10, _LARGEST, imbalance, profile), available, strict=True)]
    train = kept[choose_subset(labels[kept], counts, seed)]
    whole = DeviceImages(images, labels, mean=[0.305], std=[0.376], augment="crop")  # digits are not symmetric
    return DataSplits(
        name="digits-lt",
        train=whole.subset(train),
        test=whole.subset(test),
        holdout=None,
        class_counts=counts,
        groups=tercile_groups(counts),
        num_classes=10,
        class_names=[str(digit) for digit in range(10)],
        channels=1,
        image_size=8,
    )
