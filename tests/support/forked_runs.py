"""Runs of train.py in forks of a process that has everything imported already, so that one takes a second; and what a run leaves.

Only for a process with one thread: a fork of others may wait forever.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import train
from gclkern.training.checkpoint import _digest, load_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    """The files that decide how a run goes on; not the lock, and not TensorBoard's, which it never reads."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock" and not file.name.startswith("events.")}


def outcome(folder: Path) -> dict[str, str]:
    """What a run leaves, but for its duration."""
    found = {}
    for name, content in contents(folder).items():
        if name.endswith(".pt"):
            found[name] = _digest({key: value for key, value in load_checkpoint(folder / name).items() if key != "seconds"})
        elif name == "summary.json":
            found[name] = json.dumps({key: value for key, value in json.loads(content).items() if key != "seconds"})
        else:
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def fork(function: Callable[[], None], log: Path, environment: dict[str, str] | None = None) -> int:
    """The id of a new process that calls `function` and adds what it prints to a file; it ends with 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ |= environment or {}
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    """That of a fork, waited for; negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_forks(ranks: int, function: Callable[[int], None], log: Path) -> str:
    """Call `function(rank)` in as many forks, which torch.distributed takes for ranks; what they print, if one ends with an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    numbered = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    children = [fork(functools.partial(function, rank), log, environment) for rank, environment in enumerate(numbered)]
    codes = [exit_code(child) for child in children]
    return log.read_text() if any(codes) else ""


def run(*arguments: object) -> None:
    train.main(train.parse_arguments([str(argument) for argument in arguments]))
