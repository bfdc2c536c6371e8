"""What a training run compiles: each kernel for its first batch, and nothing for a batch of other length, at another offset or in other memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from benchmarks.machine_code.aot import specialisations

pytestmark = pytest.mark.triton

CLASSES, DIM = 50, 20  # no multiple of 16, so that no product of a batch with them hides what it is a multiple of


def _terms(rows: int, row_offset: int, element: int, reduction: str = "mean", **angles: bool) -> tuple[object, ...]:
    """Labels, shares and seed lie `element` elements into larger tensors."""
    from gclkern.kernels.terms import LossTerms

    labels, vector = torch.zeros(rows + element, dtype=torch.int64)[element:], torch.zeros(CLASSES)
    share, seed = torch.zeros(rows + element)[element:], torch.zeros(1 + element, dtype=torch.int64)[element]
    return LossTerms(labels, labels, share, vector, vector, vector, vector, seed, 30.0, 1.0, True, 0.1, -100, row_offset, 3, reduction, **angles)


def logits(rows: int, row_offset: int, element: int, **angles: bool) -> None:
    from gclkern.kernels.logit_loss import logit_backward, logit_forward

    terms, cosine = _terms(rows, row_offset, element, "none", **angles), torch.empty(rows, CLASSES)
    _, saved = logit_forward(cosine, *terms, True)
    logit_backward(torch.ones(rows + element)[element:], cosine, saved, *terms, True)


def head(rows: int, row_offset: int, element: int, *, plan: str) -> None:
    from gclkern.kernels.head import head_backward, head_forward

    terms = _terms(rows, row_offset, element)
    features, weight = torch.empty(rows, DIM, dtype=torch.bfloat16), torch.empty(CLASSES, DIM)
    _, saved = head_forward(features, weight, *terms, True, plan, True, False)
    head_backward(torch.ones(1 + element)[element], features, weight, saved, *terms, True, plan, True, True, True)


def exponentials(rows: int, row_offset: int, element: int) -> None:
    from gclkern.kernels.head import head_backward, head_forward
    from gclkern.kernels.terms import LossTerms

    labels, seed = torch.zeros(rows + element, dtype=torch.int64)[element:], torch.zeros(1 + element, dtype=torch.int64)[element]
    vector = torch.zeros(CLASSES)
    terms = LossTerms(
        labels, labels, torch.zeros(rows + element)[element:], vector, vector, None, vector, seed, 30.0, 1.0, True, 0.0, -100, row_offset, 8, "mean"
    )
    features, weight = torch.empty(rows, DIM, dtype=torch.bfloat16), torch.empty(CLASSES, DIM)
    with mock.patch("gclkern.kernels.head.exponentials_pay", return_value=True):
        _, saved = head_forward(features, weight, *terms, True, "materialised", True, False)
        head_backward(torch.ones(1 + element)[element], features, weight, saved, *terms, True, "materialised", True, True, False)


def noise(rows: int, row_offset: int, element: int) -> None:
    from gclkern.kernels.noise import cloud_noise

    cloud_noise(torch.zeros(1 + element, dtype=torch.int64)[element], rows, CLASSES, row_offset, 3)


def centroids(rows: int, row_offset: int, element: int) -> None:
    from gclkern.kernels.centroids import segment_sums

    segment_sums(torch.empty(rows, DIM), torch.zeros(rows + element, dtype=torch.int64)[element:], CLASSES)


def dro_lt(rows: int, row_offset: int, element: int) -> None:
    from gclkern.kernels.dro_lt import dro_lt_backward, dro_lt_forward

    features, centroids, epsilon = torch.empty(rows, DIM), torch.empty(CLASSES, DIM), torch.zeros(CLASSES)
    target = torch.zeros(rows + element, dtype=torch.int64)[element:]
    _, saved = dro_lt_forward(features, target, centroids, epsilon, None, 1.0, "none")
    dro_lt_backward(torch.ones(rows + element)[element:], features, target, centroids, epsilon, saved, 1.0, "none", True, True)


def contrastive(rows: int, row_offset: int, element: int, *, weighted: bool) -> None:
    from gclkern.kernels.contrastive_loss import contrastive_backward, contrastive_forward

    features, target = torch.empty(rows, DIM), torch.zeros(rows + element, dtype=torch.int64)[element:]
    prototypes, counts = (torch.empty(CLASSES, DIM), torch.ones(CLASSES)) if weighted else (None, None)
    _, saved = contrastive_forward(features, prototypes, target, counts, 0.1, True, True, "none")
    contrastive_backward(torch.ones(rows + element)[element:], features, prototypes, counts, saved, 0.1, True, True, True, weighted)


def distributions(rows: int, row_offset: int, element: int) -> None:
    from gclkern.kernels.vmf import vmf_backward, vmf_forward

    cosine, concentration = torch.empty(rows, CLASSES), torch.empty(CLASSES)
    vmf_backward(vmf_forward(cosine, concentration, 9.0, 0.1), cosine, concentration, 9.0, 0.1)


CASES: dict[str, Callable[..., None]] = {
    "logits": logits, **{plan: functools.partial(head, plan=plan) for plan in ("materialised", "chunked", "recompute")}, "noise": noise, "centroids": centroids,
    "dro_lt": dro_lt, "exponentials": exponentials, "difficulty margins": functools.partial(logits, difficulty_margin=True),
    "samples": functools.partial(contrastive, weighted=False), "samples and prototypes": functools.partial(contrastive, weighted=True), "ProCo": distributions,
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", CASES)
def test_no_batch_after_the_first_compiles_anything(name: str, target: str) -> None:
    """Except for one kernel, which is compiled once for numbers of rows that are multiples of 16 and once for other numbers."""
    known = specialisations(functools.partial(CASES[name], 512, 0, 0), target)
    assert known
    known |= {launch for launch in specialisations(functools.partial(CASES[name], 300, 0, 0), target) if launch[0] == "_gradient_kernel"}
    for rows, row_offset, element in ((512, 512, 1), (300, 37, 0), (80, 1, 0), (16, 16, 1), (3, 7, 2)):
        assert specialisations(functools.partial(CASES[name], rows, row_offset, element), target) <= known, (rows, row_offset, element)
