"""A run of train.py, killed again and again at random moments and resumed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import Run, start_train, train
from tests.support.run_files import outcome


def _is_writing(folder: Path, since: float) -> bool:
    """Whether a file has been begun that does not have its name yet; a run that was killed leaves such files, too, but older ones."""
    try:
        return any(file.stat().st_mtime > since for file in folder.glob("*.partial"))
    except FileNotFoundError:
        return False


def differences(place: Path, kills: int, arguments: list[object]) -> Iterator[str]:
    """A line for each run that ends otherwise than one left alone. Runs follow one another until so many kills have met one.

    Every other kill waits for the next write, to come in the middle of it.
    """
    Run(print).finish()  # so that the time of the next run is without that of starting the server
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
            begun = time.time()
            run = start_train(*(["--resume", folder] if (folder / "last.pt").exists() else [*arguments, "--out", folder]))
            if kills > 0:
                run.wait(dice.uniform(0.0, duration))
                while kills % 2 and run.is_running and not _is_writing(folder, begun):
                    time.sleep(0.0005)
            killed = kills > 0 and run.kill()
            kills -= killed
        try:
            run.finish()
        except AssertionError as error:
            yield f"{folder}: {error}"
        else:
            if outcome(folder) != expected:
                yield f"{folder}: it leaves other files"
