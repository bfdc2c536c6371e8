"""Which code a result belongs to: hashes that change with the code and not with its comments, docstrings or blank lines.

A result file keeps the hash of what it measured, and `python -m benchmarks.render_results` calls its figures stale once the code has another one.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".c", ".h", ".cpp"}


def code_of(source: str) -> str:
    """Python source without comments, docstrings and blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.add((node.body[0].lineno, node.body[0].col_offset))
    lines = source.splitlines()
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(source).readline))):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.start in docstrings):
            (first, start), (last, end) = token.start, token.end
            lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "\n".join(stripped for line in lines if (stripped := line.rstrip()))


def code_hash(paths: Iterable[Path]) -> str:
    """Twelve digits that change when the code of one of the files, or its name, does."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_text()
        content = (code_of(text) if path.suffix == ".py" else text).encode()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _sources(*folders: Path) -> Iterable[Path]:
    return (path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES)


def kernels_hash() -> str:
    """What a GPU's results belong to: the files in kernels/."""
    return code_hash(_sources(ROOT / "kernels"))


def torch_hash() -> str:
    """What a CPU's results belong to: the loss library without the kernels and without what needs several processes."""
    package = ROOT / "gclkern"
    elsewhere = {package / name for name in ("kernels", "training", "distributed")}
    return code_hash(path for path in _sources(package) if elsewhere.isdisjoint(path.parents))


def training_hash() -> str:
    """What trained networks belong to: train.py and all that it stands on."""
    package = ROOT / "gclkern"
    return code_hash([ROOT / "train.py", *(path for path in _sources(package) if package / "kernels" not in path.parents), *_sources(ROOT / "kernels")])
