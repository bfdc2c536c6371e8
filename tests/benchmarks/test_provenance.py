"""A result's hash says whether the code is still the one that it measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import provenance

SOURCE = '''"""A module."""

# a comment
NAME = "#no comment"  # a comment


def double(x: int) -> int:
    """Twice x."""
    return 2 * x  # twice


class Empty:
    """Nothing but
    a docstring."""
'''


def test_only_code_counts() -> None:
    code = 'NAME = "#no comment"\ndef double(x: int) -> int:\n    return 2 * x\nclass Empty:'
    assert provenance.code_of(SOURCE) == code
    assert provenance.code_of('x = "a string that is not a docstring"\n"a statement"\n') == 'x = "a string that is not a docstring"\n"a statement"'
    assert provenance.code_of('def f(): "doc"; return 1  # é\n') == "def f(): ; return 1"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [("# a comment", "# another", True), ("Twice x", "Double x", True), ("2 * x", "3 * x", False), ("#no comment", "#other", False), ("Empty", "Full", False)],
)
def test_the_hash_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE)
    before = provenance.code_hash([file])
    assert len(before) == 12 and before == provenance.code_hash([file])
    file.write_text(SOURCE.replace(old, new))
    assert (provenance.code_hash([file]) == before) is same
    assert provenance.code_hash([file.rename(tmp_path / "other.py")]) != before


def test_every_source_has_a_result_that_belongs_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are moved or added are covered, because there is no list of files."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    hashes = {"kernels": provenance.kernels_hash, "torch": provenance.torch_hash, "training": provenance.training_hash}
    changes = {
        "train.py": {"training"},
        "kernels/head.py": {"kernels", "training"},
        "gclkern/losses.py": {"torch", "training"},
        "gclkern/torch_backend/head.py": {"torch", "training"},
        "gclkern/cpu/loss.c": {"torch", "training"},
        "gclkern/training/trainer.py": {"training"},
        "gclkern/distributed/head.py": {"training"},
    }
    for name in changes:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "gclkern" / "kernels").symlink_to("../kernels")
    for name, expected in changes.items():
        before = {kind: compute() for kind, compute in hashes.items()}
        (tmp_path / name).write_text("changed = 1\n")
        assert {kind for kind, compute in hashes.items() if compute() != before[kind]} == expected
