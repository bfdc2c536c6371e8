"""A run of train.py, killed again and again at random moments and resumed: python -m tests.support.random_kills FOLDER KILLS ARGUMENT..."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.support.forked_runs import exit_code, fork, outcome, run


def differences(place: Path, kills: int, arguments: list[str]) -> Iterator[str]:
    """A line for each run that ends otherwise than one left alone. Runs follow one another until so many kills have met one."""
    place.mkdir(parents=True)
    run(*arguments, "--out", place / "alone")
    expected = outcome(place / "alone")
    started = time.monotonic()
    if exit_code(fork(lambda: run(*arguments, "--out", place / "again"), place / "again.log")):
        yield (place / "again.log").read_text()
        return
    duration = time.monotonic() - started
    dice = random.Random(0)
    number = 0
    while kills > 0:
        number += 1
        folder, log = place / str(number), place / f"{number}.log"
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            given = ["--resume", folder] if (folder / "last.pt").exists() else [*arguments, "--out", folder]
            child = fork(lambda given=given: run(*given), log)  # type: ignore[misc]
            if kills > 0:
                time.sleep(dice.uniform(0.0, 0.6 * duration))
                os.kill(child, signal.SIGKILL)
            code = exit_code(child)
            kills -= code == -signal.SIGKILL
        if code or outcome(folder) != expected:
            yield f"{folder}: {log.read_text() if code else 'it leaves other files'}"
    print(f"{number} runs", flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kills", type=int)
    args, arguments = parser.parse_known_args()
    torch.set_num_threads(1)
    found = list(differences(args.folder.resolve(), args.kills, arguments))
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
