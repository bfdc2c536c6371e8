"""Laws for subjects by name, such as losses, with the exceptions: relations between the outcomes of problems, which are checked on random problems.

Where a law does not hold for a subject, a table says why, and some problem shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

Law = Callable[[Any, torch.Generator], None]  # of a problem; raises AssertionError where it does not hold
Reasons = Mapping[str, Mapping[str, str]]  # by law and subject
few_examples = settings(max_examples=max(1, settings.default.max_examples // 3))  # type: ignore[union-attr]


@dataclass(frozen=True)
class Laws:
    """Laws and the subjects that they are for."""

    subjects: Collection[str]
    problem: Callable[[str, torch.Generator, int], Any]  # of a subject, with so many samples
    laws: Mapping[str, Law]
    broken: Reasons  # laws that do not hold
    no_argument: Reasons  # laws that speak of something that the subject does not have

    def check(self, name: str, seed: int, rows: int) -> None:
        """The laws of a subject, each on the problem of this seed."""
        for law in self.laws:
            if name not in {**self.broken.get(law, {}), **self.no_argument.get(law, {})}:
                self._apply(law, name, seed, rows)

    def _apply(self, law: str, name: str, seed: int, rows: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.laws[law](self.problem(name, random, rows), random)

    @property
    def exceptions(self) -> list[tuple[str, str]]:
        """Each broken law with a subject for which it does not hold."""
        return [(law, name) for law, reasons in self.broken.items() for name in reasons]

    def is_broken(self, law: str, name: str, rows: int) -> bool:
        """Whether one of five problems breaks the law."""
        return not all(self._holds(law, name, seed, rows) for seed in range(5))

    def _holds(self, law: str, name: str, seed: int, rows: int) -> bool:
        try:
            self._apply(law, name, seed, rows)
        except AssertionError:
            return False
        return True

    def check_names(self) -> None:
        """Every exception is one of a known law and a known subject."""
        for reasons in (self.broken, self.no_argument):
            assert set(reasons) <= set(self.laws)
            assert {name for names in reasons.values() for name in names} <= set(self.subjects)


def by_name(*laws: Law) -> dict[str, Law]:
    return {law.__name__: law for law in laws}


def counts_and_target(random: torch.Generator, classes: int, rows: int) -> tuple[list[int], Tensor]:
    """Even class counts, and labels (N,). Class 0 is the rarest, the first and the last sample are of one class."""
    counts = [4, *(2 * torch.randint(10, 500, (classes - 1,), generator=random)).tolist()]
    target = torch.randint(classes, (rows,), generator=random)
    target[-1] = target[0]
    return counts, target


def number(random: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=random))


def unused(random: torch.Generator, classes: int, used: Collection[int]) -> int:
    """A class that is not in use, and not the rarest."""
    others = [label for label in range(1, classes) if label not in used]
    return others[number(random, len(others))]
