"""The table of methods: a row for each, whose numbers are those of the recipes, of published.py and of the result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.accuracy import METHODS as ROWS
from gclkern.training.recipes import METHODS, RETRAINS, plan


def test_every_method_has_a_formula_and_a_row_of_accuracies() -> None:
    assert set(METHODS) <= methods.FORMULAS.keys()
    assert set(RETRAINS) - {"none"} == methods.RETRAIN_FORMULAS.keys()
    assert set(methods._ACCURACY.values()) <= ROWS.keys()
    assert not any("|" in formula for formula in [*methods.FORMULAS.values(), *methods.RETRAIN_FORMULAS.values()]), "it would end a cell of the table"


@pytest.mark.parametrize(("name", "place"), [("bbn", 0), ("oltr", 1), ("dro-lt", 1), ("hybrid-sc", 0)])
def test_a_step_of_every_kind_is_measured(name: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second batch, attention on the last map, centroids, and views."""
    monkeypatch.setattr(methods, "BATCH", 4)
    step = methods.measure(methods.phases_of("--method", name)[place], rounds=1)
    assert step["parameters"] > 463_504
    assert step["relative"] > 0.0
    assert (step["more_in_training"] > 0) is (name in ("hybrid-sc", "dro-lt"))  # its projection, its epsilon


def test_the_table(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "accuracy").mkdir()
    step = {"parameters": 470_004, "more_in_training": 128, "relative": 1.234}
    (tmp_path / "methods" / "steps.json").write_text(json.dumps({"steps": {"--method bbn": [step], "--method oltr": [step, {**step, "parameters": 500_000}]}}))
    result = {"data": "cifar100-lt", "imbalance": 100.0, "method": "bbn", "epochs_scale": 1, "phases": [{"name": "stage-1"}]}
    for seed, top1 in enumerate((0.40, 0.42)):
        (tmp_path / "accuracy" / f"{seed}.json").write_text(json.dumps({**result, "seed": seed, "reports": {"stage-1": {"top1": top1}}}))
    header, lines = methods.table(tmp_path)
    assert all(len(line) == len(header) for line in lines)
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    bbn = rows["`--method bbn`"]
    assert (bbn["CIFAR-100-LT, published"], bbn["CIFAR-100-LT, reached"], bbn["CIFAR-10-LT, reached"]) == ("42.56", "41.00", "")
    assert (bbn["parameters"], bbn["step / cross entropy"]) == ("470,004 (+128)", "1.23")
    assert rows["`--method oltr`"]["parameters"] == "470,004 then 500,000 (+128)"
    assert bbn["settings on CIFAR-100-LT"] == "200 epochs, batch 128, lr 0.1 steps, wd 0.0002"
    assert rows["`--method balanced-softmax`"]["CIFAR-100-LT, published"] == "49.35†"
    assert (rows["`--method la`"]["CIFAR-100-LT, published"], rows["`--retrain post-hoc-la`"]["CIFAR-10-LT, published"]) == ("44.06‡", "77.32‡")
    assert rows["`--retrain tau-norm`"]["settings on CIFAR-100-LT"] == "no training"
    assert rows["`--retrain gcl`"]["CIFAR-10-LT, published"] == "82.68"
    assert len(plan("oltr", None, "cifar100-lt", methods.COUNTS)) == rows["`--method oltr`"]["settings on CIFAR-100-LT"].count("epochs")
