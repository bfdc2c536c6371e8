"""Inputs that the tests of both losses share: the same numbers on every device, and a table of option sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A loss's options by name, with tensors on the CPU.
Options = dict[str, Any]

SIZES = [1, 2, 3, 8, 9, 17, 64, 65]  # classes, on both sides of a vector, an alignment and a group of the noise
LOOPS_SIZES = [*SIZES, 513, 1030]  # for the loops of the CPU, which take 512 classes at a time
HALVES = [torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
PLANS = ["materialised", "chunked", "recompute"]
# The loops of the CPU take 512 classes at a time: labels at the ends of three blocks.
SEVERAL_BLOCKS = 1100
BLOCK_ENDS = torch.tensor([0, 511, 512, 1023, 1099])


def cosines(rows: int, classes: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Cosines in [-1, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(rows, classes, generator=generator) - 1).to(device, dtype)


def labels(rows: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def vector(size: int, low: float = 0.0, high: float = 1.0, seed: int = 2) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=torch.Generator().manual_seed(seed))


def mixed(rows: int, classes: int) -> Options:
    """Two targets; sample 0 has equal ones, and the shares hold both ends of their range."""
    second, share = labels(rows, classes, seed=11), vector(rows, seed=12)
    second[0] = labels(rows, classes)[0]
    share[1 % rows], share[2 % rows] = 0.0, 1.0
    return {"target_b": second, "lam": share}


def with_zeros(weight: Tensor) -> Tensor:
    return weight.index_fill(0, torch.arange(0, len(weight), 3), 0.0)


def option_sets(rows: int, classes: int) -> dict[str, Options]:
    """The options one by one, as the methods of the family use them, and all at once."""
    bias = vector(classes, -3.0, 3.0, seed=3).requires_grad_()
    return {
        "plain": {},
        "small_scale": {"scale": 1.0},
        "number_margin": {"margin": 0.2},
        "vector_margin": {"margin": vector(classes, 0.0, 0.5, seed=4)},
        "bias": {"bias": bias},
        "weight": {"weight": with_zeros(vector(classes, 0.1, 3.0, seed=5))},
        "smoothing": {"label_smoothing": 0.1},
        "weight_smoothing": {"weight": with_zeros(vector(classes, 0.1, 3.0, seed=5)), "label_smoothing": 0.3},
        "margin_smoothing": {"margin": vector(classes, 0.0, 0.5, seed=4), "weight": vector(classes, 0.1, 3.0, seed=5), "label_smoothing": 0.2, "scale": 8.0},
        "full_smoothing": {"label_smoothing": 1.0, "weight": vector(classes, 0.1, 3.0, seed=5)},
        "focal": {"gamma": 1.0, "scale": 4.0},
        "focal_undetached": {"gamma": 2.0, "focal_detach": False, "scale": 4.0},
        "focal_root": {"gamma": 0.5, "focal_detach": False, "scale": 4.0},
        "cloud": {"cloud": vector(classes, 0.0, 0.5, seed=6), "seed": 5},
        "mixed": mixed(rows, classes),
        "mixed_number": {"target_b": labels(rows, classes, seed=11), "lam": 0.3},
        "mixed_scalar_tensor": {"target_b": labels(rows, classes, seed=11), "lam": torch.tensor(0.7)},
        "focal_stage_2": {"cloud": vector(classes, 0.0, 0.5, seed=6), "margin": 0.1, "scale": 20.0, "gamma": 1.0, "seed": 5, **mixed(rows, classes)},
        "everything": {
            "cloud": vector(classes, 0.0, 0.5, seed=6), "margin": vector(classes, 0.0, 0.3, seed=4), "bias": bias, "weight": vector(classes, 0.1, 3.0, seed=5),
            "gamma": 1.5, "focal_detach": False, "label_smoothing": 0.2, "seed": 5, "row_offset": 3, "class_offset": 5, "scale": 8.0, **mixed(rows, classes),
        },
    }  # fmt: skip


def class_smoothing_sets(rows: int, classes: int) -> dict[str, Options]:
    """Label smoothing of one value for each class."""
    smoothing = with_zeros(vector(classes, 0.0, 0.4, seed=7))
    return {
        "alone": {"label_smoothing": smoothing},
        "weight": {"label_smoothing": smoothing, "weight": vector(classes, 0.1, 3.0, seed=5), "gamma": 1.0, "scale": 4.0},
        "mixed": {"label_smoothing": smoothing, "margin": 0.2, "cloud": vector(classes, 0.0, 0.5, seed=6), "seed": 5, **mixed(rows, classes)},
    }


def angle_sets(rows: int, classes: int) -> dict[str, Options]:
    """Margins, clouds or both that add to the angle, as the methods use them, and all options at once."""
    cloud: Options = {"cloud": vector(classes, 0.0, 0.8, seed=6), "seed": 5}
    margin = vector(classes, 0.0, 0.7, seed=4)
    weight = vector(classes, 0.1, 3.0, seed=5)
    everything: Options = {
        "bias": vector(classes, -3.0, 3.0, seed=3), "weight": weight, "gamma": 1.5, "focal_detach": False, "label_smoothing": 0.2, "row_offset": 3,
        "class_offset": 5, "scale": 8.0, "margin": margin, **cloud, **mixed(rows, classes),
    }  # fmt: skip
    return {
        "plain": {"angular": True},
        "arcface": {"angular": True, "margin": 0.5, "scale": 8.0},
        "agcl": {"angular": True, "scale": 8.0, **cloud},
        "agcl stage 2": {"angular": True, "scale": 8.0, "margin": 0.3, "gamma": 1.0, **cloud},
        "agcl easy": {"angular": True, "easy_margin": True, "scale": 8.0, "margin": margin, **cloud},
        "dbm": {"difficulty_margin": True, "margin": margin, "scale": 8.0, "bias": vector(classes, -3.0, 3.0, seed=3)},
        "dbm and clouds": {"difficulty_margin": True, "margin": margin, "scale": 8.0, "weight": weight, "label_smoothing": 0.2, **cloud},
        "dbm and everything": {"difficulty_margin": True, **everything},
        "dbm easy": {"difficulty_margin": True, "easy_margin": True, "margin": margin, "scale": 8.0, **mixed(rows, classes)},
        "everything": {"angular": True, **everything},
    }


def moved(options: Options, device: torch.device | str) -> Options:
    """The options with their tensors on `device`, none of which requires a gradient."""
    return {name: value.detach().to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
