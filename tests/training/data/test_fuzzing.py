"""Files of any content: read, or refused by an error that names them. A longer search: tests/support/fuzzing.py."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")

from gclkern.training.checkpoint import _FORMAT, _VERSION, CheckpointError, _digest, load_checkpoint
from gclkern.training.data import load_data
from tests.support.fuzzing import TARGETS, check
from tests.training.test_data import write_cifar, write_image


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=300))
def test_any_bytes(target: str, data: bytes) -> None:
    check(target, data)


@pytest.mark.parametrize(
    ("target", "data"),
    [
        ("checkpoint", b"\0\x4a"),  # a pickle that ends within a number
        ("lists", b"a" * 300 + b" 0\n"),  # names longer than a file system allows
        ("lists", b"a/" * 3000 + b"b.png 0\n"),
        ("lists", b". 0\n/ 0\n"),
        ("lists", "a.png \u0663\n".encode()),  # a digit that is not ASCII
        # arrays in the place of names, whose text has many lines
        ("cifar", bytes.fromhex("0202020b000304020003 0c0a0a0702030603080509 00080b030d03040d070a0c070d0d030c0304000d070d03")),
    ],
)
def test_bytes_that_were_once_misread(target: str, data: bytes) -> None:
    check(target, data)


def test_a_link_to_itself(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "1.png")
    write_image(tmp_path / "dog" / "1.png")
    write_image(tmp_path / "cat" / "2.png")
    (tmp_path / "cat" / "3.png").symlink_to("3.png")
    data = load_data("folder", data_dir=tmp_path, workers=0)
    assert data.notes[0] == f"left out of {tmp_path}: broken links (1)"


def _cyclic() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["self"] = state
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": _cyclic()}, "damaged"),
        ({"state": {"value": torch.eye(2).to_sparse()}}, "damaged"),
        ({"state": {"value": torch.empty(2, device="meta")}}, "damaged"),
        ({"state": {"value": torch.zeros(1).expand(2**40)}}, "damaged"),
        ({"version": torch.ones(2)}, "not a checkpoint"),
        ({"format": torch.ones(2)}, "not a checkpoint"),
        ({"digest": torch.ones(2)}, "not a checkpoint"),
        ({"state": [1]}, "not a checkpoint"),
    ],
)
def test_checkpoints_of_odd_values(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Which torch can save, and this library never does."""
    torch.save({"format": _FORMAT, "version": _VERSION, "digest": "0", "state": {}} | content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "last.pt")


def test_the_test_above_would_be_read_with_its_digest(tmp_path: Path) -> None:
    torch.save({"format": _FORMAT, "version": _VERSION, "digest": _digest({}), "state": {}}, tmp_path / "last.pt")
    assert dict(load_checkpoint(tmp_path / "last.pt")) == {}


class TestCifar:
    def change(self, root: Path, name: str, **changes: object) -> None:
        """A file of CIFAR-100 with other values."""
        write_cifar(root, 100)
        path = root / "cifar-100-python" / name
        content = pickle.load(io.BytesIO(path.read_bytes()), encoding="bytes") | {key.encode(): value for key, value in changes.items()}
        path.write_bytes(pickle.dumps(content, protocol=2))

    def test_images_in_the_order_of_fortran(self, tmp_path: Path) -> None:
        write_cifar(tmp_path, 100)
        before = load_data("cifar100-lt", data_dir=tmp_path, imbalance=2).test
        content = pickle.loads((tmp_path / "cifar-100-python" / "test").read_bytes(), encoding="bytes")
        self.change(tmp_path, "test", data=np.asfortranarray(content[b"data"]))
        after = load_data("cifar100-lt", data_dir=tmp_path, imbalance=2).test
        for images in (before, after):
            assert len(images) == len(before)
        first, second = (next(images.loader([[0, 1, 2]], device=torch.device("cpu")))[0] for images in (before, after))
        assert first.equal(second)

    @pytest.mark.parametrize(
        ("changes", "shown"),
        [
            ({"data": {b"data": np.zeros((2, 3))}}, "a dict of 1"),
            ({"data": np.zeros((2, 3))}, r"a float64 array \(2, 3\)"),
            ({"fine_labels": 10**5000}, "a value of type int"),  # which Python does not write out
            ({"fine_labels": [100] * 1000}, "a list of 1000"),
        ],
        ids=["dict", "array", "number", "list"],
    )
    def test_errors_have_one_line(self, changes: dict[str, object], shown: str, tmp_path: Path) -> None:
        """Whatever the files hold, and whatever their folder is called."""
        root = tmp_path / "two\nlines"
        self.change(root, "test", **changes)
        with pytest.raises(ValueError, match=rf"^\S+two\\nlines/cifar-100-python/test: .*, got {shown}; pass `download` to fetch it again$"):
            load_data("cifar100-lt", data_dir=root, imbalance=2)

    @pytest.mark.parametrize("name", [10**5000, np.zeros((2, 2)), None], ids=["number", "array", "none"])
    def test_names_that_are_no_text(self, name: object, tmp_path: Path) -> None:
        self.change(tmp_path, "meta", fine_label_names=[name] * 100)
        with pytest.raises(ValueError, match=r"^\S+meta: b'fine_label_names' must list 100 names, got a list of 100; pass `download` to fetch it again$"):
            load_data("cifar100-lt", data_dir=tmp_path, imbalance=2)

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        self.change(tmp_path, "meta", fine_label_names=[b"caf\xe9"] * 100)
        assert load_data("cifar100-lt", data_dir=tmp_path, imbalance=2).class_names == ["caf\\xe9"] * 100

    def test_classes_of_other_sizes(self, tmp_path: Path) -> None:
        self.change(tmp_path, "train", fine_labels=[0] * 2000)
        message = "cifar-100-python has 0 to 2000 training images of a class, but CIFAR100 has the same number of each; pass `download`"
        with pytest.raises(ValueError, match=message):
            load_data("cifar100-lt", data_dir=tmp_path, imbalance=2)
