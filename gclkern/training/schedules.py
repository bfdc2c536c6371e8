"""Learning rate schedules: pure functions of the epoch, so a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The learning rate of an epoch, as a multiple of the base rate.

    Warm-up is linear over the first epochs, (epoch + 1) / warmup or, with `warmup_start`, from that to 1 at epoch `warmup`; then comes the schedule itself,
    which ignores the warm-up:

        constant    1
        cosine      (1 + cos(pi * epoch / epochs)) / 2, which would be 0 after the last epoch
        steps       1 before the first milestone, factors[k] from milestone k on; milestones are shares of all epochs

    Args:
        kind: "constant", "cosine" or "steps".
        warmup: epochs of the warm-up; 0 for none. It takes at most a quarter of the epochs, so that short runs keep the shape of the schedule.
        milestones, factors: of "steps"; 0.8 and 0.9 are epochs 160 and 180 of 200.
        warmup_start: factor of epoch 0; None is 1 / warmup.

    Example:
        >>> mislas = Schedule("steps", warmup=5, milestones=(0.8, 0.9), factors=(0.1, 0.01))
        >>> [round(mislas.rate(0.1, epoch, epochs=200), 6) for epoch in (0, 4, 159, 160, 180)]
        [0.02, 0.1, 0.1, 0.01, 0.001]
    """

    kind: str = "constant"
    warmup: int = 0
    milestones: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    warmup_start: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "steps"):
            raise ValueError(f"the schedule must be 'constant', 'cosine' or 'steps', got {self.kind!r}")
        if len(self.milestones) != len(self.factors) or bool(self.milestones) != (self.kind == "steps"):
            raise ValueError(f"a schedule of steps needs as many factors as milestones, any other none; got {self}")

    def rate(self, base: float, epoch: int, epochs: int) -> float:
        """The learning rate of `epoch`, counted from 0, in a phase of `epochs`."""
        warmup = min(self.warmup, epochs // 4)
        if epoch < warmup:
            if self.warmup_start is not None:
                return base * (self.warmup_start + (1 - self.warmup_start) * epoch / warmup)
            return base * (epoch + 1) / warmup
        if self.kind == "cosine":
            return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
        factor = 1.0
        for milestone, value in zip(self.milestones, self.factors, strict=True):
            if epoch >= round(milestone * epochs):
                factor = value
        return base * factor
