"""Train a long-tailed classifier: by default GCL (CVPR 2022, Algorithm 1) on a long-tailed split of scikit-learn's digits, beside a cross-entropy baseline.

For example:

    python train.py
    python train.py --data cifar100-lt --data-dir data --method gcl --seed 1
    python train.py --resume runs/cifar100-lt-gcl
    python train.py --evaluate runs/cifar100-lt-gcl/stage-2.pt
    torchrun --nproc-per-node 8 train.py --data imagenet-lt --data-dir /images --amp bf16
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gclkern.distributed import ShardError
from gclkern.training.arguments import number
from gclkern.training.atomic_files import WriteError
from gclkern.training.batches import check_phases
from gclkern.training.calibration import held_out_temperature, temperature_of
from gclkern.training.checkpoint import Checkpoint, CheckpointError, check_same_classes, final_checkpoint, last_checkpoint, load_checkpoint
from gclkern.training.config import RunConfig
from gclkern.training.cross_validation import cross_validated_temperatures, is_cross_validated
from gclkern.training.data import DATASETS, CorruptImageError, DataSplits, load_data
from gclkern.training.data.augment import COMBINED, PARTS
from gclkern.training.data.files import WorkerError, worker_problem
from gclkern.training.evaluation import evaluate, evaluate_logits, format_table, predict
from gclkern.training.extras import need
from gclkern.training.loggers import LOGGERS, LoggerError
from gclkern.training.network import Network, load_network, network_checkpoint, prepare, start
from gclkern.training.output import echo, finish_output, save_traceback
from gclkern.training.own_data import HOLDOUT
from gclkern.training.phase_training import PhaseTraining
from gclkern.training.processes import Processes, stop_requests
from gclkern.training.progress import CheckpointTimer
from gclkern.training.recipes import CLOUDS, FUSED, METHODS, RETRAINS, SAMPLERS, Phase, default_method, list_by_family, plan_run
from gclkern.training.retrain import retrain_without_gradients
from gclkern.training.run_folder import RunFolder, new_folder
from gclkern.training.summary import conclude, describe, progress_bar, report_columns
from gclkern.training.trainer import AMP

# Errors whose messages are for the user.
EXPECTED = (ValueError, TypeError, OSError, ImportError, CheckpointError, CorruptImageError, LoggerError, ShardError, WorkerError)


class Arguments(NamedTuple):
    """The parsed command line."""

    config: RunConfig
    out: str | None  # folder of the run
    evaluate: bool  # only print the report of the checkpoint
    checkpoint: Checkpoint | None  # the one that --resume or --evaluate names


class Stopped(Exception):  # noqa: N818 (not an error)
    """A signal has asked the run to stop, and the checkpoint has been written."""


def main(arguments: Arguments) -> None:
    """Load the data, plan the phases, train them one after the other, then write the table and the pictures."""
    config, checkpoint = arguments.config, arguments.checkpoint
    processes = Processes(config.device)
    set_up_torch(config)
    data = load_data(
        config.data, data_dir=config.data_dir, imbalance=config.imbalance, profile=config.profile, holdout=config.holdout, download=config.download,
        image_size=config.image_size or (checkpoint and checkpoint["image_size"]), workers=config.workers, skip_corrupt=config.skip_corrupt,
        train_list=config.train_list, test_list=config.test_list,
    )  # fmt: skip
    if processes.rank == 0:
        report_notes(data)
    if arguments.evaluate:
        assert checkpoint is not None
        evaluate_checkpoint(checkpoint, data, config, processes)
        return
    phases = plan_run(config, data.class_counts, processes.world)
    if config.pictures:
        need("matplotlib", "drawing pictures (or give --no-pictures)")
        need("sklearn", "drawing pictures (or give --no-pictures)")
    phases_to_come, network = start(phases, checkpoint, data, config, processes.device)
    check_phases(phases_to_come, network, data, config, processes)
    if arguments.out or processes.rank > 0:  # only the first process writes
        folder = Path(arguments.out or "runs")
    else:
        folder = new_folder(Path("runs"), f"{config.data}-{config.method}")
    run = RunFolder(folder, config, write=processes.rank == 0, checkpoint=checkpoint)
    if processes.rank == 0:
        echo(as_flags(describe(run, data, phases_to_come, network, processes)))
    try:
        with stop_requests() as requests:
            timer = CheckpointTimer(processes, requests, config.checkpoint_seconds)
            for phase in phases_to_come:
                if phase != phases_to_come[0]:
                    network = prepare(phase, network, data, config, processes.device)
                if not phase.epochs:
                    retrain_without_gradients(phase.trains, network, data, processes, config.tau)
                else:
                    train_phase(phase, network, data, run, processes, timer, checkpoint)
                temperature = held_out_temperature(network, data, processes, AMP[config.amp])
                run.reports[phase.name] = evaluate(network, data.test, data, processes, AMP[config.amp], temperature=temperature).as_dict()
                run.save(f"{phase.name}.pt", network_checkpoint(network, phase, data, config, temperature))
                checkpoint = None
        if is_cross_validated(data, config, processes):
            echo("fitting temperatures by cross-validation: trains again on each half of the training images")
            add_temperatures(run, cross_validated_temperatures(phases, data, config, processes), data, processes)
    except (CorruptImageError, KeyboardInterrupt, RuntimeError, WriteError) as error:
        if (folder / "last.pt").exists():
            error.add_note(f"continue with: python train.py --resume {folder}")
        raise
    except Stopped:
        if processes.rank == 0:
            echo(f"stopped; continue with: python train.py --resume {folder}")
    else:
        if processes.rank == 0:
            conclude(run, data, processes.device, phases, amp=AMP[config.amp], pictures=config.pictures)
    finally:
        run.close()
    processes.close()


def set_up_torch(config: RunConfig) -> None:
    """Set torch's global options."""
    if config.data == "digits-lt":
        torch.set_num_threads(1)  # for images this small, synchronising threads takes longer than the work
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic


def report_notes(data: DataSplits) -> None:
    """Say what is odd about the files, and which images were left out."""
    for note in data.notes:
        echo(as_flags(note))


def evaluate_checkpoint(checkpoint: Checkpoint, data: DataSplits, config: RunConfig, processes: Processes) -> None:
    """Print the report of a checkpoint's network on the test images."""
    check_same_classes(checkpoint, data)
    data.groups = checkpoint["groups"]  # of the images that it was trained with
    network = load_network(checkpoint, processes.device, averaged=True)
    report = evaluate(network, data.test, data, processes, AMP[config.amp], temperature=checkpoint["temperature"])
    if processes.rank == 0:
        echo(format_table([(checkpoint["name"], report)]))
    processes.close()


def train_phase(
    phase: Phase, network: Network, data: DataSplits, run: RunFolder, processes: Processes, timer: CheckpointTimer, checkpoint: Checkpoint | None
) -> None:
    """Train the network in place, from the beginning of the phase or from a checkpoint of it."""
    config, amp = run.config, AMP[run.config.amp]
    training = PhaseTraining(phase, network, data, config, processes, checkpoint)
    progress, eval_network, steps = training.progress, training.trainer.eval_network, training.batches.steps
    done = (progress.epoch * steps + progress.step) * phase.batch_size
    with progress_bar(phase.name, phase.epochs * steps * phase.batch_size, done, show=processes.rank == 0) as bar:
        while progress.epoch < phase.epochs:
            for _ in training.steps():
                bar.update(phase.batch_size)
                if progress.step < steps and (processes.world == 1 or progress.step % 20 == 1) and timer.due():
                    save_progress(training, data, run, stop=timer.stopping)
            loss = float(processes.mean(progress.total)) / steps
            if not math.isfinite(loss):
                rates = phase.overrides("lr") or ["`lr`, which gives this phase another network to start from"]
                remedy = f"a lower {rates[0]}" + ", or without `amp=fp16`" * (config.amp == "fp16")
                raise ValueError(f"{phase.name}: the loss of epoch {progress.epoch + 1} is {loss}; train with {remedy}")
            row: dict[str, Any] = {"phase": phase.name, "epoch": progress.epoch + 1, "lr": training.rate, "loss": loss}
            if (progress.epoch + 1) % (config.eval_every or max(1, phase.epochs // 20)) == 0 or progress.epoch + 1 == phase.epochs:
                row |= report_columns(evaluate(eval_network, data.test, data, processes, amp))
                if data.holdout is not None:
                    logits, _ = predict(eval_network, data.holdout, processes, amp=amp)
                    held_out = evaluate_logits(logits, data.holdout.labels, data.groups, data.num_classes).groups
                    row["holdout"] = sum(held_out.values()) / len(held_out)
                    if row["holdout"] > progress.best:
                        progress.best = row["holdout"]
                        run.save("best.pt", network_checkpoint(eval_network, phase, data, config, temperature_of(logits, data.holdout.labels, data)))
            run.log(row)
            bar.set_postfix(loss=f"{loss:.3f}", **{"top-1": f"{100 * row['top1']:.1f}"} if "top1" in row else {})
            progress.next_epoch()
            if timer.due(phase_ends=progress.epoch == phase.epochs):
                save_progress(training, data, run, stop=timer.stopping)
    training.finish()


def add_temperatures(run: RunFolder, temperatures: Mapping[str, float], data: DataSplits, processes: Processes) -> None:
    """Add the temperature of each phase to its report and its checkpoint."""
    for name, temperature in temperatures.items():
        checkpoint = load_checkpoint(run.path / f"{name}.pt")
        network = load_network(checkpoint, processes.device)
        run.reports[name] = evaluate(network, data.test, data, processes, AMP[run.config.amp], temperature=temperature).as_dict()
        run.save(f"{name}.pt", {**checkpoint, "temperature": temperature})


def save_progress(training: PhaseTraining, data: DataSplits, run: RunFolder, *, stop: bool) -> None:
    """Write last.pt, from which the run can be resumed; with `stop`, raise Stopped."""
    run.save("last.pt", {
        **network_checkpoint(training.network, training.phase, data, run.config), "kind": "training", "trainer": training.trainer.state_dict(),
        "progress": training.progress.state_dict(training.processes), "history": run.history, "reports": run.reports, "seconds": run.seconds,
    })  # fmt: skip
    if stop:
        raise Stopped


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse the command line. With --resume or --evaluate the settings are those of the checkpoint, overridden by the given flags."""
    given = vars(build_parser().parse_args(argv))
    resume, evaluated, out = (given.pop(name, None) for name in ("resume", "evaluate", "out"))
    if given.get("logger") == "none":
        given["logger"] = None
    if resume is None and evaluated is None:
        config, checkpoint = RunConfig(**{"method": default_method(given.get("data", RunConfig.data)), **given}), None
    else:
        path = Path(resume or evaluated)
        checkpoint = load_checkpoint(last_checkpoint(path) if resume else final_checkpoint(path) if path.is_dir() else path)
        if resume and checkpoint["kind"] != "training":
            raise CheckpointError(f"{path} holds a finished network, not a run that can be resumed; give the run's folder or its last.pt")
        config = RunConfig.from_dict(checkpoint["config"])
        config = config.resumed(given) if resume else replace(config, **given)
        out = str(path if path.is_dir() else path.parent)
    config.check_used(given)
    return Arguments(config, out, evaluated is not None, checkpoint)


def build_parser() -> argparse.ArgumentParser:
    """The parser; flags are named after the fields of RunConfig. Flags that are not given are absent from its result, since RunConfig defines the defaults."""
    lists = f"methods (--method):\n{list_by_family(METHODS)}\n\nre-trainings (--retrain):\n{list_by_family(RETRAINS)}"
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, epilog=lists, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )  # fmt: skip
    default = RunConfig()
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=DATASETS, metavar="NAME", help=f"{', '.join(DATASETS)} (default {default.data}, which needs no files)")
    add("--data-dir", metavar="FOLDER", help=f"folder of the data set's files (default {default.data_dir})")
    add("--download", action="store_true", help="fetch CIFAR into --data-dir if it is not there")
    add("--imbalance", type=number(float, 1), metavar="RATIO", help="images of the largest class over the smallest's (default 20 for digits, 100 for CIFAR)")
    add("--profile", choices=("exp", "step"), help=f"class counts of digits and CIFAR: exponential or in one step (default {default.profile})")
    add(
        "--holdout",
        type=number(float, 0, 0.9),
        metavar="SHARE",
        help=f"share of training images held out to fit the temperature and select the best epoch (default {HOLDOUT:g} of your own images, else 0)",
    )
    add("--train-list", metavar="FILE", help="text file with a line `path label` for each training image; labels from 0, paths below --data-dir")
    add("--test-list", metavar="FILE", help="such a file for the test images")
    add("--image-size", type=number(int, 1), metavar="PIXELS", help="height and width of image files (default 224; for your own images their usual size)")
    add("--workers", type=number(int, 0), metavar="N", help="processes that read image files (default as many as cores, at most 4)")
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be read, instead of stopping")
    add = parser.add_argument_group("method", "Defaults are the published settings of the method and the data set; a run prints them.").add_argument
    add("--method", choices=METHODS, metavar="NAME", help=f"see the list below (default {default.method}; {default_method('folder')} for your own images)")
    defaults = ", ".join(name for name, method in METHODS.items() if method.retrain == "gcl")
    again = f"stage 2, which re-trains the classifier, see the list below (default gcl for {defaults}; else none)"
    add("--retrain", choices=RETRAINS, metavar="NAME", help=again)
    add(
        "--stage1",
        metavar="CHECKPOINT",
        help="last checkpoint before stage 2, such as stage-1.pt, of a finished run with the same stage 1; it replaces training it",
    )
    add("--sampler", choices=list(SAMPLERS), help="sampler of stage 2 (default cben for GCL's loss, instance for disalign, else class-balanced or class-aware)")
    layers = "layers that DRO-LT's bound is on, joined by commas: features, or modules of the network such as layer3 (default features)"
    add("--robust-layers", metavar="NAMES", help=layers)
    add("--cloud", choices=list(CLOUDS), help="how GCL's cloud sizes follow from class counts (default log)")
    add("--noise-mul", type=number(float, 0), metavar="FACTOR", help="size of the largest cloud of GCL's loss, in units of cosine, in all stages")
    margins = "margin of the losses of gcl, agcl and arcface, largest margin of ldam, dbm and gcl-ldam-drw, in all stages"
    add("--margin", type=number(float, 0), metavar="SIZE", help=margins)
    add("--scale", type=number(float, 0), metavar="FACTOR", help="factor on the cosines, in losses with clouds or margins and in re-training after them")
    add("--stage1-sampler", choices=list(SAMPLERS), help="sampler of stage 1 (default instance)")
    add("--mixup", type=number(float, 0, 1000), metavar="ALPHA", help="mixup with Beta(ALPHA, ALPHA) in stage 1 and in gcl's stage 2; 0 for none")
    parts = f"{', '.join(PARTS)}, joined by commas, or {', '.join(COMBINED)} (default: depends on the data set)"
    add("--augment", metavar="PARTS", help=f"augmentation of training images: {parts}")
    add("--baseline", action=argparse.BooleanOptionalAction, help="first train a baseline with cross entropy for as many epochs (default: on digits-lt)")
    add("--model", metavar="NAME", help="small-cnn, resnet32, a network of torchvision, such as resnet50, or timm:NAME (default: depends on the data set)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="start from weights trained on ImageNet (default: for most methods on places-lt)")
    part = "part of the backbone that stage 1 trains (default: for most methods on places-lt new-last-block, which has random weights at first; else all)"
    add("--train", choices=("all", "last-block", "new-last-block"), help=part)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), metavar="N", help="epochs of stage 1 (for DRO-LT, of its first phase; later phases are scaled in proportion)")
    scale = f"factor on the published epochs and warm-up; epochs that a flag sets stay as they are (default {default.epochs_scale:g})"
    add("--epochs-scale", type=number(float, 0, 1000), metavar="FACTOR", help=scale)
    add("--batch-size", type=number(int, 2), metavar="N", help="images of a step of stage 1, over all processes")
    add("--lr", type=number(float, 0), metavar="RATE", help="learning rate of stage 1")
    add("--weight-decay", type=number(float, 0, 1000), metavar="FACTOR", help="weight decay of all stages")
    add("--retrain-epochs", type=number(int, 1), metavar="N", help="epochs of stage 2")
    add("--retrain-batch-size", type=number(int, 2), metavar="N", help="images of a step of stage 2")
    add("--retrain-lr", type=number(float, 0), metavar="RATE", help="learning rate of stage 2")
    add("--tau", type=number(float, 0, 100), metavar="POWER", help="tau of tau-norm and post-hoc-la (default: the best of 0 to 2 on held-out images, else 1)")
    add("--accumulate", type=number(int, 1), metavar="PARTS", help=f"split the images of a step into parts, to save memory (default {default.accumulate})")
    add("--ema", type=number(float, 0, 0.99999), metavar="DECAY", help=f"evaluate an average of the weights, such as 0.999 (default {default.ema:g}: none)")
    add("--seed", type=number(int, 0), metavar="N", help=f"random seed of training; which images are used does not depend on it (default {default.seed})")
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), help=f"(default {default.device}: a GPU if there is one)")
    add("--amp", choices=list(AMP), help=f"autocast (default {default.amp})")
    add("--compile", action="store_true", help="compile the step with torch.compile")
    add("--capture", action=argparse.BooleanOptionalAction, help="run the step as a CUDA graph (default: where possible)")
    fused = ", ".join(name for name, method in METHODS.items() if method.loss in FUSED)
    add("--shard-classes", action="store_true", help=f"spread the classifier's classes over the processes of torchrun; for {fused}")
    add("--channels-last", action="store_true", help="store images and weights in the memory format channels_last")
    add("--deterministic", action="store_true", help="use only bitwise repeatable algorithms, on a GPU too")
    group = parser.add_argument_group("runs and checkpoints")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--resume", metavar="RUN", help="continue the run in this folder, with its arguments")
    either("--evaluate", metavar="RUN", help="print the table of a finished run's last stage, or of a checkpoint, and exit")
    add("--out", metavar="FOLDER", help="folder of the run (default runs/DATA-METHOD, numbered)")
    add("--eval-every", type=number(int, 1), metavar="N", help="epochs between evaluations (default a twentieth of the stage)")
    seconds = f"longest time between checkpoints (default {default.checkpoint_seconds:g}; 0: every step)"
    add("--checkpoint-seconds", type=number(float, 0), metavar="SECONDS", help=seconds)
    add("--logger", choices=[*LOGGERS, "none"], help="also send curves, settings and pictures there; TensorBoard files are written wherever it is installed")
    add("--pictures", action=argparse.BooleanOptionalAction, help="draw curves, accuracies, confusion and t-SNE at the end (default yes)")
    return parser


def as_flags(message: str) -> str:
    """Replace settings in backticks in an error message by flags: `lr` by --lr, `amp=bf16` by --amp bf16, `pictures=False` by --no-pictures."""
    settings = {field.name for field in fields(RunConfig)}

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in settings:
            return match.group()
        words = name.replace("_", "-")
        return f"--no-{words}" if value == "False" else f"--{words}" if value in (None, "True") else f"--{words} {value}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, message)


def explain(error: BaseException) -> str:
    """The error message for the user. An unexpected error's traceback is written to a file, which the message names."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{notes}"
    if isinstance(error, EXPECTED):
        return f"error: {as_flags(str(error))}{notes}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"error: the memory of the GPU is full; run a step in parts by --accumulate, or take a smaller --batch-size{notes}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return f"error: the memory is full; take a smaller --image-size or --batch-size, or run a step in parts by --accumulate{notes}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised by a signal handler, at any place in the run
        return f"error: {as_flags(worker_problem(error))}{notes}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"error: --compile failed ({str(error).strip().splitlines()[0]}); leave it out{notes}"
    return f"error: {type(error).__name__}: {error}; this is a fault of the program, please report it with {save_traceback(error)}{notes}"


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(f"train.py: {explain(error)}")
    finally:
        finish_output()
