"""The benchmark of the defaults for images of one's own: its runs, the calibration by one temperature and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import train
from benchmarks.own_images import CLASSES, COMPARED, IMBALANCE, LARGEST, OwnRun, one_temperature, table
from gclkern.training.data.longtail import profile_counts
from gclkern.training.recipes import plan_run


def test_methods_differ_in_nothing_but_the_loss() -> None:
    counts = profile_counts(CLASSES, LARGEST, IMBALANCE)
    assert sum(counts) == 2757
    settings = set()
    for method in COMPARED:
        config = train.parse_arguments([*OwnRun("folder", IMBALANCE, method, 1, 1.0, (), 24, 32).arguments, "--data-dir", "pictures"]).config
        first = plan_run(config, counts, 1)[0]
        settings.add((first.epochs, first.batch_size, first.lr, first.weight_decay, first.schedule, first.mixup, first.sampler))
    assert len(settings) == 1 and next(iter(settings))[0] == 24


def test_one_temperature() -> None:
    """Logits that are five times too large: the right temperature brings back their calibration."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 4, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    found = one_temperature(5 * logits, labels)
    assert abs(found["nll"] - float(F.cross_entropy(logits, labels))) < 0.02  # a fifth of the standard error of 2000 samples
    assert found["ece"] < 0.04  # chance alone gives 15 bins of 1000 samples about 0.025


def test_table(tmp_path: Path) -> None:
    def result(seed: int, top1: float) -> dict[str, Any]:
        report = {"top1": top1, "groups": {"many": 0.5, "medium": 0.25, "few": 0.125}, "ece": 0.1, "nll": 2.0}
        calibrated = {"ece": 0.03, "nll": 1.5}
        return {"pixels": 16, "epochs": 24, "method": "gcl", "seed": seed, "reports": {"stage-1": report, "stage-2": report},
                "calibrated": {"stage-1": calibrated, "stage-2": calibrated}}  # fmt: skip

    for seed, top1 in enumerate((0.25, 0.35)):
        (tmp_path / f"{seed}.json").write_text(json.dumps(result(seed, top1)))
    *_, first, second = table(tmp_path).splitlines()
    assert first == "| 16 | 24 | GCL, stage 1 | 2 | 30.0 ± 7.1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 | 10.0 ± 0.0 | 3.0 ± 0.0 | 2.00 ± 0.00 | 1.50 ± 0.00 |"
    assert "| GCL | 2 |" in second
