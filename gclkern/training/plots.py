"""The pictures of a run: curves, accuracy by class, confusion between groups and classes, the worst errors, and embeddings by t-SNE."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gclkern.training.atomic_files import replace_file
from gclkern.training.evaluation import Report
from gclkern.training.extras import need
from gclkern.training.printable import printable

# The palette of Okabe and Ito, which is safe for colour blindness, without its yellow, which is hardly visible on white; each has a marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.5)))
_GREY = "#777777"
_TITLES = {
    "top1": "top-1", "balanced": "mean of classes", "many": "many-shot", "medium": "medium-shot", "few": "few-shot", "holdout": "held-out", "ece": "ECE",
    "loss": "training loss\n(the method's own)", "nll": "test NLL",
}  # fmt: skip
# The panels of the curves, and the words in the names of their columns. Accuracies and calibration errors are in [0, 1] and shown in percent.
_PANELS = {
    "loss": ("loss", "nll"),
    "accuracy, %": ("top1", "acc", "balanced", "many", "medium", "few", "holdout"),
    "calibration error, %": ("ece",),
    "learning rate": ("lr", "learning_rate"),
}
_BASELINE = "baseline"  # the phase whose curves are drawn over those of the others
_MOST_CLASSES = 30  # of a confusion matrix; beyond it only the most confused pairs are shown
_MOST_PAIRS, _ENOUGH_PAIRS = 20, 5
_MOST_LINES, _MOST_DOTS = 50, 200  # classes up to which their accuracies are joined by lines, and drawn as dots
_MOST_ERRORS = 24
# With more points t-SNE takes minutes, and points hide each other.
_MOST_POINTS = 2000
FEWEST_POINTS = 5  # scikit-learn's t-SNE has no valid perplexity for fewer


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, row after row, drawn without a display."""
    figure = need("matplotlib.figure", "a picture").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg", "a picture").FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(path), lambda file: figure.savefig(file, dpi=130, format=Path(path).suffix[1:] or "png"))


@cache
def _font() -> Any:
    """The font that names are drawn with."""
    manager = need("matplotlib.font_manager", "a picture")
    return manager.get_font(manager.findfont(manager.FontProperties()))


def shown_name(label: int, names: Sequence[str] | None, *, length: int = 24) -> str:
    """A class name for matplotlib: shortened in the middle, as names of classes often share a beginning.

    It is escaped where matplotlib would read `$` as a formula or hide a label that starts with `_`.
    A name with characters that the font does not have, which would be drawn as boxes, is replaced by the class number.
    """
    if names is None:
        return str(label)
    name = printable(names[label])
    if not all(_font().get_char_index(ord(letter)) for letter in name):
        return f"class {label}"
    name = name if len(name) <= length else f"{name[: length // 2]}…{name[-(length - length // 2 - 1) :]}"
    return f" {name}" if name.startswith("_") else name.replace("$", r"\$")


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _panel(column: str) -> str | None:
    """The panel of a column of the metrics; None for one that is not drawn."""
    lower = column.lower()
    if lower in _PANELS["learning rate"]:
        return "learning rate"
    return next((panel for panel, words in list(_PANELS.items())[:3] if any(word in lower for word in words)), None)


def plot_curves(history_csv: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """The numeric columns of a metrics file over the epochs, in one panel each for losses, accuracies, calibration errors and learning rates.

    Phases, which the column `phase` names, follow each other with a line between them and a common count of epochs. The baseline, which has as many epochs as
    all of them, is drawn over them in dashes.

    Raises:
        ValueError: the file has no rows, or no column that belongs to a panel.
    """
    with Path(history_csv).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{history_csv} has no rows yet")
    runs = {
        "method": [row for row in rows if row.get("phase") != _BASELINE],
        _BASELINE: [row for row in rows if row.get("phase") == _BASELINE],
    }
    if not runs["method"]:
        runs = {"method": rows, _BASELINE: []}
    columns = {name: [_number(row.get(name)) for row in rows] for name in rows[0] if name and _panel(name)}
    columns = {
        name: values for name, values in columns.items() if np.isfinite(values).any() and not (name == "balanced" and _same(values, columns.get("top1")))
    }
    panels = [(panel, names) for panel in _PANELS if (names := [name for name in columns if _panel(name) == panel])]
    if not panels:
        raise ValueError(f"{history_csv} has no column of a loss, an accuracy or a learning rate")
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(runs["method"])) if a.get("phase") != b.get("phase")), len(runs["method"])]
    crowded = min(end - start for start, end in pairwise(starts)) < len(runs["method"]) / 5  # the names of short phases would overlap: use two rows
    figure, axes = _figure(12, 3.9 * -(-len(panels) // 2), 2 if len(panels) > 1 else 1, -(-len(panels) // 2))
    for axis, (panel, names) in zip(axes, panels, strict=False):
        for place, name in enumerate(names):
            for run, run_rows in runs.items():
                values = np.array([_number(row.get(name)) for row in run_rows]) * (100 if panel.endswith("%") else 1)
                for start, end in pairwise(starts if run == "method" else [0, len(run_rows)]):
                    known = start + np.flatnonzero(np.isfinite(values[start:end]))
                    axis.plot(
                        known + 1, values[known], color=_COLOURS[place % len(_COLOURS)], linewidth=1.5, markersize=4, marker=_MARKERS[place],
                        markevery=max(1, len(known) // 8), linestyle="-" if run == "method" else _DASHES[1], alpha=1 if run == "method" else 0.65,
                        label=_TITLES.get(name, name) if run == "method" and start == 0 else None,
                    )  # fmt: skip
        for place, (start, end) in enumerate(pairwise(starts)):
            if start:
                axis.axvline(start + 0.5, color=_GREY, linewidth=0.8, linestyle=":")
            height = 1.01 + 0.06 * (place % 2) * crowded
            name = runs["method"][start].get("phase") or ""
            axis.text((start + end + 1) / 2, height, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", color=_GREY, fontsize=8)
        if runs[_BASELINE] and panel != "learning rate":
            axis.plot([], [], color=_GREY, linestyle=_DASHES[1], label=_BASELINE)
        axis.set(xlabel="epoch" if len(starts) == 2 else "epoch, over all phases", ylabel=panel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if panel == "learning rate":
            axis.set_yscale("log")
        else:  # beside the axes, since lines may run anywhere
            axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def _same(values: Sequence[float], others: Sequence[float] | None) -> bool:
    """Whether two columns of shares are the same to the eye, so that one of them is enough."""
    return others is not None and np.allclose(values, others, rtol=0, atol=0.01, equal_nan=True)


def plot_class_accuracy(
    reports: Mapping[str, Report], class_counts: Sequence[int], path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None
) -> None:
    """The accuracy of every class, from the most frequent to the rarest, above its number of training images; up to 20 classes by number or name.

    Raises:
        ValueError: a report of another number of classes.
    """
    order = sorted(range(len(class_counts)), key=lambda c: -class_counts[c])
    figure, (axis, counts) = _figure(9, 5.4, rows=2, sharex=True, height_ratios=(3, 1.2))
    places = np.arange(len(order))
    sorted_counts = [class_counts[c] for c in order]
    counts.fill_between(places, sorted_counts, 0.7 * min(sorted_counts), step="mid", color=_GREY, alpha=0.3, linewidth=0)
    counts.step(places, sorted_counts, where="mid", color=_GREY, linewidth=1.2)
    counts.set(yscale="log", ylabel="training images")
    locator = need("matplotlib.ticker", "a picture")
    counts.yaxis.set_major_locator(locator.LogLocator(subs=(1, 2, 5), numticks=8))
    counts.yaxis.set_major_formatter(locator.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    counts.yaxis.set_minor_locator(locator.NullLocator())
    counts.grid(axis="y", linewidth=0.4, alpha=0.5)
    reach = len(order) // 20
    for place, (name, report) in enumerate(reports.items()):
        # line styles differ, so that a line stays visible under a later one
        style: dict[str, Any] = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _DASHES[place % 3], "marker": _MARKERS[place % len(_MARKERS)]}
        if len(report.per_class) != len(order):
            raise ValueError(f"the report of {name} has {len(report.per_class)} classes, but there are {len(order)} class counts")
        shares = 100 * np.array([report.per_class[c] for c in order], dtype=float)  # None, of a report out of a file, becomes NaN
        if len(order) <= _MOST_LINES:
            axis.plot(places, shares, markersize=5, linewidth=1.4, label=name, **style)
        else:
            # with this many classes, single points are too scattered to read: draw them faintly or not at all, and a running mean as a line
            if len(order) <= _MOST_DOTS:
                axis.plot(places, shares, color=style["color"], marker=".", markersize=3, linestyle="none", alpha=0.25)
            axis.plot(places, _running_mean(shares, reach), markersize=5, markevery=max(1, len(order) // 10), linewidth=1.8, label=name, **style)
    dots = "dots: classes, " if len(order) <= _MOST_DOTS else ""
    shown = "" if len(order) <= _MOST_LINES else f" ({dots}lines: means of {2 * reach + 1} neighbours)"
    axis.set(ylabel="accuracy, %", ylim=(-3, 103))
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    counts.set(xlabel=f"class, from the most frequent to the rarest{shown}", xlim=(-0.5, len(order) - 0.5))
    if len(order) <= 20:
        counts.set_xticks(places, [shown_name(c, class_names, length=16) for c in order])
        if class_names is not None and max(map(len, class_names)) > 4:
            counts.tick_params("x", rotation=40)
            for tick in counts.get_xticklabels():
                tick.set_horizontalalignment("right")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def _running_mean(values: npt.NDArray[Any], reach: int) -> npt.NDArray[Any]:
    """The mean of the values at most `reach` places away, NaN left out."""
    known = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    sums = np.convolve(np.where(known, values, 0), window, mode="same")
    return sums / np.maximum(np.convolve(known.astype(float), window, mode="same"), 1)


def plot_group_confusion(predictions: Tensor, labels: Tensor, groups: Mapping[str, Sequence[int]], path: str | os.PathLike[str], *, name: str = "") -> None:
    """The percentages of each group's samples that are predicted right, as another class of the group, and as a class of each other group."""
    names = list(groups)
    group_of = torch.full((1 + max(int(predictions.max()), int(labels.max()), *(c for classes in groups.values() for c in classes)),), -1)
    for place, classes in enumerate(groups.values()):
        group_of[list(classes)] = place
    predictions, labels = predictions.cpu(), labels.cpu()
    table = np.full((len(names), len(names) + 1), np.nan)
    for row in range(len(names)):
        of_group = group_of[labels] == row
        total = int(of_group.sum())
        if total:
            right = predictions[of_group] == labels[of_group]
            guessed = group_of[predictions[of_group]][~right]
            table[row] = [100 * float(right.sum()) / total, *(100 * float((guessed == column).sum()) / total for column in range(len(names)))]
    figure, (axis,) = _figure(1.6 + 1.3 * (len(names) + 1), 1.2 + 0.9 * len(names))
    _draw_table(axis, table, "{:.1f}")
    axis.set_xticks(range(len(names) + 1), ["the right\nclass", *(f"a wrong one\nof {group}" for group in names)])
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="prediction", ylabel="true group")
    axis.set_title(f"{name}: % of the samples of each group".removeprefix(": "), fontsize=10)
    _save(figure, path)


def _draw_table(axis: Any, table: npt.NDArray[Any], form: str | None, *, zeros: bool = True, fontsize: float = 10) -> None:
    """Percentages as shades of blue, and as numbers where there is a format for them; with or without those that are 0."""
    axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in np.ndindex(table.shape):
        share = table[row, column]
        if form is not None and (zeros or share != 0):
            text = "-" if np.isnan(share) else form.format(share)
            axis.text(column, row, text, ha="center", va="center", color="white" if share > 55 else "black", fontsize=fontsize)


def plot_class_confusion(
    predictions: Tensor, labels: Tensor, class_counts: Sequence[int], path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None, name: str = ""
) -> None:
    """The most confused pairs of classes and, for up to 30 classes, the confusion matrix in percent of the true class.

    Classes are ordered from the most frequent to the rarest, with their numbers of training images. Pairs are ranked by the share of the true class, because
    by the number of errors frequent classes would hide rare ones; equal shares are ranked by the number of errors, then rare classes first. Pairs with a
    single error come last, and are left out if there are enough others.
    """
    classes = len(class_counts)
    predictions, labels = predictions.cpu(), labels.cpu()
    totals = labels.bincount(minlength=classes)
    keys, errors = (labels * classes + predictions)[predictions != labels].unique(return_counts=True)
    if (errors > 1).sum() >= _ENOUGH_PAIRS:
        keys, errors = keys[errors > 1], errors[errors > 1]
    true, predicted = keys // classes, keys % classes
    shares = 100 * errors / totals[true]
    ranks = [(int(error) == 1, -float(share), -int(error), class_counts[int(t)]) for error, share, t in zip(errors, shares, true, strict=True)]
    worst = sorted(range(keys.numel()), key=ranks.__getitem__)[:_MOST_PAIRS]
    whole = classes <= _MOST_CLASSES
    side = min(9.0, 2.5 + 0.38 * classes)
    figure, axes = _figure(side + 6 if whole else 8, max(side, 1.5 + 0.27 * len(worst)) if whole else 6.5, 2 if whole else 1)
    if whole:
        order = sorted(range(classes), key=lambda c: -class_counts[c])
        matrix = torch.zeros(classes, classes, dtype=torch.float64).index_put_((labels, predictions), torch.ones(len(labels), dtype=torch.float64), True)
        table = (100 * matrix / totals[:, None])[order][:, order].numpy()
        _draw_table(axes[0], table, "{:.0f}" if classes <= 20 else None, zeros=False, fontsize=min(10, 120 / classes))
        ticks = [shown_name(c, class_names, length=16) for c in order]
        axes[0].set_xticks(range(classes), ticks, rotation=90 if max(map(len, ticks)) > 2 else 0, fontsize=8)
        axes[0].set_yticks(range(classes), [f"{title} ({class_counts[c]})" for title, c in zip(ticks, order, strict=True)], fontsize=8)
        axes[0].set(xlabel="prediction", ylabel="true class (training images)")
        axes[0].set_title("% of the images of each class", fontsize=10)
    bars = axes[-1]
    bars.barh(range(len(worst)), [float(shares[i]) for i in worst], color=_COLOURS[0], alpha=0.75, height=0.75)
    pairs = [f"{shown_name(int(true[i]), class_names)} ({class_counts[int(true[i])]})  →  {shown_name(int(predicted[i]), class_names)}" for i in worst]
    bars.set_yticks(range(len(worst)), pairs, fontsize=8)
    for place, i in enumerate(worst):
        bars.text(float(shares[i]), place, f" {int(errors[i])} of {int(totals[true[i]])}", va="center", fontsize=8, color=_GREY)
    bars.set(ylim=(max(len(worst), 8) - 0.4, -0.6))  # a few bars would be as thick as the picture
    bars.set(xlabel="% of the images of the true class", xlim=(0, 1.15 * max((float(shares[i]) for i in worst), default=1)))
    # Long class names leave the bars little room; the title then stands above the names, too.
    bars.set_title("most confused: true class (training images) → prediction" if worst else "no errors", fontsize=10, loc="right")
    if name:
        figure.suptitle(name, fontsize=11)
    _save(figure, path)


def worst_errors(logits: Tensor, labels: Tensor) -> list[int]:
    """Indices of the wrongly predicted samples with the highest confidence, at most 24, the most confident first."""
    confidence, predicted = logits.float().softmax(1).max(1)
    wrong = (predicted.cpu() != labels.cpu()).nonzero().flatten()
    return wrong[confidence.cpu()[wrong].nan_to_num(0).argsort(descending=True, stable=True)][:_MOST_ERRORS].tolist()


def plot_worst_errors(
    images: Tensor, logits: Tensor, labels: Tensor, path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None, name: str = ""
) -> None:
    """A sheet of wrongly predicted images (K, C, H, W), values in [0, 1], each with its prediction, the probability of it and the true class."""
    confidence, predicted = logits.float().softmax(1).max(1)
    columns = min(6, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure, axes = _figure(1.9 * columns, 2.3 * rows + 0.5, columns, rows)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, sure, guess, label in zip(axes, images, confidence.tolist(), predicted.tolist(), labels.tolist(), strict=False):
        pixels = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        axis.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{shown_name(guess, class_names, length=18)} ({100 * sure:.0f}%)\ntrue: {shown_name(label, class_names, length=18)}", fontsize=8)
    what = "the most confident errors, with their probabilities" if len(images) else "no errors"
    figure.suptitle(f"{name}; {what}".removeprefix("; "), fontsize=10)
    _save(figure, path)


def plot_tsne(
    embeddings: Mapping[str, Tensor], labels: Tensor, path: str | os.PathLike[str], *, class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """t-SNE of embeddings (M, D) of the same samples by several methods, side by side, coloured by class (as in GCL, CVPR 2022, Figure 3).

    Embeddings are normalised to unit length, as in a cosine classifier. At most 2,000 samples are shown, and at most ten classes, from the most frequent to the
    rarest. `class_counts` are training samples; without them classes are ordered by number. Embeddings that are not finite, or nearly all the same, are
    reported instead of drawn, because scikit-learn's t-SNE can crash the process on them.

    Raises:
        ValueError: embeddings of another number of samples, or fewer samples than FEWEST_POINTS.
    """
    tsne = need("sklearn.manifold", "the picture of embeddings").TSNE
    # Its threads synchronise so often that on a busy machine they mostly wait for each other.
    one_thread = need("threadpoolctl", "the picture of embeddings").threadpool_limits
    labels = labels.cpu()
    classes = labels.unique()
    if class_counts is not None:
        classes = classes[torch.tensor(class_counts)[classes].sort(descending=True, stable=True).indices]
    if classes.numel() > 10:
        classes = classes[torch.linspace(0, classes.numel() - 1, 10).round().long()]
    kept = torch.isin(labels, classes).nonzero().flatten()
    if kept.numel() > _MOST_POINTS:
        kept = kept[torch.linspace(0, kept.numel() - 1, _MOST_POINTS).long()]
    if kept.numel() < FEWEST_POINTS:
        raise ValueError(f"t-SNE needs at least {FEWEST_POINTS} samples, got {kept.numel()}")
    # scikit-learn's default of 30, less for few samples
    perplexity = min(30.0, (kept.numel() - 1) / 3)
    figure, axes = _figure(4.8 * len(embeddings) + 0.8, 4.6, len(embeddings))
    for axis, (name, features) in zip(axes, embeddings.items(), strict=True):
        if features.shape[0] != labels.numel():
            raise ValueError(f"the embeddings of {name} are of {features.shape[0]} samples, but there are {labels.numel()} labels")
        axis.set(title=name, xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="#cccccc")
        directions = torch.nn.functional.normalize(features.detach().float().cpu()[kept])
        flaw = _flaw(directions)
        points = np.full((kept.numel(), 2), np.nan)
        if flaw:
            axis.text(0.5, 0.5, flaw, transform=axis.transAxes, ha="center", va="center", color=_GREY)
        else:
            with one_thread(1):
                points = tsne(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(directions.numpy())
        for place, label in enumerate(classes.tolist()):
            chosen = (labels[kept] == label).numpy()
            axis.scatter(*points[chosen].T, s=11, color=_COLOURS[place % len(_COLOURS)], marker=_MARKERS[place], linewidth=0, alpha=0.8)
    titles = [shown_name(c, class_names) + ("" if class_counts is None else f" ({class_counts[c]})") for c in classes.tolist()]
    title = "class" if class_counts is None else "class (training images)"
    figure.legend(axes[0].collections, titles, loc="outside right center", frameon=False, title=title, markerscale=2)
    _save(figure, path)


def _flaw(directions: Tensor) -> str:
    """Why directions (M, D) cannot be drawn; empty if they can."""
    if not directions.isfinite().all():
        return "features that are not finite"
    distinct = directions.mul(1e4).round().unique(dim=0).shape[0]
    return "features that are all the same" if distinct < FEWEST_POINTS else ""
