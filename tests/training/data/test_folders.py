"""Folders: which files count, how links are followed, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from gclkern.training.data import DataSplits, files, load_data
from gclkern.training.data.folders import find_images
from tests.training.test_data import write_image


def write_images(root: Path, **classes: int) -> None:
    for label, (name, count) in enumerate(classes.items()):
        for number in range(count):
            write_image(root / name / f"{number:02}.png", seed=1000 * label + number + 10**6 * sum(map(ord, root.name)))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """train/ and test/ with the classes cat (five images) and dog (three)."""
    for part in ("train", "test"):
        write_images(tmp_path / "pets" / part, cat=5, dog=3)
    return tmp_path / "pets"


def load(root: Path) -> DataSplits:
    return load_data("folder", data_dir=root, image_size=16, workers=0)


class TestWalk:
    def test_links_are_followed_but_not_in_circles(self, pets: Path, tmp_path: Path) -> None:
        write_images(tmp_path / "elsewhere", bird=2)
        (pets / "train" / "bird").symlink_to(tmp_path / "elsewhere" / "bird", target_is_directory=True)
        (pets / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (pets / "train" / "dog" / "up").symlink_to(pets / "train", target_is_directory=True)
        (pets / "train" / "cat" / "linked.png").symlink_to(pets / "train" / "cat" / "00.png")
        data = load(pets)
        assert (data.class_names, data.class_counts) == (["bird", "cat", "dog"], [2, 5 + 2 + 1, 3])
        assert any("links to a folder above them (2)" in note for note in data.notes)

    def test_only_files_are_images(self, tmp_path: Path) -> None:
        write_images(tmp_path, cat=1)
        folder = tmp_path / "cat"
        write_image(folder / "@eaDir" / "00.png" / "SYNOPHOTO_THUMB_M.png")
        write_image(folder / "inner.png" / "07.PNG")  # a folder with the name of an image
        (folder / "gone.png").symlink_to(folder / "nowhere.png")
        os.mkfifo(folder / "pipe.png")
        for name in ("notes.txt", "a.json", "b.json", "README", ".DS_Store"):
            (folder / name).touch()
        found, left_out = find_images(folder)
        assert [Path(path).name for path in found] == ["00.png", "07.PNG"]
        assert left_out == {"hidden": 2, "broken links": 1, "neither files nor folders": 1, ".txt": 1, ".json": 2, "without a suffix": 1}

    @pytest.mark.parametrize("name", ["x.pgm", "x.jfif", "x.JPEG", "x.jp2", "x.Tif", "x.webp"])
    def test_every_format_that_can_be_read_counts(self, name: str, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        image.new("L", (4, 4)).save(tmp_path / name)
        assert find_images(tmp_path)[0] == [str(tmp_path / name)]

    def test_what_is_left_out_is_counted_by_kind(self, pets: Path) -> None:
        for name in ("a.txt", "b.txt", "c.csv"):
            (pets / "train" / "cat" / name).touch()
        (pets / "train" / "stray.png").touch()
        (note,) = load(pets).notes
        assert note == f"left out of {pets}/train: .txt (2), .csv (1), files beside the class folders (1)"

    def test_a_folder_without_images_says_what_is_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "x.HEIC").touch()
        with pytest.raises(ValueError, match=r"no folder of images for each class, such as .*left out of .*: \.HEIC \(1\); convert photos"):
            load(tmp_path)

    def test_a_single_class_is_a_folder_too_high(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            write_image(tmp_path / "pets" / name / "1.png")
        with pytest.raises(ValueError, match=r"pets is the only class.* give that by `data_dir`"):
            load(tmp_path)

    @pytest.mark.skipif(os.name != "posix", reason="such names are POSIX's")
    def test_names_may_be_anything(self, tmp_path: Path) -> None:
        names = ["$a_$", "b\nc", "\udcff", "_d", "e, f", 'g"h', "x" * 250, "猫"]
        for part in ("train", "test"):
            write_images(tmp_path / part, **dict.fromkeys(names, 2))
        data = load(tmp_path)
        assert data.class_names == sorted(names)
        (tmp_path / "train" / "b\nc" / "k\udcfe.\udcff").touch()
        (tmp_path / "train" / "b\nc" / "01.png").write_bytes(b"")
        for sentence in load_data("folder", data_dir=tmp_path, image_size=16, workers=0, skip_corrupt=True).notes:
            sentence.encode()  # can be printed
            assert "\n" not in sentence
        (tmp_path / "train" / "b\nc" / "00.png").unlink()
        with pytest.raises(ValueError, match=r"classes without a training image: b\\nc;") as caught:
            load_data("folder", data_dir=tmp_path, workers=0, skip_corrupt=True)
        str(caught.value).encode()


class TestSplit:
    def test_a_folder_of_classes_splits_itself(self, tmp_path: Path) -> None:
        write_images(tmp_path, cat=10, dog=5, owl=1)
        data = load(tmp_path)
        assert (data.class_names, data.class_counts, data.test_like_train) == (["cat", "dog", "owl"], [8, 4, 1], True)
        assert data.test.labels.tolist() == [0, 0, 1]
        split, untested, *_ = data.notes
        assert split == f"{tmp_path} has no test set beside it: 20% of each class are taken as test images (seed 0), 3 images"
        assert untested == "classes without a test image, which are not part of any accuracy: owl"

    def test_the_split_depends_on_the_seed_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gclkern.training.data.files._MEMORY", 0)
        write_images(tmp_path, cat=10, dog=5)
        first, again, other = (load_data("folder", data_dir=tmp_path, workers=0, seed=seed) for seed in (0, 0, 1))
        assert again.test.files.paths == first.test.files.paths != other.test.files.paths  # type: ignore[attr-defined]
        assert not set(first.train.files.paths) & set(first.test.files.paths)  # type: ignore[attr-defined]

    def test_a_training_folder_alone_splits_itself(self, pets: Path) -> None:
        for file in sorted((pets / "test").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (pets / "test").rmdir()
        data = load(pets)
        assert (data.class_names, data.class_counts, len(data.test), data.test_like_train) == (["cat", "dog"], [4, 2], 2, True)
        assert data.notes[0].startswith(f"{pets}/train has no test set beside it")

    def test_single_images_cannot_be_split(self, tmp_path: Path) -> None:
        write_images(tmp_path, cat=1, dog=1)
        with pytest.raises(ValueError, match=r"no class has a second image.*add images, or a folder test/"):
            load(tmp_path)

    def test_names_of_the_parts(self, pets: Path) -> None:
        (pets / "train").rename(pets / "Train")
        (pets / "test").rename(pets / "Validation")
        data = load(pets)
        assert (data.class_names, data.class_counts, data.notes, data.test_like_train) == (["cat", "dog"], [5, 3], [], False)
        write_images(pets / "test", cat=2, dog=1)
        data = load(pets)
        assert len(data.test) == 3
        assert data.notes == [f"{pets}/Validation is not used, since test/ is the test set; `holdout` takes images to choose by"]

    def test_a_test_set_alone(self, pets: Path) -> None:
        (pets / "train").rename(pets / "old")
        with pytest.raises(FileNotFoundError, match="holds test/, but no train/"):
            load(pets)

    def test_a_holdout_of_single_images(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_images(tmp_path / part, cat=1, dog=1)
        with pytest.raises(ValueError, match=r"holdout 0\.5 takes no image, since no class has a second one; leave out `holdout` or add images"):
            load_data("folder", data_dir=tmp_path, workers=0, holdout=0.5)

    @pytest.mark.parametrize("name", ["folder", "list"])
    def test_a_tenth_is_held_out_by_default(self, name: str, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_images(tmp_path / part, cat=250, dog=60, owl=1)
        lines = [f"{path.relative_to(tmp_path)} {('cat', 'dog', 'owl').index(path.parent.name)}\n" for path in sorted((tmp_path / "train").rglob("*.png"))]
        (tmp_path / "list.txt").write_text("".join(lines))
        lists = {} if name == "folder" else dict.fromkeys(("train_list", "test_list"), tmp_path / "list.txt")
        data = load_data(name, data_dir=tmp_path, workers=0, image_size=8, holdout=None, **lists)  # type: ignore[arg-type]
        assert data.holdout is not None
        assert (data.class_counts, data.holdout.labels.bincount().tolist()) == ([225, 54, 1], [25, 6])
        whole = load_data(name, data_dir=tmp_path, workers=0, image_size=8, holdout=0, **lists)  # type: ignore[arg-type]
        assert (whole.class_counts, whole.holdout) == ([250, 60, 1], None)

    def test_a_tenth_of_a_small_set_is_not_held_out_by_default(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_images(tmp_path / part, cat=250, dog=44)
        data = load_data("folder", data_dir=tmp_path, workers=0, image_size=8, holdout=None)
        assert (data.class_counts, data.holdout) == ([250, 44], None)
        note = "no images are held out to fit a temperature: a tenth of each class, at least one image, would be 29 of 294, too few; `holdout=0.1` takes them"
        assert data.notes[-1] == note
        assert len(load_data("folder", data_dir=tmp_path, workers=0, image_size=8, holdout=0.1).holdout or ()) == 29

    def test_one_image_of_many_small_classes_is_not_held_out_by_default(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_images(tmp_path / part, **{f"class {label}": 4 for label in range(31)})
        data = load_data("folder", data_dir=tmp_path, workers=0, image_size=8, holdout=None)
        assert data.holdout is None
        assert data.notes[-1].endswith("a tenth of each class, at least one image, would be 31 of 124, too many; `holdout=0.1` takes them")


class TestMemory:
    def test_images_at_size_stay_as_they_are(self, pets: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        written: dict[str, torch.Tensor] = {}
        for path in sorted(pets.rglob("*.png")):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(written)))
            image.fromarray(pixels.numpy()).save(path)
            written[str(path)] = pixels.permute(2, 0, 1)
        data = load_data("folder", data_dir=pets, workers=0)
        assert (data.image_size, data.train.augment) == (32, "crop")
        assert data.notes == ["images are resized to 32 x 32 pixels, their usual shorter side; `image_size` changes it"]
        for part, images in (("train", data.train), ("test", data.test)):
            expected = torch.stack([pixels for path, pixels in written.items() if f"/{part}/" in path])
            found = next(images.loader([list(range(8))], device=torch.device("cpu")))[0]
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (files.IMAGENET_MEAN, files.IMAGENET_STD))
            assert torch.equal((255 * (found * std + mean)).round().to(torch.uint8), expected)

    @pytest.mark.parametrize("size", [24, 112])
    def test_evaluation_sees_the_same_from_memory_as_from_files(self, size: int, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image = pytest.importorskip("PIL.Image")
        for number, path in enumerate(sorted(pets.rglob("*.png"))):
            coarse = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
            image.fromarray(coarse.numpy()).resize((150, 130 + 10 * (number % 5)), 2).save(path)
        found = {}
        for memory in (0, 1 << 30):
            monkeypatch.setattr(files, "_MEMORY", memory)
            data = load_data("folder", data_dir=pets, workers=0, image_size=size, holdout=0.4)
            assert data.train.augment == ("crop" if size == 24 else "resized-crop,flip,color")
            assert data.holdout is not None
            found[memory] = [next(part.loader([[0, 1]], device=torch.device("cpu")))[0] for part in (data.train, data.test, data.holdout)]
        (train, test, held), (train_in, test_in, held_in) = found[0], found[1 << 30]
        torch.testing.assert_close(test, test_in, atol=1e-5, rtol=0)
        for of_files, in_memory in ((train, train_in), (held, held_in)):
            # photos for resized crops are made square in between, which costs an interpolation
            assert (of_files - in_memory).abs().mean() < (1e-5 if size == 24 else 0.05 * of_files.std())

    @pytest.mark.parametrize(
        ("sizes", "expected"), [([(32, 32)] * 3, 32), ([(50, 47), (60, 44), (41, 90)], 48), ([(90, 100), (110, 120)], 96), ([(999, 800)], 224)]
    )
    def test_the_usual_size(self, sizes: list[tuple[int, int]], expected: int, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        for number, size in enumerate(sizes):
            image.new("L", size).save(tmp_path / f"{number}.png")
        assert files.choose_size([*map(str, sorted(tmp_path.iterdir())), str(tmp_path / "gone.png")]) == expected

    def test_groups_of_small_sets_are_thirds(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_images(tmp_path / part, a=7, b=5, c=2)
        data = load(tmp_path)
        assert data.groups == {"many": [0], "medium": [1], "few": [2]}
        assert data.notes == ["many, medium and few are thirds of the classes by their counts, since limits of 100 and 20 images would leave a group empty"]


class TestDuplicates:
    def test_an_image_in_training_and_test(self, pets: Path) -> None:
        (pets / "test" / "dog" / "copy.png").write_bytes((pets / "train" / "cat" / "03.png").read_bytes())
        leaked, mixed = load(pets).notes
        pair = f"{pets}/train/cat/03.png and {pets}/test/dog/copy.png"
        assert leaked == f"test images that are training images too: 1, such as {pair}; the test accuracy is too high by them"
        assert mixed == f"images under more than one class: 1, such as {pair}"

    def test_an_image_twice_in_training(self, pets: Path) -> None:
        (pets / "train" / "cat" / "copy.png").write_bytes((pets / "train" / "cat" / "03.png").read_bytes())
        assert load(pets).notes == [f"training images that repeat another one: 1, such as {pets}/train/cat/03.png and {pets}/train/cat/copy.png"]

    def test_a_line_twice_in_a_list(self, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gclkern.training.data.duplicates._COMPARED", 0)  # as in a large set: by path alone
        (pets / "train.txt").write_text("train/cat/00.png 0\ntrain/dog/00.png 1\ntrain/cat/00.png 0\n")
        (pets / "test.txt").write_text("train/dog/00.png 1\ntest/cat/00.png 0\n")
        data = load_data("list", data_dir=pets, train_list=pets / "train.txt", test_list=pets / "test.txt", image_size=16, workers=0)
        first, second = data.notes
        assert first.startswith(f"test images that are training images too: 1, such as {pets}/train/dog/00.png;")
        assert second == f"training images that repeat another one: 1, such as {pets}/train/cat/00.png"
        assert torch.equal(data.train.labels, torch.tensor([0, 1, 0]))
