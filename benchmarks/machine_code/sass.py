"""Reading NVIDIA machine code: instructions, the loops they form, and the cost of a loop.

The loops are the natural loops of the control-flow graph, so a slow path that the assembler moved behind the end of the kernel still belongs to the loop
that branches to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# Opcodes that do a loop's work: moving data, matrix products, special functions. A loop without any of these, such as one that waits at a barrier, is never the
# hot one.
WORK = ("LDG", "LDGSTS", "UTMALDG", "STG", "UTMASTG", "HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "MUFU")
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
    r"(?:[^\S\n]*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/)?",  # the encoding, whose second half holds what the scheduler is told
    re.MULTILINE,
)
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET")
_BRANCHES = ("BRA", "JMP")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # with its suffixes: LDG.E.128
    operands: str
    control: int = 0  # the upper 64 bits of its encoding; 0 where the listing has none

    @property
    def stall(self) -> int:
        """Clocks until the warp may issue its next instruction."""
        return self.control >> 41 & 15

    @property
    def result_board(self) -> int | None:
        """The scoreboard, 0 to 5, that it releases when its result is there."""
        return self._board(46)

    @property
    def operands_board(self) -> int | None:
        """The scoreboard that it releases when its operands are read, so that others may overwrite them."""
        return self._board(49)

    def _board(self, shift: int) -> int | None:
        board = self.control >> shift & 7
        return board if self.control and board < 6 else None

    @property
    def waits(self) -> tuple[int, ...]:
        """The scoreboards that it waits for."""
        return tuple(board for board in range(6) if self.control >> 52 + board & 1)

    @property
    def mnemonic(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        if self.mnemonic not in _BRANCHES:
            return None
        match = _ADDRESS.search(self.operands)
        return int(match[1], 16) if match else None

    @property
    def conditional(self) -> bool:
        """Whether execution may go on behind it: a predicate stands before the opcode or, for uniform branches, among the operands."""
        return self.predicate is not None or "," in self.operands

    @property
    def load_bits(self) -> int | None:
        """How many bits of global memory one thread reads with it; None for anything else and for bulk copies."""
        return self.bits if self.mnemonic in ("LDG", "LDGSTS") else None

    @property
    def bits(self) -> int:
        """How many bits of memory one thread accesses with this load or store."""
        suffixes = self.opcode.split(".")
        for width in (256, 128, 64):
            if str(width) in suffixes:
                return width
        for width in (16, 8):
            if f"U{width}" in suffixes or f"S{width}" in suffixes:
                return width
        return 32


@dataclass(frozen=True)
class Code:
    """A stretch of instructions that runs once per pass: a loop's body, or a kernel without loops."""

    instructions: tuple[Instruction, ...]  # between the loop's label and its back-branch
    slow_paths: int  # branches and calls other than the loop's own back-branch

    def count(self, prefix: str) -> int:
        """How many instructions have this opcode, alone or with suffixes: "MUFU.EX2", "LDG"."""
        return sum(i.opcode == prefix or i.opcode.startswith(prefix + ".") for i in self.instructions)

    @property
    def opcodes(self) -> tuple[str, ...]:
        return tuple(i.opcode for i in self.instructions)

    @property
    def load_bits(self) -> tuple[int, ...]:
        """Widths of the global loads, one entry per instruction."""
        return tuple(bits for i in self.instructions if (bits := i.load_bits) is not None)

    def instructions_per(self, work: str) -> float:
        """Instructions for each `work` ("MUFU.EX2"). The assembler may unroll: this ratio does not see it."""
        count = self.count(work)
        if count == 0:
            raise ValueError(f"the code has no {work}: {sorted(set(self.opcodes))}")
        return len(self.instructions) / count

    def instructions_per_logit(self, logits: float) -> float:
        """Instructions per logit, when one thread handles `logits` of them in one pass."""
        return len(self.instructions) / logits


@dataclass(frozen=True)
class Loop:
    header: int
    back_branch: int
    body: frozenset[int]  # addresses, out-of-line parts included
    code: Code


@dataclass(frozen=True)
class Program:
    instructions: tuple[Instruction, ...]

    @classmethod
    def parse(cls, text: str) -> Program:
        """From what `cuobjdump -sass` prints for one kernel."""
        found = [Instruction(int(m[1], 16), m[2], m[3], m[4], int(m[5] or "0", 16)) for m in _LINE.finditer(text)]
        # Behind the last instruction stand an endless branch to itself and padding.
        kept = [i for i in found if i.mnemonic != "NOP" and not (i.target == i.address and i.predicate is None)]
        if not kept:
            raise ValueError("no instructions in the disassembly")
        return cls(tuple(kept))

    @property
    def body(self) -> Code:
        """The whole kernel as if it were one loop's body."""
        return Code(self.instructions, _slow_paths(self.instructions, None))

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All natural loops; loops with one header are one loop."""
        blocks, successors = self.blocks
        dominators = _dominators(successors)
        found: dict[int, tuple[set[int], int]] = {}
        predecessors: dict[int, list[int]] = {b: [] for b in successors}
        for block, nexts in successors.items():
            for nxt in nexts:
                predecessors[nxt].append(block)
        for block, nexts in successors.items():
            for header in nexts:
                if block in dominators and header in dominators[block]:
                    members, last = found.get(header, ({header}, 0))
                    stack = [block]
                    while stack:
                        member = stack.pop()
                        if member not in members:
                            members.add(member)
                            stack.extend(p for p in predecessors[member] if p in dominators)
                    branch = blocks[block][-1].address
                    # Where several branches return to one header, the one in line ends the loop; a slow path returns from further away.
                    found[header] = (members, branch if last == 0 else min(last, branch) if min(last, branch) >= header else max(last, branch))
        loops = []
        for header, (members, back_branch) in sorted(found.items()):
            body = frozenset(i.address for member in members for i in blocks[member])
            code = tuple(i for i in self.instructions if header <= i.address <= back_branch)
            loops.append(Loop(header, back_branch, body, Code(code, _slow_paths(code, back_branch))))
        return tuple(loops)

    def hot_loop(self, contains: str | None = None) -> Code:
        """The innermost loop that does work (`contains`: with this opcode); the whole kernel where there is none.

        Of several, the one that takes the fewest instructions for each `contains` (a main loop beside its masked or not unrolled rest), without it the longest.
        """

        def works(loop: Loop) -> bool:
            return any(loop.code.count(opcode) for opcode in ((contains,) if contains else WORK))

        working = [loop for loop in self.loops if works(loop)]
        innermost = [loop for loop in working if not any(other.body < loop.body for other in working)]
        if not innermost:
            return self.body
        codes = [loop.code for loop in innermost]
        return max(codes, key=lambda code: len(code.instructions)) if contains is None else min(codes, key=lambda code: code.instructions_per(contains))

    @cached_property
    def blocks(self) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
        """Basic blocks by their first address, and the blocks that may follow each."""
        known = {i.address for i in self.instructions}
        leaders = {self.instructions[0].address}
        for position, instruction in enumerate(self.instructions):
            if instruction.target in known:
                leaders.add(instruction.target)
            if (instruction.target is not None or instruction.mnemonic in _ENDS) and position + 1 < len(self.instructions):
                leaders.add(self.instructions[position + 1].address)
        blocks: dict[int, list[Instruction]] = {}
        for instruction in self.instructions:
            if instruction.address in leaders:
                blocks[instruction.address] = current = []
            current.append(instruction)
        starts = list(blocks)
        successors: dict[int, list[int]] = {}
        for position, start in enumerate(starts):
            last = blocks[start][-1]
            nexts = [last.target] if last.target in blocks else []
            falls_through = last.conditional or (last.target is None and last.mnemonic not in _ENDS)
            if falls_through and position + 1 < len(starts):
                nexts.append(starts[position + 1])
            successors[start] = [n for n in nexts if n is not None]
        return blocks, successors


def _slow_paths(instructions: Sequence[Instruction], back_branch: int | None) -> int:
    return sum((i.target is not None and i.address != back_branch) or i.mnemonic in ("CALL", "BRX") for i in instructions)


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Blocks that every path from the first block to a block passes through; unreachable blocks are left out."""
    entry = next(iter(successors))
    order, stack = [], [entry]
    seen = {entry}
    while stack:
        block = stack.pop()
        order.append(block)
        for nxt in successors[block]:
            if nxt not in seen:
                seen.add(nxt)
                stack.append(nxt)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for nxt in successors[block]:
            predecessors[nxt].append(block)
    dominators = {block: set(order) for block in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in order:
            if block != entry:
                new = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
    return dominators
