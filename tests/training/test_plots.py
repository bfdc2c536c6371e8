"""Every picture is drawn, and shows what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from gclkern.training import plots
from gclkern.training.evaluation import Report

GROUPS = {"many": [0], "medium": [1], "few": [2]}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, to look into."""
    saved: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_curves_by_kind_and_phase(figures: list[Any], tmp_path: Path) -> None:
    history = tmp_path / "metrics.csv"
    history.write_text("phase,epoch,lr,loss,top1,few\nstage 1,0,.1,2.5,,\nstage 1,1,.1,2.0,0.5,\nstage 2,0,.01,1.5,0.75,0.25\n")
    plots.plot_curves(history, tmp_path / "new" / "curves.png")
    assert drawn(tmp_path / "new" / "curves.png")
    rate, loss, percent = figures[0].axes
    assert [axis.get_ylabel() for axis in (rate, loss, percent)] == ["learning rate", "loss", "accuracy and calibration error, %"]
    lines = {(line.get_label(), *line.get_xdata()): list(line.get_ydata()) for line in percent.lines if line.get_linestyle() == "-"}
    assert lines[("top-1", 2)] == [50]
    assert [75] in lines.values(), "the second phase is a line of its own"
    assert [text.get_text() for text in loss.texts] == ["stage 1", "stage 2"]


@pytest.mark.parametrize(("text", "message"), [("epoch,loss\n", "no rows"), ("epoch,colour\n1,2\n", "no column")])
def test_curves_of_an_empty_file(text: str, message: str, tmp_path: Path) -> None:
    history = tmp_path / "metrics.csv"
    history.write_text(text)
    with pytest.raises(ValueError, match=message):
        plots.plot_curves(history, tmp_path / "curves.png")


@pytest.mark.parametrize("classes", [3, 60])
def test_accuracy_by_class(classes: int, figures: list[Any], tmp_path: Path) -> None:
    counts = [int(c) for c in np.random.default_rng(0).integers(1, 500, classes)]
    shares = [count / 500 for count in counts]
    shares[0] = float("nan")
    plots.plot_class_accuracy(
        {"a": Report(**Report(0.5, {}, shares, 0, 0).as_dict()), "b": Report(0.5, {}, [0.5] * classes, 0, 0)}, counts, tmp_path / "class.png"
    )
    assert drawn(tmp_path / "class.png")
    points = np.array(figures[0].axes[0].lines[0].get_ydata())
    assert np.all(np.diff(points[np.isfinite(points)]) <= 0), "the most frequent class comes first"
    assert len({line.get_linestyle() for line in figures[0].axes[0].lines if line.get_label()[0] != "_"}) == 2, "one line does not hide the other"
    names = [f"class {c}" for c in range(classes)]
    plots.plot_class_accuracy({"a": Report(0.5, {}, shares, 0, 0)}, counts, tmp_path / "class.png", class_names=names)
    shown = [text.get_text() for text in figures[1].axes[0].get_xticklabels()]
    assert (shown == [f"class {c}" for c in sorted(range(classes), key=lambda c: -counts[c])]) is (classes <= 20)
    with pytest.raises(ValueError, match="report of a has 60 classes" if classes == 60 else "report of a has 3 classes"):
        plots.plot_class_accuracy({"a": Report(0.5, {}, shares, 0, 0)}, [1, 2], tmp_path / "class.png")


def test_confusion_of_groups(figures: list[Any], tmp_path: Path) -> None:
    predictions, labels = torch.tensor([0, 0, 0, 2, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    plots.plot_group_confusion(predictions, labels, GROUPS, tmp_path / "confusion.png")
    assert drawn(tmp_path / "confusion.png")
    texts = np.array([text.get_text() for text in figures[0].axes[0].texts]).reshape(3, 4)
    assert texts.tolist() == [["100.0", "0.0", "0.0", "0.0"], ["0.0", "50.0", "0.0", "50.0"], ["0.0", "50.0", "50.0", "0.0"]]


def test_tsne_of_two_methods(figures: list[Any], tmp_path: Path) -> None:
    labels = torch.arange(60) % 12
    embeddings = {name: torch.nn.functional.one_hot(labels, 12) + 0.1 * torch.randn(60, 12) for name in ("cross-entropy", "GCL")}
    plots.plot_tsne(embeddings, labels, tmp_path / "tsne.png")
    assert drawn(tmp_path / "tsne.png")
    assert [axis.get_title() for axis in figures[0].axes] == ["cross-entropy", "GCL"]
    assert len(figures[0].axes[0].collections) == 10, "ten of the twelve classes"
    counts = [5, *range(11, 0, -1)]
    plots.plot_tsne(embeddings, labels, tmp_path / "tsne.png", class_counts=counts, class_names=[f"class number {c} of them all" for c in range(12)])
    texts = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert texts[0] == "class number 1 of them … (11)", "the most frequent class comes first"
    assert texts[-1] == "class number 11 of them… (1)"
    with pytest.raises(ValueError, match="of 59 samples, but there are 60 labels"):
        plots.plot_tsne({"a": torch.zeros(59, 2)}, labels, tmp_path / "tsne.png")
    with pytest.raises(ValueError, match="at least 5 samples"):
        plots.plot_tsne({"a": torch.zeros(3, 2)}, torch.zeros(3), tmp_path / "tsne.png")
