"""The recipes of docs/frameworks.md run; those for several processes as two, whose samplers deal out an epoch as one process would see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gclkern.samplers import CBENSampler
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
CODE, SECTION = (re.compile(pattern, re.MULTILINE | re.DOTALL) for pattern in (r"^```python\n(.*?)^```", r"^## (.*?)\n(.*?)(?=^## |\Z)"))
SECTIONS = {title: CODE.findall(text) for title, text in SECTION.findall(PAGE)}
SHARED = "".join(SECTIONS.pop("What all share"))
LABELS, EPOCHS, BATCH = [0] * 40 + [1] * 16 + [2] * 8, 2, 8  # of the page, and batches of each process

# Between what all recipes share and a recipe: the data set writes down which images are read.
RECORD = """
import json, os, sys
torch.manual_seed(0)
seen = []
class Recorded(torch.utils.data.Dataset):
    def __len__(self):
        return len(labels)
    def __getitem__(self, index):
        seen.append(index)
        return images[index], torch.tensor(labels[index])
dataset = Recorded()
"""
# After a recipe: each process says what it has read and what came of the weights. It ends without Python's shutdown, in which a thread of gloo that still
# holds a tensor aborts the process: DistributedDataParallel keeps the process group and its threads alive.
REPORT = """
full = [getattr(parameter.detach(), "full_tensor", parameter.detach)() for parameter in model.parameters()] if "fully_shard" not in globals() else []
with open(os.path.join(sys.argv[1], os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), "w") as file:
    json.dump({"seen": seen, "weights": [float(part.double().sum()) for part in full]}, file)
os._exit(0)
"""


def start(title: str, folder: Path, processes: int) -> list[dict[str, list[float]]]:
    """What the processes of a recipe report."""
    script = folder / "script.py"
    script.write_text(SHARED + RECORD + "".join(SECTIONS[title]) + REPORT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, str(script), str(folder)], env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(processes)]


def test_every_recipe_is_tested() -> None:
    assert set(SECTIONS) == {"A plain loop", "timm", "torch.compile", *SEVERAL}


def run(title: str) -> dict[str, Any]:
    """The variables that a recipe for one process leaves."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(SHARED + "".join(SECTIONS[title]), names)
    return names


def trained(model: torch.nn.Module) -> bool:
    """Whether the loss has reached every weight."""
    gradients = [parameter.grad for parameter in model.parameters()]
    return all(gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)


def test_plain_loop() -> None:
    names = run("A plain loop")
    assert trained(names["model"])


def test_timm() -> None:
    pytest.importorskip("timm")
    names = run("timm")
    names["loss"].backward()
    assert trained(names["network"].classifier)


@pytest.mark.slow  # the compiler of torch takes half a minute
def test_torch_compile() -> None:
    names = run("torch.compile")
    assert trained(names["model"])


SEVERAL = {"Lightning": "lightning", "Hugging Face Trainer": "transformers", "Accelerate": "accelerate", "DistributedDataParallel": "torch", "FSDP2": "torch"}


@pytest.mark.slow  # processes that import large libraries
@pytest.mark.parametrize(("title", "library"), SEVERAL.items(), ids=SEVERAL)
def test_two_processes(title: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    first, second = start(title, tmp_path, 2)
    assert first["weights"] == second["weights"]
    sampler, order = CBENSampler(LABELS), []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order += list(sampler)
    assert len(first["seen"]) == len(second["seen"]) == len(order) // 2
    for place in range(0, len(first["seen"]), BATCH):  # both see in a step what one process would see
        assert sorted(first["seen"][place : place + BATCH] + second["seen"][place : place + BATCH]) == sorted(order[2 * place : 2 * (place + BATCH)])
