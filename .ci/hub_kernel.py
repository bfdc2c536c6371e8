"""The loss library in the layout of the Hugging Face Hub's package `kernels`: python .ci/hub_kernel.py FOLDER

FOLDER/build/torch-cpu and FOLDER/build/torch-cuda get the sources of gclkern/ (without training/) and kernels/, with relative imports: the Hub loads a kernel
under a name of its own, so that several versions can be loaded side by side. Nothing is compiled; Triton does that when a kernel is first called.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "gclkern"
BACKENDS = ("cpu", "cuda")


def relative_imports(source: str, path: Path) -> str:
    """The source of a module, whose file in the package is `path`, with relative imports of the package's modules."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module or ""):
            module = "." * len(path.parts) + (node.module or "").removeprefix(NAME).removeprefix(".")
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {node.module} import", f"from {module} import", 1)
        elif isinstance(node, ast.Import) and any(_is_ours(name.name) for name in node.names):
            raise ValueError(f"{path}:{node.lineno} imports {node.names[0].name} as a whole; import from it, which can be made relative")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(rf"{NAME}\.\S*", node.value):
            raise ValueError(f"{path}:{node.lineno} has the module name {node.value!r} in a string; write it relative to __name__")
    return "".join(lines)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == NAME


def modules() -> Iterator[tuple[Path, str]]:
    """Each module's file in the package, and its source."""
    for folder, place in ((ROOT / NAME, Path()), (ROOT / "kernels", Path("kernels"))):
        for file in sorted(folder.rglob("*.py")):
            path = place / file.relative_to(folder)
            if path.parts[0] != "training" and folder / "kernels" not in file.parents:
                yield path, relative_imports(file.read_text(), path)


def write_layout(folder: Path) -> None:
    sources = {path.as_posix(): source.encode() for path, source in modules()}
    digests = {path: hashlib.sha256(source).digest() for path, source in sources.items()}
    version = re.search(rb'^__version__ = "(\d+)\.', sources["__init__.py"], flags=re.MULTILINE)
    assert version is not None
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for path, source in sources.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_bytes(source)
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{hashlib.sha256(b''.join(digests.values())).hexdigest()[:7]}",
            "version": int(version[1]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()}},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_layout(Path(sys.argv[1]))
