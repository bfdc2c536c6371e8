"""The softmax over samples and prototypes against its formula, sample by sample in float64, and the promises that are no numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gclkern
from benchmarks.machine_code.launches import Launches
from gclkern.cpu_backend import contrastive_loss as cpu_contrastive_loss
from gclkern.functional import supervised_contrastive
from gclkern.kernels.terms import FLOAT32_TEMPERATURE, FUNCTIONS, PREFIXES
from gclkern.torch_backend import contrastive_loss as torch_contrastive_loss
from tests.support.cases import HALVES, REDUCTIONS
from tests.support.comparison import ROUNDING
from tests.support.oracle import supervised_contrastive as oracle

# numpy, which interprets the kernels, warns of what a GPU computes in silence and a later selection discards.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


FORMS: dict[str, dict[str, Any]] = {
    "SupCon": {},
    "SupCon with prototypes": {"prototypes": True},
    "BCL": {"prototypes": True, "class_counts": True},
    "BCL without prototypes": {"class_counts": True},
    "prototypes alone": {"prototypes": True, "include_samples": False},
    "PSC": {"prototypes": True, "include_samples": False, "include_own_class": False},
    "decoupled": {"include_own_class": False},
    "decoupled BCL": {"prototypes": True, "class_counts": True, "include_own_class": False},
}


def problem(rows: int, classes: int, dim: int, form: dict[str, Any], seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features, labels, and the options of a form; the last class has one sample at most."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator) * torch.rand(rows, 1, generator=generator)
    target = torch.randint(classes - 1, (rows,), generator=generator)
    target[0] = classes - 1
    options = dict(form)
    if form.get("prototypes"):
        options["prototypes"] = torch.randn(classes, dim, generator=generator)
    if form.get("class_counts"):
        options["class_counts"] = (target.bincount(minlength=classes) + ("prototypes" in form)).clamp(min=1).float()
    return features, target, options


def check(
    features: Tensor, target: Tensor, options: dict[str, Any], backend: str, device: torch.device, upstream: Tensor | None = None, error: float = 1e-6
) -> None:
    """Loss and gradients; `error` is that of a float32 cosine, which the temperature enlarges."""
    error /= options.get("temperature", 0.1)
    double = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in options.items()}
    exact = [features.double().requires_grad_(), *([double["prototypes"].requires_grad_()] if "prototypes" in options else [])]
    expected = oracle(exact[0], target, **double)
    expected.backward(torch.ones_like(expected) if upstream is None else upstream.double())

    moved = {name: value.detach().to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    leaves = [features.to(device).requires_grad_(), *([moved["prototypes"].requires_grad_()] if "prototypes" in options else [])]
    loss = supervised_contrastive(leaves[0], target.to(device), backend=backend, **moved)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    assert loss.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    scale = len(target) if options.get("reduction") == "sum" else 1
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=2e-6, atol=4 * error * scale)
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None and leaf.grad.dtype == leaf.dtype
        # probabilities cancel against the pull of the positives: relative to the row's largest
        largest = reference.grad.abs().amax(1, keepdim=True).expand_as(reference.grad).clamp(min=float(reference.grad.abs().max()) * 1e-3)
        wrong = (leaf.grad.cpu().double() - reference.grad).abs() > (8 * error + ROUNDING[leaf.dtype]) * largest
        assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} gradients differ"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients(form: str, reduction: str, backend: str, device: torch.device) -> None:
    features, target, options = problem(22, 5, 9, FORMS[form])
    upstream = torch.linspace(-1.0, 2.0, 22) if reduction == "none" else torch.tensor(0.7)
    check(features, target, {**options, "reduction": reduction}, backend, device, upstream)


@pytest.mark.parametrize("form", ["SupCon", "BCL", "PSC"])
def test_more_than_a_tile(form: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_contrastive_loss, "_CPU_TILE", 32)
    monkeypatch.setattr(cpu_contrastive_loss, "_TILE", 32)
    features, target, options = problem(70, 66, 40, FORMS[form])
    check(features, target, options, backend, device)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
@pytest.mark.parametrize(
    ("rows", "classes", "form", "kept"),
    [(70, 6, "BCL", (0, 0)), (30, 66, "BCL", (0, 0)), (30, 6, "BCL", (30, 36)), (30, 66, "prototypes alone", (30, 66))],
)
def test_tiles_of_samples_and_prototypes(rows: int, classes: int, form: str, kept: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward has the only tile from forward, and computes several again."""
    features, target, options = problem(rows, classes, 9, FORMS[form])
    monkeypatch.setattr(torch_contrastive_loss, "_CPU_TILE", 32)
    monkeypatch.setattr(cpu_contrastive_loss, "_TILE", 32)
    check(features, target, options, backend, torch.device("cpu"))
    loss = supervised_contrastive(features.requires_grad_(), target, backend=backend, **options)
    node: Any = loss.grad_fn
    assert tuple(node.saved_tensors[-1].shape) == kept


def test_tiles_without_positives_compare_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of 32 samples in the order of their classes: each on the diagonal has two classes of its own."""
    compared: list[bool] = []
    same = torch_contrastive_loss._same

    def spy(*arguments: Any) -> Tensor | None:
        found = same(*arguments)
        compared.append(found is not None)
        return found

    monkeypatch.setattr(torch_contrastive_loss, "_CPU_TILE", 32)
    monkeypatch.setattr(torch_contrastive_loss, "_same", spy)
    features, _, _ = problem(96, 7, 9, {})
    target = torch.arange(96) % 6
    check(features, target, {"reduction": "none"}, "torch", torch.device("cpu"), torch.linspace(-1.0, 2.0, 96))
    assert compared == 2 * [True, False, False, True, False, True]


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("tile", [32, 512])
def test_a_gradient_that_is_not_wanted_changes_no_other(tile: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles of samples alone, of both, and of prototypes alone."""
    monkeypatch.setattr(torch_contrastive_loss, "_CPU_TILE", tile)
    monkeypatch.setattr(cpu_contrastive_loss, "_TILE", tile)
    features, target, options = problem(70, 40, 9, FORMS["BCL"])
    leaves = (features.requires_grad_(), options.pop("prototypes").requires_grad_())

    def gradients(wanted: tuple[bool, bool]) -> tuple[Tensor, ...]:
        given = [leaf if want else leaf.detach() for leaf, want in zip(leaves, wanted, strict=True)]
        loss = supervised_contrastive(given[0], target, prototypes=given[1], backend=backend, **options)
        return torch.autograd.grad(loss, [leaf for leaf, want in zip(leaves, wanted, strict=True) if want])

    both = gradients((True, True))
    torch.testing.assert_close(gradients((True, False)), both[:1])
    torch.testing.assert_close(gradients((False, True)), both[1:])


def test_numbers_of_classes_beyond_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    features, target, options = problem(22, 5, 9, FORMS["BCL"])
    expected = supervised_contrastive(features, target, backend="torch", **options)
    monkeypatch.setattr(torch_contrastive_loss, "_CONSECUTIVE_INTEGERS", 4)
    assert supervised_contrastive(features, target, backend="torch", **options).equal(expected)


def test_the_own_class_is_out_of_a_denominator_that_is_tiny_without_it(backend: str, device: torch.device) -> None:
    """Two classes at opposite ends: a key of the own class would have e^70 times the others' exponentials."""
    target = torch.arange(12) % 2
    features = (2.0 * target[:, None] - 1) * torch.ones(6) + 0.3 * torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    check(features, target, {"include_own_class": False, "temperature": 0.025, "class_counts": torch.full((2,), 6.0)}, backend, device)


@pytest.mark.triton
@pytest.mark.parametrize("form", ["SupCon", "BCL"])
def test_rows_of_several_tiles(form: str, device: torch.device) -> None:
    features, target, options = problem(70, 5, 150, FORMS[form])
    check(features, target, options, "triton", device)


@pytest.mark.triton
def test_products_in_tf32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of 11 bits where torch's own have them: visibly different numbers, within their error."""
    monkeypatch.setattr("gclkern.kernels.contrastive_loss._precision", lambda: "tf32")
    features, target, options = problem(22, 5, 9, FORMS["BCL"])
    check(features, target, options, "triton", device, error=2**-12)
    with pytest.raises(AssertionError):
        check(features, target, options, "triton", device)


@pytest.mark.triton
def test_the_gradient_is_as_accurate_for_an_upstream_of_any_size(device: torch.device) -> None:
    """Numbers of float16 end at 65504 and 2^-24; the kernels divide by the largest rate."""
    features, target, _ = problem(22, 5, 9, {})
    grads = {}
    for scale in (2.0**-40, 1.0, 2.0**40):
        leaf = features.to(device, copy=True).requires_grad_()
        loss = supervised_contrastive(leaf, target.to(device), backend="triton")
        grads[scale] = torch.autograd.grad(loss, leaf, torch.tensor(scale, device=device))[0] / scale
    assert all(grad.equal(grads[1.0]) for grad in grads.values())
    upstream = torch.logspace(-6, 6, 22)
    check(features, target, {"reduction": "none"}, "triton", device, upstream)


@pytest.mark.triton
def test_labels_at_the_ends_of_their_type(device: torch.device) -> None:
    """Keys that are not there have a label, too."""
    features, target, _ = problem(12, 3, 5, {})
    expected = supervised_contrastive(features, target)
    names = torch.tensor([1 - 2**63, 2**63 - 1, 0])
    torch.testing.assert_close(supervised_contrastive(features.to(device), names[target].to(device), backend="triton").cpu(), expected)


@pytest.mark.triton
@pytest.mark.parametrize("processors", [1, 3])
def test_programs_that_take_several_tiles(processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them where a GPU is full without splits; with three multiprocessors the last split of three tiles has one."""
    from gclkern.kernels import contrastive_loss

    monkeypatch.setattr(contrastive_loss, "MULTIPROCESSORS", processors)
    assert contrastive_loss.tiles_per_split(3, 3) == {1: 3, 3: 2}[processors]
    features, target, options = problem(150, 5, 9, FORMS["BCL"])
    check(features, target, options, "triton", device)


@pytest.mark.triton
def test_sums_of_many_parts(device: torch.device, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a program reads at a time: of samples and of prototypes one, of the denominator two of four."""
    from gclkern.kernels import contrastive_loss

    monkeypatch.setattr(contrastive_loss, "_PARTS", 2)
    monkeypatch.setattr(contrastive_loss, "_SUMMED_OF_SAMPLES", (4, 1))
    monkeypatch.setattr(contrastive_loss, "_SUMMED_OF_PROTOTYPES", (2, 1))
    features, target, options = problem(70, 3, 5, FORMS["BCL"])
    check(features, target, options, "triton", device)
    assert [(launch.argument("ROWS"), launch.argument("PARTS")) for launch in launches if launch.name == "_rows_kernel"][-2:] == [(4, 1), (2, 1)]
    assert [(launch.argument("parts"), launch.argument("PARTS")) for launch in launches if launch.name == "_losses_kernel"] == [(4, 2)]


@pytest.mark.triton
@pytest.mark.parametrize(("programs", "tiles", "share"), [(64, 64, 16), (128, 128, 64), (512, 512, 512), (4, 128, 2), (1, 3, 1)])
def test_programs_fill_a_gpu_once(programs: int, tiles: int, share: int) -> None:
    from gclkern.kernels.contrastive_loss import RESIDENT, tiles_per_split
    from gclkern.kernels.runtime import MULTIPROCESSORS

    assert tiles_per_split(programs, tiles) == share
    assert programs * -(-tiles // share) <= max(RESIDENT * MULTIPROCESSORS, programs)


@pytest.mark.parametrize("form", ["SupCon", "BCL", "decoupled BCL"])
@pytest.mark.parametrize("temperature", [1 / 300, 0.02, 0.07, 5.0])
def test_any_temperature(temperature: float, form: str, backend: str, device: torch.device) -> None:
    features, target, options = problem(22, 5, 9, FORMS[form])
    if backend == "cpu" and temperature < FLOAT32_TEMPERATURE:
        backend = "auto"
    # at temperature 5 probabilities that are nearly equal cancel against the positives: the torch backend has 99% of the error that 2e-7 allows
    check(features, target, {**options, "temperature": temperature}, backend, device, error=2.5e-7)


# The positives of each sample, in the forms that differ in where they are: options, samples of a class, positives of a sample.
POSITIVES: dict[str, tuple[dict[str, Any], int, int]] = {
    "a sample": ({}, 2, 1),
    "two samples": ({}, 3, 2),
    "three samples": ({}, 4, 3),
    "a prototype": ({"prototypes": True, "include_samples": False}, 2, 1),
    "a prototype beside samples": ({"prototypes": True, "class_counts": True}, 1, 1),
    "a sample and a prototype": ({"prototypes": True, "class_counts": True}, 2, 2),
}
NEARLY_ALL = [0.9, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.99, 0.999, 0.9999)), 0.99999]


@pytest.mark.parametrize("p", NEARLY_ALL)
@pytest.mark.parametrize("form", POSITIVES)
def test_positives_with_nearly_all_of_the_probability(form: str, p: float, backend: str, device: torch.device) -> None:
    """All cosines of a class are 1/2 and all others 0, at a temperature that gives the positives together the probability p.

    A single positive loses no digits: the error is that of the others' exponentials, of a cosine, 2^-24, over a temperature of 1/25 or more. Several have
    probabilities of nearly 1 / their number, in which a rounding error or two stand against 1 - p.
    """
    options, samples, positives = POSITIVES[form]
    classes = 4
    target = torch.arange(classes).repeat(samples)
    prototypes = torch.arange(classes if "prototypes" in options else 0)
    label = torch.cat((target, prototypes))
    keys = torch.cat((F.one_hot(label), torch.eye(len(label), dtype=torch.int64)), 1).double()
    others = positives * (classes - 1)  # exponentials of 1, in the denominator of a sample
    if options.get("include_samples", True):
        others = (classes - 1) * (1 if "class_counts" in options else samples)
    weight = 1 if "class_counts" in options else positives
    given = {**options, "reduction": "none", "temperature": 0.5 / math.log(others * p / (weight * (1 - p)))}
    exact = [keys[: len(target)].requires_grad_()]
    if "prototypes" in options:
        given["prototypes"] = keys[len(target) :].requires_grad_()
        exact.append(given["prototypes"])
    if "class_counts" in options:
        given["class_counts"] = torch.full((classes,), samples + 1.0, dtype=torch.float64)
    expected = oracle(exact[0], target, **given)
    expected.sum().backward()

    given |= {name: value.detach().float().to(device) for name, value in given.items() if isinstance(value, Tensor)}
    leaves = [leaf.detach().float().to(device).requires_grad_() for leaf in exact]
    if "prototypes" in options:
        given["prototypes"] = leaves[1]
    loss = supervised_contrastive(leaves[0], target.to(device), backend=backend, **given)
    loss.sum().backward()
    error = 2e-5 if positives == 1 else 2e-5 + 2**-23 / (1 - p)
    if positives == 1:
        torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=error, atol=0.0)
        torch.testing.assert_close(expected.detach(), torch.full_like(expected, -math.log(p)))
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        wrong = (leaf.grad.cpu().double() - reference.grad).norm(dim=1) / reference.grad.norm(dim=1)
        assert float(wrong.max()) < error


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    features, target, options = problem(22, 5, 9, FORMS["BCL"])
    check(features.to(dtype), target, options, backend, device)


ON_CPU = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.compiled)])


@ON_CPU
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prototypes_of_sixteen_bits(dtype: torch.dtype, backend: str) -> None:
    features, target, options = problem(22, 5, 9, FORMS["BCL"])
    across = options["prototypes"].T.to(dtype).contiguous().T  # whose columns are the neighbours in memory
    check(features.to(dtype), target, options | {"prototypes": across}, backend, torch.device("cpu"))


@ON_CPU
def test_low_temperatures_have_float64(backend: str) -> None:
    """Whose exponentials float32 cannot hold: the loops refuse them, and torch computes them in their place."""
    features, target, options = problem(22, 5, 9, FORMS["BCL without prototypes"])
    check(features, target, options | {"temperature": FLOAT32_TEMPERATURE}, backend, torch.device("cpu"))
    low = options | {"temperature": 0.024}
    check(features.detach(), target, low, "auto", torch.device("cpu"), error=1e-7)
    with pytest.raises(ValueError, match=r'backend="cpu" has no supervised_contrastive at temperatures below 0\.025; use backend="torch" or "auto"'):
        supervised_contrastive(features, target, backend=backend, **low)


def test_float64(device: torch.device) -> None:
    features, target, options = problem(22, 5, 9, FORMS["BCL"])
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    check(features.double(), target, options, "auto", device, error=1e-14)


def test_gradcheck(device: torch.device) -> None:
    for form in FORMS.values():
        features, target, options = problem(7, 3, 4, form)
        moved = {name: value.to(device, torch.float64) if isinstance(value, Tensor) else value for name, value in options.items()}
        prototypes = moved.pop("prototypes", None)
        inputs = (features.to(device, torch.float64).requires_grad_(), None if prototypes is None else prototypes.requires_grad_())
        assert torch.autograd.gradcheck(
            lambda x, q, moved=moved, target=target: supervised_contrastive(x, target.to(device), prototypes=q, temperature=0.5, **moved), inputs
        )


@ON_CPU
@pytest.mark.parametrize("form", ["BCL", "PSC"])
def test_rows_longer_than_a_block(form: str, backend: str) -> None:
    """Features of more than 512 elements, and as many keys of a sample, of its class in the second block, too."""
    features, target, options = problem(30, 600, 520, FORMS[form])
    check(features, target, options, backend, torch.device("cpu"))


def test_counts_of_1_leave_the_positives_out_of_the_denominator(backend: str, device: torch.device) -> None:
    """As the class of a single key has none in its own."""
    features, target, _ = problem(22, 5, 9, {})
    features, target = features.to(device), target.to(device)
    counted = supervised_contrastive(features, target, class_counts=torch.ones(5, device=device), backend=backend)
    torch.testing.assert_close(counted, supervised_contrastive(features, target, include_own_class=False, backend=backend))


def test_any_strides_and_labels(backend: str, device: torch.device) -> None:
    """Without prototypes labels may be any numbers."""
    features, target, _ = problem(12, 4, 10, {})
    expected = supervised_contrastive(features.to(device), target.to(device), backend=backend)
    names = torch.tensor([0, 99, 2**40, -1])  # in the order in which the loops sort them, so that sums are added in one order
    strided = torch.stack((features, features), 2)[:, :, 0]
    assert supervised_contrastive(strided.to(device), names[target].to(device), backend=backend).equal(expected)


def test_rows_without_a_direction(backend: str, device: torch.device) -> None:
    features, target, options = problem(8, 3, 5, FORMS["BCL"])
    features[2] = 0.0
    features[5] = F.one_hot(torch.tensor(1), 5)  # of norm 1 exactly
    leaf = features.to(device).requires_grad_()
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = supervised_contrastive(leaf, target.to(device), backend=backend, **moved)
    loss.backward()
    expected = oracle(features.double(), target, **{name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()})
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None and leaf.grad[2].eq(0).all() and leaf.grad.isfinite().all() and leaf.grad[3].ne(0).any()


@pytest.mark.parametrize("size", [1e20, float("inf")])
def test_a_row_whose_squares_leave_float32_gives_no_plausible_loss(size: float, backend: str, device: torch.device) -> None:
    """It is a key of every sample."""
    features, _, _ = problem(8, 3, 5, {})
    features[2] *= size
    target = torch.arange(8, device=device) % 2
    assert supervised_contrastive(features.to(device), target, reduction="none", backend=backend).isnan().all()


def test_samples_without_positives(backend: str, device: torch.device) -> None:
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.tensor([0, 1, 2], device=device)
    assert supervised_contrastive(features, target, backend=backend).isnan()
    total = supervised_contrastive(features, target, reduction="sum", backend=backend)
    total.backward()
    assert total == 0 and features.grad is not None and features.grad.eq(0).all()
    assert supervised_contrastive(features[:1], target[:1], reduction="none", backend=backend).eq(0).all()


def test_temperature_1_and_more_classes_than_columns(backend: str, device: torch.device) -> None:
    """The factor of a sample in the gradient is then its upstream gradient, of which 1 is nothing special, as 0 is."""
    features, target, _ = problem(20, 6, 3, {})
    upstream = torch.linspace(-1.0, 2.0, 20)
    upstream[[4, 9]] = torch.tensor([0.0, 1.0])
    check(features, target, {"temperature": 1.0, "reduction": "none"}, backend, device, upstream)


def test_the_upstream_gradient_of_a_sample_without_positives_is_not_read(backend: str, device: torch.device) -> None:
    features, target, _ = problem(8, 3, 5, {})
    leaf = features.to(device).requires_grad_()
    upstream = torch.ones(8, device=device)
    upstream[0] = torch.nan  # the only sample of its class
    supervised_contrastive(leaf, target.to(device), reduction="none", backend=backend).backward(upstream)
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad[0].ne(0).any()


def test_a_label_out_of_range_spoils_its_own_row_only(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels are not read, as on a GPU."""
    monkeypatch.setattr("gclkern.validation.values_may_be_read", lambda tensor: False)
    features, target, options = problem(8, 3, 5, FORMS["BCL"])
    target[4] = 3
    leaf = features.to(device).requires_grad_()
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = supervised_contrastive(leaf, target.to(device), reduction="none", backend=backend, **moved)
    loss.sum().backward()
    others = torch.arange(8, device=device) != 4
    assert loss[4].isnan() and loss[others].isfinite().all()
    assert leaf.grad is not None and leaf.grad[4].isnan().all() and leaf.grad[others].isfinite().all()


def test_repeatable_and_backward_twice(backend: str, device: torch.device) -> None:
    features, target, options = problem(30, 4, 6, FORMS["BCL"])
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    grads = []
    for _ in range(2):
        leaf = features.to(device).requires_grad_()
        loss = supervised_contrastive(leaf, target.to(device), backend=backend, **moved)
        grads += [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
    assert all(grad.equal(grads[0]) for grad in grads)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
def test_no_matrix_over_pairs_is_in_memory(backend: str) -> None:
    """Of 2^12 samples it would have 64 MB: no operator makes a tensor of more than a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    features, target = torch.randn(4096, 4), torch.arange(4096) % 10
    forward, backward = (FUNCTIONS[f"{PREFIXES[backend]}contrastive_{name}"] for name in ("forward", "backward"))
    with Watch():  # the functions themselves: within an operator it sees nothing
        _, saved = forward(features, None, target, None, 0.1, True, True, "mean")
        backward(torch.ones(()), features, None, None, saved, 0.1, True, True, True, False)
    assert largest == 2**20


def test_a_second_derivative_is_refused(backend: str, device: torch.device) -> None:
    features = torch.randn(6, 4, device=device, requires_grad=True)
    loss = supervised_contrastive(features, torch.arange(6, device=device) % 2, backend=backend)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, features, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("form", ["SupCon", "BCL", "PSC"])
def test_operators(form: str, backend: str, device: torch.device) -> None:
    features, target, options = problem(12, 4, 5, FORMS[form])
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    choices = [options.get(name, True) for name in ("include_samples", "include_own_class")]
    name = f"{PREFIXES[backend]}contrastive_forward"
    arguments = (features.to(device), moved.get("prototypes"), target.to(device), moved.get("class_counts"), 0.1, *choices, "mean")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    supervised_contrastive(features.to(device), target.to(device), backend=backend)  # registers the operators
    torch.library.opcheck(getattr(torch.ops.gclkern, name).default, arguments, test_utils=tests)
    _, saved = getattr(torch.ops.gclkern, name)(*arguments)
    backward = getattr(torch.ops.gclkern, name.replace("forward", "backward")).default
    torch.library.opcheck(
        backward, (torch.ones((), device=device), *arguments[:2], arguments[3], saved, 0.1, *choices, True, "prototypes" in moved), test_utils=tests
    )


def test_compile_without_a_graph_break(backend: str, device: torch.device) -> None:
    features, target, options = problem(12, 4, 5, FORMS["BCL"])
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}

    def step(x: Tensor) -> Tensor:
        return supervised_contrastive(2 * x, target.to(device), backend=backend, **moved)

    eager, traced = features.to(device).requires_grad_(), features.to(device).requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(traced).backward()
    torch.testing.assert_close(traced.grad, eager.grad)


def test_modules() -> None:
    features, target, options = problem(12, 4, 5, FORMS["BCL"])
    prototypes = options["prototypes"]
    x, q = features.double(), prototypes.double()
    expected = {
        gclkern.SupConLoss(temperature=0.2): oracle(x, target, temperature=0.2),
        gclkern.BalancedContrastiveLoss(): oracle(x, target, q, options["class_counts"]),
        gclkern.PrototypicalContrastiveLoss(temperature=1.0): oracle(x, target, q, temperature=1.0, include_samples=False, include_own_class=False),
    }
    for criterion, value in expected.items():
        arguments = (features, target) if isinstance(criterion, gclkern.SupConLoss) else (features, prototypes, target)
        torch.testing.assert_close(criterion(*arguments).double(), value, rtol=1e-5, atol=1e-5)
        assert f"temperature={criterion.temperature}" in repr(criterion)


def test_supcon_of_plain_torch() -> None:
    """Compared with the usual implementation over the whole matrix."""
    features, target, _ = problem(20, 4, 6, {})
    logits = F.normalize(features) @ F.normalize(features).T / 0.1
    others = ~torch.eye(20, dtype=torch.bool)
    positives = (target[:, None] == target) & others
    log_probability = logits - logits.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    anchors = positives.any(1)
    expected = -((log_probability * positives).sum(1)[anchors] / positives.sum(1)[anchors]).mean()
    torch.testing.assert_close(supervised_contrastive(features, target), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "words"),
    [
        ({"temperature": 0.001}, {}, ValueError, ["temperature", "0.001"]),
        ({"temperature": "warm"}, {}, TypeError, ["temperature", "warm"]),
        ({"reduction": "avg"}, {}, ValueError, ["reduction", "'avg'"]),
        ({"backend": "cuda"}, {}, ValueError, ["backend", "'cuda'"]),
        ({}, {"features": torch.zeros(12)}, ValueError, ["features", "(12,)"]),
        ({}, {"features": torch.zeros(12, 5, dtype=torch.int64)}, TypeError, ["features", "int64"]),
        ({}, {"target": torch.zeros(11, dtype=torch.int64)}, ValueError, ["target", "(12,)", "(11,)"]),
        ({}, {"target": torch.zeros(12, 4)}, TypeError, ["target", "float32"]),
        ({}, {"prototypes": torch.zeros(4, 6)}, ValueError, ["prototypes", "5 columns", "(4, 6)"]),
        ({}, {"prototypes": torch.zeros(0, 5)}, ValueError, ["prototypes", "(0, 5)"]),
        ({}, {"prototypes": [[0.0] * 5]}, TypeError, ["prototypes", "list"]),
        ({}, {"target": torch.full((12,), 4)}, ValueError, ["target[0]", "4", "[0, 4)"]),
    ],
)
@pytest.mark.parametrize("criterion", [gclkern.SupConLoss, gclkern.BalancedContrastiveLoss, gclkern.PrototypicalContrastiveLoss])
def test_modules_refuse(criterion: Any, arguments: dict[str, Any], call: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    features, target, options = problem(12, 4, 5, FORMS["BCL"])
    given = {"features": features, "prototypes": options["prototypes"], "target": target} | call
    if criterion is gclkern.SupConLoss:
        if "prototypes" in call or "[0, 4)" in words:
            pytest.skip("it has no prototypes, and takes any labels")
        del given["prototypes"]
    with pytest.raises(error) as caught:
        criterion(**arguments)(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
