"""Checkpoints: written atomically, checked when read, and never executed.

A checkpoint is a file of ``torch.save`` that holds only containers, numbers, strings and tensors. It is written under another name, flushed to disk and
renamed, so that the file of the final name is always complete, even if the process is killed: either the new checkpoint or the previous one. A digest over all
values detects damaged files.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from gclkern.training.atomic_files import replace_file
from gclkern.training.data import DataIdentity, DataSplits, EvaluationTransform, class_difference, data_difference
from gclkern.training.printable import printable

_FORMAT = "gclkern.training.checkpoint"
_VERSION = 2  # of the keys of Checkpoint


class Checkpoint(TypedDict):
    """Everything in a checkpoint of train.py. The network can be used without its data set; a run in progress has the last five keys, too."""

    kind: Literal["network", "training"]
    name: str  # of the phase, such as "stage-1"
    config: dict[str, Any]  # of RunConfig
    network: dict[str, Tensor]  # its state_dict, with the scale of its logits
    model: str  # of the backbone
    head: str  # kind of classifier
    in_channels: int
    image_size: int
    transform: EvaluationTransform
    temperature: float | None  # divides the logits; None where none was fitted
    groups: dict[str, list[int]]  # "many", "medium", "few": class indices
    data: DataIdentity  # class names, counts and digests of the data set

    progress: NotRequired[dict[str, Any]]  # of Progress
    trainer: NotRequired[dict[str, Any]]  # of Trainer; the averaged network is its "average"
    history: NotRequired[list[dict[str, Any]]]  # of RunFolder, as the next two
    reports: NotRequired[dict[str, dict[str, Any]]]
    seconds: NotRequired[float]


class CheckpointError(RuntimeError):
    """A file that cannot be read as a checkpoint of this version; the message says why and what to do."""


def _plain(value: object, place: str) -> Any:
    """`value` with the types that loading accepts: subclasses of Python's types become those types. Tensors are not copied."""
    if isinstance(value, dict):
        items = {_plain(key, f"a key of {place}"): _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
        if not isinstance(value, OrderedDict):
            return items
        ordered = OrderedDict(items)
        ordered.__dict__.update(_plain(vars(value), place))  # a state_dict keeps the versions of its modules there
        return ordered
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(item, f"{place}[{index}]") for index, item in enumerate(value))
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta:  # type: ignore[attr-defined]
        return value.detach().resolve_conj().resolve_neg()  # type: ignore[attr-defined]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a checkpoint holds dicts, lists, tuples, numbers, strings, None and dense tensors, but {place} is a {type(value).__name__}")


def _update(digest: Any, value: Any) -> None:
    """Hash every value with its type and position, so that different states have different digests."""
    if isinstance(value, dict):
        digest.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


def _digest(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    _update(digest, state)
    return digest.hexdigest()


def save_checkpoint(path: Path | str, state: Mapping[str, Any]) -> None:
    """Write `state` atomically: `path` is always a complete checkpoint, the new one or the previous one.

    Args:
        path: the file; its folder must exist.
        state: dicts, lists, tuples, numbers, strings, None and tensors. Subclasses, such as numpy's float64 or named tuples, become the plain types.

    Raises:
        TypeError: `state` holds a value of another type; the message says where.
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.pt"
        >>> save_checkpoint(path, {"epoch": 3, "weight": torch.ones(2)})
        >>> load_checkpoint(path)["epoch"]
        3
    """
    plain = _plain(state, "it")
    content = {"format": _FORMAT, "version": _VERSION, "digest": _digest(plain), "state": plain}

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # how torch's writer reports a failed write
                raise error.__context__ from None
            raise

    replace_file(Path(path), write)


def load_checkpoint(path: Path | str, *, map_location: torch.device | str = "cpu") -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote; no code from the file runs.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, of another program or of another version.
    """
    path = Path(path)
    shown = printable(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {shown}; give the folder of a run, or a checkpoint in it such as stage-1.pt")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # an unpickler raises many kinds of errors on invalid files
        raise CheckpointError(f"{shown} cannot be read as a checkpoint: it is truncated, damaged or holds more than plain data; use another one") from error
    match content:
        case {"format": str(written), "version": int(version), "digest": str(digest), "state": dict(state)} if written == _FORMAT:
            pass
        case _:
            raise CheckpointError(f"{shown} is not a checkpoint of gclkern's train.py; give a file that it wrote, such as last.pt in the folder of a run")
    if version != _VERSION:
        raise CheckpointError(f"{shown} is of version {version} of the checkpoint format, this gclkern reads version {_VERSION}; use the one that wrote it")
    try:
        intact = digest == _digest(state)
    except Exception:  # values that are never saved, such as sparse tensors and lists that hold themselves
        intact = False
    if not intact:
        raise CheckpointError(f"{shown} is damaged: its values do not match its digest; use another checkpoint")
    return cast("Checkpoint", state)


def last_checkpoint(path: Path) -> Path:
    """The checkpoint that a run continues from; `path` is its folder or the checkpoint itself.

    Raises:
        FileNotFoundError: there is none; the message says what to do.
    """
    last = path / "last.pt" if path.is_dir() else path
    if last.is_file():
        return last
    if (path / "summary.json").exists():
        raise FileNotFoundError(f"{printable(str(path))} has finished without training; there is nothing to continue")
    if (path / "config.json").exists():
        raise FileNotFoundError(f"{printable(str(path))} ended before its first checkpoint; start it again with --out {printable(str(path))}")
    raise FileNotFoundError(f"there is no checkpoint at {printable(str(last))}; give the folder of a run or its last.pt")


def final_checkpoint(folder: Path) -> Path:
    """The checkpoint of the last stage of a finished run.

    Raises:
        FileNotFoundError: the run has not finished; the message names its checkpoints.
    """
    summary = folder / "summary.json"
    if not summary.exists():
        inside = ", ".join(sorted(entry.name for entry in folder.glob("*.pt")))
        remedy = f"give a checkpoint in it (here: {inside})" if inside else "it holds no checkpoint either; give the folder of another run"
        raise FileNotFoundError(f"{folder} is a folder without a finished run; {remedy}")
    return folder / f"{json.loads(summary.read_text())['phases'][-1]['name']}.pt"


def check_same_classes(checkpoint: Checkpoint, data: DataSplits) -> None:
    """Check that the data has the classes of the network.

    Raises:
        CheckpointError: the classes differ; the message says how.
    """
    if difference := class_difference(checkpoint["data"], data.identity):
        raise CheckpointError(f"{difference}; evaluate the network on its own classes")


def check_same_data(checkpoint: Checkpoint, data: DataSplits) -> None:
    """Check that the data is that of the run. Its files may have moved.

    Raises:
        CheckpointError: the data differs; the message says how.
    """
    if difference := data_difference(checkpoint["data"], data.identity):
        raise CheckpointError(f"{difference}; continue with the data of the run, or start a new run")
