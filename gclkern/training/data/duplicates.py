"""Finds images that occur twice: within a list, under two labels, or in both training and test set."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from gclkern.training.printable import printable

# Up to this many files are compared by content, which reads only files of equal size; more are compared by path.
_COMPARED = 20_000


def _contents(paths: Sequence[str]) -> dict[str, Hashable]:
    """A key of each path that is equal for files of equal content."""
    sizes: dict[str, int] = {}
    for path in set(paths):
        try:
            sizes[path] = Path(path).stat().st_size
        except OSError:  # reported when the image is decoded
            continue
    shared = Counter(sizes.values())
    keys: dict[str, Hashable] = {}
    for path, size in sizes.items():
        try:
            keys[path] = hashlib.blake2b(Path(path).read_bytes()).digest() if shared[size] > 1 and size else path
        except OSError:
            continue
    return keys


def duplicate_notes(train: tuple[Sequence[str], Sequence[int]], test: tuple[Sequence[str], Sequence[int]]) -> list[str]:
    """A sentence for each kind of duplicate among the training and test images, given as (paths, labels)."""
    contents = _contents([*train[0], *test[0]]) if len(train[0]) + len(test[0]) <= _COMPARED else {}
    members: dict[Hashable, list[tuple[bool, str, int]]] = defaultdict(list)
    for tests, (paths, labels) in enumerate((train, test)):
        for path, label in zip(paths, labels, strict=True):
            members[contents.get(path, path)].append((bool(tests), path, label))
    repeated = [same for same in members.values() if len(same) > 1]
    if not repeated:
        return []

    def example(same: list[tuple[bool, str, int]]) -> str:
        first, second = printable(same[0][1]), printable(same[-1][1])
        return first if first == second else f"{first} and {second}"

    notes = []
    leaked = [same for same in repeated if len({tests for tests, _, _ in same}) == 2]
    if leaked:
        count = sum(tests for same in leaked for tests, _, _ in same)
        notes.append(f"test images that are training images too: {count}, such as {example(leaked[0])}; the test accuracy is too high by them")
    for tests, name in enumerate(("training", "test")):
        within = [own for same in repeated if len(own := [member for member in same if member[0] == bool(tests)]) > 1]
        if within:
            notes.append(f"{name} images that repeat another one: {sum(len(own) - 1 for own in within)}, such as {example(within[0])}")
    mixed = [same for same in repeated if len({label for _, _, label in same}) > 1]
    if mixed:
        different = next(member for member in mixed[0] if member[2] != mixed[0][0][2])
        notes.append(f"images under more than one class: {len(mixed)}, such as {example([mixed[0][0], different])}")
    return notes
