"""What a type checker finds in a user's program."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gclkern
from gclkern.distributed import ShardedLinearGCLLoss, gather_batch, sharded_dro_lt_loss, sharded_linear_gcl_cross_entropy

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wrong_uses_are_type_errors_and_right_ones_are_not(tmp_path: Path) -> None:
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "mypy", *options, "tests/typing/uses.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "build",
    [
        *(lambda loss=loss: loss([5, 2], noize_mul=1.0) for loss in (gclkern.GCLLoss, gclkern.LinearGCLLoss, ShardedLinearGCLLoss)),
        *(lambda loss=loss: loss([5, 2], noize_mul=1.0) for loss in (gclkern.LDAMLoss, gclkern.LogitAdjustedLoss, gclkern.DROLTLoss)),
        *(lambda loss=loss: loss([5, 2], noize_mul=1.0) for loss in (gclkern.AGCLLoss, gclkern.DBMLoss, gclkern.LabelAwareSmoothingLoss)),
        *(lambda loss=loss: loss(noize_mul=1.0) for loss in (gclkern.CosFaceLoss, gclkern.FocalLoss, gclkern.ArcFaceLoss)),
        *(lambda loss=loss: loss(noize_mul=1.0) for loss in (gclkern.SupConLoss, gclkern.BalancedContrastiveLoss, gclkern.PrototypicalContrastiveLoss)),
        lambda: gclkern.ProCoLoss([5, 2], 16, noize_mul=1.0),  # type: ignore[call-arg]
    ],
)
def test_a_misspelt_keyword_is_named(build: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="'noize_mul'"):
        build()


FUNCTIONS = [gclkern.cloud_sizes, gclkern.cloud_noise, *(getattr(gclkern.functional, name) for name in gclkern.functional.__all__), sharded_dro_lt_loss]
LOSSES: list[type] = [
    gclkern.GCLLoss, gclkern.LinearGCLLoss, gclkern.LDAMLoss, gclkern.LogitAdjustedLoss, gclkern.CosFaceLoss, gclkern.FocalLoss, gclkern.SupConLoss,
    gclkern.BalancedContrastiveLoss, gclkern.PrototypicalContrastiveLoss, gclkern.ProCoLoss, gclkern.LabelAwareSmoothingLoss, gclkern.ArcFaceLoss,
    gclkern.AGCLLoss, gclkern.DBMLoss, gclkern.MemoryLoss,
]  # fmt: skip


@pytest.mark.parametrize("function", [*FUNCTIONS, gather_batch, sharded_linear_gcl_cross_entropy, *LOSSES, gclkern.DROLTLoss, ShardedLinearGCLLoss])
def test_annotations_can_be_evaluated(function: Any) -> None:
    """Programs that build objects from configuration files evaluate annotations, so every name in them must exist at run time."""
    assert "return" in typing.get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
