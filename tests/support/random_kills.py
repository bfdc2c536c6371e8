"""A run of train.py, killed again and again at random moments and resumed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import start_train, train
from tests.support.run_files import outcome


def differences(place: Path, kills: int, arguments: list[object]) -> Iterator[str]:
    """A line for each run that ends otherwise than one left alone. Runs follow one another until so many kills have met one."""
    started = time.monotonic()
    train(*arguments, "--out", place / "alone")
    duration = time.monotonic() - started
    expected = outcome(place / "alone")
    dice = random.Random(0)
    number = 0
    while kills > 0:
        number += 1
        folder, killed = place / str(number), True
        while killed:
            run = start_train(*(["--resume", folder] if (folder / "last.pt").exists() else [*arguments, "--out", folder]))
            killed = kills > 0 and run.kill(dice.uniform(0.0, 0.6 * duration))
            kills -= killed
        try:
            run.finish()
        except AssertionError as error:
            yield f"{folder}: {error}"
        else:
            if outcome(folder) != expected:
                yield f"{folder}: it leaves other files"
