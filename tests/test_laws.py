"""Laws: changes of a problem whose effect on loss and gradients is known without computing either. They hold for every loss of the table of operations.

The torch backend is held to them in float64, where rounding is far below any fault; the kernels in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gclkern import MemoryLoss
from tests.support.cases import Options
from tests.support.operations import CLASSES, DIM, OPERATIONS, Operation, Outcome, outcome

MATRICES = [operation for operation in OPERATIONS if operation.narrow and "soft" not in operation.name]  # soft labels become two targets and their shares
LOSSES = [operation for operation in MATRICES if operation.leaves]
CENTROIDS = [operation for operation in MATRICES if not operation.leaves]
FAMILY = [operation for operation in LOSSES if not operation.batch]
BOUND = [operation for operation in LOSSES if operation.name == "dro_lt_loss"]
HEADS = [operation for operation in LOSSES if "linear_weight" in operation.leaves]
CONTRAST = [operation for operation in LOSSES if operation.name == "supervised_contrastive"]

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
LOOPS = pytest.param("cpu", marks=pytest.mark.compiled)
every_backend = pytest.mark.parametrize("backend", ["torch", LOOPS, pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.slow])])
kernels_if_exhaustive = pytest.mark.parametrize("backend", ["torch", LOOPS, pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.exhaustive])])
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(
    data: st.DataObject, operation: Operation, backend: str, device: torch.device, *, noise: bool = False, without: tuple[str, ...] = (), sample: str = ""
) -> Options:  # fmt: skip
    """A sample of the table, any or the one of that name, with other numbers in its matrices, for a mean or a sum."""
    rows = data.draw(st.integers(1, 6), "rows")
    name = sample or data.draw(st.sampled_from(sorted(operation.samples(rows))), "sample")
    arguments = operation.sample(name, rows, device, torch.float64 if backend == "torch" else torch.float32)
    random = generator(data.draw(seeds, "numbers"))
    for matrix in operation.narrow:
        arguments[matrix] = (2 * torch.rand(arguments[matrix].shape, generator=random, dtype=torch.float64) - 1).to(arguments[matrix])
    dropped = (*without, *(() if noise else ("cloud", "seed", "row_offset", "class_offset")))
    arguments = {name: value for name, value in arguments.items() if name not in dropped}
    if operation.leaves:
        arguments["reduction"] = data.draw(st.sampled_from(["mean", "sum"]), "reduction")
    return arguments


def run(operation: Operation, backend: str, arguments: Options) -> Outcome:
    return outcome(functools.partial(operation.function, backend=backend), arguments, operation.differentiable(arguments))


def losses(operation: Operation, backend: str, arguments: Options) -> Tensor:
    return operation.function(**arguments | {"reduction": "none"}, backend=backend)


def assert_same(actual: Tensor, expected: Tensor, what: str, size: float = 1.0) -> None:
    """Within a few roundings of numbers of `size`, which logits of up to 30 and sums over the batch multiply."""
    error = size * (1e-11 if expected.dtype == torch.float64 else 2e-4)
    torch.testing.assert_close(actual, expected, rtol=error, atol=error, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    for name, part in expected.parts().items():
        assert_same(actual.parts()[name], part, name)


def reordered(operation: Operation, values: dict[str, Any], axis: str, order: Tensor) -> dict[str, Any]:
    """The arguments, or gradients, with the elements of an axis taken in another order, or some of them twice."""

    def take(name: str, value: Any) -> Any:
        axes = operation.axes.get(name, "").split()
        if not isinstance(value, Tensor) or axis not in axes or value.dim() != len(axes):
            return value
        return value.index_select(axes.index(axis), order.to(value.device))

    return {name: take(name, value) for name, value in values.items()}


def relabelled(arguments: Options, places: Tensor) -> Options:
    """Class j is now class places[j]; a label that is ignored stays."""
    changed = dict(arguments)
    for name in ("target", "target_b"):
        if name in arguments:
            label = arguments[name]
            changed[name] = torch.where(label >= 0, places.to(label.device)[label.clamp(min=0)], label)
    return changed


# ---- rows


@every_backend
@pytest.mark.parametrize("operation", MATRICES, ids=str)
@given(data=st.data())
def test_the_order_of_rows_does_not_matter(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    arguments = problem(data, operation, backend, device)
    order = torch.randperm(len(arguments["target"]), generator=generator(data.draw(seeds, "order")))
    before, moved = run(operation, backend, arguments), reordered(operation, arguments, "rows", order)
    assert_same_outcome(run(operation, backend, moved), Outcome(before.value, reordered(operation, before.grads, "rows", order)))
    if operation.leaves:
        assert_same(losses(operation, backend, moved), losses(operation, backend, arguments)[order.to(device)], "losses")


@every_backend
@pytest.mark.parametrize("operation", [*FAMILY, *BOUND, *CONTRAST, *CENTROIDS], ids=str)
@given(data=st.data())
def test_every_row_twice(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """The mean stays the same, and each copy has half of the gradient. In a softmax over the batch, twice as many samples add log 2 to the term of each class.

    Samples that are keys of one another would get a key of cosine 1, so of the contrastive losses only the one with prototypes alone is tested.
    """
    arguments = problem(data, operation, backend, device, sample="prototypes alone" if operation in CONTRAST else "")
    rows = len(arguments["target"])
    twice = reordered(operation, arguments, "rows", torch.arange(rows).repeat(2))
    if operation.leaves:
        arguments["reduction"] = twice["reduction"] = "mean"
    before, after = run(operation, backend, arguments), run(operation, backend, twice)
    assert_same(after.value, before.value + (math.log(2) if operation in BOUND else 0.0), "value")
    for name, grad in before.grads.items():
        if operation.axes[name].split()[0] == "rows":
            first, second = after.grads[name][:rows], after.grads[name][rows:]
            assert_same(first, grad / 2, name)
            assert_same(second, grad / 2, name)
        else:
            assert_same(after.grads[name], grad, name)


@every_backend
@pytest.mark.parametrize("operation", [*FAMILY, *CONTRAST], ids=str)
@given(data=st.data())
def test_parts_of_a_batch_add_up(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """Micro-batches, each at its place in the noise's grid: losses are those of the whole, and gradients of the sum add up to its gradient."""
    sample = "prototypes alone" if operation in CONTRAST else ""
    arguments = problem(data, operation, backend, device, noise=True, sample=sample) | {"reduction": "sum"}
    rows = len(arguments["target"])
    cut, start = data.draw(st.integers(0, rows), "cut"), arguments.pop("row_offset", 0)

    def part(first: int, last: int) -> Options:
        return reordered(operation, arguments, "rows", torch.arange(first, last)) | ({"row_offset": start + first} if operation.grid else {})

    whole, whole_losses = run(operation, backend, part(0, rows)), losses(operation, backend, part(0, rows))
    parts = [part(first, last) for first, last in ((0, cut), (cut, rows)) if first < last]
    found = [run(operation, backend, part) for part in parts]
    assert_same(torch.cat([losses(operation, backend, part) for part in parts]), whole_losses, "losses")
    assert_same(torch.stack([part.value for part in found]).sum(), whole.value, "value")
    for name, grad in whole.grads.items():
        grads = [part.grads[name] for part in found]
        assert_same(torch.cat(grads) if operation.axes[name].split()[0] == "rows" else torch.stack(grads).sum(0), grad, name)


@every_backend
@pytest.mark.parametrize("operation", CENTROIDS, ids=str)
@given(data=st.data())
def test_sums_of_parts_add_up(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """A mean is a sum over a number."""
    arguments = problem(data, operation, backend, device)
    rows = len(arguments["target"])
    cut = data.draw(st.integers(0, rows), "cut")

    def sums(first: int, last: int) -> Tensor:
        part = reordered(operation, arguments, "rows", torch.arange(first, last))
        return operation.function(**part, backend=backend) * part["target"].bincount(minlength=CLASSES)[:, None]

    assert_same(sum((sums(*ends) for ends in ((0, cut), (cut, rows)) if ends[0] < ends[1]), torch.zeros(())), sums(0, rows), "sums")


@every_backend
@pytest.mark.parametrize("operation", BOUND, ids=str)
@given(data=st.data())
def test_parts_of_the_classes_add_up(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """The bound's batch cannot be split, because every sample is in the softmax of every class; but its sum is linear in the weights of the classes."""
    arguments = problem(data, operation, backend, device, sample="everything") | {"reduction": "sum"}
    chosen = torch.rand(CLASSES, generator=generator(data.draw(seeds, "chosen"))) < 0.5
    chosen[arguments["target"][0]] = True  # neither part is without a term, or both are the whole
    weight = arguments["class_weight"]
    whole = run(operation, backend, arguments)
    parts = [run(operation, backend, arguments | {"class_weight": weight * part.to(weight)}) for part in (chosen, ~chosen)]
    for name, part in whole.parts().items():
        assert_same(sum(one.parts()[name] for one in parts), part, name)


# ---- classes


@every_backend
@pytest.mark.parametrize("operation", LOSSES, ids=str)
@given(data=st.data())
def test_the_order_of_classes_does_not_matter(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    arguments = problem(data, operation, backend, device)
    order = torch.randperm(CLASSES, generator=generator(data.draw(seeds, "order")))
    before, moved = run(operation, backend, arguments), relabelled(reordered(operation, arguments, "classes", order), order.argsort())
    assert_same_outcome(run(operation, backend, moved), Outcome(before.value, reordered(operation, before.grads, "classes", order)))


@every_backend
@pytest.mark.parametrize("operation", FAMILY, ids=str)
@given(data=st.data())
def test_splitting_a_class_in_two_changes_nothing(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """A class that is no target, twice, with half of its probability each: nothing changes, and the halves share its gradient."""
    arguments = problem(data, operation, backend, device, without=("label_smoothing",))
    bias = arguments.get("bias", torch.zeros(CLASSES).to(arguments[operation.narrow[0]]))
    labels = {label for name in ("target", "target_b") if name in arguments for label in arguments[name].tolist()}
    chosen = data.draw(st.sampled_from([j for j in range(CLASSES) if j not in labels]), "class")
    arguments["bias"] = bias
    halved = reordered(operation, arguments, "classes", torch.tensor([*range(CLASSES), chosen]))
    halved["bias"][[chosen, CLASSES]] -= math.log(2)
    before, after = run(operation, backend, arguments), run(operation, backend, halved)
    assert_same(after.value, before.value, "value")
    for name, grad in after.grads.items():
        axes = operation.axes[name].split()
        if "classes" in axes:
            whole, half = grad.narrow(axes.index("classes"), 0, CLASSES).clone(), grad.select(axes.index("classes"), CLASSES)
            whole.select(axes.index("classes"), chosen).add_(half)
            grad = whole
        assert_same(grad, before.grads[name], name)


@kernels_if_exhaustive
@pytest.mark.parametrize("operation", CONTRAST, ids=str)
@given(data=st.data())
def test_a_class_of_one_key_in_two_halves(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """A prototype without samples, twice, where each class counts twice as many keys, so that each key weighs half."""
    arguments = problem(data, operation, backend, device, sample="everything")
    chosen = data.draw(st.sampled_from([j for j in range(CLASSES) if j not in arguments["target"].tolist()]), "class")
    halved = reordered(operation, arguments, "classes", torch.tensor([*range(CLASSES), chosen]))
    halved["class_counts"][[chosen, CLASSES]] *= 2
    before, after = run(operation, backend, arguments), run(operation, backend, halved)
    assert_same(after.value, before.value, "value")
    assert_same(after.grads["features"], before.grads["features"], "features")
    grad, half = after.grads["prototypes"].split([CLASSES, 1])
    assert_same(grad[chosen], half[0], "both halves")
    assert_same(grad.index_add(0, torch.tensor([chosen], device=grad.device), half), before.grads["prototypes"], "prototypes")


@every_backend
@pytest.mark.parametrize("operation", BOUND, ids=str)
@given(data=st.data())
def test_a_class_without_samples_adds_nothing(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    arguments = problem(data, operation, backend, device)
    more = reordered(operation, arguments, "classes", torch.tensor([*range(CLASSES), data.draw(st.integers(0, CLASSES - 1), "like")]))
    before, after = run(operation, backend, arguments), run(operation, backend, more)
    assert_same(after.value, before.value, "value")
    for name, grad in before.grads.items():
        if operation.axes[name] == "classes" and grad.dim() == 1:
            assert after.grads[name][CLASSES] == 0
            assert_same(after.grads[name][:CLASSES], grad, name)
        else:
            assert_same(after.grads[name], grad, name)


# ---- numbers


@every_backend
@pytest.mark.parametrize("operation", FAMILY, ids=str)
@given(data=st.data(), constant=st.sampled_from([-300.0, -1.0, 0.125, 64.0]))
def test_a_constant_for_all_logits_changes_nothing(operation: Operation, backend: str, device: torch.device, data: st.DataObject, constant: float) -> None:
    arguments = problem(data, operation, backend, device, noise=True)
    arguments["bias"] = arguments.get("bias", torch.zeros(CLASSES).to(arguments[operation.narrow[0]]))
    before, after = run(operation, backend, arguments), run(operation, backend, arguments | {"bias": arguments["bias"] + constant})
    assume(bool(before.value.isfinite().all()))  # a mean whose weights are all 0 divides by 0
    for name, part in before.parts().items():
        assert_same(after.parts()[name], part, name, max(1.0, abs(constant) / 8))  # logits of that size have larger roundings
    if "bias" in operation.leaves:
        assert_same(before.grads["bias"].sum(), before.grads["bias"].new_zeros(()), "the gradient of a constant")


@every_backend
@pytest.mark.parametrize("operation", [*HEADS, *CONTRAST], ids=str)
@given(data=st.data())
def test_the_length_of_a_row_does_not_matter_where_it_is_normalised(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """The longer the row, the smaller its gradient."""
    arguments = problem(data, operation, backend, device, noise=True, without=("normalize",))
    random = generator(data.draw(seeds, "lengths"))
    matrices = [name for name in operation.differentiable(arguments) if arguments[name].dim() == 2]
    lengths = {name: torch.rand(len(arguments[name]), 1, generator=random, dtype=torch.float64).mul(4).exp().to(arguments[name]) for name in matrices}
    before, after = run(operation, backend, arguments), run(operation, backend, arguments | {name: arguments[name] * lengths[name] for name in matrices})
    assert_same_outcome(Outcome(after.value, {name: grad * lengths.get(name, 1.0) for name, grad in after.grads.items()}), before)


@kernels_if_exhaustive
@pytest.mark.parametrize("operation", [*BOUND, *CONTRAST], ids=str)
@given(data=st.data())
def test_a_rotation_changes_nothing(operation: Operation, backend: str, device: torch.device, data: st.DataObject) -> None:
    """Distances and cosines stay, and gradients turn with the points."""
    arguments = problem(data, operation, backend, device)
    random = generator(data.draw(seeds, "rotation"))
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=random, dtype=torch.float64)).Q.to(arguments["features"])
    points = [name for name in ("features", "centroids", "prototypes") if isinstance(arguments.get(name), Tensor)]
    before, after = run(operation, backend, arguments), run(operation, backend, arguments | {name: arguments[name] @ rotation for name in points})
    assert_same_outcome(after, Outcome(before.value, {name: grad @ rotation if name in points else grad for name, grad in before.grads.items()}))


@every_backend
@pytest.mark.parametrize("operation", BOUND, ids=str)
@given(data=st.data(), size=st.sampled_from([0.25, 1.0, 8.0]), distance=st.sampled_from([0.0, 5.0]))
def test_the_unit_and_the_origin_do_not_matter(
    operation: Operation, backend: str, device: torch.device, data: st.DataObject, size: float, distance: float
) -> None:
    """Distances, radii and temperature in another unit, and all points moved together."""
    arguments = problem(data, operation, backend, device)
    moved = {name: size * (arguments[name] + distance) for name in ("features", "centroids")}
    scaled = {"epsilon": size * arguments["epsilon"], "temperature": size * arguments.get("temperature", 1.0)}
    before, after = run(operation, backend, arguments), run(operation, backend, arguments | moved | scaled)
    assert_same_outcome(Outcome(after.value, {name: size * grad for name, grad in after.grads.items()}), before)


# ---- a loss that is no operator


@given(data=st.data(), margin=st.sampled_from([0.0, 1.0, 100.0]))
def test_laws_of_the_memory_loss(data: st.DataObject, margin: float) -> None:
    """Samples and classes in any order, samples twice, and a rigid motion of all points; on both sides of the hinge."""
    random = generator(data.draw(seeds, "numbers"))
    rows = data.draw(st.integers(1, 6), "rows")
    features, memory = (torch.randn(count, DIM, generator=random, dtype=torch.float64) for count in (rows, CLASSES))
    target = torch.randint(CLASSES, (rows,), generator=random)
    criterion = MemoryLoss(margin=margin, repulsion_weight=0.5)

    def gradients(x: Tensor, label: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), centroids.clone().requires_grad_()]
        loss = criterion(leaves[0], label, leaves[1])
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    value, by_features, by_memory = gradients(features, target, memory)
    order, places = torch.randperm(rows, generator=random), torch.randperm(CLASSES, generator=random)
    assert_same_parts(gradients(features[order], target[order], memory), (value, by_features[order], by_memory))
    assert_same_parts(gradients(features, places.argsort()[target], memory[places]), (value, by_features, by_memory[places]))
    rotation, shift = torch.linalg.qr(torch.randn(DIM, DIM, generator=random, dtype=torch.float64)).Q, torch.randn(DIM, generator=random, dtype=torch.float64)
    turned = gradients(features @ rotation + shift, target, memory @ rotation + shift)
    assert_same_parts(turned, (value, by_features @ rotation, by_memory @ rotation))
    twice = gradients(features.repeat(2, 1), target.repeat(2), memory)  # the memory's share of the gradient depends on the number of samples
    assert_same_parts(twice[:2], (value, by_features.repeat(2, 1) / 2))


def assert_same_parts(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for number, (found, part) in enumerate(zip(actual, expected, strict=True)):
        assert_same(found, part, f"part {number}")
