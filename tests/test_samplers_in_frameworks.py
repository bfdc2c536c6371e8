"""The samplers under frameworks that deal out data themselves, in two processes: together the ranks see every sample of an epoch once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gclkern.samplers import InstanceBalancedSampler
from tests.support.processes import ROOT

SAMPLES, BATCH = 48, 4
pytestmark = pytest.mark.slow  # both frameworks take long to import

COMMON = f"""
import json, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from gclkern.samplers import InstanceBalancedSampler

DATA = TensorDataset(torch.arange({SAMPLES}))
LABELS = [index % 3 for index in range({SAMPLES})]

def report(epochs):
    with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
        json.dump(epochs, file)
"""

ACCELERATE = f"""
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
sampler = InstanceBalancedSampler(LABELS, seed=5, num_replicas=1, rank=0)
loader = accelerator.prepare(DataLoader(DATA, batch_size={BATCH}, sampler=sampler))
epochs = []
for epoch in range(2):
    loader.set_epoch(epoch)
    epochs.append([index for (batch,) in loader for index in batch.tolist()])
report(epochs)
"""

LIGHTNING = f"""
import lightning

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += batch[0].tolist()
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

# built before Lightning starts the process group
loader = DataLoader(DATA, batch_size={BATCH}, sampler=InstanceBalancedSampler(LABELS, seed=5))
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    default_root_dir=sys.argv[1],
)
model = Model()
trainer.fit(model, loader)
report(model.epochs)
"""


@pytest.mark.parametrize(("framework", "program"), [("accelerate", ACCELERATE), ("lightning", LIGHTNING)])
def test_two_ranks_see_every_sample_once(framework: str, program: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    script = tmp_path / "script.py"
    script.write_text(COMMON + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for epoch, (first, second) in enumerate(zip(*ranks, strict=True)):
        sampler = InstanceBalancedSampler([index % 3 for index in range(SAMPLES)], seed=5)
        sampler.set_epoch(epoch)
        assert sorted(first + second) == list(range(SAMPLES))
        assert len(first) == len(second)
        # what the ranks see between two steps is what one process would, in some order
        order = list(sampler)
        for start in range(0, len(first), BATCH):
            assert sorted(first[start : start + BATCH] + second[start : start + BATCH]) == sorted(order[2 * start : 2 * (start + BATCH)])
