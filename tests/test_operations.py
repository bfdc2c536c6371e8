"""What every operation of the table promises, whatever it computes: its formula's values, repeatable results, errors by name, any strides, and graphs."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gclkern
from benchmarks.machine_code.launches import Launches
from gclkern import functional, samplers
from gclkern.kernels.terms import PREFIXES, SCHEMAS
from tests.support.cases import HALVES, REDUCTIONS, Options
from tests.support.modules import MODULES
from tests.support.operations import OPERATIONS, Operation, Outcome, expected, outcome
from tests.support.wrong_arguments import VALID, Wrong

# numpy, which interprets the kernels, warns of what a GPU computes in silence and a later selection discards.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

LOSSES = [operation for operation in OPERATIONS if operation.leaves]
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
every_operation_of_a_matrix = pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.narrow], ids=str)
# Tracing a head takes seconds where its kernels are interpreted, and all plans are traced in the same way.
TRACED_ALIKE = ("chunked", "recompute", "angles", "vmf", "top1", "soft")
every_graph = pytest.mark.parametrize(
    "operation",
    [pytest.param(one, marks=pytest.mark.exhaustive if any(part in one.name for part in TRACED_ALIKE) else pytest.mark.slow) for one in OPERATIONS],
    ids=str,
)
every_loss = pytest.mark.parametrize("operation", LOSSES, ids=str)


def call(operation: Operation, backend: str) -> Callable[..., Tensor]:
    return functools.partial(operation.function, backend=backend)


def run(operation: Operation, backend: str, arguments: Options, wanted: tuple[str, ...] | None = None) -> Outcome:
    return outcome(call(operation, backend), arguments, operation.differentiable(arguments) if wanted is None else wanted)


def assert_equal(actual: Outcome, reference: Outcome) -> None:
    """Bit for bit."""
    assert actual.parts().keys() == reference.parts().keys()
    for name, part in reference.parts().items():
        assert actual.parts()[name].equal(part), name


def assert_near(actual: Outcome, reference: Outcome, error: float, what: str = "") -> None:
    """The norm of a difference over that of the exact part; the tests of each operation look at its elements."""
    for name, part in reference.parts().items():
        found, exact = actual.parts()[name].detach().cpu().double(), part.detach().cpu().double()
        assert found.shape == exact.shape, f"{what} {name}"
        difference = float((found - exact).norm())
        assert difference <= error * float(exact.norm()), f"{what} {name}: {difference / float(exact.norm()):.2e}"


# ---- values


@every_operation_of_a_matrix
def test_float64_follows_the_formula(operation: Operation, device: torch.device) -> None:
    for name in operation.samples(6):
        for reduction in REDUCTIONS if operation.leaves else [None]:
            arguments = operation.sample(name, device=device, dtype=torch.float64) | ({"reduction": reduction} if reduction else {})
            found = run(operation, "auto", arguments)
            assert all(part.dtype == torch.float64 for part in found.parts().values())
            # the draws of the noise are float32 numbers here and exact in the formula
            assert_near(found, expected(operation, arguments), 1e-12 if arguments.get("cloud") is None else 2e-6, f"{name}, {reduction}")


@every_loss
def test_gradients_are_derivatives(operation: Operation, device: torch.device) -> None:
    """Central differences know nothing of formulas."""
    arguments = operation.sample(rows=3, device=device, dtype=torch.float64)
    wanted = operation.differentiable(arguments)
    options = [{"reduction": reduction} for reduction in REDUCTIONS] + ([{"normalize": False}] if "linear_weight" in arguments else [])
    for option in options:

        def function(*leaves: Tensor, option: Options = option) -> Tensor:
            return operation.function(**arguments | dict(zip(wanted, leaves, strict=True)) | option)

        assert torch.autograd.gradcheck(function, tuple(arguments[name].requires_grad_() for name in wanted), fast_mode=True)


@every_operation
def test_float32_follows_the_formula(operation: Operation, backend: str, device: torch.device) -> None:
    arguments = operation.sample(rows=7, device=device)
    found = run(operation, backend, arguments)
    assert all(part.dtype == torch.float32 for part in found.parts().values())
    # logits of a few units, so a few roundings of 2^-24 of those; a GPU's draws of the noise differ by up to 1e-4 of a scale of 8
    assert_near(found, expected(operation, arguments), 1e-3 if device.type == "cuda" and "seed" in arguments else 1e-5)


@every_operation_of_a_matrix
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits(operation: Operation, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Results are float32 and gradients have the dtype of what they belong to."""
    arguments = operation.sample(device=device, dtype=dtype)
    found = run(operation, backend, arguments)
    assert found.value.dtype == torch.float32
    assert all(grad.dtype == arguments[name].dtype for name, grad in found.grads.items())
    # rounded products of 16 bits at a scale of 8, and of the gradient, which the interpreter truncates: 2^-7 each
    assert_near(found, expected(operation, arguments), 2**-5)


@every_operation_of_a_matrix
@pytest.mark.triton
def test_kernels_refuse_float64(operation: Operation, launches: Launches, device: torch.device) -> None:
    if operation.name == "class_centroids":
        pytest.skip("has no choice of a backend")
    arguments = operation.sample(device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"triton.*float64|float64.*triton"):
        operation.function(**arguments, backend="triton")
    assert operation.function(**arguments).dtype == torch.float64
    assert launches == []


# ---- which backend


@every_operation
def test_a_cpu_gets_no_kernels(operation: Operation, launches: Launches) -> None:
    for backend in ("auto", "torch"):
        run(operation, backend, operation.sample())
    assert launches == []


@every_operation
@pytest.mark.triton
def test_the_kernels_run_when_asked_for(operation: Operation, launches: Launches, device: torch.device) -> None:
    run(operation, "triton", operation.sample(device=device), ())
    forward = len(launches)
    assert forward > 0
    if operation.leaves:
        run(operation, "triton", operation.sample(device=device))
        assert len(launches) > 2 * forward


@every_operation
@pytest.mark.gpu
def test_a_gpu_gets_the_kernels(operation: Operation, launches: Launches, device: torch.device) -> None:
    run(operation, "auto", operation.sample(device=device))
    assert launches


# ---- promises


@every_operation
def test_results_are_bitwise_repeatable(operation: Operation, backend: str, device: torch.device) -> None:
    arguments = operation.sample(rows=20, device=device)
    assert_equal(run(operation, backend, arguments), run(operation, backend, arguments))


@every_operation
def test_inputs_are_never_modified(operation: Operation, backend: str, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    before = {name: (value.clone(), value._version) for name, value in arguments.items() if isinstance(value, Tensor)}
    run(operation, backend, arguments)
    for name, (value, version) in before.items():
        assert arguments[name].equal(value) and arguments[name]._version == version, name


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_may_be_repeated(operation: Operation, reduction: str, backend: str, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    wanted = operation.differentiable(arguments)
    leaves = [arguments[name].requires_grad_() for name in wanted]
    loss = operation.function(**arguments, reduction=reduction, backend=backend)
    upstream = torch.linspace(-0.7, 1.9, loss.numel(), device=device).view(loss.shape)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, 2 * upstream)
    for name, one, copy, two, double in zip(wanted, first, kept, second, third, strict=True):
        assert one.equal(copy) and two.equal(one), name
        assert double.equal(2 * one), f"{name}: a power of 2 changes no digit"


@every_loss
def test_a_changed_input_is_noticed(operation: Operation, backend: str, device: torch.device) -> None:
    """Backward after an in-place change must not answer for other numbers."""
    for name in operation.narrow:
        arguments = operation.sample(device=device)
        changed = arguments[name].requires_grad_() * 1.0
        loss = operation.function(**arguments | {name: changed}, backend=backend)
        with torch.no_grad():
            changed.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


@every_loss
def test_a_second_derivative_is_refused(operation: Operation, backend: str, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    leaves = [arguments[name].requires_grad_() for name in operation.differentiable(arguments)]
    for leaf, grad in zip(leaves, torch.autograd.grad(operation.function(**arguments, backend=backend), leaves, create_graph=True), strict=True):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)


@every_loss
def test_only_some_gradients_are_wanted(operation: Operation, backend: str, device: torch.device) -> None:
    """A frozen backbone, a frozen classifier, evaluation: what is asked for is the same as when all is."""
    arguments = operation.sample(device=device)
    everything = run(operation, backend, arguments)
    for wanted in ((), *((name,) for name in everything.grads)):
        some = run(operation, backend, arguments, wanted)
        for name, part in some.parts().items():
            # a head that wants one gradient may take its products in another order
            torch.testing.assert_close(part, everything.parts()[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        value = operation.function(**{**arguments, operation.leaves[0]: arguments[operation.leaves[0]].requires_grad_()}, backend=backend)
    assert not value.requires_grad
    torch.testing.assert_close(value, everything.value, rtol=1e-6, atol=1e-6)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """A view of `layout` with the numbers of `value`, or, where it is expanded, of its first row or column."""
    if layout == "expanded rows":
        return value[:1].expand(value.shape)
    if layout == "expanded columns":
        return value[..., :1].expand(value.shape)
    if layout == "offset":
        view = value.new_zeros([extent + 2 for extent in value.shape])[tuple(slice(1, -1) for _ in value.shape)]
    elif layout == "every second":
        view = value.new_zeros([2 * extent for extent in value.shape])[tuple(slice(None, None, 2) for _ in value.shape)]
    else:
        view = value.new_zeros([*reversed(value.shape)]).permute(*reversed(range(value.dim())))
    return view.copy_(value)


@every_operation_of_a_matrix
@pytest.mark.parametrize("layout", ["transposed", "every second", "offset", "expanded rows", "expanded columns"])
def test_any_strides(operation: Operation, layout: str, backend: str, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    if layout == "expanded columns" and "prototypes" in arguments:
        pytest.skip("rows that are always normalised have no gradient there but rounding")
    if "linear_weight" in arguments:
        # columns that are all equal give cosines of +-1, where the gradient is a difference of equal numbers
        arguments |= {"normalize": False, "scale": 0.5}
    # and with weights that are equal for all classes the features have no gradient but rounding
    kept = {"linear_weight"} if layout == "expanded rows" else set()
    if layout == "expanded columns" and arguments["target"].is_floating_point():
        kept = {"target"}  # the shares of a row add up to 1
    strided = {
        name: laid_out(value, layout) if name in operation.axes and name not in kept and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    contiguous = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in strided.items()}
    # a sum may be taken in another order
    assert_near(run(operation, backend, strided), run(operation, backend, contiguous), 1e-6)


@every_operation
def test_autocast_changes_nothing_but_the_heads_features(operation: Operation, backend: str, device: torch.device) -> None:
    """A loss belongs in float32: autocast reaches neither its input nor what happens inside. A head casts its features, as F.linear does; not its weights."""
    arguments = operation.sample(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = run(operation, backend, arguments)
    if "linear_weight" in arguments:
        arguments["features"] = arguments["features"].bfloat16()
    by_hand = run(operation, backend, arguments)
    assert found.value.dtype == torch.float32
    assert_equal(found, Outcome(by_hand.value, {name: grad.to(found.grads[name].dtype) for name, grad in by_hand.grads.items()}))
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())


# ---- the table is complete


# Public names that are in no table, by the tests of them.
ELSEWHERE = {
    "tests/test_centroids.py": ["gclkern.ClassCentroids"],
    "tests/test_clouds.py": ["gclkern.cloud_sizes"],
    "tests/test_gcl_cross_entropy.py": ["gclkern.set_debug"],
    "tests/test_soft_labels.py": ["gclkern.label_aware_smoothing", "gclkern.mixed_targets"],
    "tests/test_weights.py": [
        "gclkern.DeferredReweighting", "gclkern.effective_number_weights", "gclkern.inverse_frequency_weights", "gclkern.ldam_margins",
        "gclkern.log_prior",
    ],
    "tests/test_samplers.py": [f"gclkern.samplers.{name}" for name in vars(samplers) if name.endswith("Sampler") and not name.startswith(("_", "Distributed"))],
    "tests/distributed/test_batches.py": ["gclkern.distributed.gather_batch"],
    "tests/distributed/test_sharded_classifier.py": [
        f"gclkern.distributed.{name}" for name in ("RowSGD", "ShardError", "ShardedClassCentroids", "sharded_dro_lt_loss", "sharded_optimizer_state")
    ],
    "tests/distributed/test_sharded_head.py": ["gclkern.distributed.sharded_linear_gcl_cross_entropy"],
    "tests/training/test_classifier.py": ["gclkern.training.Classifier", "gclkern.training.load_classifier"],
}  # fmt: skip


def test_every_public_name_is_in_a_table_or_tested_elsewhere() -> None:
    """A function in the table of operations, a module in that of modules; a new name fails here until it has an entry."""
    modules = (gclkern, functional, samplers, gclkern.distributed, gclkern.training)
    public = set()
    for module in modules:
        names = getattr(module, "__all__", [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__])
        public |= {f"{module.__name__}.{name}" for name in names if name[0] != "_" and not isinstance(getattr(module, name), ModuleType)}
    functions = {operation.name.split()[0] for operation in OPERATIONS} - {"vmf_contrast"}  # which only ProCo's module calls
    tables = {name for name in public if name.rpartition(".")[2] in functions} | set(MODULES)
    elsewhere = [name for names in ELSEWHERE.values() for name in names]
    assert sorted([*tables, *elsewhere]) == sorted(public)
    for path, names in ELSEWHERE.items():
        source = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
        missing = [name for name in names if not re.search(rf"\b{name.rpartition('.')[2]}\b", source)]
        assert not missing, f"{path} does not mention {missing}"


def test_every_operator_is_called() -> None:
    with operators() as calls:
        for operation in OPERATIONS:
            run(operation, "torch", operation.sample())
    assert {func.name() for func, _, _ in calls} == {f"gclkern::{PREFIXES['torch']}{name}" for name in SCHEMAS}


# ---- graphs


@contextlib.contextmanager
def operators() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """The calls of the library's own operators."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "gclkern":
                calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))))
            return func(*args, **kwargs or {})

    with Recording():
        yield calls


@every_operation
def test_operators_are_registered_soundly(operation: Operation, backend: str, device: torch.device) -> None:
    """Schema, fake implementation and autograd of each operator that a sample or its backward calls."""
    seen = set()
    for name in ("plain", "everything") if operation.leaves else ("everything",):
        with operators() as calls:
            run(operation, backend, operation.sample(name, device=device))
        for func, args, kwargs in calls:
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
            seen.add(func.name())
    assert len(seen) >= (2 if operation.leaves else 1)
    if operation.leaves and backend == "torch" and not operation.batch:  # the bound saves a workspace of which only the rows of the batch's classes are defined
        torch.library.opcheck(*calls[0], test_utils="test_aot_dispatch_dynamic")


@every_operation_of_a_matrix
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.compiled)])
def test_sixteen_bits_have_the_shapes_and_dtypes_that_a_compiler_expects(operation: Operation, backend: str) -> None:
    """Autograd would cast a gradient of the wrong dtype without a word."""
    with operators() as calls:
        for name in {"everything", "plain product"} & operation.samples(6).keys():
            for reduction in ("mean", "none") if operation.leaves else (None,):
                arguments = operation.sample(name, dtype=torch.bfloat16) | ({"reduction": reduction} if reduction else {})
                run(operation, backend, arguments)
    assert calls
    for func, args, kwargs in calls:
        with FakeTensorMode() as fake:
            promised = func(*tree_map_only(Tensor, fake.from_tensor, args), **kwargs)
        made, promised = ([(part.shape, part.dtype) for part in tree_leaves(result)] for result in (func(*args, **kwargs), promised))
        assert made == promised, func


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def step_of(operation: Operation, arguments: Options, backend: str) -> Callable[..., Tensor]:
    """The operation inside of a larger graph."""

    def step(**tensors: Tensor) -> Tensor:
        tensors |= {name: torch.tanh(tensors[name]) for name in operation.narrow[:1]}
        return 2 * operation.function(**{**arguments, **tensors}, backend=backend)

    return step


def check_compiled(operation: Operation, compiler: str, backend: str, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    step = step_of(operation, arguments, backend)
    wanted = operation.differentiable(arguments)
    eager = outcome(step, tensors, wanted)
    assert_near(outcome(compiled(step, compiler)[0], tensors, wanted), eager, 1e-6)  # inductor has a tanh of its own


@every_operation
def test_compiles_as_one_graph(operation: Operation, backend: str, device: torch.device) -> None:
    check_compiled(operation, "aot_eager", backend, device)


@pytest.mark.slow
@every_operation
def test_compiles_under_inductor(operation: Operation, device: torch.device) -> None:
    """For the backend that a user gets: operators are opaque to the compiler, and those of all backends have one schema."""
    check_compiled(operation, "inductor", "auto", device)


@every_graph
def test_one_graph_for_every_batch(operation: Operation, backend: str, device: torch.device) -> None:
    """dynamic=True makes symbols of everything: of sizes and offsets, and of the numbers that are a function's defaults."""
    batches = [(4, 2), (7, 6), (13, 20), (5, 3)]
    options = [{"row_offset": row_offset} if operation.grid else {} for _, row_offset in batches]
    samples = [operation.sample(rows=rows, device=device) | offset for (rows, _), offset in zip(batches, options, strict=True)]
    step, counter = compiled(call(operation, backend), dynamic=True)
    graphs = []
    for arguments in samples:
        wanted = operation.differentiable(arguments)
        assert_equal(outcome(step, arguments, wanted), outcome(call(operation, backend), arguments, wanted))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, "no batch after the first is traced"


@every_operation
def test_exports(operation: Operation, device: torch.device) -> None:
    arguments = operation.sample(device=device)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}

    class Module(nn.Module):
        def forward(self, **tensors: Tensor) -> Tensor:
            return operation.function(**{**arguments, **tensors})

    program = torch.export.export(Module(), (), tensors, strict=False)
    assert program.module()(**tensors).equal(operation.function(**arguments))


@every_operation
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_tensors_without_values(operation: Operation, mode: str) -> None:
    """Nobody can read a number of theirs, so that whatever passes here does not make the host wait for a GPU either."""
    arguments = operation.sample(device="meta" if mode == "meta" else "cpu")
    expected_shapes = {name: part.shape for name, part in run(operation, "auto", operation.sample()).parts().items()}
    with FakeTensorMode() if mode == "fake" else contextlib.nullcontext() as fake:
        if isinstance(fake, FakeTensorMode):
            arguments = {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        found = run(operation, "auto", arguments)
    assert {name: part.shape for name, part in found.parts().items()} == expected_shapes


@every_loss
def test_functional_transforms_are_refused(operation: Operation) -> None:
    """torch.func would need a rule for the batches of vmap, and levels of derivatives that there are not."""
    arguments = operation.sample()
    name = operation.leaves[0]
    with pytest.raises(RuntimeError, match=rf"{name} is inside of a torch.func transform"):
        torch.func.grad(lambda leaf: operation.function(**{**arguments, name: leaf}))(arguments[name])


# ---- on a GPU


@every_operation_of_a_matrix
@pytest.mark.gpu
def test_no_synchronisation_and_a_graph_that_reads_new_numbers(operation: Operation, device: torch.device) -> None:
    arguments = operation.sample(rows=64, device=device)
    if "seed" in arguments:
        arguments["seed"] = torch.tensor(arguments["seed"], device=device)
    run(operation, "auto", arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operation, "auto", arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(operation, "auto", arguments)  # all that is captured: a kernel that is loaded for the first time may end a capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(operation, "auto", arguments)
    arguments[operation.narrow[0]].mul_(0.5)
    arguments["target"].copy_(arguments["target"].roll(1))
    graph.replay()
    assert_equal(captured, run(operation, "auto", arguments))


# ---- arguments


def refusals() -> list[Any]:
    return [
        pytest.param(operation, wrong, id=f"{operation.name}-{wrong.named}-{index}") for operation in OPERATIONS for index, wrong in enumerate(operation.wrong)
    ]


def test_every_function_of_the_table_has_calls_that_it_refuses() -> None:
    assert {operation.name.split()[0] for operation in OPERATIONS if operation.wrong} == {operation.name.split()[0] for operation in OPERATIONS}
    assert {operation.name for operation in OPERATIONS if operation.wrong} == set(VALID)


@pytest.mark.parametrize("name", VALID)
def test_the_valid_call_is_valid(name: str) -> None:
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    assert operation.function(**VALID[name]).isfinite().all()


@pytest.mark.parametrize(("operation", "wrong"), refusals())
def test_wrong_arguments_are_refused_by_name(operation: Operation, wrong: Wrong) -> None:
    """Before anything is computed, with the argument's value."""
    with pytest.raises(wrong.error) as caught:
        operation.function(**{**VALID[operation.name], **wrong.changes})
    message = str(caught.value)
    assert re.search(rf"\b{wrong.named}\b", message), f"{wrong.named!r} is not named in {message!r}"
    assert wrong.shown in message, f"{wrong.shown!r} is not shown in {message!r}"
