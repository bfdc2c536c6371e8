"""The pictures of a run: curves, accuracy by class, confusion between groups, and embeddings in the plane."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gclkern.training.evaluation import Report
from gclkern.training.extras import need
from gclkern.training.writing import replace_file

# Colours that people with colour blindness tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_GREY = "#888888"
_TITLES = {"top1": "top-1", "many": "many-shot", "medium": "medium-shot", "few": "few-shot", "ece": "ECE", "holdout": "held-out"}
# t-SNE takes minutes beyond this many points, and more of them hide each other.
_MOST_POINTS = 2000
FEWEST_POINTS = 5  # below it scikit-learn's t-SNE has no perplexity to take


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its row of axes, drawn without a display."""
    figure = need("matplotlib.figure", "a picture").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg", "a picture").FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(path), lambda file: figure.savefig(file, dpi=130, format=Path(path).suffix[1:] or "png"))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def plot_curves(history_csv: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Every numeric column of a metrics file over its epochs: losses, accuracies and calibration (shares in [0, 1], shown in percent), and learning rates.

    The phases that the column `phase` names follow each other, with a line between them, and epochs are counted on over all of them.

    Raises:
        ValueError: the file has no rows.
    """
    with Path(history_csv).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{history_csv} has no rows yet")
    phases = [row.get("phase") or "" for row in rows]
    starts = [0, *(place for place in range(1, len(rows)) if phases[place] != phases[place - 1]), len(rows)]
    numbers = {name: np.array([_number(row.get(name)) for row in rows]) for name in rows[0] if name and name not in ("epoch", "phase", "step")}
    numbers = {name: values for name, values in numbers.items() if np.isfinite(values).any()}
    panels: dict[str, list[str]] = {}
    for name in numbers:
        lower = name.lower()
        if "loss" in lower or "nll" in lower:
            panels.setdefault("loss", []).append(name)
        elif lower in ("lr", "learning_rate"):
            panels.setdefault("learning rate", []).append(name)
        elif any(part in lower for part in ("top1", "acc", "many", "medium", "few", "ece", "holdout")):
            panels.setdefault("accuracy and calibration error, %", []).append(name)
    if not panels:
        raise ValueError(f"{history_csv} has no column of a loss, an accuracy or a learning rate")
    crowded = min(end - start for start, end in pairwise(starts)) < len(rows) / 5  # names of short phases would overlap: two rows of them
    figure, axes = _figure(5 * len(panels), 3.6, len(panels))
    epochs = np.arange(1, len(rows) + 1)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for colour, name in zip(_COLOURS * len(names), names, strict=False):
            marker = "o" if np.isfinite(numbers[name]).sum() < 40 else None
            for start, end in pairwise(starts):
                known = start + np.flatnonzero(np.isfinite(numbers[name][start:end]))
                values = numbers[name][known] * (100 if title.endswith("%") else 1)
                axis.plot(epochs[known], values, color=colour, label=None if start else _TITLES.get(name, name), marker=marker, markersize=3, linewidth=1.4)
        for place, (start, end) in enumerate(pairwise(starts)):
            if start:
                axis.axvline(start + 0.5, color=_GREY, linewidth=0.8, linestyle=":")
            height = 1.01 + 0.05 * (place % 2) * crowded
            axis.text((start + end + 1) / 2, height, phases[start], transform=axis.get_xaxis_transform(), ha="center", va="bottom", color=_GREY, fontsize=8)
        axis.set(xlabel="epoch" if len(starts) == 2 else "epoch, over all phases", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:  # beside the axes, since lines may run anywhere
            axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def plot_class_accuracy(
    reports: Mapping[str, Report], class_counts: Sequence[int], path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None
) -> None:
    """The accuracy of every class, from the most frequent to the rarest, above its number of training samples; up to 20 classes by number or name.

    Raises:
        ValueError: a report of another number of classes.
    """
    order = sorted(range(len(class_counts)), key=lambda c: -class_counts[c])
    figure, (axis,) = _figure(8, 4)
    counts = axis.twinx()
    places = np.arange(len(order))
    counts.bar(places, [class_counts[c] for c in order], width=1, color=_GREY, alpha=0.25, linewidth=0)
    counts.set(yscale="log", ylabel="training samples (grey)")
    counts.spines[["top"]].set_visible(False)
    reach = len(order) // 20
    for place, (name, report) in enumerate(reports.items()):
        # a later line that covers an earlier one lets it show through
        colour, dashes = _COLOURS[place % len(_COLOURS)], ("-", (0, (4, 1.5)), (0, (1, 1.5)))[place % 3]
        if len(report.per_class) != len(order):
            raise ValueError(f"the report of {name} has {len(report.per_class)} classes, but there are {len(order)} class counts")
        shares = 100 * np.array([report.per_class[c] for c in order], dtype=float)  # None, of a report out of a file, becomes NaN
        if len(order) <= 50:
            axis.plot(places, shares, color=colour, marker="o", markersize=4, linewidth=1.4, linestyle=dashes, label=name)
        else:
            # one point a class would be a cloud: the line is the mean over neighbours, the points stay faint
            axis.plot(places, shares, color=colour, marker=".", markersize=3, linestyle="none", alpha=0.35)
            axis.plot(places, _running_mean(shares, reach), color=colour, linewidth=1.8, linestyle=dashes, label=name)
    shown = "" if len(order) <= 50 else f" (dots: classes, lines: means of {2 * reach + 1} neighbours)"
    axis.set(xlabel=f"class, from the most frequent to the rarest{shown}", ylabel="accuracy, %", ylim=(-3, 103), zorder=counts.get_zorder() + 1)
    axis.patch.set_visible(False)
    if len(order) <= 20:
        axis.set_xticks(places, [_class_title(c, class_names, None) for c in order])
        if class_names is not None:
            axis.tick_params("x", rotation=30)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def _running_mean(values: np.ndarray[Any, Any], reach: int) -> np.ndarray[Any, Any]:
    """The mean of the values at most `reach` places away, NaN left out."""
    known = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    sums = np.convolve(np.where(known, values, 0), window, mode="same")
    return sums / np.maximum(np.convolve(known.astype(float), window, mode="same"), 1)


def plot_group_confusion(predictions: Tensor, labels: Tensor, groups: Mapping[str, Sequence[int]], path: str | os.PathLike[str], *, name: str = "") -> None:
    """For the samples of each group: the shares that are right, wrong but within the group, and taken for another group."""
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
    axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(names) + 1), ["the right\nclass", *(f"a wrong one\nof {group}" for group in names)])
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="prediction", ylabel="true group")
    for row, column in np.ndindex(table.shape):
        share = table[row, column]
        axis.text(column, row, "-" if np.isnan(share) else f"{share:.1f}", ha="center", va="center", color="white" if share > 55 else "black")
    axis.set_title(f"{name}: % of the samples of each group".removeprefix(": "), fontsize=10)
    _save(figure, path)


def plot_tsne(
    embeddings: Mapping[str, Tensor], labels: Tensor, path: str | os.PathLike[str], *, class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Embeddings (M, D) of the same samples by several methods, side by side in the plane by t-SNE, coloured by class (GCL, CVPR 2022, Figure 3).

    Directions are compared, as a cosine classifier does. At most 2,000 samples and, of many classes, ten from the most frequent to the rarest are shown.
    `class_counts` are training samples; without them classes stand in the order of their numbers.

    Raises:
        ValueError: embeddings of another number of samples, or fewer samples than FEWEST_POINTS.
    """
    tsne = need("sklearn.manifold", "the picture of embeddings").TSNE
    # Its threads meet so often that on a busy machine they wait for each other for most of the time.
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
    # more samples a cluster than neighbours: scikit-learn's default of 30, less for few samples
    perplexity = min(30.0, (kept.numel() - 1) / 3)
    figure, axes = _figure(4.8 * len(embeddings) + 0.8, 4.6, len(embeddings))
    colours = need("matplotlib", "a picture").colormaps["tab10"].colors
    for axis, (name, features) in zip(axes, embeddings.items(), strict=True):
        if features.shape[0] != labels.numel():
            raise ValueError(f"the embeddings of {name} are of {features.shape[0]} samples, but there are {labels.numel()} labels")
        directions = torch.nn.functional.normalize(features.detach().float().cpu()[kept])
        with one_thread(1):
            points = tsne(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(directions.numpy())
        for place, label in enumerate(classes.tolist()):
            chosen = (labels[kept] == label).numpy()
            axis.scatter(*points[chosen].T, s=7, color=colours[place], linewidth=0, label=_class_title(label, class_names, class_counts))
        axis.set(title=name, xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="#cccccc")
    title = "class" if class_counts is None else "class (training samples)"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, title=title, markerscale=2.5)
    _save(figure, path)


def _class_title(label: int, names: Sequence[str] | None, counts: Sequence[int] | None) -> str:
    name = str(label) if names is None else names[label]
    short = name if len(name) <= 24 else name[:23] + "…"
    return short if counts is None else f"{short} ({counts[label]})"
