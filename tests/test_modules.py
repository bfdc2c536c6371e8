"""What every public module promises, whatever it computes: gradients, copies, a state dict, any strides, graphs and shapes without values."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.modules import MODULES, Module

IDS = {name.rpartition(".")[2]: entry for name, entry in MODULES.items()}
every_module = pytest.mark.parametrize("entry", IDS.values(), ids=IDS)
LEARNED = {name: entry for name, entry in IDS.items() if name != "ShardedCosineLinear"}  # which only predicts
every_learned_module = pytest.mark.parametrize("entry", LEARNED.values(), ids=LEARNED)
GRAPHS = {name: entry for name, entry in IDS.items() if entry.graph}
every_graph = pytest.mark.parametrize("entry", GRAPHS.values(), ids=GRAPHS)


def call(module: Any, entry: Module, arguments: list[Tensor]) -> Tensor:
    result: Tensor = module(*arguments, **entry.options)
    return result


def result_and_gradients(module: nn.Module, entry: Module, arguments: list[Tensor]) -> list[Tensor]:
    """Those of all inputs and parameters that have one."""
    leaves = [x.detach().requires_grad_() for name, x in zip(entry.inputs, arguments, strict=True) if x.is_floating_point() and name not in entry.constant]
    given = iter(leaves)
    arguments = [next(given) if x.is_floating_point() and name not in entry.constant else x for name, x in zip(entry.inputs, arguments, strict=True)]
    result = call(module, entry, arguments)
    leaves += [parameter for name, parameter in module.named_parameters() if name not in entry.constant]
    return [result.detach(), *(torch.autograd.grad(result.sum(), leaves) if leaves else ())]


@every_learned_module
def test_gradients_are_derivatives(entry: Module) -> None:
    """Central differences know nothing of formulas. In training mode some modules average what they are given, which counts as a constant."""
    module = entry.made(torch.float64)
    call(module, entry, entry.arguments(torch.float64))  # so that there is such an average
    module.eval()
    parameters = {name: value.detach() for name, value in module.named_parameters() if name not in entry.constant}
    arguments = entry.arguments(torch.float64)
    places = [place for place, name in enumerate(entry.inputs) if arguments[place].is_floating_point() and name not in entry.constant]

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(places, leaves, strict=False))
        inputs = tuple(given.get(place, argument) for place, argument in enumerate(arguments))
        weights = dict(zip(parameters, leaves[len(places) :], strict=True))
        result: Tensor = torch.func.functional_call(module, weights, inputs, entry.options)
        return result

    leaves = [arguments[place].requires_grad_() for place in places] + [value.requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(function, tuple(leaves), fast_mode=True)


@every_module
def test_copies(entry: Module) -> None:
    """Also one that has only the state dict. All of them compute the same, in both modes."""
    module = entry.made()
    call(module, entry, entry.arguments())
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = entry.build()
    loaded.load_state_dict(torch.load(saved))
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    for training in (False, True):
        expected = call(copy.deepcopy(module).train(training), entry, entry.arguments())
        for other in copies:
            assert repr(other) == repr(module)
            assert call(other.train(training), entry, entry.arguments()).equal(expected)


@every_module
def test_any_strides(entry: Module) -> None:
    strided = [
        x.new_zeros([2 * extent for extent in reversed(x.shape)]).permute(*reversed(range(x.dim())))[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
        for x in entry.arguments()
    ]
    assert not any(x.is_contiguous() for x in strided)
    found, expected = (result_and_gradients(entry.made(), entry, arguments) for arguments in (strided, entry.arguments()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # a sum may be taken in another order


@every_graph
def test_compiles_as_one_graph(entry: Module) -> None:
    torch.compiler.reset()
    eager, compiled = entry.made(), entry.made()
    found = call(torch.compile(compiled, fullgraph=True, backend="eager"), entry, entry.arguments())
    torch.testing.assert_close(found, call(eager, entry, entry.arguments()), rtol=1e-6, atol=1e-6)


@every_graph
def test_exports(entry: Module) -> None:
    """For prediction."""
    module = entry.made().eval()
    program = torch.export.export(module, tuple(entry.arguments()), entry.options, strict=False)
    assert call(program.module(), entry, entry.arguments()).equal(call(module, entry, entry.arguments()))


@every_module
def test_tensors_without_values(entry: Module) -> None:
    """Whatever passes here does not make the host wait for a GPU."""
    expected = call(entry.made(), entry, entry.arguments())
    found = call(entry.made().to("meta"), entry, [x.to("meta") for x in entry.arguments()])
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")
