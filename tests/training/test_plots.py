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
    loss, percent, rate, _empty = figures[0].axes
    assert [axis.get_ylabel() for axis in (loss, percent, rate)] == ["loss", "accuracy, %", "learning rate"]
    lines = {(line.get_label(), *line.get_xdata()): list(line.get_ydata()) for line in percent.lines if line.get_linestyle() == "-"}
    assert lines[("top-1", 2)] == [50]
    assert [75] in lines.values(), "the second phase is a line of its own"
    assert [text.get_text() for text in loss.texts] == ["stage 1", "stage 2"]


def test_the_baseline_lies_over_the_method_and_calibration_has_an_axis_of_its_own(figures: list[Any], tmp_path: Path) -> None:
    history = tmp_path / "metrics.csv"
    history.write_text(
        "phase,epoch,top1,balanced,ece\nbaseline,1,0.5,0.5,0.1\nbaseline,2,0.6,0.6,0.2\nbaseline,3,0.7,0.7,0.2\n"
        "stage-1,1,0.6,0.605,0.3\nstage-1,2,0.8,0.8,0.3\nstage-2,1,0.9,0.9,0.1\n"
    )
    plots.plot_curves(history, tmp_path / "curves.png")
    accuracy, calibration = figures[0].axes
    assert [axis.get_ylabel() for axis in (accuracy, calibration)] == ["accuracy, %", "calibration error, %"]
    drawn_lines = [(list(line.get_xdata()), np.round(line.get_ydata()).tolist()) for line in accuracy.lines if len(line.get_xdata())]
    assert ([1, 2, 3], [50, 60, 70]) in drawn_lines, "the baseline counts its own epochs"
    assert ([1, 2], [60, 80]) in drawn_lines
    assert ([3], [90]) in drawn_lines
    shown = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert shown == ["top-1", "baseline"], "the mean of classes is nearly the same on a balanced test set"


@pytest.mark.parametrize(("text", "message"), [("epoch,loss\n", "no rows"), ("epoch,colour\n1,2\n", "no column")])
def test_curves_of_an_empty_file(text: str, message: str, tmp_path: Path) -> None:
    history = tmp_path / "metrics.csv"
    history.write_text(text)
    with pytest.raises(ValueError, match=message):
        plots.plot_curves(history, tmp_path / "curves.png")


@pytest.mark.parametrize("classes", [3, 200, 201])
def test_accuracy_by_class(classes: int, figures: list[Any], tmp_path: Path) -> None:
    counts = [int(c) for c in np.random.default_rng(0).integers(1, 500, classes)]
    shares = [count / 500 for count in counts]
    shares[0] = float("nan")
    plots.plot_class_accuracy(
        {"a": Report.from_dict(Report(0.5, {}, shares, 0, 0).as_dict()), "b": Report(0.5, {}, [0.5] * classes, 0, 0)}, counts, tmp_path / "class.png"
    )
    assert drawn(tmp_path / "class.png")
    points = np.array(figures[0].axes[0].lines[0].get_ydata())
    assert np.all(np.diff(points[np.isfinite(points)]) <= 0), "the most frequent class comes first"
    dots = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "None"]
    assert len(dots) == (2 if classes == 200 else 0), "a line through few classes, no dots of very many"
    assert ("dots: classes" in figures[0].axes[1].get_xlabel()) is bool(dots)
    assert len({line.get_linestyle() for line in figures[0].axes[0].lines if line.get_label()[0] != "_"}) == 2, "one line does not hide the other"
    names = [f"class {c}" for c in range(classes)]
    plots.plot_class_accuracy({"a": Report(0.5, {}, shares, 0, 0)}, counts, tmp_path / "class.png", class_names=names)
    shown = [text.get_text() for text in figures[1].axes[1].get_xticklabels()]
    assert (shown == [f"class {c}" for c in sorted(range(classes), key=lambda c: -counts[c])]) is (classes <= 20)
    with pytest.raises(ValueError, match=f"report of a has {classes} classes"):
        plots.plot_class_accuracy({"a": Report(0.5, {}, shares, 0, 0)}, [1, 2], tmp_path / "class.png")


def test_confusion_of_groups(figures: list[Any], tmp_path: Path) -> None:
    predictions, labels = torch.tensor([0, 0, 0, 2, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    plots.plot_group_confusion(predictions, labels, GROUPS, tmp_path / "confusion.png")
    assert drawn(tmp_path / "confusion.png")
    texts = np.array([text.get_text() for text in figures[0].axes[0].texts]).reshape(3, 4)
    assert texts.tolist() == [["100.0", "0.0", "0.0", "0.0"], ["0.0", "50.0", "0.0", "50.0"], ["0.0", "50.0", "50.0", "0.0"]]


def test_confusion_of_classes(figures: list[Any], tmp_path: Path) -> None:
    counts, names = [50, 5, 20], ["cat", "dog", "owl"]
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 5)
    predictions = labels.clone()
    predictions[:3], predictions[10:12], predictions[14] = 2, 0, 1
    plots.plot_class_confusion(predictions, labels, counts, tmp_path / "confusion.png", class_names=names)
    matrix, pairs = figures[0].axes
    assert [text.get_text() for text in matrix.get_yticklabels()] == ["cat (50)", "owl (20)", "dog (5)"], "from the most frequent to the rarest"
    assert [text.get_text() for text in matrix.texts] == ["70", "30", "80", "20", "50", "50"]
    assert [text.get_text() for text in pairs.get_yticklabels()] == ["dog (5)  →  cat", "cat (50)  →  owl", "owl (20)  →  dog"]
    assert [text.get_text().strip() for text in pairs.texts] == ["2 of 4", "3 of 10", "1 of 5"], "single errors come last"
    assert max(bar.get_height() for bar in pairs.patches) < 0.2 * np.ptp(pairs.get_ylim()), "few bars are not as thick as the picture"
    plots.plot_class_confusion(labels, labels, counts, tmp_path / "confusion.png")
    assert figures[1].axes[1].get_title("right") == "no errors"  # above the names, too, if these leave the bars little room


def test_confusion_of_many_classes_is_a_list(figures: list[Any], tmp_path: Path) -> None:
    labels = torch.arange(1000).repeat_interleave(3)
    plots.plot_class_confusion((labels // 7) * 7, labels, [9] * 1000, tmp_path / "confusion.png")
    (pairs,) = figures[0].axes
    assert len(pairs.patches) == 20
    assert drawn(tmp_path / "confusion.png")
    predictions = labels.clone()
    predictions[:15:3] += 1
    predictions[1:15:3] += 1
    predictions[30:60:3] += 1
    plots.plot_class_confusion(predictions, labels, [9] * 1000, tmp_path / "confusion.png")
    assert len(figures[1].axes[0].patches) == 5, "single errors are left out where there are enough others"


def test_the_worst_errors(figures: list[Any], tmp_path: Path) -> None:
    logits = torch.tensor([[5.0, 0], [0, 1], [0, 3], [float("nan"), 0], [2, 0]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    worst = plots.worst_errors(logits, labels)
    assert worst[:3] == [2, 4, 1]
    worst = worst[:3]
    plots.plot_worst_errors(torch.rand(3, 1, 8, 8), logits[worst], labels[worst], tmp_path / "worst.png", class_names=["cat", "dog"])
    assert [axis.get_title() for axis in figures[0].axes] == ["dog (95%)\ntrue: cat", "cat (88%)\ntrue: dog", "dog (73%)\ntrue: cat"]
    plots.plot_worst_errors(torch.rand(0, 3, 8, 8), logits[:0], labels[:0], tmp_path / "worst.png")
    assert drawn(tmp_path / "worst.png")


ODD_NAMES = ["$a_$", "b\nc", "\udcff", "_d", "猫", "x" * 250 + "y" * 250, "100% \\frac{", "e, f"]


@pytest.mark.filterwarnings("error")
def test_class_names_may_be_anything(figures: list[Any], tmp_path: Path) -> None:
    count = len(ODD_NAMES)
    labels = torch.arange(count).repeat_interleave(4)
    logits = 9.0 * torch.nn.functional.one_hot((labels + (torch.arange(4 * count) % 2)) % count, count)
    report = Report(0.5, {}, [0.5] * count, 0, 0)
    counts = list(range(count, 0, -1))
    plots.plot_class_accuracy({"a": report}, counts, tmp_path / "a.png", class_names=ODD_NAMES)
    plots.plot_class_confusion(logits.argmax(1), labels, counts, tmp_path / "b.png", class_names=ODD_NAMES)
    plots.plot_worst_errors(torch.rand(4 * count, 3, 4, 4), logits, labels, tmp_path / "c.png", class_names=ODD_NAMES)
    plots.plot_tsne({"a": logits + torch.rand(4 * count, count)}, labels, tmp_path / "d.png", class_names=ODD_NAMES)
    expected = [r"\$a_\$", r"b\nc", r"\udcff", " _d", "class 4", "x" * 8 + "…" + "y" * 7, r"100% \frac{", "e, f"]
    assert [text.get_text() for text in figures[0].axes[1].get_xticklabels()] == expected
    assert len(figures[3].legends[0].get_texts()) == count, "an underscore in front hides no class"


@pytest.mark.parametrize("features", [torch.ones(60, 8), torch.zeros(60, 8), torch.full((60, 8), float("nan")), 1 + 1e-7 * torch.randn(60, 8)])
def test_features_without_structure_are_not_given_to_tsne(features: torch.Tensor, figures: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can end the process on them."""
    monkeypatch.setattr("sklearn.manifold.TSNE", None)
    plots.plot_tsne({"a": features}, torch.arange(60) % 3, tmp_path / "tsne.png")
    assert figures[0].axes[0].texts[0].get_text() in ("features that are all the same", "features that are not finite")
    assert drawn(tmp_path / "tsne.png")


def test_tsne_of_two_methods(figures: list[Any], tmp_path: Path) -> None:
    labels = torch.arange(60) % 12
    embeddings = {name: torch.nn.functional.one_hot(labels, 12) + 0.1 * torch.randn(60, 12) for name in ("cross-entropy", "GCL")}
    plots.plot_tsne(embeddings, labels, tmp_path / "tsne.png")
    assert drawn(tmp_path / "tsne.png")
    assert [axis.get_title() for axis in figures[0].axes] == ["cross-entropy", "GCL"]
    assert len(figures[0].axes[0].collections) == 10, "ten of the twelve classes"
    counts = [5, *range(11, 0, -1)]
    plots.plot_tsne(embeddings, labels, tmp_path / "tsne.png", class_counts=counts, class_names=[f"class that has the number {c}" for c in range(12)])
    texts = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert texts[0] == "class that h…he number 1 (11)", "the most frequent class comes first"
    assert texts[-1] == "class that h…e number 11 (1)"
    with pytest.raises(ValueError, match="of 59 samples, but there are 60 labels"):
        plots.plot_tsne({"a": torch.zeros(59, 2)}, labels, tmp_path / "tsne.png")
    with pytest.raises(ValueError, match="at least 5 samples"):
        plots.plot_tsne({"a": torch.zeros(3, 2)}, torch.zeros(3), tmp_path / "tsne.png")
