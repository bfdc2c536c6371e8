"""Train a long-tailed classifier: by default GCL (CVPR 2022, Algorithm 1) on a long-tailed split of scikit-learn's digits, beside a cross-entropy baseline.

    python train.py
    python train.py --data cifar100-lt --data-dir data --method gcl --seed 1
    python train.py --resume runs/cifar100-lt-gcl
    python train.py --evaluate runs/cifar100-lt-gcl/stage-2.pt
    torchrun --nproc-per-node 8 train.py --data imagenet-lt --data-dir /images --amp bf16
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclkern import ClassCentroids, DROLTLoss
from gclkern.checkpoint import CheckpointError, load_checkpoint
from gclkern.data import DATASETS, DataSplits, load_data
from gclkern.engine import CapturedStep, Network, Ranks, TrainingStep, build_head, derive_seed, mixup, predict, step_batches, stop_requests
from gclkern.extras import need
from gclkern.methods import METHODS, RETRAINS, SAMPLERS, Phase, build_loss, plan
from gclkern.metrics import Report, evaluate_logits, format_table
from gclkern.models import build_backbone
from gclkern.retrain import nearest_class_mean, replace_head, search_tau, tau_normalise
from gclkern.runs import RunFolder, new_folder, report_columns
from gclkern.weights import drw_weights

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits-lt", help=f"data set: {', '.join(DATASETS)} (default digits-lt)")
    group.add_argument("--data-dir", help="folder of the data set")
    group.add_argument("--imbalance", type=float, help="largest over smallest class (default: 20 for digits-lt, 100 for CIFAR)")
    group.add_argument("--holdout", type=float, default=0.0, help="share of the training set that is held out to select by (default 0: select nothing)")
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default="gcl")
    group.add_argument("--retrain", choices=RETRAINS, help="second stage (default: the method's own)")
    group.add_argument("--sampler", choices=SAMPLERS, help="sampler of the second stage (default: the recipe's)")
    group.add_argument("--mixup", type=float, help="alpha of mixup, 0 for none (default: the recipe's)")
    group.add_argument("--baseline", action=argparse.BooleanOptionalAction, help="train a cross-entropy baseline too (default: on digits-lt)")
    group = parser.add_argument_group("training")
    group.add_argument("--model", help="backbone (default: small-cnn for digits-lt, resnet32 for CIFAR, resnet50)")
    group.add_argument("--epochs", type=int, help="epochs of stage 1 (default: the recipe's)")
    group.add_argument("--retrain-epochs", type=int, help="epochs of the second stage (default: the recipe's)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder of the run (default runs/DATA-METHOD)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    ranks = Ranks("auto")
    data = load_data(args.data, data_dir=args.data_dir, imbalance=args.imbalance, seed=0, holdout=args.holdout)
    overrides = {"epochs": args.epochs, "mixup": args.mixup}
    retrain_overrides = {"epochs": args.retrain_epochs, "sampler": args.sampler, "mixup": args.mixup}
    phases = plan(
        args.method, args.retrain, args.data, data.class_counts, baseline=args.data == "digits-lt" if args.baseline is None else args.baseline,
        stage1={name: value for name, value in overrides.items() if value is not None},
        stage2={name: value for name, value in retrain_overrides.items() if value is not None},
    )  # fmt: skip
    run = RunFolder(args.out or new_folder(Path("runs"), f"{args.data}-{args.method}"), {}, write=ranks.rank == 0, history=[], reports={})
    network = None
    for phase in phases:
        network = prepare(phase, network, data, args, ranks)
        report = train_phase(phase, network, data, args, ranks, run)
        run.reports[phase.name] = report
    print(format_table(list(run.reports.items())))


def prepare(phase: Phase, network: Network | None, data: DataSplits, args: argparse.Namespace, ranks: Ranks) -> Network:
    if network is None or phase.start == "fresh":
        torch.manual_seed(derive_seed(args.seed, "weights"))
        backbone = build_backbone(args.model or "small-cnn", image_size=data.image_size, in_channels=data.channels)
        return Network(backbone, build_head(phase.head, backbone.feature_dim, data.num_classes)).to(ranks.device)
    torch.manual_seed(derive_seed(args.seed, "new head"))
    if phase.start == "new head" or type(network.head) is not type(build_head(phase.head, 1, 1)):
        replace_head(network, phase.head, keep=phase.start != "new head")
    return network


def train_phase(phase: Phase, network: Network, data: DataSplits, args: argparse.Namespace, ranks: Ranks, run: RunFolder) -> Report:
    loss = build_loss(phase, data.class_counts).to(ranks.device)
    network.scale.fill_(loss.scale)
    module = TrainingStep(network, loss, trains=phase.trains)
    optimizer = torch.optim.SGD(module.learn(), lr=phase.lr, momentum=0.9, weight_decay=phase.weight_decay)
    steps = max(1, len(data.train) // phase.batch_size)
    sampler = SAMPLERS[phase.sampler](data.train.labels, num_samples=steps * phase.batch_size, seed=derive_seed(args.seed, phase.name, "order"))
    bar = need("tqdm", "the progress bar").tqdm(total=phase.epochs * steps, desc=phase.name, unit="step")
    for epoch in range(phase.epochs):
        for group in optimizer.param_groups:
            group["lr"] = phase.schedule.rate(phase.lr, epoch, phase.epochs)
        module.train()
        sampler.set_epoch(epoch)
        batches = step_batches(iter(sampler), phase.batch_size)
        epoch_seed = derive_seed(args.seed, phase.name, "augmentation", epoch)
        total = torch.zeros((), dtype=torch.float64)
        for step, (images, target) in enumerate(data.train.loader(batches, device=ranks.device, epoch_seed=epoch_seed, train=True)):
            seed = derive_seed(args.seed, phase.name, epoch, step)
            inputs = {"target_b": None, "lam": None}
            if phase.mixup:
                images, inputs["target_b"], inputs["lam"] = mixup(images, target, phase.mixup, seed, 0)
            value = module(images, target, torch.tensor(seed), 0, **inputs)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.detach()
            bar.update()
        bar.set_postfix(loss=f"{float(total) / steps:.3f}")
    bar.close()
    logits, _ = predict(network, data.test, ranks)
    return evaluate_logits(logits, data.test.labels, data.groups, data.num_classes)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ValueError, FileNotFoundError, ImportError, CheckpointError) as error:
        sys.exit(f"train.py: {error}")
