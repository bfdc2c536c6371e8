"""Data sets: exact subsets, safe reading, and augmentation that depends on a sample's place in the epoch alone."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gclkern.training.data import CorruptImageError, DeviceImages, Epoch, ImageSet, load_data
from gclkern.training.data.augment import (
    _POLICY,
    COLUMNS,
    COMBINED,
    PARTS,
    Operation,
    _grey_shares,
    _orders,
    _policy_tables,
    apply_operations,
    augment_batch,
    autoaugment,
    color_jitter,
    crop_and_flip,
    cutout,
    parse_augmentation,
    resample,
    resized_boxes,
)
from gclkern.training.data.cifar import read_pickle
from gclkern.training.data.groups import count_groups, tercile_groups
from gclkern.training.data.images import uniform_numbers
from gclkern.training.data.lists import read_list
from gclkern.training.data.longtail import choose_subset, profile_counts, stratified_split

CPU = torch.device("cpu")
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")


class TestLongTail:
    @pytest.mark.parametrize(
        ("classes", "largest", "totals"),
        [(10, 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}), (100, 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502})],
    )
    def test_totals_of_cifar(self, classes: int, largest: int, totals: dict[int, int]) -> None:
        assert {imbalance: sum(profile_counts(classes, largest, imbalance)) for imbalance in totals} == totals

    def test_step(self) -> None:
        assert profile_counts(10, 5000, 100, "step") == [5000] * 5 + [50] * 5
        assert profile_counts(10, 5000, 1, "step") == profile_counts(10, 5000, 1) == [5000] * 10

    def test_subset_is_numpys_shuffle_of_each_class(self) -> None:
        labels = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(1))
        np.random.seed(0)  # noqa: NPY002
        expected: list[int] = []
        for label, count in enumerate([12, 5, 1]):
            members = np.where(labels.numpy() == label)[0]
            np.random.shuffle(members)  # noqa: NPY002
            expected += members[:count].tolist()
        before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
        assert choose_subset(labels, [12, 5, 1], 0).tolist() == expected
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[1]  # noqa: NPY002

    def test_stratified_split(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
        kept, taken = stratified_split(labels, 0.2, 0)
        assert labels[taken].bincount(minlength=4).tolist() == [10, 2, 1, 0]
        assert sorted([*kept.tolist(), *taken.tolist()]) == list(range(64))
        assert torch.equal(stratified_split(labels, 0.2, 0)[1], taken)
        assert not torch.equal(stratified_split(labels, 0.2, 1)[1], taken)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: profile_counts(10, 100, 0.5), "imbalance"),
            (lambda: profile_counts(10, 100, 101), "imbalance 101 leaves classes without a sample.*at most 100"),
            (lambda: profile_counts(10, 100, 10, "linear"), "profile must be one of 'exp', 'step', got 'linear'"),
            (lambda: choose_subset(torch.tensor([0, 1]), [1, 2], 0), "class 1 has 1 training samples, but the long-tailed set needs 2"),
        ],
    )
    def test_refuses(self, call: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()

    def test_groups(self) -> None:
        assert count_groups([101, 100, 20, 19]) == {"many": [0], "medium": [1, 2], "few": [3]}
        assert count_groups([5, 500]) == {"many": [1], "few": [0]}
        assert tercile_groups([1, 5, 3, 4, 2]) == {"many": [1, 3], "medium": [2, 4], "few": [0]}
        assert {name: len(classes) for name, classes in tercile_groups(range(100, 0, -1)).items()} == {"many": 34, "medium": 33, "few": 33}


def images_of(data: ImageSet, places: Sequence[int]) -> Tensor:
    """As evaluation sees them."""
    return next(data.loader([places], device=CPU))[0]


def random_images(count: int, channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth pictures with noise: flat ones would hide a wrong operation, plain noise has no edges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (255 * (0.8 * smooth + 0.1 + 0.1 * torch.rand(count, channels, side, side, generator=generator))).to(torch.uint8)


class TestAugmentation:
    def test_crop_and_flip_of_each_image(self) -> None:
        images, padding = random_images(40, side=6), 2
        numbers = torch.rand(40, 3, generator=torch.Generator().manual_seed(3))
        padded = torch.nn.functional.pad(images, [padding] * 4)
        for image, whole, (top, left, side) in zip(crop_and_flip(images, numbers, padding, True), padded, numbers.tolist(), strict=True):
            top, left = int(top * 5), int(left * 5)
            expected = whole[:, top : top + 6, left : left + 6]
            assert torch.equal(image, expected.flip(2) if side < 0.5 else expected)

    def test_cutout(self) -> None:
        images = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
        black = (cutout(images, torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.999, 0.999]])) == 0).all(1)
        assert black.sum((1, 2)).tolist() == [256, 128, 9 * 9]
        assert black[0, 8:24, 8:24].all()
        assert (images == 7).all(), "the set's own images stay"

    @needs_torchvision
    def test_policy_is_torchvisions(self) -> None:
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy

        rows = [line.split() for line in _POLICY.strip().splitlines()]
        for row, policy in zip(rows, AutoAugment(AutoAugmentPolicy.CIFAR10).policies, strict=True):
            for (name, share, magnitude), (expected, expected_share, expected_magnitude) in zip((row[:3], row[3:]), policy, strict=True):
                assert (name, float(share)) == (expected, expected_share)
                assert expected_magnitude in (None, int(magnitude))

    @needs_torchvision
    @pytest.mark.parametrize("name", Operation.__members__)
    def test_operations_are_torchvisions(self, name: str) -> None:
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
        from torchvision.transforms.autoaugment import _apply_op

        images = random_images(6)
        images[0] = 90  # nothing to stretch or to equalise
        magnitudes, signed = AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (32, 32))[name]
        for magnitude, sign in ((1, 1.0), (4, -1.0), (7, 1.0), (9, -1.0)):
            value = float(magnitudes[magnitude]) * (sign if signed else 1) if magnitudes.ndim else 0.0
            expected = torch.stack([_apply_op(image, name, value, InterpolationMode.NEAREST, [128.0] * 3) for image in images])
            full = torch.full((6,), 1)
            found = apply_operations(images, full * Operation[name], full * float(magnitude), full * sign)
            # a factor one rounding away moves a truncated value by one; a shear may meet a pixel's edge from either side
            wrong = (found.int() - expected.int()).abs() > 1
            assert wrong.float().mean() < 0.01, (magnitude, sign)

    def test_autoaugment_draws_from_the_policy(self) -> None:
        images = random_images(1).expand(3, -1, -1, -1)
        # sub-policy 0 (invert with .1, contrast with .2): neither, the first, the second
        numbers = torch.zeros(3, COLUMNS.autoaugment.stop)
        numbers[:, COLUMNS.autoaugment] = torch.tensor([[0.0, 0.5, 0.5, 0, 0], [0.0, 0.05, 0.5, 0, 0], [0.0, 0.5, 0.1, 0, 0]])
        same, inverted, contrast = autoaugment(images, numbers)
        assert torch.equal(same, images[0])
        assert torch.equal(inverted, 255 - images[0])
        assert float(contrast.float().std()) < float(images[0].float().std()), "a negative direction"

    @needs_torchvision
    def test_resized_crops_are_torchvisions(self) -> None:
        """The same box of a photo that was made square, bilinear; without antialiasing, which a crop that is hardly made smaller does not need."""
        from torchvision.transforms.functional import resized_crop

        square, view = random_images(1, side=48).float(), torch.tensor([[1.0, 0.5]])  # a photo twice as wide as high
        photo = torch.nn.functional.interpolate(square, size=(48, 96), mode="bilinear").round()
        numbers = torch.tensor([[0.3, 0.8, 0.25, 0.6]])
        top, left, height, width = resized_boxes(numbers, view, 0.08)[0].tolist()
        assert height * width == pytest.approx(0.08 + 0.92 * 0.3)
        assert (2 * width) / height == pytest.approx((4 / 3) ** 0.6)
        pixels = [round(value) for value in (top * 48, left * 96, height * 48, width * 96)]
        box = torch.tensor([[pixels[0] / 48, pixels[1] / 96, pixels[2] / 48, pixels[3] / 96]])
        found = resample(square.to(torch.uint8), box, 32)
        expected = resized_crop(photo.to(torch.uint8), *pixels, [32, 32], antialias=False)
        assert (found.int() - expected.int()).abs().float().mean() < 2

    def test_boxes_of_resized_crops_lie_in_the_image(self) -> None:
        numbers = torch.rand(2000, 4, generator=torch.Generator().manual_seed(4))
        for view in ([1.0, 1.0], [0.5, 0.875], [1.0, 0.1]):
            boxes = resized_boxes(numbers, torch.tensor([view]).expand(2000, 2), 0.08)
            assert float(boxes.min()) >= 0
            assert float((boxes[:, :2] + boxes[:, 2:]).max()) <= 1 + 1e-6
            assert float((boxes[:, 2] * boxes[:, 3]).min()) < 0.1

    def test_the_whole_box_is_the_image(self) -> None:
        images = random_images(5, side=24)
        assert torch.equal(resample(images, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(5, 4), 24), images)
        assert torch.equal(resample(images, torch.tensor([[0.125, 0.25, 0.75, 0.75]]).expand(5, 4), 18), images[:, :, 3:21, 6:])

    @needs_torchvision
    @pytest.mark.parametrize(("place", "name"), [(0, "brightness"), (1, "contrast"), (2, "saturation"), (3, "hue")])
    def test_colours_change_as_torchvisions(self, place: int, name: str) -> None:
        from torchvision.transforms import functional

        images, amounts = random_images(8), [0.0, 0.0, 0.0, 0.0]
        amounts[place] = 0.4
        numbers = torch.full((8, 6), 0.5)
        numbers[:, 2 + place] = torch.linspace(0, 1, 8)
        found = color_jitter(images, numbers, tuple(amounts), 1.0)  # type: ignore[arg-type]
        for image, number, same in zip(images, numbers[:, 2 + place].tolist(), found, strict=True):
            change = 0.4 * (2 * number - 1)
            expected = getattr(functional, f"adjust_{name}")(image, change if name == "hue" else 1 + change)
            # torchvision rounds between its steps
            assert (same.int() - expected.int()).abs().max() <= 2
        assert torch.equal(color_jitter(images, numbers, tuple(amounts), 0.5), images), "not applied"  # type: ignore[arg-type]

    @pytest.mark.parametrize("augment", [*(part for part in PARTS if part != "grey"), *COMBINED])
    @pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 224)])
    def test_every_part_takes_every_image(self, augment: str, channels: int, side: int) -> None:
        data = DeviceImages(random_images(4, channels, side), torch.arange(4), mean=[0.0] * channels, std=[1.0] * channels, augment=augment)
        batches = [[0, 1, 2, 3]] * 3
        found = [255 * images for images, _ in data.loader(batches, device=CPU, epoch=Epoch(1))]
        assert all(images.shape == data.images.shape and images.min() >= 0 and images.max() < 255.5 for images in found)
        changed = sum(not torch.allclose(images[i], data.images[i].float(), atol=0.5) for images in found for i in range(4))
        assert (changed > 3) is (augment != "none")

    def test_a_fifth_of_the_images_becomes_grey(self) -> None:
        from torchvision.transforms import functional

        images, numbers = random_images(40), torch.linspace(0.0, 0.99, 40)[:, None].expand(-1, COLUMNS.grey.stop)
        found = augment_batch(images, numbers, parse_augmentation("grey"))
        assert torch.equal(found[8:], images[8:])
        assert (found[:8].int() - functional.rgb_to_grayscale(images[:8], 3)).abs().max() <= 1  # torchvision cuts where this rounds

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("crop,flop", r"unknown augmentation 'flop' in 'crop,flop'; join parts of resized-crop, crop"),
            ("crop,resized-crop", "crop and resized-crop exclude each other"),
            ("rand-augment,autoaugment", "exclude each other"),
            ("sim,cutout", "unknown augmentation 'sim'"),
            ("", "unknown augmentation ''"),
        ],
    )
    def test_parts_that_do_not_fit(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_augmentation(text)

    @pytest.mark.gpu
    @pytest.mark.parametrize("augment", ["crop,flip", "crop,flip,autoaugment,cutout", "flip,color,rand-augment", "sim"])
    def test_a_gpu_augments_as_a_cpu(self, augment: str) -> None:
        view = parse_augmentation(augment)
        images, numbers = random_images(500), torch.rand(500, view.numbers, generator=torch.Generator().manual_seed(1))
        found = augment_batch(images.cuda(), numbers.cuda(), view).cpu()
        wrong = (found.int() - augment_batch(images, numbers, view).int()).abs() > 1
        assert wrong.float().mean() < 0.002

    @pytest.mark.parametrize("augment", ["crop,flip,autoaugment,cutout", "flip,color,rand-augment,cutout", "sim"])
    def test_a_gpu_is_not_waited_for(self, augment: str) -> None:
        """No tensor is made of Python's numbers, which would be copied to the device, and no value is asked for: fake tensors refuse that, and need no GPU."""
        called: list[str] = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                called.append(func.name())
                return func(*args, **(kwargs or {}))

        tables, view = (_policy_tables, _grey_shares, _orders), parse_augmentation(augment)  # made once for a device
        try:
            with FakeTensorMode():
                images, numbers = torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="cuda"), torch.empty(2, view.numbers, device="cuda")
                for table in (_policy_tables, _grey_shares):
                    table(images.device)
                for count in (3, 4):
                    _orders(count, images.device)
                with Record():
                    if view.least_area is not None:
                        images = resample(images, resized_boxes(numbers[:, COLUMNS.resized_crop], torch.ones_like(numbers[:, :2]), view.least_area), 32)
                    augment_batch(images, numbers, view)
        finally:
            for table in tables:
                table.cache_clear()
        assert len(called) > 70
        assert "aten::lift_fresh" not in called

    def test_numbers_are_uniform_and_of_a_place(self) -> None:
        numbers = uniform_numbers(5, torch.arange(4000), 10)
        assert float(numbers.min()) >= 0
        assert float(numbers.max()) < 1
        assert (numbers.mean(0) - 0.5).abs().max() < 0.03
        assert torch.equal(uniform_numbers(5, torch.tensor([7, 3999]), 3), numbers[[7, 3999], :3])
        assert not torch.equal(uniform_numbers(6, torch.arange(4), 10), numbers[:4])


def device_images(augment: str = "crop,flip") -> DeviceImages:
    return DeviceImages(random_images(300), torch.arange(300) % 7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), augment=augment)


class TestDeviceImages:
    def test_evaluation_normalises_and_nothing_else(self) -> None:
        data = device_images()
        (images, labels), *rest = data.loader([[3, 4], [5]], device=CPU)
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        torch.testing.assert_close(images, (data.images[3:5] / 255 - mean) / std)
        assert labels.tolist() == [3, 4]
        assert [len(batch) for batch, _ in rest] == [1]

    @pytest.mark.parametrize("augment", ["crop,flip", "crop,flip,autoaugment,cutout", "none", "sim", "sim-sharp"])
    def test_resumed_and_divided_epochs_see_the_same_images(self, augment: str) -> None:
        data = device_images(augment)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(2)).tolist()
        batches = [order[start : start + 30] for start in range(0, 300, 30)]

        def epoch(batches: list[list[int]], **place: int) -> Tensor:
            return torch.cat([images for images, _ in data.loader(batches, device=CPU, epoch=Epoch(9, **place))])

        whole = epoch(batches)
        assert torch.equal(epoch(batches[4:], position=120), whole[120:])
        parts = [[batch[rank::2] for batch in batches] for rank in range(2)]
        assert torch.equal(torch.stack([epoch(part, num_replicas=2, rank=rank) for rank, part in enumerate(parts)], 1).flatten(0, 1), whole)
        assert torch.equal(torch.cat([epoch([part], position=15 * i, num_replicas=2, rank=1) for i, part in enumerate(parts[1])]), whole[1::2])

    def test_an_unknown_augmentation_is_refused(self) -> None:
        data = device_images()
        data.augment = "randaugment"
        with pytest.raises(ValueError, match="unknown augmentation 'randaugment'"):
            next(data.loader([[0]], device=CPU))


@needs_sklearn
class TestDigits:
    def test_split(self) -> None:
        data = load_data("digits-lt")
        assert data.class_counts == [140, 100, 71, 51, 36, 26, 19, 13, 9, 7]
        assert data.train.labels.bincount().tolist() == data.class_counts
        assert data.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
        assert data.groups == {"many": [0, 1, 2, 3], "medium": [4, 5, 6], "few": [7, 8, 9]}
        images = images_of(data.train, range(len(data.train)))
        assert images.shape == (472, data.channels, data.image_size, data.image_size)
        test = {image.numpy().tobytes() for image in images_of(data.test, range(len(data.test)))}
        assert not any(image.numpy().tobytes() in test for image in images)

    def test_options(self) -> None:
        assert load_data("digits-lt", imbalance=1).class_counts == [140] * 2 + [140] * 6 + [139] + [140]
        assert load_data("digits-lt", imbalance=10, profile="step").class_counts == [140] * 5 + [14] * 5

    def test_holdout_comes_out_of_the_training_set(self) -> None:
        whole, data = load_data("digits-lt"), load_data("digits-lt", holdout=0.2)
        assert whole.holdout is load_data("digits-lt", holdout=None).holdout is None
        assert data.holdout is not None
        held = data.holdout.labels.bincount(minlength=10)
        assert held.tolist() == [28, 20, 14, 10, 7, 5, 4, 3, 2, 1]
        assert (held + torch.tensor(data.class_counts)).tolist() == whole.class_counts
        assert (data.groups, len(data.test)) == (whole.groups, len(whole.test))


@pytest.mark.parametrize(
    ("name", "options", "message"), [("cifar", {}, "unknown data set 'cifar'; choose one of digits-lt"), ("digits-lt", {"holdout": 1}, "holdout")]
)
def test_bad_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(name, **options)


def write_cifar(root: Path, classes: int, per_class: int = 20) -> None:
    """Small files of the official form, with random images."""
    random = np.random.default_rng(0)

    def write(path: Path, labels: list[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        key = b"labels" if classes == 10 else b"fine_labels"
        data = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        path.write_bytes(pickle.dumps({b"data": data, key: labels, b"filenames": [b"x.png"] * len(labels)}, protocol=2))

    labels = random.permutation(np.repeat(np.arange(classes), per_class)).tolist()
    test = list(range(classes))
    names = [f"name {c}".encode() for c in range(classes)]
    if classes == 10:
        folder = root / "cifar-10-batches-py"
        for part in range(5):
            write(folder / f"data_batch_{part + 1}", labels[part * len(labels) // 5 : (part + 1) * len(labels) // 5])
        write(folder / "test_batch", test)
        (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    else:
        folder = root / "cifar-100-python"
        write(folder / "train", labels)
        write(folder / "test", test)
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))


class Command:
    """Unpickled, it would run a program."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


class TestCIFAR:
    @pytest.mark.parametrize("classes", [10, 100])
    def test_official_files(self, classes: int, tmp_path: Path) -> None:
        write_cifar(tmp_path, classes)
        data = load_data(f"cifar{classes}-lt", data_dir=tmp_path, imbalance=10)
        assert data.class_counts == profile_counts(classes, 20, 10) == data.train.labels.bincount().tolist()
        assert len(data.test) == classes
        assert data.class_names is not None
        assert data.class_names[:2] == ["name 0", "name 1"]
        assert images_of(data.train, range(2)).shape == (2, 3, 32, 32)
        (folder,) = tmp_path.iterdir()
        again = load_data(f"cifar{classes}-lt", data_dir=folder, imbalance=10)
        assert torch.equal(images_of(again.train, range(5)), images_of(data.train, range(5))), "the folder itself will do"

    def test_pixels_are_channel_first(self, tmp_path: Path) -> None:
        write_cifar(tmp_path, 100)
        content = read_pickle(tmp_path / "cifar-100-python" / "test")
        data = load_data("cifar100-lt", data_dir=tmp_path, imbalance=1)
        pixel = (content[b"data"][5, 1024 + 2 * 32 + 3] / 255 - 0.4822) / 0.1994
        assert float(images_of(data.test, [5])[0, 1, 2, 3]) == pytest.approx(pixel, rel=1e-4)

    def test_no_code_is_run(self, tmp_path: Path) -> None:
        write_cifar(tmp_path, 100)
        path, marker = tmp_path / "cifar-100-python" / "train", tmp_path / "marker"
        path.write_bytes(pickle.dumps({b"data": Command(marker)}, protocol=2))
        with pytest.raises(ValueError, match=r"train is not a file of CIFAR.*asks for posix\.system, which no file of CIFAR needs"):
            load_data("cifar100-lt", data_dir=tmp_path)
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "_codecs.decode", "numpy.core.multiarray.fromfile", "numpy.core.multiarray.scalar"])
    def test_other_names_are_refused(self, name: str, tmp_path: Path) -> None:
        module, _, attribute = name.rpartition(".")
        (tmp_path / "file").write_bytes(f"c{module}\n{attribute}\n.".encode())
        with pytest.raises(ValueError, match=f"asks for {name}"):
            read_pickle(tmp_path / "file")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "damaged .*pass `download` to fetch it again"),
            ([1], "holds a list"),
            ({b"data": np.zeros((2, 3072))}, r"b'data' must be a uint8 array \(images, 3072\), got a float64 array \(2, 3072\)"),
            ({b"data": np.zeros((2, 3072), np.uint8)}, r"b'fine_labels' must list 2 classes in \[0, 100\), got a value of type NoneType"),
            ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 100]}, r"in \[0, 100\), got a list of 2"),
        ],
    )
    def test_files_that_are_something_else(self, content: object, message: str, tmp_path: Path) -> None:
        write_cifar(tmp_path, 100)
        path = tmp_path / "cifar-100-python" / "train"
        path.write_bytes(path.read_bytes()[:5000] if content is None else pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=message):
            load_data("cifar100-lt", data_dir=tmp_path)

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no CIFAR10 in .*cifar-10-batches-py.*`data_dir`, or `download`"):
            load_data("cifar10-lt", data_dir=tmp_path)
        write_cifar(tmp_path, 10)
        (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
        with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py lacks data_batch_3; unpack the archive"):
            load_data("cifar10-lt", data_dir=tmp_path)

    @needs_torchvision
    def test_download_without_a_connection(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: object, **options: object) -> None:
            raise OSError("no route")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
        with pytest.raises(FileNotFoundError, match=r"download of CIFAR100 into .* failed \(no route\); fetch it by hand"):
            load_data("cifar100-lt", data_dir=tmp_path, download=True)

    @needs_torchvision
    def test_a_damaged_file_is_fetched_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the message says to do helps."""
        write_cifar(tmp_path, 100)
        path = tmp_path / "cifar-100-python" / "test"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match="pass `download` to fetch it again"):
            load_data("cifar100-lt", data_dir=tmp_path, imbalance=2)
        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *args, **options: write_cifar(tmp_path, 100))

        def download_only(self: Any, root: str, train: bool, download: bool) -> None:  # the rest of it would compare the checksums of these files, too
            self.root = root
            self.download()

        monkeypatch.setattr("torchvision.datasets.CIFAR100.__init__", download_only)
        assert len(load_data("cifar100-lt", data_dir=tmp_path, imbalance=2, download=True).test) == 100

    @needs_torchvision
    def test_runs_that_start_together_download_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        downloads = []

        def slow(root: str, **options: object) -> None:
            downloads.append(root)
            folder = tmp_path / "data" / "cifar-100-python"
            folder.mkdir()
            for name in ("train", "test"):  # what a look at the names alone would take for the files
                (folder / name).touch()
            time.sleep(0.2)
            write_cifar(tmp_path / "data", 100)

        monkeypatch.setattr("torchvision.datasets.CIFAR100", slow)
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda _: load_data("cifar100-lt", data_dir=tmp_path / "data", imbalance=2, download=True), range(3)))
        assert len(downloads) == 1
        assert [len(data.test) for data in found] == [100] * 3

    def test_files_that_are_there_need_no_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run that began with `download` is resumed with it, perhaps where nothing can be written any more, or torchvision is not installed."""
        write_cifar(tmp_path, 100)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        for writable in (True, False):
            monkeypatch.setattr(os, "access", lambda path, mode, writable=writable: writable)
            if not writable:
                monkeypatch.setattr("gclkern.training.data.cifar.FileLock", None)
            assert len(load_data("cifar100-lt", data_dir=tmp_path, imbalance=2, download=True).test) == 100

    @pytest.mark.skipif("GCLKERN_DATA" not in os.environ, reason="needs CIFAR's files in the folder GCLKERN_DATA")
    @pytest.mark.parametrize(("name", "imbalance", "total"), [("cifar10-lt", 100, 12406), ("cifar100-lt", 100, 10847), ("cifar100-lt", 50, 12608)])
    def test_real_files(self, name: str, imbalance: int, total: int) -> None:
        data = load_data(name, data_dir=os.environ["GCLKERN_DATA"], imbalance=imbalance)
        assert (len(data.train), len(data.test)) == (total, 10_000)
        images = images_of(data.train, range(total))
        assert (images.flatten(1).std(1) > 0).all()
        # the usual deviations are means over images, so that over all pixels they come out larger; a tail of few classes moves the mean
        assert images.mean((0, 2, 3)).abs().max() < 0.3
        assert ((images.std((0, 2, 3)) > 1.1) & (images.std((0, 2, 3)) < 1.5)).all()


def write_image(path: Path, seed: int = 0) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and test/ with the classes cat (five images) and dog (three)."""
    pytest.importorskip("torchvision")
    for part in ("train", "test"):
        for seed in range(8):
            write_image(tmp_path / part / ("cat" if seed < 5 else "dog") / f"{seed}.{'png' if seed % 2 else 'jpg'}", seed)
    return tmp_path


class TestFolder:
    def test_classes(self, folder: Path) -> None:
        (folder / "train" / "cat" / "notes.txt").write_text("not an image")
        data = load_data("folder", data_dir=folder, image_size=16, workers=0)
        assert (data.class_counts, data.class_names, data.num_classes) == ([5, 3], ["cat", "dog"], 2)
        images, labels = next(data.test.loader([[0, 7]], device=CPU))
        assert images.shape == (2, 3, 16, 16)
        assert labels.tolist() == [0, 1]

    @pytest.mark.parametrize("memory", [True, False])
    def test_workers_resume_and_ranks_see_the_same_images(self, memory: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gclkern.training.data.files._MEMORY", memory * (1 << 30))
        data = load_data("folder", data_dir=folder, image_size=16, workers=0)
        data.train.augment = "resized-crop,flip,color"
        batches = [[0, 1, 2, 3], [4, 5, 6, 7]]

        def epoch(batches: list[list[int]], **place: int) -> Tensor:
            return torch.cat([images for images, _ in data.train.loader(batches, device=CPU, epoch=Epoch(3, **place))])

        before = torch.get_rng_state()
        whole = epoch(batches)
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator stays as it was"
        assert torch.equal(epoch(batches[1:], position=4), whole[4:])
        assert torch.equal(epoch([batch[1::2] for batch in batches], num_replicas=2, rank=1), whole[1::2])
        data.train.workers = 2  # type: ignore[attr-defined] # of no use in memory
        assert torch.equal(epoch(batches), whole)
        views = [Epoch(3), Epoch(4, augment="flip"), Epoch(3, augment="sim")]
        loader = data.train.view_loader(batches, device=CPU, epochs=views)
        for place, images in enumerate(zip(*(images for images, _ in loader), strict=True)):
            alone = data.train.loader(batches, device=CPU, epoch=views[place])
            assert torch.equal(torch.cat(images), torch.cat([images for images, _ in alone])), "a view does not depend on the others"

    def test_workers_outlive_a_signal_to_all_processes(self, folder: Path) -> None:
        """As Ctrl-C and torchrun send it: the main process, which stops after its step, still gets its images."""
        script = f"""
            import multiprocessing, os, signal, time, torch
            from gclkern.training.data import Epoch, files, load_data
            files._MEMORY = 0
            multiprocessing.set_start_method("forkserver")  # the default from Python 3.14 on
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)
            data = load_data("folder", data_dir={str(folder)!r}, image_size=16, workers=1)
            batches = iter(data.train.loader([[i] for i in range(8)], device=torch.device("cpu"), epoch=Epoch(0)))
            next(batches)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.killpg(os.getpid(), number)
                time.sleep(0.3)
            print(1 + sum(1 for _ in batches))
        """
        command, root = [sys.executable, "-c", textwrap.dedent(script)], Path(__file__).resolve().parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False, start_new_session=True)
        assert done.stdout == "8\n", done.stderr

    def test_holdout(self, folder: Path) -> None:
        data = load_data("folder", data_dir=folder, image_size=16, workers=0, holdout=0.4)
        assert data.holdout is not None
        assert (data.class_counts, data.holdout.labels.tolist()) == ([3, 2], [0, 0, 1])
        assert next(data.holdout.loader([[0, 1, 2]], device=CPU))[1].tolist() == [0, 0, 1]

    @pytest.mark.parametrize(("workers", "memory"), [(0, 0), (1, 0), (1, 1 << 30)])
    def test_a_corrupt_image_is_named(self, workers: int, memory: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gclkern.training.data.files._MEMORY", memory)
        path = folder / "train" / "cat" / "2.jpg"
        path.write_bytes(path.read_bytes()[:400])

        def read() -> None:  # in memory the file is met at once, else in its batch
            data = load_data("folder", data_dir=folder, image_size=16, workers=workers)
            list(data.train.loader([list(range(8))], device=CPU))

        with pytest.raises(CorruptImageError, match=r"^\S*train/cat/2\.jpg cannot be read as an image .*pass `skip_corrupt`") as caught:
            read()
        assert "Traceback" not in str(caught.value)

    @pytest.mark.parametrize("memory", [0, 1 << 30])
    def test_corrupt_images_are_left_out_and_counted(self, memory: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gclkern.training.data.files._MEMORY", memory)
        (folder / "train" / "cat" / "2.jpg").write_bytes(b"")
        (folder / "test" / "dog" / "5.png").write_bytes(b"<html>")
        data = load_data("folder", data_dir=folder, image_size=16, workers=0, skip_corrupt=True)
        assert data.class_counts == [4, 3]
        assert [note.partition(": ")[0] for note in data.notes[-2:]] == ["1 training image left out", "1 test image left out"]
        assert next(data.test.loader([list(range(len(data.test)))], device=CPU))[1].tolist() == data.test.labels.tolist() == [0] * 5 + [1] * 2

    def test_a_class_without_a_readable_image(self, folder: Path) -> None:
        for path in (folder / "train" / "dog").iterdir():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match="classes without a training image: dog; remove their folders, or fill them"):
            load_data("folder", data_dir=folder, workers=0, skip_corrupt=True)

    def test_the_last_class_without_a_training_image(self, folder: Path) -> None:
        for path in (folder / "train" / "dog").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match="classes without a training image: dog; remove their folders, or fill them"):
            load_data("folder", data_dir=folder, workers=0)

    def test_hidden_files_and_folders_do_not_count(self, folder: Path) -> None:
        (folder / "train" / ".ipynb_checkpoints").mkdir()
        (folder / "train" / "dog" / ".ipynb_checkpoints").mkdir()
        write_image(folder / "train" / "dog" / ".ipynb_checkpoints" / "5-checkpoint.jpg")
        (folder / "test" / "dog" / "._5.png").write_bytes(b"Mac OS X")
        data = load_data("folder", data_dir=folder, workers=0)
        assert (data.class_counts, data.class_names, len(data.test)) == ([5, 3], ["cat", "dog"], 8)

    def test_folders_that_are_missing_or_unknown(self, folder: Path, tmp_path: Path) -> None:
        write_image(folder / "test" / "bird" / "1.png")
        with pytest.raises(ValueError, match=r"bird is a class that .*train does not have"):
            load_data("folder", data_dir=folder)
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; give the folder of train/ and test/, or of the classes"):
            load_data("folder", data_dir=tmp_path / "nowhere")


class TestLists:
    def test_own_list(self, folder: Path) -> None:
        (folder / "train.txt").write_text("train/cat/0.jpg 0\ntrain/cat/1.png 0\n\ntrain/dog/5.png 1\n")
        (folder / "test.txt").write_text("test/dog/5.png 1\n")
        data = load_data("list", data_dir=folder, train_list=folder / "train.txt", test_list=folder / "test.txt", image_size=16, workers=0)
        assert (data.class_counts, len(data.test), data.num_classes) == ([2, 1], 1, 2)
        assert next(data.train.loader([[2]], device=CPU))[1].tolist() == [1]

    def test_paths_may_have_spaces(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a b/c d.jpg 3\n  e.jpg\t 4 \n")
        read = read_list(tmp_path / "list.txt")
        assert (read.paths, read.labels.tolist()) == (["a b/c d.jpg", "e.jpg"], [3, 4])

    def test_a_mark_of_the_byte_order_is_no_part_of_the_path(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a.jpg 0\n", encoding="utf-8-sig")
        assert read_list(tmp_path / "list.txt").paths == ["a.jpg"]

    @pytest.mark.parametrize(
        ("text", "message"), [("a.jpg 0\nb.jpg\n", r"list\.txt:2: expected `relative/path label`"), ("a.jpg -1\n", "label from 0 on"), ("\n", "lists no image")]
    )
    def test_lines_that_are_something_else(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_list(tmp_path / "list.txt")

    def test_missing_lists_and_images(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"imagenet-lt needs its list ImageNet_LT_train\.txt in .*`train_list` and `test_list`"):
            load_data("imagenet-lt", data_dir=folder)
        with pytest.raises(ValueError, match="'list' needs `train_list` and `test_list`"):
            load_data("list", data_dir=folder)
        lists = {"train_list": folder / "a.txt", "test_list": folder / "a.txt"}
        (folder / "a.txt").write_text("somewhere/0.jpg 0\n")
        with pytest.raises(FileNotFoundError, match=r"the list has somewhere/0\.jpg, but .* holds no folder somewhere; pass the folder with `data_dir`"):
            load_data("list", data_dir=folder, **lists)
        (folder / "a.txt").write_text("train/cat/0.jpg 0\ntrain/cat/99.jpg 0\n")
        with pytest.raises(FileNotFoundError, match=r"the list has train/cat/99\.jpg, but there is no .*99\.jpg; add it, or pass `skip_corrupt`"):
            load_data("list", data_dir=folder, **lists)
        data = load_data("list", data_dir=folder, **lists, skip_corrupt=True, workers=0)
        assert f"1 training image left out: {folder}/train/cat/99.jpg does not exist" in data.notes
        with pytest.raises(ValueError, match="inat18 has 8142 classes, but its training list has 1"):
            load_data("inat18", data_dir=folder, **lists)

    def test_labels_with_a_gap_or_unknown_to_training(self, folder: Path) -> None:
        (folder / "gap.txt").write_text("train/cat/0.jpg 0\ntrain/dog/5.png 2\n")
        (folder / "high.txt").write_text("train/cat/0.jpg 3\n")
        with pytest.raises(ValueError, match="classes without a training image: 1; labels must be 0 to C - 1"):
            load_data("list", data_dir=folder, train_list=folder / "gap.txt", test_list=folder / "gap.txt")
        with pytest.raises(ValueError, match="the test images have class 3, but the training images only 0 to 2"):
            load_data("list", data_dir=folder, train_list=folder / "gap.txt", test_list=folder / "high.txt")

    @pytest.mark.parametrize("written", ["small", "easy"])
    @pytest.mark.parametrize("stored", ["small", "easy"])
    def test_both_layouts_of_places(self, written: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """365 classes, the first airfield, the second apartment_building/outdoor; lists of either layout find the images of either."""
        pytest.importorskip("torchvision")
        monkeypatch.setattr("gclkern.training.data.files._MEMORY", 0)
        names = ["airfield", "apartment_building/outdoor", *(f"place_{c}" for c in range(2, 365))]

        def place(layout: str, name: str, part: str) -> str:
            if layout == "small":
                return f"data_256/{name[0]}/{name}/1.jpg" if part == "train" else f"val_256/{name.replace('/', '_')}.jpg"
            folder = name.replace("/", "-")
            return f"train/{folder}/1.jpg" if part == "train" else f"val/{folder}/{name.replace('/', '_')}.jpg"

        write_image(tmp_path / "1.jpg")
        for name in names:
            for part in ("train", "test"):
                target = tmp_path / place(stored, name, part)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(tmp_path / "1.jpg")
        for part in ("train", "test"):
            (tmp_path / f"Places_LT_{part}.txt").write_text("".join(f"{place(written, name, part)} {label}\n" for label, name in enumerate(names)))
        data = load_data("places-lt", data_dir=tmp_path, image_size=16, workers=0)
        assert data.class_counts == [1] * 365
        for images in (data.train, data.test):
            assert all(Path(path).is_file() for path in images.files.paths)  # type: ignore[attr-defined]
        assert next(data.test.loader([[1, 0]], device=CPU))[1].tolist() == [1, 0]


def test_importing_the_data_sets_needs_no_extra() -> None:
    extras = ("torchvision", "sklearn", "matplotlib", "tensorboard", "tqdm", "PIL")
    code = f"""
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {extras!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import gclkern.training.data, gclkern.training.evaluation, gclkern.training.backbones, gclkern.training.plots
try:
    gclkern.training.data.load_data("digits-lt")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.strip() == "the data set digits-lt needs sklearn, which is not installed; run: pip install 'gclkern[train]'", done.stderr
