"""Lists: every line is understood as it was meant, or refused with file, line and cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

from gclkern.training.data import load_data
from gclkern.training.data.lists import read_list
from tests.training.test_data import write_image


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\n# more of them\n", r"list\.txt:2: expected .* got '# more of them'; a list has no comments, remove the line"),
        ("a.jpg,0\n", r"list\.txt:1: expected .*; separate path and label by a space, not by a comma or a semicolon"),
        ('"a b.jpg" "0"\n', "write paths without quotes"),
        ("a.jpg 0\n\nb.jpg 99999999999999999999\n", r"list\.txt:3: the label 99999999999999999999 is too large: labels are 0 to C - 1"),
        ("b.jpg 123456789\n", "the label 123456789 is too large"),
        ("b.jpg " + "9" * 5000 + "\n", r"list\.txt:1: the label 9{30} is too large"),
        ("a.jpg 0\0\n", "not a text file in UTF-8; save it as one"),
    ],
)
def test_lines_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("cat/0.png,", "separate path and label by a space, not by a comma"),
        ('"cat/0.png"', "write paths without quotes"),
        ("cat\\0.png", "separate folders by /, not by a backslash"),
        ("# cat/0.png", "a list has no comments"),
        ("cat/\udcff.png", "bytes that are not UTF-8, save the list as UTF-8"),
    ],
)
def test_paths_that_lead_nowhere_have_a_cause(path: str, cause: str, tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "0.png")
    (tmp_path / "list.txt").write_bytes(os.fsencode(f"cat/0.png 0\n{path} 0\n"))
    with pytest.raises(FileNotFoundError, match=rf"list\.txt:2: the list has .*{cause}") as caught:
        load_data("list", data_dir=tmp_path, train_list=tmp_path / "list.txt", test_list=tmp_path / "list.txt")
    str(caught.value).encode()


@pytest.mark.skipif(os.name != "posix", reason="such names are POSIX's")
def test_odd_names_that_exist_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gclkern.training.data.files._MEMORY", 0)
    names = ["a,", '"b"', "c\\d", "# e", "f\u2028g", "h  i", "\udcff", "j\x0bk", "l;"]
    for name in names:
        write_image(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(os.fsencode("".join(f"{name} 0\r\n" for name in names)))
    data = load_data("list", data_dir=tmp_path, train_list=tmp_path / "list.txt", test_list=tmp_path / "list.txt")
    assert [Path(path).name for path in data.train.files.paths] == names  # type: ignore[attr-defined]


@pytest.mark.parametrize("written", ["flat", "classes"])
@pytest.mark.parametrize("stored", ["flat", "classes"])
def test_imagenets_validation_folder(written: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its archive is flat, a common script sorts it into classes, and lists come in both forms."""
    from gclkern.training.data import lists

    monkeypatch.setattr("gclkern.training.data.files._MEMORY", 0)
    monkeypatch.setitem(lists._LISTS, "imagenet-lt", lists._LISTS["imagenet-lt"]._replace(num_classes=2))
    classes = ["n01440764", "n01443537"]

    def path(layout: str, label: int) -> str:
        return f"val/{classes[label]}/{label}.png" if layout == "classes" else f"val/{label}.png"

    for label, name in enumerate(classes):
        write_image(tmp_path / "train" / name / "0.png", label)
        write_image(tmp_path / path(stored, label), 10 + label)
    (tmp_path / "ImageNet_LT_train.txt").write_text("".join(f"train/{name}/0.png {label}\n" for label, name in enumerate(classes)))
    (tmp_path / "ImageNet_LT_test.txt").write_text("".join(f"{path(written, label)} {label}\n" for label in range(2)))
    data = load_data("imagenet-lt", data_dir=tmp_path)
    assert data.test.files.paths == [str(tmp_path / path(stored, label)) for label in range(2)]  # type: ignore[attr-defined]
