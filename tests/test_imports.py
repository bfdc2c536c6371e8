"""Arrows point down the ladder: the imports of every file, at its top or inside a function, and what `import gclkern` loads."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From top to bottom. A module, with all that is below it in the tree, is of the level that names its longest prefix; it may import modules of its own level and
# of those below.
LAYERS: list[set[str]] = [
    {"train"},
    {"gclkern.training"},
    {"gclkern.distributed"},
    {"gclkern", "gclkern.__main__"},  # the public names
    {"gclkern.losses", "gclkern.samplers", "gclkern.centroids"},
    {"gclkern.layers", "gclkern.tde", "gclkern.oltr"},
    {"gclkern.functional", "gclkern.noise"},
    {"gclkern.clouds", "gclkern.weights"},
    {"gclkern.autograd"},
    {"gclkern.dispatch"},
    {"gclkern.ready", "gclkern.validation", "gclkern.buffers", "gclkern.soft_labels"},
    {"gclkern.devices", "gclkern.options"},
    {"gclkern.torch_backend", "gclkern.cpu_backend"},
    {"gclkern.kernels"},
]
# What the backends share. Nothing else of the kernels is for the others.
SHARED = {"gclkern.kernels.terms"}
# Heavy or optional: the library loads them when a call needs them, if at all.
NOT_LOADED = ["gclkern.training", "gclkern.distributed", "triton", "torch._dynamo", "torch.distributed.tensor", "torchvision", "sklearn", "matplotlib", "PIL"]


def sources() -> dict[str, Path]:
    """The modules of the tree. gclkern/kernels is a link to kernels/, which is listed by its name within the package."""
    files = [ROOT / "train.py", *(path for folder in ("gclkern", "kernels") for path in (ROOT / folder).rglob("*.py"))]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels":
            parts = ("gclkern", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: set[str]) -> set[str]:
    """The modules of the tree that a file imports anywhere, by `import`, `from` or importlib; what only type checkers read is not imported."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.extend(ast.iter_child_nodes(node))
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else str(node.module)
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
        found |= {name for name in names if name in modules}
    return found - {module}


def level(module: str) -> int:
    """The place of a module on the ladder."""
    prefixes = [(len(prefix), place) for place, names in enumerate(LAYERS) for prefix in names if f"{module}.".startswith(f"{prefix}.")]
    assert prefixes, f"{module} is on no level: give it a place in LAYERS"
    place = max(prefixes)[1]
    assert LAYERS[place] != {"gclkern"} or module == "gclkern", f"{module} is on no level: give it a place in LAYERS"
    return place


SOURCES = sources()
IMPORTS = {module: imports_of(module, path, set(SOURCES)) for module, path in SOURCES.items()}


def test_every_name_of_the_ladder_is_there() -> None:
    assert {name for names in LAYERS for name in names} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_points_up(module: str) -> None:
    up = {other for other in IMPORTS[module] if level(other) < level(module)}
    assert not up, f"{module} imports {sorted(up)}, which stand above it"
    if module.startswith(("gclkern.torch_backend", "gclkern.cpu_backend")):
        assert {other for other in IMPORTS[module] if other.startswith("gclkern.kernels")} <= SHARED


def test_no_import_cycle() -> None:
    """A package's __init__ stands for its name alone; its modules do not count as importing it."""
    graph = {module: {other for other in others if not module.startswith(f"{other}.")} for module, others in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_library_loads_nothing_of_training() -> None:
    code = f"import sys, gclkern, gclkern.functional; print(*[name for name in {NOT_LOADED!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
