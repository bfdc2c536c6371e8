"""Runs compiled kernels where there is no GPU: an interpreter of the PTX that Triton makes, all threads of a grid in step, in NumPy.

Triton's own interpreter runs a kernel's source, so it sees neither inline assembly nor the layouts, vector accesses, shuffles and tensor-core instructions
that the compiler chose. This one runs what a GPU would be given. It is stricter than a GPU: an access outside the storages of a launch's tensors or not
aligned to its width, a shuffle or a barrier that not all threads reach, and a register that nobody wrote are errors; shared memory starts as NaN.

It knows the instructions that the kernels of this package compile to (PTX ISA 8.8). Approximate ones give rounded exact results. Copies to shared memory and
products on Hopper's tensor cores are done at once, unless PTX_DEFERRED is set: then each is done as late as its wait allows, and until a copy is waited for,
its place holds NaN. So a missing wait, or a stage that is overwritten while a product still reads it, changes the result.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]  # one element a thread

_WARP = 32
_BLOCKS_AT_A_TIME = 64
_SWIZZLED = 1 << 62  # of a matrix descriptor: swizzled by 128 bytes
DEFERRED = "PTX_DEFERRED" in os.environ
_LIMIT = 5_000_000  # instructions of one launch: a loop that does not end
_DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
_BINARY = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_UNARY = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt, "rcp": np.reciprocal, "rsqrt": lambda value: 1 / np.sqrt(value), "ex2": np.exp2,
    "lg2": np.log2, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
_TOKEN = re.compile(r"[^\s,\[\]{}]+|[\[\]{}]")


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # the predicate register, after "!" where it is negated
    name: str
    suffixes: tuple[str, ...]
    operands: tuple[Any, ...]  # names; tuples of names for vectors; lists of names for addresses
    text: str

    @property
    def dtype(self) -> str:
        return self.suffixes[-1]


@dataclass(frozen=True)
class Program:
    """One kernel."""

    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @staticmethod
    @functools.cache
    def parse(text: str) -> Program:
        header, _, body = text.partition(".entry")[2].partition("\n{")
        body = re.sub(r"//[^\n]*|^\s*\.(loc|pragma)[^\n]*", "", body.partition("\n}\n")[0], flags=re.MULTILINE)
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for statement in body.split(";"):
            statement = statement.strip()
            while match := re.match(r"(?:(\$\w+):|[{}])\s*", statement):  # labels, and braces around inline assembly
                if match[1]:
                    labels[match[1]] = len(instructions)
                statement = statement[match.end() :]
            if statement and not statement.startswith("."):
                instructions.append(_instruction(statement))
        return Program(tuple(re.findall(r"\b(\w+_param_\d+)", header)), tuple(instructions), labels)


def _instruction(statement: str) -> Instruction:
    guard, tokens = None, statement.split(None, 1)
    if tokens[0].startswith("@"):
        guard, tokens = tokens[0][1:], tokens[1].split(None, 1)
    name, *suffixes = tokens[0].split(".")
    operands: list[Any] = []
    group: list[str] | None = None
    for token in _TOKEN.findall(tokens[1]) if len(tokens) > 1 else ():
        if token in "[{":
            group = []
        elif token == "]":
            operands.append(group)
            group = None
        elif token == "}":
            operands.append(tuple(group or ()))
            group = None
        elif group is not None:
            group += [part for part in token.split("+") if part]
        else:
            operands += token.split("|")  # the second half of a shuffle's result is a predicate
    return Instruction(guard, name, tuple(suffixes), tuple(operands), statement)


class Buffers:
    """The memory that a launch may touch: the storages of its tensors."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        ordered = sorted({span for span in spans if span[1]})
        self.starts = np.array([start for start, _ in ordered], dtype=np.int64)
        self.sizes = np.array([size for _, size in ordered], dtype=np.int64)
        self.bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)) for start, size in ordered]

    def places(self, address: Lanes, width: int) -> list[tuple[NDArray[np.uint8], Lanes, Lanes]]:
        """For each buffer that is met: its bytes, which lanes meet it, and where."""
        which = np.searchsorted(self.starts, address, side="right") - 1
        inside = (which >= 0) & (address + width <= self.starts[which] + self.sizes[which]) if len(self.starts) else np.zeros(address.shape, np.bool_)
        if not inside.all():
            lane = int(np.flatnonzero(~inside)[0])
            at = int(address[lane])
            near = int(which[lane])
            raise MemoryError(
                f"{width} bytes at offset {at - int(self.starts[near])} of a buffer of {int(self.sizes[near])} bytes"
                if near >= 0
                else f"address {at:#x} is in no buffer"
            )
        return [(self.bytes[index], which == index, address - self.starts[index]) for index in np.unique(which)]


def _rounded_to_bf16(value: Lanes) -> Lanes:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _from_bits(bits: Lanes, kind: str) -> Lanes:
    """Numbers of a matrix instruction's operand as float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & 0xFFFFE000).view(np.float32)  # tf32: the last 13 bits are not read


class Groups:
    """Work that each thread has begun, by the number of its group, and that waits to be done."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)  # groups of each thread
        self.pending: list[tuple[Lanes, Lanes, Callable[[Lanes], None]]] = []

    def begin(self, mask: Lanes, work: Callable[[Lanes], None]) -> None:
        """`work` is called with the threads for which it is to be done."""
        self.pending.append((mask.copy(), self.committed.copy(), work))

    def commit(self, mask: Lanes) -> None:
        self.committed = self.committed + mask

    def wait(self, mask: Lanes, allowed: int) -> None:
        """Do, for these threads, all but the last `allowed` groups."""
        left = []
        for waiting, group, work in self.pending:
            ready = waiting & mask & (group < self.committed - allowed)
            if ready.any():
                work(ready)
            if (waiting & ~ready).any():
                left.append((waiting & ~ready, group, work))
        self.pending = left


class Machine:
    """Some blocks of a launch in step: at any time the threads that are furthest behind run."""

    def __init__(
        self, program: Program, grid: Sequence[int], blocks: NDArray[np.int64], threads: int, arguments: Sequence[int], buffers: Buffers, shared: int
    ) -> None:
        self.program, self.buffers, self.threads, self.blocks = program, buffers, threads, len(blocks)
        lanes = self.blocks * threads
        self.lanes = lanes
        block = np.repeat(np.arange(self.blocks), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), self.blocks)
        number = blocks[block]
        x, y = (*grid, 1)[:2]
        special: dict[str, Lanes] = {"tid.x": thread, "ctaid.x": number % x, "ctaid.y": number // x % y, "ctaid.z": number // (x * y)}
        self.registers: dict[str, Lanes] = {f"%{name}": value.astype(np.uint32) for name, value in special.items()}
        self.registers["global_smem"] = np.zeros(lanes, np.uint64)
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        self.shared_size = shared
        self.shared = np.full(self.blocks * shared, 0xFF, np.uint8)
        self.shared_base = block * shared
        self.mask = np.ones(lanes, np.bool_)  # of the threads that run now
        self.whole = True
        self.ready = {0: self.mask}  # the threads that may go on, by their next instruction
        self.waiting, self.done = np.zeros((2, lanes), np.bool_)  # at a barrier, and at the end
        self.resume = np.zeros(lanes, np.int64)  # where waiting threads go on
        self.copies, self.matrix_products = Groups(lanes), Groups(lanes)

    def run(self) -> None:
        for _ in range(_LIMIT):
            if not self.ready:
                if self.done.all():
                    return
                self._release()
            at = min(self.ready)
            self._activate(self.ready.pop(at))
            self._step(at, self.program.instructions[at])
        raise RuntimeError(f"{_LIMIT} instructions and no end")

    def _release(self) -> None:
        """Blocks all of whose threads have come to the barrier go on."""
        arrived = (self.waiting | self.done).reshape(self.blocks, self.threads).all(1)
        released = self.waiting & np.repeat(arrived, self.threads)
        if not released.any():
            raise RuntimeError("threads wait at a barrier that others never reach")
        self.waiting &= ~released
        self.ready = {int(at): released & (self.resume == at) for at in np.unique(self.resume[released])}

    def _step(self, at: int, instruction: Instruction) -> None:
        """One instruction of the threads that run now, and where they go on."""
        here, taken = self.mask, self._guard(instruction)
        if instruction.name == "bar":
            self.waiting |= here
            self.resume[here] = at + 1
        elif instruction.name == "ret":
            self.done |= taken
            self._join(at + 1, here & ~taken)
        elif instruction.name == "bra":
            self._join(self.program.labels[instruction.operands[0]], taken)
            self._join(at + 1, here & ~taken)
        else:
            if taken is not here:
                self._activate(taken)
            if taken is here or taken.any():
                try:
                    self._execute(instruction)
                except Exception as error:
                    error.add_note(f"at: {instruction.text}")
                    raise
            self._join(at + 1, here)

    def _execute(self, instruction: Instruction) -> None:
        if instruction.name in _BINARY:
            self._binary(instruction, _BINARY[instruction.name])
        elif instruction.name in _UNARY:
            self._unary(instruction, _UNARY[instruction.name])
        else:
            getattr(self, f"_{instruction.name}")(instruction)

    def _activate(self, mask: Lanes) -> None:
        self.mask = mask
        self.whole = bool(mask.all())

    def _join(self, at: int, mask: Lanes) -> None:
        if at in self.ready:
            self.ready[at] = self.ready[at] | mask
        elif mask.any():
            self.ready[at] = mask

    def _guard(self, instruction: Instruction) -> Lanes:
        if instruction.guard is None:
            return self.mask
        condition = self.registers[instruction.guard.removeprefix("!")]
        return self.mask & ~condition if instruction.guard.startswith("!") else self.mask & condition

    # Operands

    def read(self, name: str, kind: str) -> Lanes:
        dtype = np.dtype(_DTYPES[kind])
        register = self.registers.get(name)
        if register is not None:
            if register.dtype.itemsize != dtype.itemsize:  # a shift's count, a narrow number in a wide register
                register = register.astype(np.dtype(f"u{dtype.itemsize}"))
            return register.view(dtype)
        if name.startswith("0f"):
            return np.full(self.lanes, int(name[2:], 16), np.uint32).view(dtype)
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", name) is None:
            raise LookupError(f"{name} was never written")
        if kind == "pred":
            return np.full(self.lanes, int(name, 0) != 0)
        return np.full(self.lanes, int(name, 0) % (1 << (8 * dtype.itemsize)), dtype=f"u{dtype.itemsize}").view(dtype)

    def write(self, name: str, value: Lanes) -> None:
        if name == "_":
            return
        value = np.ascontiguousarray(value)
        if value.dtype != np.bool_:
            value = value.view(f"u{value.dtype.itemsize}")
        old = self.registers.get(name)
        if not self.whole and old is not None:
            value = np.where(self.mask, value, old)
        self.registers[name] = value

    def _sources(self, instruction: Instruction) -> list[Lanes]:
        return [self.read(name, instruction.dtype) for name in instruction.operands[1:]]

    def _address(self, operand: list[str]) -> Lanes:
        base, *offsets = operand
        address = self.registers[base].astype(np.int64)
        return address + sum(int(offset, 0) for offset in offsets)

    def _float(self, instruction: Instruction, value: Lanes) -> None:
        if value.dtype == np.float32:
            if "ftz" in instruction.suffixes:
                value = np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)
            if "sat" in instruction.suffixes:
                value = np.where(np.isnan(value), np.float32(0), np.clip(value, 0, 1)).astype(np.float32)
        self.write(instruction.operands[0], value)

    # Moves and conversions

    def _mov(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        if isinstance(target, tuple):
            width = np.dtype(_DTYPES[instruction.dtype]).itemsize // len(target)
            parts = self.read(source, instruction.dtype).view(f"u{width}").reshape(self.lanes, len(target))
            for index, name in enumerate(target):
                self.write(name, parts[:, index])
        elif isinstance(source, tuple):
            width = np.dtype(_DTYPES[instruction.dtype]).itemsize // len(source)
            parts = np.stack([self.read(name, f"b{8 * width}") for name in source], axis=1)
            self.write(target, np.ascontiguousarray(parts).view(_DTYPES[instruction.dtype])[:, 0])
        else:
            self.write(target, self.read(source, instruction.dtype).copy())

    def _cvt(self, instruction: Instruction) -> None:
        to, kind = instruction.suffixes[-2:]
        if to in ("bf16x2", "f16x2"):
            high, low = (self.read(name, "f32") for name in instruction.operands[1:])
            halves = [_rounded_to_bf16(part) if to == "bf16x2" else part.astype(np.float16).view(np.uint16) for part in (low, high)]
            self.write(instruction.operands[0], np.stack(halves, axis=1).view(np.uint32)[:, 0])
        else:
            bits = self.read(instruction.operands[1], "b16" if kind == "bf16" else kind)
            number = _from_bits(bits, kind) if kind == "bf16" else bits
            self.write(instruction.operands[0], _rounded_to_bf16(number.astype(np.float32)) if to == "bf16" else number.astype(_DTYPES[to]))

    def _selp(self, instruction: Instruction) -> None:
        target, yes, no, condition = instruction.operands
        self.write(target, np.where(self.registers[condition], self.read(yes, instruction.dtype), self.read(no, instruction.dtype)))

    def _setp(self, instruction: Instruction) -> None:
        target, left, right, *other = instruction.operands
        a, b = self.read(left, instruction.dtype), self.read(right, instruction.dtype)
        result = _COMPARISONS[instruction.suffixes[0]](a, b)
        if instruction.dtype.startswith("f") and instruction.suffixes[0] == "ne":
            result &= ~(np.isnan(a) | np.isnan(b))  # ordered, unlike neu
        if other:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[instruction.suffixes[1]]
            result = combine(result, self.registers[other[0]])
        self.write(target, result)

    # Arithmetic

    def _binary(self, instruction: Instruction, operation: Callable[[Any, Any], Any]) -> None:
        a, b = self._sources(instruction)
        self._float(instruction, operation(a, b))

    def _unary(self, instruction: Instruction, operation: Callable[[Any], Any]) -> None:
        value = self._sources(instruction)[0]
        self._float(instruction, operation(value.astype(np.float64)).astype(value.dtype) if value.dtype == np.float32 else operation(value))

    def _mul(self, instruction: Instruction) -> None:
        if "wide" in instruction.suffixes or "hi" in instruction.suffixes:
            a, b = self._sources(instruction)
            product = a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}") * b.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
            self.write(instruction.operands[0], product if "wide" in instruction.suffixes else (product >> (8 * a.dtype.itemsize)).astype(a.dtype))
        else:
            self._binary(instruction, np.multiply)

    def _mad(self, instruction: Instruction) -> None:
        a, b = (self.read(name, instruction.dtype) for name in instruction.operands[1:3])
        wide = "wide" in instruction.suffixes
        kind = f"{instruction.dtype[0]}{2 * int(instruction.dtype[1:])}" if wide else instruction.dtype
        dtype = _DTYPES[kind]
        self.write(instruction.operands[0], a.astype(dtype) * b.astype(dtype) + self.read(instruction.operands[3], kind))

    def _fma(self, instruction: Instruction) -> None:
        a, b, c = (value.astype(np.float64) for value in self._sources(instruction))  # the product is exact there
        self._float(instruction, (a * b + c).astype(np.float32))

    def _div(self, instruction: Instruction) -> None:
        if instruction.dtype.startswith("f"):
            self._binary(instruction, np.divide)
        else:
            a, b = self._sources(instruction)
            quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
            self.write(instruction.operands[0], (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype))

    def _max(self, instruction: Instruction) -> None:
        self._binary(instruction, np.maximum if "NaN" in instruction.suffixes or not instruction.dtype.startswith("f") else np.fmax)

    def _min(self, instruction: Instruction) -> None:
        self._binary(instruction, np.minimum if "NaN" in instruction.suffixes or not instruction.dtype.startswith("f") else np.fmin)

    # Bits

    def _shift(self, instruction: Instruction, operation: Callable[[Any, Any], Any]) -> None:
        value = self.read(instruction.operands[1], instruction.dtype)
        count = self.read(instruction.operands[2], "u32")
        bits = 8 * value.dtype.itemsize
        shifted = operation(value, np.minimum(count, bits - 1).astype(value.dtype))
        beyond = np.where(value < 0, -1, 0).astype(value.dtype) if operation is np.right_shift and value.dtype.kind == "i" else value.dtype.type(0)
        self.write(instruction.operands[0], np.where(count >= bits, beyond, shifted))

    def _shl(self, instruction: Instruction) -> None:
        self._shift(instruction, np.left_shift)

    def _shr(self, instruction: Instruction) -> None:
        self._shift(instruction, np.right_shift)

    def _shf(self, instruction: Instruction) -> None:
        low, high, count = self._sources(instruction)
        count = count & 31 if "wrap" in instruction.suffixes else np.minimum(count, 32)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        right = "r" in instruction.suffixes
        self.write(
            instruction.operands[0], (both >> count.astype(np.uint64) if right else (both << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        )

    def _bfe(self, instruction: Instruction) -> None:
        value = self.read(instruction.operands[1], instruction.dtype)
        at, length = (int(name, 0) for name in instruction.operands[2:])
        bits = 8 * value.dtype.itemsize
        left = value.dtype.type(bits - at - length)
        self.write(instruction.operands[0], (value << left) >> value.dtype.type(bits - length))

    def _lop3(self, instruction: Instruction) -> None:
        *sources, table = instruction.operands[1:]
        a, b, c = (self.read(name, "b32") for name in sources)
        result = np.zeros(self.lanes, np.uint32)
        for index in range(8):
            if int(table, 0) >> index & 1:
                result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        self.write(instruction.operands[0], result)

    def _prmt(self, instruction: Instruction) -> None:
        low, high, selectors = (self.read(name.removesuffix("U"), "b32") for name in instruction.operands[1:])
        parts = np.stack([low, high], axis=1).view(np.uint8)
        chosen = np.stack([selectors >> 4 * index & 15 for index in range(4)], axis=1)
        found = np.take_along_axis(parts, (chosen & 7).astype(np.int64), axis=1)
        sign = np.where(found & 0x80, 0xFF, 0).astype(np.uint8)
        self.write(instruction.operands[0], np.where(chosen & 8, sign, found).view(np.uint32)[:, 0])

    # Memory

    @staticmethod
    def _names(operand: Any) -> tuple[str, ...]:
        return operand if isinstance(operand, tuple) else (operand,)

    @staticmethod
    def _bits(instruction: Instruction) -> np.dtype[Any]:
        """The unsigned type of the instruction's width."""
        return np.dtype(f"u{np.dtype(_DTYPES[instruction.dtype]).itemsize}")

    def _aligned(self, address: Lanes, width: int) -> Lanes:
        met = address[self.mask]
        if (met % width).any():
            raise MemoryError(f"an access of {width} bytes at {int(met[met % width != 0][0]):#x}")
        return met

    def _ld(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        if instruction.suffixes[0] == "param":
            dtype = np.dtype(_DTYPES[instruction.dtype])
            raw = self.arguments[source[0]] % (1 << (8 * dtype.itemsize))
            self.write(target, np.full(self.lanes, raw, dtype=f"u{dtype.itemsize}"))
            return
        names, dtype = self._names(target), self._bits(instruction)
        read = self._shared_read if instruction.suffixes[0].startswith("shared") else self._global_read
        values = np.zeros((self.lanes, len(names)), dtype)
        values[self.mask] = read(self._address(source), dtype, len(names))
        for index, name in enumerate(names):
            self.write(name, values[:, index])

    def _st(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        names, dtype = self._names(source), self._bits(instruction)
        values = np.stack([self.read(name, instruction.dtype).view(dtype) for name in names], axis=1)[self.mask]
        write = self._shared_write if instruction.suffixes[0].startswith("shared") else self._global_write
        write(self._address(target), np.ascontiguousarray(values))

    def _global_read(self, address: Lanes, dtype: np.dtype[Any], count: int) -> Lanes:
        width = dtype.itemsize * count
        met = self._aligned(address, width)
        values = np.zeros((len(met), width), np.uint8)
        for memory, lanes, offset in self.buffers.places(met, width):
            values[lanes] = memory[offset[lanes][:, None] + np.arange(width)]
        return values.view(dtype)

    def _global_write(self, address: Lanes, values: Lanes) -> None:
        raw = values.view(np.uint8)
        met = self._aligned(address, raw.shape[1])
        for memory, lanes, offset in self.buffers.places(met, raw.shape[1]):
            memory[offset[lanes][:, None] + np.arange(raw.shape[1])] = raw[lanes]

    def _shared_at(self, address: Lanes, width: int) -> Lanes:
        met = self._aligned(address, width)
        if len(met) and (met.min() < 0 or met.max() + width > self.shared_size):
            raise MemoryError(f"shared memory of {self.shared_size} bytes at {int(met.max())}")
        places: Lanes = (met + self.shared_base[self.mask])[:, None] + np.arange(width)
        return places

    def _shared_read(self, address: Lanes, dtype: np.dtype[Any], count: int) -> Lanes:
        return self.shared[self._shared_at(address, dtype.itemsize * count)].view(dtype)

    def _shared_write(self, address: Lanes, values: Lanes) -> None:
        raw = values.view(np.uint8)
        self.shared[self._shared_at(address, raw.shape[1])] = raw

    def _cp(self, instruction: Instruction) -> None:
        """cp.async: `size` bytes, of which those beyond `filled` become 0."""
        kind = instruction.suffixes[1]
        if kind == "commit_group":
            self.copies.commit(self.mask)
        elif kind == "wait_group":
            self.copies.wait(self.mask, int(instruction.operands[0], 0))
        elif kind == "wait_all":
            self.copies.commit(self.mask)
            self.copies.wait(self.mask, 0)
        else:
            self._copy(instruction)

    def _copy(self, instruction: Instruction) -> None:
        target, source, size, *filled = instruction.operands
        width = int(size, 0)
        values = np.zeros((self.lanes, width), np.uint8)
        wanted = self.mask if not filled else self.mask & (self.read(filled[0], "u32") > 0)
        mask = self.mask
        self.mask = wanted
        values[wanted] = self._global_read(self._address(source), np.dtype(np.uint8), width)
        self.mask = mask
        address = self._address(target)
        if not DEFERRED:
            self._shared_write(address, values[mask])
            return
        self._shared_write(address, np.full_like(values[mask], 0xFF))

        def land(lanes: Lanes) -> None:
            here, self.mask = self.mask, lanes
            self._shared_write(address, values[lanes])
            self.mask = here

        self.copies.begin(mask, land)

    def _fence(self, instruction: Instruction) -> None:
        """Accesses are in order here."""

    # Warps

    def _warps(self, value: Lanes) -> Lanes:
        """(warps, 32, ...), of which every warp is whole or idle."""
        running = self.mask.reshape(-1, _WARP)
        if (running.any(1) != running.all(1)).any():
            raise RuntimeError("part of a warp is not here")
        return value.reshape(-1, _WARP, *value.shape[1:])

    def _shfl(self, instruction: Instruction) -> None:
        mode = instruction.suffixes[1]
        names = list(instruction.operands)
        reached = names.pop(1) if len(names) == 6 else None
        target, source, by, _, members = names
        if int(members, 0) != -1:
            raise NotImplementedError("a shuffle of some lanes")
        lane = np.arange(_WARP)
        by_lane = self._warps(self.read(by, "u32")).astype(np.int64)
        wanted = {"bfly": lane ^ by_lane, "idx": by_lane % _WARP + 0 * lane, "up": lane - by_lane, "down": lane + by_lane}[mode]
        valid = (wanted >= 0) & (wanted < _WARP)
        values = self._warps(self.read(source, "b32"))
        self.write(target, np.take_along_axis(values, np.where(valid, wanted, lane), axis=1).reshape(-1))
        if reached is not None:
            self.write(reached, valid.reshape(-1))

    def _redux(self, instruction: Instruction) -> None:
        values = self._warps(self.read(instruction.operands[1], instruction.dtype))
        if instruction.suffixes[1] != "add":
            raise NotImplementedError("a reduction other than a sum")
        total = values.sum(axis=1).astype(values.dtype)
        self.write(instruction.operands[0], np.repeat(total, _WARP))

    # Matrices

    def _matrix_rows(self, operand: list[str], count: int) -> tuple[Lanes, Lanes]:
        """The lanes that hold the addresses of rows of `count` 8 x 8 matrices, lanes 8 i to 8 i + 7 those of matrix i, and where the rows are."""
        all_lanes = self.mask
        self.mask = all_lanes & np.tile(np.arange(_WARP) < 8 * count, self.lanes // _WARP)
        lanes, places = self.mask, self._shared_at(self._address(operand), 16)
        self.mask = all_lanes
        return lanes, places

    def _ldmatrix(self, instruction: Instruction) -> None:
        names = self._names(instruction.operands[0])
        count = len(names)
        rows = np.zeros((self.lanes, 16), np.uint8)
        lanes, places = self._matrix_rows(instruction.operands[1], count)
        rows[lanes] = self.shared[places]
        matrices = self._warps(rows.view(np.uint16))[:, : 8 * count].reshape(-1, count, 8, 8)
        if "trans" in instruction.suffixes:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, _WARP)  # lane 4 r + c has columns 2 c and 2 c + 1 of row r
        for index, name in enumerate(names):
            self.write(name, pairs[:, index].reshape(-1))

    def _stmatrix(self, instruction: Instruction) -> None:
        names = self._names(instruction.operands[1])
        count = len(names)
        pairs = np.stack([self._warps(self.read(name, "b32")) for name in names], axis=1)
        matrices = pairs.view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in instruction.suffixes:
            matrices = matrices.swapaxes(2, 3)
        rows = np.zeros((self.lanes // _WARP, _WARP, 16), np.uint8)
        rows[:, : 8 * count] = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 8 * count, 16)
        lanes, places = self._matrix_rows(instruction.operands[0], count)
        self.shared[places] = rows.reshape(-1, 16)[lanes]

    def _fragment(self, names: Sequence[str], kind: str) -> Lanes:
        """(warps, 8 groups, 4 lanes of a group, registers, numbers in a register), float32."""
        registers = np.stack([self.read(name, "b32") for name in names], axis=1)
        numbers = registers if kind == "tf32" else registers.view(np.uint16)
        return self._warps(_from_bits(numbers, kind)).reshape(-1, 8, 4, len(names), 1 if kind == "tf32" else 2)

    def _mma(self, instruction: Instruction) -> None:
        """d = a @ b + c of 16 x 8 numbers a warp, in float32."""
        target, a_names, b_names, c_names = instruction.operands
        kind = instruction.suffixes[6]
        a = self._fragment(a_names, kind)  # registers: rows g, g + 8 of the first half of k, then of the second
        b = self._fragment(b_names, kind)
        warps, halves = len(a), len(b_names)
        a = a.reshape(warps, 8, 4, halves, 2, -1).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, -1)
        b = b.transpose(0, 1, 3, 2, 4).reshape(warps, 8, -1)
        product = np.einsum("wmk,wnk->wmn", a.astype(np.float64), b.astype(np.float64)).reshape(warps, 2, 8, 4, 2)
        product = product.transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        for index, (name, added) in enumerate(zip(target, c_names, strict=True)):
            self.write(name, (product[:, index] + self.read(added, "f32")).astype(np.float32))

    def _tile(self, descriptor: Lanes, extent: int, transposed: bool, size: int) -> Lanes:
        """The extent x 32 / size numbers in shared memory that a matrix descriptor names, for each group of four warps."""
        group = 4 * _WARP
        descriptor = np.where(self.mask, descriptor, np.uint64(_SWIZZLED))[::group].astype(np.int64)
        if (descriptor >> 62 != 1).any():
            raise NotImplementedError("a matrix that is not swizzled by 128 bytes")
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        row, depth = np.arange(extent)[:, None], np.arange(32 // size)[None, :]
        if transposed:  # 64 rows in a line of 128 bytes, one line for each depth
            offset = (row // 64)[None] * leading[:, None, None] + (depth // 8)[None] * stride[:, None, None] + (depth % 8 * 128 + row % 64 * 2)[None]
        else:  # depth in a line of 128 bytes, one line for each row
            offset = (row // 8)[None] * stride[:, None, None] + (row % 8 * 128 + depth * size)[None]
        address = start[:, None, None] + offset
        address ^= (address >> 7 & 7) << 4
        if address.max() + size > self.shared_size:
            raise MemoryError(f"shared memory of {self.shared_size} bytes at {int(address.max())}")
        place = address + self.shared_base[::group][:, None, None]
        return self.shared.view(f"u{size}")[place // size]

    def _wgmma(self, instruction: Instruction) -> None:
        """d = a @ b + d of 64 x n numbers a group of four warps, in float32."""
        kind = instruction.suffixes[0]
        if kind == "commit_group":
            self.matrix_products.commit(self.mask)
        elif kind == "wait_group":
            self.matrix_products.wait(self.mask, int(instruction.operands[0], 0))
        elif kind == "mma_async":
            self._matrix_product(instruction)

    def _matrix_product(self, instruction: Instruction) -> None:
        target, a_name, b_name, added, _, _, *transposed = instruction.operands
        shape = re.fullmatch(r"m64n(\d+)k(8|16)", instruction.suffixes[3])
        assert shape is not None
        columns, size, kind = int(shape[1]), 32 // int(shape[2]), instruction.suffixes[-1]
        in_registers = not isinstance(a_name, str)
        # tf32 has no choice
        transposed_a, transposed_b = transposed[:1] == ["1"], transposed[-1:] == ["1"]
        b_descriptor, keep = self.read(b_name, "b64").copy(), self.read(added, "pred").copy()
        a_descriptor = None if in_registers else self.read(a_name, "b64").copy()
        fragment = self._fragment(a_name, kind) if in_registers else None  # as in _mma

        def multiply(lanes: Lanes) -> None:
            here = self.mask
            self._activate(lanes)
            if fragment is not None:
                warps, halves = len(fragment), len(a_name)
                a = fragment.reshape(warps, 8, 4, halves // 2, 2, -1).transpose(0, 4, 1, 3, 2, 5).reshape(warps // 4, 64, -1).astype(np.float64)
            else:
                a = _from_bits(self._tile(a_descriptor, 64, transposed_a, size), kind).astype(np.float64)
            b = _from_bits(self._tile(b_descriptor, columns, transposed_b, size), kind).astype(np.float64)
            product = np.einsum("gmk,gnk->gmn", a, b).reshape(-1, 4, 2, 8, columns // 8, 4, 2)  # group, warp, half, row, column tile, lane, pair
            product = product.transpose(0, 1, 3, 5, 4, 2, 6).reshape(self.lanes, -1)
            for index, name in enumerate(target):
                self.write(name, (product[:, index] + (np.where(keep, self.read(name, "f32"), 0) if keep.any() else 0)).astype(np.float32))
            self._activate(here)

        if DEFERRED:
            self.matrix_products.begin(self.mask, multiply)
        else:
            multiply(self.mask)


def run(ptx: str, grid: Sequence[int], threads: int, arguments: Sequence[int], spans: Iterable[tuple[int, int]], shared: int) -> None:
    """Launch a kernel: `arguments` are raw bits, `spans` the (address, bytes) that it may touch."""
    program, buffers = Program.parse(ptx), Buffers(spans)
    blocks = np.arange(int(np.prod(grid)))
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), _BLOCKS_AT_A_TIME):
            Machine(program, grid, blocks[first : first + _BLOCKS_AT_A_TIME], threads, arguments, buffers, shared).run()
