"""A run of train.py, crashed at every moment at which its files change, and resumed from each.

One run is recorded: before and after each open, rename, removal and flush below its folder, and in the middle of what a flush stores, a copy of the folder is
kept, which is what a crash at this moment would leave. Then a run goes on from each copy, and must leave the same files as the one that nothing disturbed, bit
by bit. It is also checked that a file is flushed before it gets its name and the folder afterwards, so that a loss of power leaves one of these copies, too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Run, train, train_here
from tests.support.run_files import contents, outcome


class Recorder:
    """Copies of a folder at every change in it, which Python's audit events announce."""

    def __init__(self, folder: Path, states: Path) -> None:
        self.folder, self.states = folder, states
        self.seen: set[str] = set()
        self.flushed: set[str] = set()
        self.faults: list[str] = []
        self.renamed: str | None = None  # a file whose new name is not yet flushed
        self.active = True

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and self.folder in (Path(path), *Path(path).parents)

    def keep(self, label: str, shortened: Path | None = None, size: int = 0) -> None:
        """A copy of the folder, in which one file may end early."""
        self.active = False
        if self.folder.exists():
            files = contents(self.folder)
            if shortened is not None:
                files[shortened.name] = files[shortened.name][:size]
            key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
            if key not in self.seen:
                self.seen.add(key)
                state = self.states / f"{len(self.seen):03d} {label}"
                state.mkdir(parents=True)
                for name, content in files.items():
                    (state / name).write_bytes(content)
        self.active = True

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and self.inside(arguments[0]):
            path, mode, flags = arguments
            if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR):
                if self.renamed:
                    self.faults.append(f"the name of {self.renamed} is not flushed before {Path(path).name} is opened")
                self.flushed.discard(str(path))
                self.keep(f"before {Path(path).name} is opened")
        elif event == "os.rename" and self.inside(arguments[0]):
            if str(arguments[0]) not in self.flushed:
                self.faults.append(f"{Path(arguments[0]).name} is renamed before it is flushed")
            self.renamed = Path(arguments[1]).name
            self.keep(f"before {self.renamed} gets its name")
        elif event in ("os.remove", "os.mkdir", "os.truncate") and self.inside(arguments[0]):
            self.keep(f"before {event} of {Path(arguments[0]).name}")

    def fsync(self, descriptor: int, flush: Callable[[int], None] = os.fsync) -> None:
        """In the place of the system's."""
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.folder:
            self.keep(f"before the name of {self.renamed} is flushed")
            self.renamed = None
        elif self.inside(path):
            size = path.stat().st_size
            for share in (0, size // 2, size - 1):
                self.keep(f"{path.name} has {share} of {size} bytes", path, share)
            self.keep(f"before {path.name} is flushed")
            self.flushed.add(str(path))
        flush(descriptor)


def record(folder: Path, states: Path, arguments: list[object]) -> None:
    """A run whose first rank keeps the states."""
    if os.environ.get("RANK", "0") != "0":
        train_here(*arguments, "--out", folder)
        return
    recorder = Recorder(folder, states)
    sys.addaudithook(recorder.audit)
    os.fsync = recorder.fsync  # type: ignore[assignment]
    train_here(*arguments, "--out", folder)
    recorder.keep("at the end")
    recorder.active = False
    assert not recorder.faults, recorder.faults


def go_on(folder: Path, arguments: list[object]) -> None:
    """Resume, or start again where there is nothing to resume, as the error says."""
    if (folder / "last.pt").exists():
        train_here("--resume", folder)
        return
    with pytest.raises(SystemExit, match=r"ended before its first checkpoint|there is no checkpoint at"):
        train_here("--resume", folder)
    train_here(*arguments, "--out", folder)


def differences(place: Path, ranks: int, every: int, arguments: list[object]) -> Iterator[str]:
    """A line for each of every N-th state from which a run goes on to another end."""
    if ranks == 1:
        train(*arguments, "--out", place / "alone")
    Run(record, place / "recorded", place / "states", arguments, ranks=ranks).finish()
    expected = outcome(place / "recorded")
    if ranks == 1 and outcome(place / "alone") != expected:
        yield "the recorded run differs from one that is not recorded"
    for state in sorted((place / "states").iterdir())[::every]:
        folder = place / "resumed" / state.name.partition(" ")[0]
        shutil.copytree(state, folder)
        try:
            Run(go_on, folder, arguments, ranks=ranks).finish()
        except AssertionError as error:
            yield f"{state.name}: {error}"
        else:
            if (found := outcome(folder)) != expected:
                yield f"{state.name}: {sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))} differ"
        shutil.rmtree(folder)
