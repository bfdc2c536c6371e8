"""What a run of train.py leaves in its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
