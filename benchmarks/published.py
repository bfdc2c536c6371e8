"""Published top-1 accuracies in percent, of ResNet-32 on CIFAR: with which `python -m benchmarks.accuracy` compares its own.

GCL: Li, Cheung and Lu, "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022. Its comparison on CIFAR gives the numbers of all
other methods up to its year but DRO-LT, too (BBN's 81.18 on CIFAR-10-LT with imbalance 50 is 82.18 elsewhere); its ablations, on CIFAR-10-LT with imbalance
100, those of clouds (Table 3), samplers (Table 5) and re-training, where cRT has the number of GCL itself. DRO-LT: Samuel and Chechik, "Distributional
robustness loss for long-tail learning", ICCV 2021. DBM, and BCL and balanced softmax as its authors ran them: AAAI 2025, Table 2. ProCo: its authors' README.
Hybrid-PSC: its paper (CVPR 2021) as a reproduction quotes it. Logit adjustment, as a loss and post-hoc: its authors' README, google-research/logit_adjustment.
"""

from __future__ import annotations

from typing import NamedTuple

_FACTORS = (200.0, 100.0, 50.0)
_COMPARISON = {
    "ce": {"cifar10-lt": (65.68, 70.70, 74.81), "cifar100-lt": (34.84, 38.43, 43.9)},
    "ce-mixup": {"cifar10-lt": (65.84, 72.96, 79.48), "cifar100-lt": (35.84, 40.01, 45.16)},
    "ldam-drw": {"cifar10-lt": (73.52, 77.03, 81.03), "cifar100-lt": (38.91, 42.04, 47.62)},
    "ce-mixup-crt": {"cifar10-lt": (73.06, 79.15, 84.21), "cifar100-lt": (41.73, 45.12, 50.86)},
    "bbn": {"cifar10-lt": (73.47, 79.82, 81.18), "cifar100-lt": (37.21, 42.56, 47.02)},
    "mislas": {"cifar10-lt": (77.31, 82.06, 85.16), "cifar100-lt": (42.33, 47.50, 52.62)},
    "gcl": {"cifar10-lt": (79.03, 82.68, 85.46), "cifar100-lt": (44.88, 48.71, 53.55)},
}
# Without a number at imbalance 200.
_WITHOUT_200 = {
    "tde": {"cifar10-lt": (80.60, 83.60), "cifar100-lt": (44.15, 50.31)},
    "hybrid-sc": {"cifar10-lt": (81.40, 85.36), "cifar100-lt": (46.72, 51.87)},
    "hybrid-psc": {"cifar10-lt": (78.82, 83.86)},
    "balanced-softmax": {"cifar10-lt": (83.57, 86.45), "cifar100-lt": (49.35, 54.79)},
    "dbm": {"cifar10-lt": (84.60, 87.06), "cifar100-lt": (51.30, 55.84)},
    "bcl": {"cifar10-lt": (82.95, 86.76), "cifar100-lt": (50.23, 55.35)},
    "proco": {"cifar10-lt": (85.9, 88.2), "cifar100-lt": (52.8, 57.1)},
}
_ABLATIONS = {
    "cloud-cosine": 79.21,
    "cloud-power-1/3": 80.80,
    "cloud-power-1/4": 82.31,
    "gcl-instance": 80.41,
    "gcl-class-balanced": 82.43,
    "gcl-effective-number": 82.47,
    "gcl-stage1": 80.52,
    "gcl-lws": 82.25,
    "gcl-tau-norm": 82.16,
    "gcl-crt": 82.68,
}
# In its authors' code 1241 epochs on CIFAR-10-LT and 1419 on CIFAR-100-LT, of a ResNet-32 whose blocks have three convolutions.
_LOGIT_ADJUSTMENT = {
    "la": {"cifar10-lt": 77.89, "cifar100-lt": 44.06},
    "post-hoc-la": {"cifar10-lt": 77.32, "cifar100-lt": 44.07},
}


class Mark(NamedTuple):
    """What sets the published numbers of some methods apart from the others."""

    sign: str  # behind the number
    meaning: str
    methods: frozenset[str]


STRONG_AUGMENTATION = frozenset({"balanced-softmax", "dbm", "dro-lt", "bcl", "proco"})  # it adds several points
MARKS = (
    Mark("†", "with AutoAugment and Cutout, which the other published numbers are without", STRONG_AUGMENTATION),
    Mark("‡", "after six to seven times as many epochs", frozenset(_LOGIT_ADJUSTMENT)),
)
# By data set, imbalance factor and method of benchmarks.accuracy.
PUBLISHED: dict[tuple[str, float, str], float] = {
    **{
        (data, factor, method): top1 for method, found in _COMPARISON.items() for data, row in found.items() for factor, top1 in zip(_FACTORS, row, strict=True)
    },
    **{("cifar10-lt", 100.0, method): top1 for method, top1 in _ABLATIONS.items()},
    **{
        (data, factor, method): top1
        for method, found in _WITHOUT_200.items()
        for data, row in found.items()
        for factor, top1 in zip(_FACTORS[1:], row, strict=True)
    },
    **{(data, 100.0, method): top1 for method, found in _LOGIT_ADJUSTMENT.items() for data, top1 in found.items()},
    ("cifar100-lt", 100.0, "dro-lt"): 47.33,
    ("cifar100-lt", 10.0, "dro-lt"): 63.41,
}


def published_top1(data: str, imbalance: float, method: str) -> str:
    """The published number with its marks; empty where there is none."""
    top1 = PUBLISHED.get((data, imbalance, method))
    return "" if top1 is None else f"{top1:.2f}" + "".join(mark.sign for mark in MARKS if method in mark.methods)


def legend() -> str:
    """What the marks mean."""
    return " ".join(f"{mark.sign} {mark.meaning}." for mark in MARKS)
