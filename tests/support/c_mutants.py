"""The mutants of a C source that mutation.py tries: the same changes as in mutants.py, found in its text, whose format is uniform.

An operator has a space on both sides exactly if it has two operands. What only a compiler for other processors sees, behind a second #if, is left alone: the
library with the mutant is built for the compiler's default instructions, which takes seconds.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tests.support.mutants import Mutant

_EXCHANGED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&": "|", "|": "&", "^": "&",
    "<<": ">>", ">>": "<<", "&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "*=": "+=",
}  # fmt: skip
_TOKEN = re.compile(
    r"(?P<skipped>/\*.*?\*/|\"[^\"\n]*\"|^\s*#(?:[^\n]*\\\n)*[^\n]*|__attribute__\(\(.*?\)\)|^typedef[^\n]*)"
    r"|(?P<integer>(?<![\w.])(?:0[xX][0-9a-fA-F]+|\d+)[uUlL]*(?![\w.]))"
    r"|(?P<float>(?<![\w.])\d[\d.]*(?:[eE][-+]?\d+)?(?=f?\b)(?!\w*p))"
    r"|(?P<name>(?<!\w)(?:sin|cos)(?=\())"
    r"|(?P<condition>(?<=if )\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))"
    r"|(?P<operator>(?<=\s)(?:<<|>>|&&|\|\||[-+*]=|[<>=!]=|[<>+*/%&|^-])(?=\s))"
    r"|(?P<statement>(?<=^)[ ]+[^\s/]+ (?:[-+*|]?=) [^;\n]*;$|(?<=^)[ ]+\w+\([^;\n]*\);$)",
    re.DOTALL | re.MULTILINE,
)  # fmt: skip
_FUNCTION = re.compile(r"^(?!typedef|struct \w+ \{|enum)[A-Za-z][^;{}=]*?(\w+)\([^;{}]*\) \{\n.*?^\}", re.DOTALL | re.MULTILINE)


def _replacements(kind: str, text: str) -> Iterator[str]:
    match kind:
        case "operator":
            yield _EXCHANGED[text]
        case "integer":
            digits = text.rstrip("uUlL")
            number = int(digits, 0) + 1
            yield (hex(number) if digits[:2] in ("0x", "0X") else str(number)) + text[len(digits) :]
        case "float":
            value = float(text)
            yield repr(value + 1.0 if value in (0.0, 1.0) else value * 1.01)
        case "name":
            yield "cos" if text == "sin" else "sin"
        case "condition":
            yield f"(!{text})"
        case "statement":
            yield ";"


def _own_lines(source: str) -> set[int]:
    """The lines that every compiler sees: those outside of #if, but for the one around a whole file, which ends with it."""
    lines = source.rstrip().splitlines()
    begun: list[int] = []
    depths = []
    around = len(lines)  # where the #if around a whole file begins
    for number, line in enumerate(lines, 1):
        if line.startswith("#if"):
            begun.append(number)
        elif line.startswith("#endif"):
            first = begun.pop()
            around = first if number == len(lines) else around
        depths.append(len(begun))
    return {number for number, depth in enumerate(depths, 1) if depth == int(number > around)}


def _changes(source: str, begin: int, end: int) -> Iterator[tuple[int, int, str, str]]:
    """Where a change begins and ends, what it replaces, and by what."""
    place = begin
    while found := _TOKEN.search(source, place, end):
        kind, text = str(found.lastgroup), found[0]
        if kind != "skipped":
            for replacement in _replacements(kind, text):
                yield found.start() + len(text) - len(text.lstrip()), found.end(), text.strip(), replacement
        # below a condition or a statement there are other places
        place = found.start() + len(text) - len(text.lstrip()) + 1 if kind in ("condition", "statement") else found.end()


def c_mutants(source: str) -> list[Mutant]:
    """Every change of one place of a function, in the order of the source."""
    lines, own = source.splitlines(), _own_lines(source)
    found = []
    for function in _FUNCTION.finditer(source):
        code = re.sub(r"/\*.*?\*/", "", function[0], flags=re.DOTALL)
        span = tuple(source.count("\n", 0, place) + 1 for place in function.span())
        body = source.index("{\n", function.start())
        for number, (begin, end, text, replacement) in enumerate(_changes(source, body, function.end())):
            line, last = (source.count("\n", 0, place) + 1 for place in (begin, end))
            if line not in own:
                continue
            key = hashlib.sha256(f"{code}\0{number}".encode()).hexdigest()[:16]
            # what stands on both sides tells it from others of the line
            before = f"{source[:begin].split()[-1]} {text} {source[end:].split()[0]}" if len(text) < 4 else text
            changed = source[:begin] + replacement + source[end:]
            found.append(Mutant(function[1], (line, last), (span[0], span[1]), lines[line - 1].strip(), before, replacement, changed, key))
    return found


def build(folder: Path, path: Path) -> bool:
    """Compile the loops in `folder` into the library `path`, which passes for that of the sources beside it; False if they do not compile."""
    sources = sorted(path.parent.glob("native/*.[ch]"))
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]  # as setup.py
    compiler = shutil.which(str(sysconfig.get_config_var("CC") or "cc").split()[0]) or "cc"
    flags = ["-std=gnu11", "-O1", "-w", "-fno-math-errno", "-fno-trapping-math", "-DGCLKERN_BASELINE", f'-DGCLKERN_SOURCES="{digest}"', "-shared", "-fPIC"]
    files = [str(folder / name) for name in ("library.c", "baseline.c", "call.c")]
    command = [compiler, *flags, f"-I{sysconfig.get_path('include')}", "-o", str(path), *files, "-lm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
