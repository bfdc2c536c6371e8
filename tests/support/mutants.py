"""The mutants of a source file that mutation.py tries: changes of one place, in Triton or in Python, such as a programmer's slip would make.

A comparison or an operator is exchanged for its neighbour, a term of a sum or a mask left out, a constant moved, a maximum made a minimum, the arms of a
selection swapped, a condition negated, a store or an addition in place left out.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin", "amin": "amax", "sub_": "add_", "cos": "sin", "sin": "cos"}
# Where a change says nothing about the numbers: errors and their words, imports, and what only tells the compiler how to schedule.
_SKIPPED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
_SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "bases")
_SKIPPED_KEYWORDS = ("num_warps", "num_stages", "enable_fp_fusion", "is_pure", "pack")


@dataclass(frozen=True)
class Mutant:
    function: str  # the outermost function or class around it; "" for the module
    lines: tuple[int, int]  # of what is replaced, the first and the last
    around: tuple[int, int]  # of `function`
    text: str  # of the first line
    before: str
    after: str
    source: str  # the changed file, whose other lines keep their numbers
    key: str  # stays as long as the code of the function around it does; comments and docstrings may change

    def __str__(self) -> str:
        return f"{self.lines[0]}: {self.before} -> {self.after}"


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The nodes to replace, each with its replacement."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            changed = copy.copy(node)
            changed.ops = [_COMPARISONS[type(operator)]()]
            yield node, f"({ast.unparse(changed)})"
        case ast.BinOp(op=ast.BitOr(), right=ast.Constant(value=None)):  # a type
            return
        case ast.BinOp():
            if type(node.op) in _OPERATORS:
                other = copy.copy(node)
                other.op = _OPERATORS[type(node.op)]()
                yield node, f"({ast.unparse(other)})"
            if isinstance(node.op, ast.Add | ast.Sub | ast.BitAnd | ast.BitOr):
                yield node, f"({ast.unparse(node.left)})"
        case ast.BoolOp(values=[first, *_]):
            swapped = copy.copy(node)
            swapped.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, f"({ast.unparse(swapped)})"
            yield node, f"({ast.unparse(first)})"
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield node, f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool() as flag):
            yield node, str(not flag)
        case ast.Constant(value=int() as number):
            yield node, str(number + 1)
        case ast.Constant(value=float() as number):
            yield node, repr(number + 1.0 if number in (0.0, 1.0) else number * 1.01)
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            exchanged = copy.copy(node)
            exchanged.args = [condition, no, yes]
            yield node, ast.unparse(exchanged)
        case ast.Call(func=ast.Attribute(attr=name)) if name in _NAMES:
            renamed = copy.copy(node)
            renamed.func = copy.copy(node.func)
            renamed.func.attr = _NAMES[name]  # type: ignore[attr-defined]
            yield node, ast.unparse(renamed)
        case ast.IfExp(test=test, body=yes, orelse=no):
            yield node, f"({ast.unparse(ast.IfExp(test, no, yes))})"
        case ast.If(test=ast.Name() | ast.Attribute() | ast.Call() as test):
            yield test, f"(not {ast.unparse(test)})"
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield node, "pass"


def _places(node: ast.AST) -> Iterator[ast.AST]:
    """What may be changed below a node."""
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED_FIELDS:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _SKIPPED) or (isinstance(child, ast.keyword) and child.arg in _SKIPPED_KEYWORDS):
                continue
            yield child
            yield from _places(child)


def _without_docstrings(node: ast.stmt) -> str:
    code = copy.deepcopy(node)
    for part in ast.walk(code):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            del part.body[0]
    return ast.unparse(code)


def mutants(source: str) -> list[Mutant]:
    """Every change of one place, in the order of the source."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []
    for outer in ast.parse(source).body:
        if isinstance(outer, _SKIPPED):
            continue
        code, number = _without_docstrings(outer), 0
        name = outer.name if isinstance(outer, ast.FunctionDef | ast.ClassDef) else ""
        for node in (outer, *_places(outer)):
            for replaced, text in _changes(node):
                assert replaced.end_lineno is not None and replaced.end_col_offset is not None
                first, last = offset(replaced.lineno, replaced.col_offset), offset(replaced.end_lineno, replaced.end_col_offset)
                key = hashlib.sha256(f"{code}\0{number}".encode()).hexdigest()[:16]
                number += 1
                end = len(text) - text.endswith(")")
                changed = source[:first] + text[:end] + "\n" * source.count("\n", first, last) + text[end:] + source[last:]
                span, around = (replaced.lineno, replaced.end_lineno), (outer.lineno, outer.end_lineno or outer.lineno)
                found.append(Mutant(name, span, around, lines[replaced.lineno - 1].strip(), ast.unparse(replaced), text, changed, key))
    return found
