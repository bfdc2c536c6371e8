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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclkern import DROLTLoss
from gclkern.distributed import ShardError
from gclkern.training.arguments import number
from gclkern.training.checkpoint import CheckpointError, load_checkpoint
from gclkern.training.data import CIFAR, DATASETS, CorruptImageError, DataSplits, Epoch, load_data
from gclkern.training.evaluation import epoch_centroids, evaluate, format_table
from gclkern.training.extras import need
from gclkern.training.network import Network, gather_classifier, load_network, network_state, prepare, shard_classifier
from gclkern.training.processes import Processes, stop_requests
from gclkern.training.recipes import CLOUDS, METHODS, RETRAINS, SAMPLERS, Phase, build_loss, default_model, plan
from gclkern.training.retrain import retrain_without_gradients
from gclkern.training.run_folder import RunFolder, new_folder
from gclkern.training.seeds import derive_seed
from gclkern.training.summary import conclude, describe, progress_bar, report_columns
from gclkern.training.trainer import Trainer, TrainingStep, step_batches
from gclkern.weights import drw_weights

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Arguments that a resumed run may change: where things are and how long they may take, not what comes out.
FREE = {"resume", "evaluate", "out", "data_dir", "download", "workers", "device", "checkpoint_seconds", "pictures"}
# Arguments that stage 1 does not depend on, so that runs that differ in these alone can share it.
LATER = FREE | {"stage1", "eval_every", "retrain", "sampler", "retrain_epochs", "retrain_batch_size", "retrain_lr", "tau", "baseline"}


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint that --resume or --evaluate names."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits-lt", choices=DATASETS, metavar="NAME", help=f"{', '.join(DATASETS)} (default digits-lt, which needs no files)")
    add("--data-dir", default="data", metavar="FOLDER", help="folder of the data set's files (default data)")
    add("--download", action="store_true", help="fetch CIFAR into --data-dir if it is not there")
    add("--imbalance", type=number(float, 1), metavar="RATIO", help="images of the largest class over the smallest's (default 20 for digits, 100 for CIFAR)")
    add("--profile", choices=("exp", "step"), default="exp", help="how class counts fall on digits and CIFAR: all along, or half way (default exp)")
    add("--holdout", type=number(float, 0, 0.9), default=0.0, metavar="SHARE", help="share of training images to choose the best epoch by (default 0)")
    add("--train-list", metavar="FILE", help="text file with a line `path label` for each training image; labels from 0, paths below --data-dir")
    add("--test-list", metavar="FILE", help="the same for test images")
    add("--image-size", type=number(int, 1), default=224, metavar="PIXELS", help="pixels of a side, for image files (default 224)")
    add("--workers", type=number(int, 0), default=4, metavar="N", help="processes that read image files (default 4)")
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be read, instead of stopping")
    add = parser.add_argument_group("method", "What is left out is the published setting for the method and the data set; a run prints them all.").add_argument
    add("--method", choices=METHODS, default="gcl", help="loss of stage 1 (default gcl)")
    add("--retrain", choices=RETRAINS, help="stage 2, which trains the classifier anew (default gcl for the clouded methods, else none)")
    add("--stage1", metavar="CHECKPOINT", help="stage-1.pt of a finished run with the same settings of stage 1: retrain it, in place of training one")
    add("--sampler", choices=list(SAMPLERS), help="sampler of stage 2 (default cben for GCL's loss, else class-balanced)")
    add("--cloud", choices=list(CLOUDS), help="how GCL's clouds grow as classes get rarer (default log)")
    add("--stage1-sampler", choices=list(SAMPLERS), help="sampler of stage 1 (default instance)")
    add("--mixup", type=number(float, 0), metavar="ALPHA", help="mixup with Beta(ALPHA, ALPHA) in stage 1 and in gcl's stage 2; 0 for none")
    add("--augment", choices=("none", "standard", "autoaugment"), help="of small sets (default standard, for DRO-LT on CIFAR autoaugment)")
    add("--baseline", action=argparse.BooleanOptionalAction, help="train by cross entropy for as many epochs, too (default: on digits-lt)")
    add("--model", metavar="NAME", help="small-cnn, resnet32, resnet50, resnet152, a name of torchvision's, or timm:NAME (default: the data set's usual)")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=None, help="start from ImageNet's weights (default: for places-lt)")
    add("--train", choices=("all", "last-block"), help="what learns in stage 1 beside the classifier (default: last-block on places-lt, else all)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), metavar="N", help="epochs of stage 1 (DRO-LT goes on after them; --epochs-scale shortens all)")
    add("--epochs-scale", type=number(float, 0), default=1.0, metavar="FACTOR", help="times epochs that are not given and warm-up (default 1)")
    add("--batch-size", type=number(int, 2), metavar="N", help="images of a step of stage 1, over all processes")
    add("--lr", type=number(float, 0), metavar="RATE", help="learning rate of stage 1")
    add("--weight-decay", type=number(float, 0), metavar="FACTOR", help="weight decay of all stages")
    add("--retrain-epochs", type=number(int, 1), metavar="N", help="epochs of stage 2")
    add("--retrain-batch-size", type=number(int, 2), metavar="N", help="images of a step of stage 2")
    add("--retrain-lr", type=number(float, 0), metavar="RATE", help="learning rate of stage 2")
    add("--tau", type=number(float, 0), metavar="POWER", help="of tau-norm (default: the best of 0 to 2 on the held-out part; 1 without one)")
    add("--accumulate", type=number(int, 1), default=1, metavar="PARTS", help="parts in which a step's images are run, to save memory (default 1)")
    add("--ema", type=number(float, 0, 0.99999), default=0.0, metavar="DECAY", help="evaluate an average of the weights, such as 0.999 (default 0: none)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of everything random but the choice of the long-tailed subset (default 0)")
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add("--amp", choices=list(AMP), default="off", help="autocast (default off)")
    add("--compile", action="store_true", help="compile the step with torch.compile")
    add("--capture", action=argparse.BooleanOptionalAction, help="run the step as a CUDA graph (default: where that is possible)")
    add("--shard-classes", action="store_true", help="spread the classifier's classes over the processes of torchrun (gcl methods)")
    add("--channels-last", action="store_true", help="memory format of images and weights")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit by bit, on a GPU too")
    group = parser.add_argument_group("runs and checkpoints")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--resume", metavar="RUN", help="go on with the run in this folder, with its own arguments")
    either("--evaluate", metavar="CHECKPOINT", help="print the report of a checkpoint and leave")
    add("--out", metavar="FOLDER", help="folder of the run (default runs/DATA-METHOD, numbered)")
    add("--eval-every", type=number(int, 1), metavar="N", help="epochs between evaluations (default a twentieth of the stage)")
    add("--checkpoint-seconds", type=number(float, 0), default=30.0, metavar="SECONDS", help="most between checkpoints (default 30; 0: each step)")
    add("--pictures", action=argparse.BooleanOptionalAction, default=True, help="draw curves, accuracies, confusion and t-SNE at the end (default yes)")
    args, state = parser.parse_args(argv), None
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate)
        state = load_checkpoint(path / "last.pt" if path.is_dir() else path)
        if args.resume and state.get("kind") != "training":
            raise CheckpointError(f"{path} holds a finished network, not a run to go on with; give the run's folder or its last.pt")
        parser.set_defaults(**{name: value for name, value in state["config"].items() if name not in ("resume", "evaluate")})
        args = parser.parse_args(argv)
        changed = [name for name, value in state["config"].items() if name not in FREE and getattr(args, name) != value]
        if args.resume and changed:
            name = changed[0]
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: the run was started with {state['config'][name]}, now it is {getattr(args, name)}; leave {flag} out or start a new run")
        args.out = str(path if path.is_dir() else path.parent)
    refuse_unused(args, parser)
    return args, state


def refuse_unused(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Arguments that would do nothing are mistakes."""
    files = args.data != "digits-lt" and args.data not in CIFAR
    lists = files and args.data != "folder"
    used = {"train_list": lists, "test_list": lists, "image_size": files, "skip_corrupt": files, "imbalance": not files, "profile": not files}
    used |= {"download": args.data in CIFAR, "tau": args.retrain == "tau-norm"}
    for name, use in used.items():
        if not use and getattr(args, name) != parser.get_default(name):
            choice = "without --retrain tau-norm" if name == "tau" else f"with --data {args.data}"
            raise ValueError(f"--{name.replace('_', '-')} does nothing {choice}; leave it out")


@dataclass
class Job:
    """What every phase of a run shares."""

    args: argparse.Namespace
    ranks: Processes
    data: DataSplits
    run: RunFolder
    stop: list[float]  # not empty when a signal asked to stop


class Stopped(Exception):  # noqa: N818 (it is no error)
    """A signal asked to stop, and the checkpoint is written."""


def main(args: argparse.Namespace, state: dict[str, Any] | None) -> None:
    ranks = Processes(args.device)
    if args.data == "digits-lt":
        torch.set_num_threads(1)  # on images this small threads wait for each other more than they work
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    data = load_data(
        args.data, data_dir=args.data_dir, imbalance=args.imbalance, profile=args.profile, holdout=args.holdout, download=args.download,
        image_size=args.image_size, workers=args.workers, skip_corrupt=args.skip_corrupt, train_list=args.train_list, test_list=args.test_list,
    )  # fmt: skip
    for images, part in ((data.train, "training"), (data.test, "test")):
        skipped = getattr(images, "skipped", None)
        if ranks.rank == 0 and skipped:
            print(f"left out {len(skipped)} {part} images that cannot be read, such as {skipped[0]}")
    if args.evaluate:
        assert state is not None
        report = evaluate(load_network(state, data, ranks.device, averaged=True), data.test, data, ranks, AMP[args.amp])
        if ranks.rank == 0:
            print(format_table([(state["name"], report)]))
        ranks.close()
        return
    if args.augment or (args.method.endswith("dro-lt") and args.data.startswith("cifar")):
        data.train.augment = args.augment or "autoaugment"  # DRO-LT's release has it
    phases = plan_run(args, data)
    for phase in phases:
        if phase.batch_size % (ranks.world * args.accumulate):
            raise ValueError(f"{phase.name}: a batch of {phase.batch_size} does not divide into {ranks.world} processes times --accumulate {args.accumulate}")
    if args.pictures:
        need("matplotlib", "drawing pictures (or give --no-pictures)")
        need("sklearn", "drawing pictures (or give --no-pictures)")
    folder = Path(args.out) if args.out else new_folder(Path("runs"), f"{args.data}-{args.method}")
    if state is None and (folder / "last.pt").exists():
        raise ValueError(f"--out: {folder} already holds a run; go on with it by --resume {folder}, or choose another folder")
    kept = {"history": [], "reports": {}, "seconds": 0.0} if state is None else {name: state[name] for name in ("history", "reports", "seconds")}
    first = state["phase"] if state else len(phases) - 1 if args.stage1 else 0
    if state:
        network = load_network(state, data, ranks.device)
    else:
        stage1 = take_stage1(args, data, ranks.device) if args.stage1 else None
        network = prepare(phases[first], stage1, data, vars(args), ranks.device)
    run = RunFolder(folder, vars(args), write=ranks.rank == 0, **kept)
    if ranks.rank == 0:
        print(describe(run, data, phases[first:], args.model or default_model(args.data), ranks.device), flush=True)
    stopped = False
    try:
        with stop_requests() as stop:
            job = Job(args, ranks, data, run, stop)
            for index, phase in enumerate(phases[first:], first):
                if index > first:
                    network = prepare(phase, network, data, vars(args), ranks.device)
                train_phase(job, phase, index, network, state)
                report = evaluate(network, data.test, data, ranks, AMP[args.amp])
                run.reports[phase.name] = report.as_dict()
                run.save(f"{phase.name}.pt", network_state(vars(args), phase, network))
                state = None
    except Stopped:
        stopped = True
    ranks.close()
    if ranks.rank == 0 and stopped:
        print(f"stopped; go on with: python train.py --resume {folder}")
    elif ranks.rank == 0:
        conclude(run, data, ranks.device, phases, amp=AMP[args.amp], pictures=args.pictures)


def plan_run(args: argparse.Namespace, data: DataSplits) -> list[Phase]:
    """The phases, with the arguments in place of the published settings."""
    first = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "sampler": args.stage1_sampler, "mixup": args.mixup}
    first |= {"weight_decay": args.weight_decay, "trains": args.train}
    second = {"epochs": args.retrain_epochs, "batch_size": args.retrain_batch_size, "lr": args.retrain_lr, "sampler": args.sampler}
    phases = plan(
        args.method, args.retrain, args.data, data.class_counts, baseline=args.data == "digits-lt" if args.baseline is None else args.baseline,
        epochs_scale=args.epochs_scale, cloud=args.cloud,
        stage1={name: value for name, value in first.items() if value is not None},
        stage2={name: value for name, value in second.items() if value is not None},
    )  # fmt: skip
    whole = [phase.name for phase in phases if phase.name != "baseline" and (phase.loss, phase.head) != ("gcl", "cosine")]
    if args.shard_classes and args.amp == "fp16":
        raise ValueError("--shard-classes: with --amp fp16 each process would skip steps of its own; use --amp bf16")
    if args.shard_classes and whole:
        raise ValueError(f"--shard-classes: the loss of {whole[0]} takes the logits of all classes; use --method gcl or gcl+dro-lt, --retrain gcl, crt or none")
    if args.stage1 and phases[-1].name != "stage-2":
        raise ValueError(f"--stage1: there is no stage 2 to go on with after {args.stage1}; choose one with --retrain")
    return phases


def take_stage1(args: argparse.Namespace, data: DataSplits, device: torch.device) -> Network:
    """The network of a finished stage 1, if it is the one that this run would have trained."""
    state = load_checkpoint(args.stage1)
    different = [name for name, value in state["config"].items() if name not in LATER and getattr(args, name) != value]
    if state["kind"] != "network" or not state["name"].startswith("stage-1"):
        raise CheckpointError(f"--stage1: {args.stage1} holds {state['name']} of kind {state['kind']}; give stage-1.pt of a finished run")
    if different:
        name = different[0]
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"--stage1: {args.stage1} was trained with {flag} {state['config'][name]}, this run has {getattr(args, name)}; give the same")
    return load_network(state, data, device)


def train_phase(job: Job, phase: Phase, index: int, network: Network, state: dict[str, Any] | None) -> None:
    """Train the network in place, from its beginning or from a checkpoint."""
    args, ranks, data, run = job.args, job.ranks, job.data, job.run
    if phase.trains in ("ncm", "tau-norm"):
        retrain_without_gradients(phase.trains, network, data, ranks, args.tau)
        return
    steps = max(1, (phase.epoch_samples or len(data.train)) // phase.batch_size)
    local = phase.batch_size // ranks.world  # images of this process in a step
    sampler = SAMPLERS[phase.sampler](
        data.train.labels, num_samples=steps * phase.batch_size, seed=derive_seed(args.seed, phase.name, "order"), num_replicas=ranks.world, rank=ranks.rank,
        **phase.sampler_options,
    )  # fmt: skip
    sharded = args.shard_classes and phase.loss == "gcl"
    if sharded:
        shard_classifier(network)
    loss: Any = build_loss(phase, data.class_counts, sharded=sharded).to(ranks.device)
    network.scale.fill_(loss.scale)
    robust = DROLTLoss(data.class_counts).to(ranks.device) if phase.robust else None
    module = TrainingStep(network, loss, trains=phase.trains, robust=robust, robust_weight=phase.robust)
    trainer = Trainer(
        module, ranks, weight_decay=phase.weight_decay, mixup=phase.mixup, accumulate=args.accumulate, amp=AMP[args.amp], ema=args.ema,
        compiled=args.compile, capture=args.capture, channels_last=args.channels_last,
    )  # fmt: skip
    total, first_epoch, first_step, best = torch.zeros((), dtype=torch.float64, device=ranks.device), 0, 0, -1.0
    centroids: dict[str, Tensor] = {}
    if state is not None:
        trainer.load_state_dict(state)
        centroids = {name: value.to(ranks.device) for name, value in state["centroids"].items()}
        total.fill_(state["total"])
        first_epoch, first_step, best = state["epoch"], state["step"], state["best"]

    def batches(purpose: str, epoch: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images and labels of an epoch's steps, from `step` on."""
        sampler.set_epoch(epoch, position=step * local)
        place = Epoch(derive_seed(args.seed, phase.name, purpose, epoch), step * local, ranks.world, ranks.rank)
        return data.train.loader(step_batches(iter(sampler), local), device=ranks.device, epoch=place)

    saved = time.monotonic()

    def checkpoint(epoch: int, step: int, *, due: bool = False) -> None:
        """Write one if it is due by now or a signal asked to stop, and then stop."""
        nonlocal saved
        stopping = ranks.any(bool(job.stop))
        if stopping or ranks.any(due or time.monotonic() - saved >= args.checkpoint_seconds):
            run.save("last.pt", {
                **network_state(vars(args), phase, network), **trainer.state_dict(), "kind": "training", "phase": index, "epoch": epoch, "step": step,
                "best": best, "total": float(ranks.mean(total.clone())), "centroids": centroids, "history": run.history, "reports": run.reports,
                "seconds": run.seconds,
            })  # fmt: skip
            saved = time.monotonic()
        if stopping:
            raise Stopped

    evaluate_every = args.eval_every or max(1, phase.epochs // 20)
    with progress_bar(phase.name, phase.epochs * steps * phase.batch_size, (first_epoch * steps + first_step) * phase.batch_size, show=ranks.rank == 0) as bar:
        for epoch in range(first_epoch, phase.epochs):
            rate = phase.schedule.rate(phase.lr, epoch, phase.epochs)
            trainer.set_rate(rate)
            if phase.drw is not None:
                loss.weight.copy_(drw_weights(data.class_counts, epoch, round(phase.drw * phase.epochs)))
            if robust is not None and first_step == 0:
                centroids = epoch_centroids(network, batches("centroids", epoch, 0), data.num_classes, ranks)
            module.train()
            for step, (images, target) in enumerate(batches("training", epoch, first_step), first_step):
                total += trainer.step(images, target, derive_seed(args.seed, phase.name, epoch, step), epoch * steps + step, **centroids)
                bar.update(phase.batch_size)
                if step + 1 < steps and (ranks.world == 1 or step % 20 == 0):
                    checkpoint(epoch, step + 1)
            mean_loss = float(ranks.mean(total)) / steps
            if not math.isfinite(mean_loss):
                raise ValueError(f"{phase.name}: the loss of epoch {epoch + 1} is {mean_loss}; train with a lower learning rate, or without --amp fp16")
            row: dict[str, Any] = {"phase": phase.name, "epoch": epoch + 1, "lr": rate, "loss": mean_loss}
            if (epoch + 1) % evaluate_every == 0 or epoch + 1 == phase.epochs:
                row |= report_columns(evaluate(trainer.shown, data.test, data, ranks, AMP[args.amp]))
                if data.holdout is not None:
                    held = evaluate(trainer.shown, data.holdout, data, ranks, AMP[args.amp])
                    row["holdout"] = sum(held.groups.values()) / len(held.groups)
                    if row["holdout"] > best:
                        best = row["holdout"]
                        run.save("best.pt", network_state(vars(args), phase, trainer.shown))
            run.log(row)
            bar.set_postfix(loss=f"{mean_loss:.3f}", **{"top-1": f"{100 * row['top1']:.1f}"} if "top1" in row else {})
            total.zero_()
            first_step = 0
            checkpoint(epoch + 1, 0, due=epoch + 1 == phase.epochs)
    network.load_state_dict(trainer.shown.state_dict())
    gather_classifier(network)


if __name__ == "__main__":
    try:
        main(*parse_arguments())
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, CorruptImageError, ShardError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
