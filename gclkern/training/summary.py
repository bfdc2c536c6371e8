"""What a run prints and its final results: plan, progress, table, summary.json and pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclkern.training import own_data
from gclkern.training.atomic_files import replace_text
from gclkern.training.batches import steps_of
from gclkern.training.checkpoint import load_checkpoint
from gclkern.training.cross_validation import is_cross_validated
from gclkern.training.data import DataSplits, ImageSet
from gclkern.training.estimate import duration, estimated_seconds, seconds_per_image, step_seconds
from gclkern.training.evaluation import Report, evaluate, format_table, predict, share_interval
from gclkern.training.extras import need
from gclkern.training.network import Network, backbone_name, load_network
from gclkern.training.output import echo
from gclkern.training.printable import printable
from gclkern.training.processes import Processes
from gclkern.training.recipes import Phase, family, plan_run
from gclkern.training.run_folder import RunFolder


def progress_bar(name: str, images: int, done: int, *, show: bool) -> Any:
    """A progress bar over the images of a phase, updated often on a terminal and twice a minute in a log file."""
    bar = need("tqdm", "the progress bar").tqdm
    return bar(total=images, initial=done, desc=name, unit=" img", unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 30.0, disable=not show)


def describe(run: RunFolder, data: DataSplits, phases: Sequence[Phase], network: Network, processes: Processes) -> str:
    """The plan of a run: data, network, the settings of every phase and the time that they will take."""
    groups = ", ".join(f"{len(classes)} {name}-shot" for name, classes in data.groups.items())
    held = "" if data.holdout is None else f", {len(data.holdout)} held out"
    networks = " then ".join(dict.fromkeys(backbone_name(phase, run.config, data) for phase in phases))
    lines = [
        f"{data.name}: {len(data.train)} training images{held}, {len(data.test)} test images",
        f"{data.num_classes} classes of {max(data.class_counts)} to {min(data.class_counts)} training images ({groups})",
        f"{networks} on {processes.device}, results in {run.path}",
    ]
    augmentations: dict[str, list[str]] = {}
    for phase in phases:
        if phase.epochs:
            own = phase.augment or data.train.augment
            augmentations.setdefault(" and ".join([own, *(view or own for view in phase.views)]), []).append(phase.name)
    one = len(augmentations) == 1
    lines += [f"augmentation of training images{'' if one else ' of ' + ' and '.join(names)}: {parts}" for parts, names in augmentations.items()]
    if family(run.config.data) == "own":
        if data.class_names:  # shows at once if the folders are not the classes that were meant
            more = f" and {data.num_classes - 10} more" if data.num_classes > 10 else ""
            lines.insert(2, f"classes: {', '.join(printable(name) for name in data.class_names[:10])}{more}")
        given = {name for name, value in run.config.to_dict().items() if value is not None} | ({"epochs"} if run.config.epochs_scale != 1 else set())
        pretrained = bool(run.config.pretrained)
        given -= {"method"} if run.config.method == own_data.METHOD else set()
        held_out = 0 if data.holdout is None else len(data.holdout)
        lines.append(own_data.reasons(
            run.config.method, data.class_counts, data.image_size, data.train.augment, held_out=held_out, pretrained=pretrained, given=given,
        ))  # fmt: skip
        last = phases[-1]
        if last.name == "stage-2" and last.epochs:
            stage1_lr = own_data.stage1_settings(data.class_counts, pretrained=pretrained).lr if run.config.lr is None else run.config.lr
            new_weights = last.trains != "head" or last.start == "new head"
            lines += filter(None, [own_data.stage2_reasons(last.epochs, last.lr, stage1_lr, new_weights=new_weights, given=given)])
        stage1_epochs = [phase.epochs for phase in phases if phase.name == "stage-1"]  # a resumed run may be past it
        if stage1_epochs and (warning := own_data.short_training(stage1_epochs[0], data.class_counts, pretrained=pretrained)):
            lines.append(warning)
    for phase in phases:
        if not phase.epochs:
            lines.append(f"{phase.title}, which takes no training")
            continue
        steps = steps_of(phase, len(data.train))
        parts = [
            phase.title,
            f"{phase.epochs} epoch{'s' * (phase.epochs != 1)} of {steps} step{'s' * (steps != 1)} ({steps * phase.batch_size:,} images)",
            f"batch {phase.batch_size}",
        ]
        parts += [f"lr {phase.lr:g} {phase.schedule.kind}", f"weight decay {phase.weight_decay:g}", f"{phase.sampler} sampler"]
        parts += [f"second batch by the {phase.second_sampler} sampler"] if phase.second_sampler else []
        parts += [f"mixup {phase.mixup:g}"] if phase.mixup else []
        parts += [] if phase.trains == "all" else [f"trains the {phase.trains.replace('-', ' ').replace('head', 'classifier')}"]
        if phase.drw is not None:
            weighted = round(phase.drw * phase.epochs) + 1
            parts.append(f"class weights from epoch {weighted}" if weighted <= phase.epochs else "too few epochs for class weights")
        parts += [f"{name} {value:g}" if type(value) in (int, float) else f"{name} {value}" for name, value in phase.options.items()]
        lines.append(", ".join(parts))
    per_image = seconds_per_image(network.backbone, (data.channels, data.image_size, data.image_size), processes.device)
    seconds = estimated_seconds(phases, len(data.train), len(data.test), per_image, run.config.eval_every) / processes.world
    if is_cross_validated(data, run.config, processes):  # it trains all phases again on each half, those before a resumed one, too
        seconds += 2 * step_seconds(plan_run(run.config, data.class_counts, processes.world), len(data.train) // 2, per_image)
    lines.append(f"estimated time: {duration(seconds)}, by the speed of the network on a few images; loading images and drawing pictures may add to it")
    return "\n".join(lines)


def conclude(run: RunFolder, data: DataSplits, device: torch.device, phases: Sequence[Phase], *, amp: torch.dtype | None, pictures: bool) -> None:
    """Print the table, write the summary and draw the pictures, from the files of the run: a resumed run has its earlier phases only there."""
    alone = Processes.single(device)
    if data.holdout is not None and (run.path / "best.pt").exists():
        best = load_checkpoint(run.path / "best.pt")
        report = evaluate(load_network(best, device), data.test, data, alone, amp, temperature=best["temperature"])
        run.reports["best on held-out"] = report.as_dict()
    reports = {name: Report.from_dict(report) for name, report in run.reports.items()}
    echo(format_table(list(reports.items())))
    if sentence := interval_sentence(reports, data):
        echo(sentence)
    summary = {
        "reports": run.reports, "phases": [asdict(phase) for phase in phases], "class_names": data.class_names, "class_counts": data.class_counts,
        "groups": data.groups, "config": run.config.to_dict(), "seconds": round(run.seconds, 1),
    }  # fmt: skip
    replace_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if pictures:
        done = [phase for phase in phases if phase.name in reports]
        found = {}
        for phase in (*compared(done), done[-1]):
            checkpoint = load_checkpoint(run.path / f"{phase.name}.pt")
            logits, features = predict(load_network(checkpoint, device), data.test, alone, amp=amp)
            found[phase.name] = logits / (checkpoint["temperature"] or 1.0), features
        draw_pictures(run.path, reports, done, found, data)
    last = reports[phases[-1].name]  # after its last epoch, not the best one
    run.finish({"top1": last.top1, "balanced": last.balanced, "ece": last.ece, "nll": last.nll})
    echo(f"{run.path}: metrics.csv, summary.json, checkpoints" + (", pictures" if pictures else ""))


def interval_sentence(reports: Mapping[str, Report], data: DataSplits) -> str:
    """How uncertain the accuracies of the rarest classes are, because of the number of test images; empty without such classes."""
    counts = data.test.labels.bincount(minlength=data.num_classes)[data.groups.get("few", [])].tolist()
    intervals = [f"{name} {low:.0f} to {high:.0f}" for name, report in reports.items() if "few" in report.groups
                 for low, high in [[100 * end for end in share_interval(report.groups["few"], counts)]]]  # fmt: skip
    if not intervals:
        return ""
    return f"few: 95% intervals of {sum(counts)} test images: {', '.join(intervals)}; seeds of training differ, too"


def compared(phases: Sequence[Phase]) -> list[Phase]:
    """The first and the last phase that train embeddings: re-training the classifier does not change them."""
    own = [phase for phase in phases if phase.trains_backbone or phase.trains == "embedding"] or list(phases)
    return own[:1] + own[1:][-1:]


def draw_pictures(folder: Path, reports: dict[str, Report], phases: Sequence[Phase], found: dict[str, tuple[Tensor, Tensor]], data: DataSplits) -> None:
    """The run's pictures, from the reports of its phases and from (logits over the temperature, features) on the test set."""
    from gclkern.training import plots  # needs packages of the extra `train`

    last, title = phases[-1].name, phases[-1].title
    if (folder / "metrics.csv").exists():  # a re-training without gradients leaves none
        plots.plot_curves(folder / "metrics.csv", folder / "curves.png")
    titles = {phase.name: phase.title for phase in phases}
    titled = {titles.get(name, name): report for name, report in reports.items()}
    plots.plot_class_accuracy(titled, data.class_counts, folder / "class-accuracy.png", class_names=data.class_names)
    logits, labels, names = found[last][0].cpu(), data.test.labels, data.class_names
    plots.plot_group_confusion(logits.argmax(1), labels, data.groups, folder / "group-confusion.png", name=title)
    plots.plot_class_confusion(logits.argmax(1), labels, data.class_counts, folder / "class-confusion.png", class_names=names, name=title)
    worst = plots.worst_errors(logits, labels)
    plots.plot_worst_errors(shown_images(data.test, worst), logits[worst], labels[worst], folder / "worst-errors.png", class_names=names, name=title)
    embeddings = {phase.title: found[phase.name][1].cpu() for phase in compared(phases)}
    if data.test.labels.numel() >= plots.FEWEST_POINTS:
        plots.plot_tsne(embeddings, data.test.labels, folder / "tsne.png", class_counts=data.class_counts, class_names=data.class_names)


def shown_images(images: ImageSet, places: Sequence[int]) -> Tensor:
    """The images at `places` with the transform of evaluation, but values in [0, 1]: (K, C, H, W)."""
    if not places:
        return torch.empty(0, 1, 1, 1)
    transform = images.evaluation_transform()
    mean, std = (torch.tensor(transform[name]).view(-1, 1, 1) for name in ("mean", "std"))
    (batch,) = (batch for batch, _ in images.loader([places], device=torch.device("cpu")))
    return batch * std + mean


def report_columns(report: Report) -> dict[str, float]:
    """A report as columns of the metrics."""
    return {"top1": report.top1, "balanced": report.balanced, **report.groups, "ece": report.ece, "nll": report.nll}
