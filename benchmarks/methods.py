"""Size and cost of every method of train.py, and the table of docs/methods.md: python -m benchmarks.methods

    python -m benchmarks.methods --only bbn tde    # measure these again and keep the others

Measures one training step of each phase on ResNet-32 with 100 classes, all with the same batch, beside one of cross entropy on the plain network. Both take
turns on one thread, and the time is that of the processor, which other work on the machine changes little. Writes benchmarks/results/methods/steps.json;
`python -m benchmarks.render_results` makes the table of it, of the recipes, of published.py and of the results in accuracy/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import last_report, results_of
from benchmarks.common import RESULTS
from benchmarks.gpu_report import machine
from benchmarks.provenance import training_hash
from benchmarks.published import published_top1
from gclkern.training.arguments import number
from gclkern.training.atomic_files import replace_text
from gclkern.training.config import RunConfig
from gclkern.training.data.longtail import profile_counts
from gclkern.training.network import build_network
from gclkern.training.objectives import Samples
from gclkern.training.processes import Processes
from gclkern.training.recipes import METHODS, RETRAINS, Phase, plan
from gclkern.training.trainer import Trainer, build_trainer

PATH = RESULTS / "methods" / "steps.json"
BATCH, CLASSES = 32, 100
COUNTS = profile_counts(CLASSES, 500, 100.0, "exp")
# What each method adds to cross entropy CE of the logits z, with target y; n are class counts, r their shares, s a scale, cos the cosine of a feature and a
# class's weight, x the feature.
FORMULAS = {
    "ce": "CE(z, y)",
    "mixup": "lam CE(z, y_a) + (1 - lam) CE(z, y_b), images mixed in the same shares",
    "focal": "(1 - p_y)^2 CE(z, y)",
    "cb": "w_y CE(z, y), w_j ~ (1 - beta) / (1 - beta^n_j)",
    "ldam-drw": "CE(s (cos_j - m_j [j = y]), y), m_j ~ n_j^(-1/4); from 80% of the epochs weighted like cb",
    "la": "CE(z + tau log r, y)",
    "balanced-softmax": "CE(z + log r, y)",
    "arcface": "CE(s cos(theta_j + m [j = y]), y)",
    "dbm": "CE(s cos(theta_j + m_y (1 + hard (1 - cos_y) / 2) [j = y]) + log r_j, y), m_j ~ 1 / n_j",
    "gcl": "CE(s (cos_j - cloud_j e), y), cloud_j ~ log n_max - log n_j, e = min(abs N(0, 1/3), 1)",
    "gcl-ldam-drw": "CE(s (cos_j - cloud_j e - m_j [j = y]), y), weighted as ldam-drw",
    "gcl-dbm": "the loss of dbm with the clouds of gcl on the other classes",
    "agcl": "CE(s cos(theta_j + (pi/2) cloud_j e), y)",
    "dro-lt": "CE(z, y) + robust bound of distances to class centroids, radius epsilon / sqrt(n_y) or learned",
    "gcl+dro-lt": "the loss of gcl + the bound of dro-lt",
    "bcl": "2 CE(z + log r, y) + 0.6 contrast of views and prototypes, each class averaged",
    "gcl+bcl": "the loss of bcl with that of gcl in place of CE",
    "proco": "CE(z + log r, y) + CE(log of the mean of exp(v.k / t) over a class's distribution of k + log r, y)",
    "hybrid-sc": "a contrast of views + (1 - a) CE(z, y), a = 1 - (epoch / epochs)^2",
    "hybrid-psc": "a (log sum over j != y of exp(v.q_j / t) - v.q_y / t) + (1 - a) CE(z, y)",
    "tde": "CE(z, y), z_j = (s / K) sum over heads k of w_jk.u_k / (norm of w_jk + gamma); predicts with u_k - alpha (u_k.d_k) d_k, d the mean's direction",
    "bbn": "a CE(z, y_c) + (1 - a) CE(z, y_r), z of 2 [a f_c, (1 - a) f_r], a = 1 - (epoch / epochs)^2",
    "oltr": "CE(z, y) + 0.01 memory loss, z_j = s cos(v, w_j), v = (10 / distance) (x + tanh(S x) * softmax(H x) M)",
}
RETRAIN_FORMULAS = {
    "crt": "a new classifier, CE(z, y) on class-balanced batches",
    "lws": "z_j = f_j (w_j.x + b_j), only f trains",
    "tau-norm": "w_j / norm(w_j)^tau, no bias",
    "ncm": "the nearest mean of features that are centred and normalised",
    "post-hoc-la": "z - tau log r",
    "gcl": "CE(s (cos_j - cloud_j e - m [j = y]), y), times 1 - p_y",
    "mislas": "CE with label smoothing by class, z_j = f_j (w_j.x + b_j), running statistics of batch normalisation move",
    "disalign": "z_j <- c (a_j z_j + b_j) + (1 - c) z_j, c = sigmoid(v.x + d); CE weighted by r_j^(-rho)",
}
# Rows of benchmarks.accuracy that show a method or a re-training; the others have its name. GCL's first stage is its method's, all of it its re-training's.
_ACCURACY = {
    "--method mixup": "ce-mixup", "--method gcl": "gcl-stage1", "--method gcl+dro-lt": "gcl-dro-lt",
    "--retrain crt": "ce-mixup-crt", "--retrain lws": "gcl-lws", "--retrain tau-norm": "gcl-tau-norm",
}  # fmt: skip
SETS = (("cifar10-lt", "CIFAR-10-LT"), ("cifar100-lt", "CIFAR-100-LT"))


def phases_of(flag: str, name: str) -> list[Phase]:
    """The phases of a method's own stage, or the stage of a re-training after the method that it was published with; all on CIFAR-100-LT."""
    if flag == "--method":
        return plan(name, "none", "cifar100-lt", COUNTS)
    return plan({"gcl": "gcl", "mislas": "mixup"}.get(name, "ce"), name, "cifar100-lt", COUNTS)[1:]


def rows() -> list[tuple[str, str]]:
    """Flags and names, in the order of the table."""
    return [("--method", name) for name in METHODS] + [("--retrain", name) for name in RETRAINS if name != "none"]


def trainer_of(phase: Phase) -> Trainer:
    """The training steps of a phase on a network with random weights, with the measured batch and without an augmentation."""
    torch.manual_seed(0)
    model = f"{phase.backbone}:resnet32" if phase.backbone else "resnet32"
    network = build_network(model, phase.head, CLASSES, in_channels=3, image_size=32)
    trainer = build_trainer(replace(phase, batch_size=BATCH), network, COUNTS, RunConfig(), Processes.single(torch.device("cpu")))
    trainer.set_rate(1e-3)
    trainer.module.objective.set_epoch(network, phase.epochs // 2, phase.epochs, 1e-3)
    trainer.module.train()
    return trainer


def inputs_of(phase: Phase, trainer: Trainer) -> tuple[Samples, dict[str, Tensor]]:
    """Random samples of a step, and centroids where the objective takes some."""
    images = torch.randn(BATCH, 3, 32, 32)
    target = torch.arange(BATCH) // 2  # pairs of a class
    samples: Samples = {"images": images, "target": target}
    if phase.views:
        samples["views"] = torch.randn(BATCH, len(phase.views), 3, 32, 32)
    if phase.second_sampler:
        samples["second_images"], samples["second_target"] = torch.randn(BATCH, 3, 32, 32), target.flip(0)
    objective = trainer.module.objective
    if not objective.needs_centroids(0):
        return samples, {}
    with torch.no_grad():
        dim = objective.centroid_features(trainer.module.network, images).shape[1]
    return samples, {"centroids": torch.randn(CLASSES, dim), "counts": torch.ones(CLASSES, dtype=torch.int64)}


def measure(phase: Phase, rounds: int) -> dict[str, Any]:
    """Parameters, and the processor's seconds of a step beside those of a step of cross entropy."""
    contestants = []
    for one in (phase, plan("ce", "none", "cifar100-lt", COUNTS)[0]):
        trainer = trainer_of(one)
        contestants.append((trainer, *inputs_of(one, trainer)))
    seconds: list[list[float]] = [[], []]
    for step in range(rounds + 1):
        for place, (trainer, samples, centroids) in enumerate(contestants):
            began = time.process_time()
            trainer.step(samples, step, step, **centroids)
            if step:  # the first one allocates
                seconds[place].append(time.process_time() - began)
    module = contestants[0][0].module
    return {
        "phase": phase.name,
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "more_in_training": sum(parameter.numel() for parameter in module.objective.parameters()),
        "seconds": statistics.median(seconds[0]),
        "relative": statistics.median(own / plain for own, plain in zip(*seconds, strict=True)),
    }


def settings_of(phases: list[Phase]) -> str:
    """The published settings, phase by phase."""
    parts = []
    for phase in phases:
        if phase.epochs:
            mixup = f", mixup {phase.mixup:g}" if phase.mixup else ""
            parts.append(f"{phase.epochs} epochs, batch {phase.batch_size}, lr {phase.lr:g} {phase.schedule.kind}, wd {phase.weight_decay:g}{mixup}")
    return "; ".join(parts) or "no training"


def reached(row: str, dataset: str, results: list[dict[str, Any]]) -> str:
    """Mean top-1 of the last epoch over seeds, of full schedules at imbalance 100; empty where no result is committed."""
    wanted = (dataset, 100.0, row, 1.0)
    found = [result for result in results if (result["data"], result["imbalance"], result["method"], result["epochs_scale"]) == wanted]
    return f"{statistics.mean(100 * last_report(result)['top1'] for result in found):.2f}" if found else ""


def table(results: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of docs/methods.md."""
    measured = json.loads((results / "methods" / "steps.json").read_text())["steps"]
    found = results_of(results / "accuracy")
    header = ["", "idea", "formula", "settings on CIFAR-100-LT"]
    header += [f"{title}, {kind}" for _, title in SETS for kind in ("published", "reached")] + ["parameters", "step / cross entropy"]
    lines = []
    for flag, name in rows():
        steps = measured.get(f"{flag} {name}", [])
        idea = METHODS[name].summary if flag == "--method" else RETRAINS[name].summary
        formula = (FORMULAS if flag == "--method" else RETRAIN_FORMULAS).get(name, "")
        row = _ACCURACY.get(f"{flag} {name}", name)
        numbers = [kind for dataset, _ in SETS for kind in (published_top1(dataset, 100.0, row), reached(row, dataset, found))]
        size = " then ".join(dict.fromkeys(f"{step['parameters']:,}" for step in steps))
        more = max((step["more_in_training"] for step in steps), default=0)
        cost = " then ".join(f"{step['relative']:.2f}" for step in steps)
        size += f" (+{more:,})" if more else ""
        lines.append([f"`{flag} {name}`", idea, f"`{formula}`", settings_of(phases_of(flag, name)), *numbers, size, cost])
    return header, lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number(int, 1), default=7, metavar="N", help="steps of each phase (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[name for _, name in rows()], help="methods and re-trainings to measure (default all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(PATH.read_text())["steps"] if PATH.exists() else {}
    measured: dict[str, list[dict[str, Any]]] = {}
    code = training_hash()
    for flag, name in rows():
        row = f"{flag} {name}"
        if arguments.only is None or name in arguments.only:
            measured[row] = [measure(phase, arguments.rounds) | {"code": code} for phase in phases_of(flag, name) if phase.epochs]
            print(row, *(f"{step['relative']:.2f}" for step in measured[row]), flush=True)
        elif row in known:
            measured[row] = known[row]
    codes = sorted({step["code"] for steps in measured.values() for step in steps})
    PATH.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine(), "code": codes, "batch": BATCH, "classes": CLASSES, "rounds": arguments.rounds, "steps": measured}
    replace_text(PATH, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
