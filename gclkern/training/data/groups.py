"""Many-, medium- and few-shot classes: the three groups for which long-tailed results are reported."""

from __future__ import annotations

from collections.abc import Sequence

GROUPS = ("many", "medium", "few")


def _named(members: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """The groups by name, without empty ones: their accuracy is undefined, not 0."""
    return {name: sorted(classes) for name, classes in zip(GROUPS, members, strict=True) if classes}


def count_groups(class_counts: Sequence[int], many: int = 100, few: int = 20) -> dict[str, list[int]]:
    """Classes with more than `many` training samples, fewer than `few`, and those between, both ends included (Liu et al., "Large-scale long-tailed recognition
    in an open world", CVPR 2019).

    Example:
        >>> count_groups([500, 100, 20, 19])
        {'many': [0], 'medium': [1, 2], 'few': [3]}
        >>> count_groups([500, 50])
        {'many': [0], 'medium': [1]}
    """
    classes = range(len(class_counts))
    above, below = [c for c in classes if class_counts[c] > many], [c for c in classes if class_counts[c] < few]
    return _named([above, [c for c in classes if few <= class_counts[c] <= many], below])


def tercile_groups(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """Thirds of the classes from the most frequent to the rarest, for sets too small for fixed limits. If 3 does not divide their number, the first are larger.

    Example:
        >>> tercile_groups([140, 70, 35, 10])
        {'many': [0, 1], 'medium': [2], 'few': [3]}
    """
    ranked = sorted(range(len(class_counts)), key=lambda c: -class_counts[c])
    size, larger = divmod(len(ranked), 3)
    ends = [size + (larger > 0), 2 * size + larger]
    return _named([ranked[: ends[0]], ranked[ends[0] : ends[1]], ranked[ends[1] :]])
