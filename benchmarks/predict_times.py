"""Predicted microseconds of every launch of the head and of the losses on an H200, from machine code: python -m benchmarks.predict_times

Nothing is measured: the launches of each shape and plan are compiled for sm_90, and what a GPU has to do for them is counted. A kernel takes as long as the
resource that it keeps busy longest, a little longer where two are nearly as busy:

    issue, MUFU         instructions of the hot loop and of what is before and after it
    tensor, shared, L2  the tiles of a product: 4096 operations, 128 bytes of shared memory and about 39 bytes from the L2 cache a clock and multiprocessor
    latency             one warp alone: stalls and scoreboards as the assembler wrote them
    memory              bytes that the order of the tiles leaves to the L2 cache's misses

Operators of torch beside the kernels take a launch each and the bytes of their tensors.

Programs that do not fit at once come in waves, whose last may be nearly empty. No constant below comes from a run of these kernels: benchmarks.gpu_report
prints the predictions beside its measurements.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import HUNDRED_THOUSAND, INATURALIST, MILLION, SCALE, SMOKE, Shape
from benchmarks.machine_code import aot
from benchmarks.machine_code.aot import CompiledKernel
from benchmarks.machine_code.launches import Launch, LibraryProduct, capture_launches
from benchmarks.machine_code.sass import Instruction, Program

if TYPE_CHECKING:
    from gclkern.kernels.terms import LossTerms

SHAPES = (INATURALIST, HUNDRED_THOUSAND, MILLION)
SAMPLES = (Shape("4096 samples", 4096, 100, 128), Shape("16384 samples", 16384, 100, 128))  # the keys of a contrastive loss
PLANS = ("materialised", "chunked", "recompute")
WHATS = ("loss", "loss without noise", *PLANS)
CONTRASTIVE = ("SupCon", "BCL")

# An H200.
PROCESSORS = 132
CLOCK = 1.755e9  # of a multiprocessor under the load of products
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
SHARED = 228 * 1024  # of a multiprocessor; each block takes a KiB more than it asks for
MEMORY_RATE = 4.3e12  # bytes a second of a copy
CACHE = 25e6  # bytes of the L2 cache that one operand can count on: its halves hold copies of the same lines
L2_RATE, SHARED_RATE = 38.8, 128.0  # bytes a clock and multiprocessor
TENSOR_RATE = {2: 4096.0, 4: 2048.0}  # operations a clock and multiprocessor, by the size of an element
MUFU_CLOCKS = 8  # of a warp's instruction, on its quarter of a multiprocessor
QUARTERS = 4
LIBRARY_RATE = 790e12  # operations a second of cuBLAS at 16 bits
FLOAT32_RATE = PROCESSORS * CLOCK * 2 * 128  # operations a second of the CUDA cores: what a float32 product can reach at most
LAUNCH = 1.5e-6  # of a kernel in a CUDA graph
PRODUCT_LATENCY = 200.0  # clocks between two steps of a product that one block alone cannot hide: barrier, wait, start of the tensor cores
# Clocks until the result is there, of what the assembler guards by a scoreboard.
LATENCIES = {
    "LDG": 550.0,
    "LDGSTS": 550.0,
    "LDS": 30.0,
    "LDSM": 33.0,
    "MUFU": 22.0,
    "SHFL": 24.0,
    "LDC": 40.0,
    "S2R": 40.0,
    "F2F": 22.0,
    "I2F": 22.0,
    "BAR": 30.0,
}
OTHER_LATENCY = 15.0
SHARPNESS = 4  # of the maximum over resources: two that are equally busy take 1.19 times as long as one


class Demand(NamedTuple):
    """Clocks of one block's work on each resource of a multiprocessor, and its latency when it is alone."""

    issue: float = 0.0
    mufu: float = 0.0
    tensor: float = 0.0
    shared: float = 0.0
    l2: float = 0.0
    latency: float = 0.0

    def plus(self, other: Demand, times: float = 1.0) -> Demand:
        return Demand(*(mine + times * its for mine, its in zip(self, other, strict=True)))

    def clocks(self, blocks: int) -> float:
        """Until `blocks` of them that share a multiprocessor are done."""
        return smooth_maximum(*(blocks * value for value in self[:-1]), self.latency)


def smooth_maximum(*values: float) -> float:
    top = max(values)
    return top * sum((value / top) ** SHARPNESS for value in values) ** (1 / SHARPNESS) if top > 0 else 0.0


@dataclass(frozen=True)
class Work:
    """How often the loops of a kernel run in a launch, and what the launch moves: what the machine code does not say.

    Each program is taken to be two loops, one in the other; a kernel with one loop makes a single pass of the outer one.

        for _ in range(outer):
            for _ in range(inner):
                instructions, and `step`
            instructions
        instructions
    """

    inner: float
    outer: float = 1.0
    step: Demand | None = None  # what a pass of the inner loop needs beside its instructions, such as the time of a matrix product
    reads: Callable[[int], Sequence[tuple[object, float]]] | None = None  # panels that a program reads, with their bytes, by the number of the program
    read_bytes: float = 0.0  # in place of `reads`, where all programs together read every byte once
    written: float = 0.0  # bytes
    hot: Sequence[str] = ("HGMMA", "MUFU.EX2")  # the inner loop is the one with the first of these that the kernel has in a loop


@dataclass(frozen=True)
class Compiled:
    """A launch, compiled, with its plain arguments and the bytes of its tensors."""

    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def warps(self) -> int:
        return int(self.kernel.options["num_warps"])

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name] if name in self.arguments else self.kernel.constants[name]


@dataclass(frozen=True)
class Prediction:
    name: str
    launches: int
    grid: tuple[int, ...]
    registers: int
    resident: int  # blocks of a multiprocessor
    waves: float
    memory_bytes: float
    bound: str
    seconds: float  # of all launches


def resident_blocks(registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    of_a_warp = 32 * 8 * math.ceil(registers / 8)
    return max(1, min(REGISTERS // of_a_warp // warps, SHARED // (shared_bytes + 1024), WARPS // warps, BLOCKS))


def memory_reads(programs: int, at_a_time: int, reads: Callable[[int], Sequence[tuple[object, float]]], cache: float = CACHE) -> float:
    """Bytes that miss the cache if programs run in the order of their numbers: a wave reads each panel once, and a later wave hits what is still cached."""
    held: OrderedDict[object, float] = OrderedDict()
    size = missed = 0.0
    for first in range(0, programs, at_a_time):
        wave = dict(panel for program in range(first, min(first + at_a_time, programs)) for panel in reads(program))
        for panel, width in wave.items():
            if panel in held:
                held.move_to_end(panel)
                continue
            missed += width
            held[panel] = width
            size += width
        while size > cache and held:
            size -= held.popitem(last=False)[1]
    return missed


def walk(code: Sequence[Instruction]) -> float:
    """Clocks of a single warp in a later pass of a loop, so that waits for results of the pass before are included."""
    clock = start = 0.0
    ready = [0.0] * 6
    for _ in range(2):
        start = clock
        for instruction in code:
            clock = max(clock, *(ready[board] for board in instruction.waits), 0.0)
            if (board := instruction.result_board) is not None:
                ready[board] = max(ready[board], clock + LATENCIES.get(instruction.mnemonic, OTHER_LATENCY))
            if (board := instruction.operands_board) is not None:
                ready[board] = max(ready[board], clock + OTHER_LATENCY)
            clock += max(instruction.stall, 1) + (LATENCIES["BAR"] if instruction.mnemonic == "BAR" else 0.0)
    return clock - start


def instructions_demand(code: Sequence[Instruction], warps: int) -> Demand:
    share = warps / QUARTERS
    mufu = sum(i.mnemonic == "MUFU" for i in code)
    return Demand(issue=share * len(code), mufu=share * MUFU_CLOCKS * mufu, latency=walk(code))


def product_step(rows: int, columns: int, depth: int, size: int) -> Demand:
    """The work of one step over `depth` of a tile rows x columns: copies to shared memory, and products from there."""
    tensor = 2.0 * rows * columns * depth / TENSOR_RATE[size]
    copied = (rows + columns) * depth * size
    read = (rows + columns * max(rows // 64, 1)) * depth * size  # every 64 rows read all columns
    return Demand(tensor=tensor, shared=(read + copied) / SHARED_RATE, l2=copied / L2_RATE, latency=tensor + PRODUCT_LATENCY)


def _shortest(program: Program, header: int) -> list[Instruction]:
    """The instructions on the shortest way from the first one to `header`."""
    blocks, successors = program.blocks
    first = next(iter(blocks))
    came_from: dict[int, int | None] = {first: None}
    queue = [first]
    for block in queue:
        for following in successors[block]:
            if following not in came_from:
                came_from[following] = block
                queue.append(following)
    way: list[int] = []
    at: int | None = came_from.get(header)
    while at is not None:
        way.append(at)
        at = came_from[at]
    return [instruction for block in reversed(way) for instruction in blocks[block]]


class LoopNest(NamedTuple):
    """The instructions of a kernel by how often they run: outside of loops, in the outer loop, in the inner one."""

    once: tuple[Instruction, ...]
    outer: tuple[Instruction, ...]
    inner: tuple[Instruction, ...]


def loop_nest(program: Program, hot: Sequence[str]) -> LoopNest:
    """The loop nest around the loop with the first of `hot` that a loop has; without such a loop, of all loops together, as if all made equally many passes."""
    for work in hot:
        loops = [loop for loop in program.loops if loop.code.count(work)]
        innermost = [loop for loop in loops if not any(other.body < loop.body for other in loops)]
        if not innermost:
            continue
        inner = min(innermost, key=lambda loop: loop.code.instructions_per(work))
        around = [loop for loop in program.loops if loop.body > inner.body]
        outermost = max([inner, *around], key=lambda loop: len(loop.body))
        after = []
        for instruction in program.instructions:
            if instruction.address > outermost.back_branch:
                after.append(instruction)
                if instruction.mnemonic == "EXIT" and instruction.predicate is None:
                    break
        outer = tuple(i for i in outermost.code.instructions if i.address not in inner.body) if around else ()
        return LoopNest((*_shortest(program, outermost.header), *after), outer, inner.code.instructions)
    looped = frozenset[int]().union(*(loop.body for loop in program.loops))
    return LoopNest(tuple(i for i in program.instructions if i.address not in looped), (), tuple(i for i in program.instructions if i.address in looped))


def _tiles(extent: int, tile: int) -> int:
    return math.ceil(extent / tile)


def _uncached(size: float) -> float:
    """Bytes of a buffer, written by the previous kernel, that are no longer in the cache."""
    return size if size > CACHE else 0.0


def raster(program: int, fast_tiles: int) -> tuple[int, int]:
    """The slow and the fast tile of a program, as `products.tile_of_program` orders them."""
    from gclkern.kernels.products import tile_of_program

    slow, fast = tile_of_program.fn(program, fast_tiles)
    return slow, fast


def _cosine_work(launch: Compiled) -> Work:
    rows, columns, depth, dim, num_rows = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH", "dim", "num_rows"))
    row_tiles = _tiles(num_rows, rows)

    def reads(program: int) -> Sequence[tuple[object, float]]:
        classes, row = raster(program, row_tiles)
        return (("x", row), 2.0 * rows * dim), (("w", classes), 2.0 * columns * dim)

    return Work(_tiles(dim, depth), 1, product_step(rows, columns, depth, 2), reads, written=2.0 * num_rows * launch["num_classes"])


def _fused_stats_work(launch: Compiled) -> Work:
    rows, columns, depth, dim = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH", "dim"))
    tiles = _tiles(launch["num_classes"], columns) / launch.grid[1]
    row_tiles = launch.grid[0]

    def reads(program: int) -> Sequence[tuple[object, float]]:
        return (("x", program % row_tiles), 2.0 * rows * dim), (("w", program // row_tiles), 2.0 * columns * dim * tiles)

    return Work(_tiles(dim, depth), tiles, product_step(rows, columns, depth, 2), reads)


def _fused_gradient_work(launch: Compiled) -> Work:
    rows, columns, depth, dim, num_rows = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH", "dim", "num_rows"))
    row_tiles = launch.grid[0]

    def reads(program: int) -> Sequence[tuple[object, float]]:
        return (("x", program % row_tiles), 2.0 * rows * dim), (("w", program // row_tiles), 2.0 * columns * dim)

    return Work(_tiles(dim, depth), 1, product_step(rows, columns, depth, 2), reads, written=_uncached(2.0 * num_rows * launch["num_classes"]))


def _feature_gradient_work(launch: Compiled) -> Work:
    rows, columns, depth, dim, num_rows = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH", "dim", "num_rows"))
    along = min(launch["depth_per_split"], launch["num_classes"])
    row_tiles, column_tiles, splits = launch.grid
    cached = _uncached(2.0 * num_rows * launch["num_classes"]) == 0.0

    def reads(program: int) -> Sequence[tuple[object, float]]:
        row, column, split = program % row_tiles, program // row_tiles % column_tiles, program // (row_tiles * column_tiles)
        return (("G", row, split), 0.0 if cached else 2.0 * rows * along), (("w", column, split), 2.0 * columns * along)

    return Work(_tiles(along, depth), 1, product_step(rows, columns, depth, 2), reads, written=4.0 * splits * num_rows * dim)


def _weight_gradient_work(launch: Compiled) -> Work:
    rows, columns, depth, num_rows = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH", "num_rows"))
    dim = launch["dim_units"] * launch["UNIT"]
    column_tiles = _tiles(dim, columns)
    cached = _uncached(2.0 * num_rows * launch["num_classes"]) == 0.0

    def reads(program: int) -> Sequence[tuple[object, float]]:
        classes, column = raster(program, column_tiles)
        weight = 2.0 * rows * columns  # the epilogue's
        return (("G", classes), 0.0 if cached else 2.0 * rows * num_rows), (("x", column), 2.0 * columns * num_rows), (("w", classes, column), weight)

    return Work(_tiles(num_rows, depth), 1, product_step(rows, columns, depth, 2), reads, written=2.0 * launch["num_classes"] * dim)


def _row_stats_work(launch: Compiled) -> Work:
    size = launch["num_rows"] * launch["num_classes"] * launch["cosine_ptr"].itemsize
    return Work(_tiles(_tiles(launch["num_classes"], launch["COLUMNS"]), launch.grid[1]), read_bytes=_uncached(size))


def _gradient_work(launch: Compiled) -> Work:
    size = launch["num_rows"] * launch["num_classes"] * 2.0
    return Work(_tiles(_tiles(launch["num_rows"], launch["ROWS"]), launch.grid[1]), read_bytes=_uncached(size), written=_uncached(size))


def _exponentials_work(launch: Compiled) -> Work:
    size = _uncached(2.0 * launch["num_rows"] * launch["num_classes"])
    return Work(_tiles(_tiles(launch["num_classes"], launch["COLUMNS"]), launch.grid[1]), read_bytes=size, written=size)


def _targets_work(launch: Compiled) -> Work:
    return Work(1, read_bytes=64.0 * launch["num_rows"])  # a line of the buffer and some numbers for each row


def _finish_weights_work(launch: Compiled) -> Work:
    gradient, weight, out = launch["gradient_ptr"], launch["weight_ptr"], launch["out_ptr"]
    return Work(1, read_bytes=_uncached(gradient.nbytes) + weight.nbytes, written=out.nbytes)


def _keys_work(launch: Compiled) -> Work:
    """Products with all keys of a part, which come from the L2 cache; the rows stay in shared memory."""
    rows, columns, depth = (launch[name] for name in ("ROWS", "COLUMNS", "DEPTH"))
    halves, products = (1, 1) if launch["low_ptr"] is None else (2, 3)
    keys = 2.0 * columns * depth
    read = 2.0 * rows * depth + keys
    if launch.kernel.name == "_pull_kernel":
        read += keys  # the factors of the second product are in registers
    operations = 2.0 * rows * columns * depth * products * (2 if launch.kernel.name == "_pull_kernel" else 1)
    tensor = operations / TENSOR_RATE[2]
    step = Demand(tensor=tensor, shared=(read * products + keys * halves) / SHARED_RATE, l2=keys * halves / L2_RATE, latency=tensor + PRODUCT_LATENCY)
    return Work(launch["tiles_per_split"], 1, step, written=_uncached(launch["part_ptr"].nbytes))


def _losses_work(launch: Compiled) -> Work:
    part = launch["part_ptr"]
    return Work(_tiles(launch["parts"], launch["PARTS"]), _tiles(launch["num_rows"], launch["LANES"]), read_bytes=part.nbytes)


def _rates_work(launch: Compiled) -> Work:
    return Work(_tiles(launch["num_rows"], launch.blocks * launch["LANES"]), read_bytes=20.0 * launch["num_rows"])


def _rows_work(launch: Compiled) -> Work:
    size = launch["grad_ptr"].nbytes
    return Work(
        _tiles(launch["parts"], launch["PARTS"]) * _passes(launch), read_bytes=launch["row_ptr"].nbytes + _uncached(launch["part_ptr"].nbytes), written=size
    )


def _passes(launch: Compiled) -> int:
    """The passes of a loop over the elements of a row."""
    return _tiles(launch["dim"], launch["DEPTH"]) if "DEPTH" in launch.kernel.constants else 1


def _unit_rows_work(launch: Compiled) -> Work:
    copy = launch["copy_ptr"]
    return Work(_passes(launch), read_bytes=launch["x_ptr"].nbytes, written=0.0 if copy is None else _uncached(copy.nbytes))


def _stream_work(launch: Compiled) -> Work:
    """The work of a kernel that reads or writes each of its tensors once, except those from which it gathers some rows."""
    gathered = ("weight_ptr", "cosine_a_ptr", "cosine_b_ptr")
    return Work(
        _passes(launch), read_bytes=sum(value.nbytes for name, value in launch.arguments.items() if isinstance(value, Operand) and name not in gathered)
    )


WORK: dict[str, Callable[[Compiled], Work]] = {
    "_cosine_kernel": _cosine_work,
    "_fused_stats_kernel": _fused_stats_work,
    "_fused_gradient_kernel": _fused_gradient_work,
    "_feature_gradient_kernel": _feature_gradient_work,
    "_weight_gradient_kernel": _weight_gradient_work,
    "_row_stats_kernel": _row_stats_work,
    "_gradient_kernel": _gradient_work,
    "_unit_rows_kernel": _unit_rows_work,
    "_exponentials_kernel": _exponentials_work,
    "_targets_kernel": _targets_work,
    "_finish_weights_kernel": _finish_weights_work,
    "_denominator_kernel": _keys_work,
    "_losses_kernel": _losses_work,
    "_rates_kernel": _rates_work,
    "_rows_kernel": _rows_work,
    "_pull_kernel": _keys_work,
}


class Operand(NamedTuple):
    """A tensor among the arguments."""

    itemsize: int
    nbytes: int


class TorchOperators(NamedTuple):
    """Operators of torch, each of which runs on a GPU as a kernel of its own or as several."""

    launches: int
    nbytes: float  # that they read and write, where the L2 cache cannot hold them


class _CountOperators(TorchDispatchMode):
    """Counts the operators of a block, but for those that only make views or allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.nbytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func._schema.name:
            self.launches += 1
            self.nbytes += _uncached(sum(value.nbytes for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)))
        return out


def predict_product(product: LibraryProduct, repeats: int = 1) -> Prediction:
    """The time of cuBLAS at its full rate, with multiprocessors idle in the last wave of tiles. Fewer tiles than multiprocessors are split along the depth."""
    moved = product.itemsize * product.depth * (product.rows + product.columns) + product.out_itemsize * product.rows * product.columns
    flops = 2.0 * product.rows * product.depth * product.columns
    waves = _tiles(product.rows, 128) * _tiles(product.columns, 256) / PROCESSORS
    compute = flops / LIBRARY_RATE * (math.ceil(waves) / waves if waves > 0.9 else 1.0)
    memory = moved / MEMORY_RATE
    seconds = LAUNCH + smooth_maximum(compute, memory)
    grid = (product.rows, product.columns, product.depth)
    return Prediction("torch.mm", repeats, grid, 0, 1, waves, moved, "memory" if memory > compute else "tensor", repeats * seconds)


def predict(launch: Compiled | LibraryProduct | TorchOperators, repeats: int = 1) -> Prediction:
    if isinstance(launch, LibraryProduct):
        return predict_product(launch, repeats)
    if isinstance(launch, TorchOperators):
        seconds = launch.launches * LAUNCH + launch.nbytes / MEMORY_RATE
        return Prediction("operators of torch", launch.launches, (), 0, 1, 0.0, launch.nbytes, "launches", seconds)
    kernel = launch.kernel
    work = WORK.get(kernel.name, _stream_work)(launch)
    parts = loop_nest(kernel.program, work.hot)
    block = instructions_demand(parts.once, launch.warps)
    pass_ = instructions_demand(parts.inner, launch.warps)
    if work.step is not None:
        pass_ = pass_._replace(latency=0.0).plus(work.step)  # the step's own latency stands for its waits
    block = block.plus(instructions_demand(parts.outer, launch.warps).plus(pass_, work.inner), work.outer)
    resident = resident_blocks(kernel.registers, kernel.shared_bytes, launch.warps)
    at_a_time = PROCESSORS * resident
    whole, rest = divmod(launch.blocks, at_a_time)
    clocks = whole * block.clocks(resident) + (block.clocks(math.ceil(rest / PROCESSORS)) if rest else 0.0)
    read = work.read_bytes if work.reads is None else memory_reads(launch.blocks, at_a_time, work.reads)
    memory = (read + work.written) / MEMORY_RATE
    seconds = LAUNCH + smooth_maximum(clocks / CLOCK, memory)
    bound = "memory" if memory > clocks / CLOCK else max(zip((*(resident * v for v in block[:-1]), block.latency), Demand._fields, strict=True))[1]
    return Prediction(kernel.name, repeats, launch.grid, kernel.registers, resident, launch.blocks / at_a_time, read + work.written, bound, repeats * seconds)


def _terms(shape: Shape, noise: bool) -> LossTerms:
    from gclkern.kernels.terms import LossTerms

    return LossTerms(
        target=torch.zeros(shape.rows, dtype=torch.int64), target_b=None, lam=None, cloud=torch.zeros(shape.classes) if noise else None, margin=None, bias=None,
        weight=None, seed=torch.zeros((), dtype=torch.int64) if noise else None, scale=SCALE, gamma=0.0, focal_detach=True, label_smoothing=0.0,
        ignore_index=-100, row_offset=0, class_offset=0, reduction="mean",
    )  # fmt: skip


def _head(shape: Shape, plan: str) -> None:
    from gclkern.kernels.head import run_backward, run_forward

    features, weight = torch.empty(shape.rows, shape.dim, dtype=torch.bfloat16), torch.empty(shape.classes, shape.dim, dtype=torch.bfloat16)
    terms = _terms(shape, True)
    loss, saved = run_forward(features, weight, terms, True, plan)
    run_backward(loss, features, weight, saved, terms, True, plan, True, True, False)


def _loss(shape: Shape, noise: bool) -> None:
    from gclkern.kernels.logit_loss import logit_backward, logit_forward

    cosine, terms = torch.empty(shape.rows, shape.classes, dtype=torch.bfloat16), _terms(shape, noise)
    loss, saved = logit_forward(cosine, *terms, True)
    logit_backward(loss, cosine, saved, *terms, False)


def _contrastive(shape: Shape, what: str) -> None:
    from gclkern.kernels.contrastive_loss import contrastive_backward, contrastive_forward

    features, target = torch.empty(shape.rows, shape.dim), torch.empty(shape.rows, dtype=torch.int64)
    prototypes, counts = (torch.empty(shape.classes, shape.dim), torch.empty(shape.classes)) if what == "BCL" else (None, None)
    loss, saved = contrastive_forward(features, prototypes, target, counts, 0.1, True, True, "mean")
    contrastive_backward(loss, features, prototypes, counts, saved, 0.1, True, True, True, prototypes is not None)


def _plain(launch: Launch) -> dict[str, Any]:
    """The arguments that can be sent to another process."""
    found: dict[str, Any] = {}
    for name, value in {**dict(zip(launch.kernel.arg_names, launch.args, strict=False)), **launch.kwargs}.items():
        if isinstance(value, torch.Tensor):
            found[name] = Operand(value.element_size(), value.numel() * value.element_size())
        elif isinstance(value, int | float | str | None):
            found[name] = value
    return found


def launches_of(shape: Shape, what: str) -> list[tuple[Compiled | LibraryProduct | TorchOperators, int]]:
    """The launches of a plan, or of a loss, in order, and how often each runs; in a worker of benchmarks.machine_code.aot."""
    operators = _CountOperators()
    serves = mock.patch("gclkern.kernels.products.uses_cublas", lambda gradient, weight, device: gradient == weight)  # as on a GPU
    with aot.as_on("sm_90"), serves, capture_launches(execute=False) as launches:
        if what in PLANS:
            _head(shape, what)
        elif what in CONTRASTIVE:
            with operators:
                _contrastive(shape, what)
        else:
            _loss(shape, what == "loss")
    found: dict[str, tuple[Compiled, int]] = {}
    for launch in launches:
        arguments = _plain(launch)
        kernel = aot.compiled(launch, "sm_90")
        # chunks differ in the class that they begin at
        same = {name: value for name, value in arguments.items() if name not in ("target_shift", "first_group", "class_offset", "shift")}
        key = f"{kernel.name} {launch.grid} {same} {kernel.constants}"
        found[key] = Compiled(kernel, launch.grid, arguments), found.get(key, (None, 0))[1] + 1
    beside = [(TorchOperators(operators.launches, operators.nbytes), 1)] if operators.launches else []
    return [*found.values(), *Counter(launches.products).items(), *beside]


def _predictions_of(shape: Shape, what: str) -> list[Prediction]:
    return [predict(launch, repeats) for launch, repeats in launches_of(shape, what)]


def predictions(shapes: Iterable[Shape]) -> Iterator[tuple[Shape, str, list[Prediction]]]:
    """The predictions for each shape and what runs at it, whose kernels are compiled in parallel."""
    wanted = [(shape, what) for shape in shapes for what in (("loss",) if shape is SMOKE else CONTRASTIVE if shape in SAMPLES else WHATS)]
    futures: list[tuple[Shape, str, Future[Any]]] = [(shape, what, aot.in_worker(_predictions_of, shape, what)) for shape, what in wanted]
    for shape, what, future in futures:
        yield shape, what, future.result()


def bare_seconds(shape: Shape, products: int = 3) -> float:
    """Seconds of only the matrix products, by cuBLAS; each also moves its operands and its result."""
    flops = 2.0 * shape.rows * shape.classes * shape.dim
    moved = 2.0 * (shape.rows * shape.dim + shape.classes * shape.dim + shape.rows * shape.classes)
    return products * (LAUNCH + smooth_maximum(flops / LIBRARY_RATE, moved / MEMORY_RATE))


def bare_float32_seconds(shape: Shape) -> float:
    """Two float32 products of all samples with all samples at the full rate of the CUDA cores, of which nothing is written."""
    return 2 * (LAUNCH + 2.0 * shape.rows**2 * shape.dim / FLOAT32_RATE)


def table(shape: Shape, what: str, found: Sequence[Prediction]) -> str:
    total = sum(prediction.seconds for prediction in found)
    ratio = ""
    if what in PLANS:
        ratio = f", {total / bare_seconds(shape):.2f} of three bare products"
    elif what in CONTRASTIVE:
        ratio = f", {total / bare_float32_seconds(shape):.2f} of two bare float32 products"
    lines = [f"{shape.name}, {what}: {1e6 * total:.0f} us{ratio}"]
    for prediction in found:
        grid = " x ".join(map(str, prediction.grid))
        lines.append(
            f"  {prediction.name:26}{prediction.launches:4} x {grid:16}{prediction.registers:4} registers{prediction.resident:3} blocks"
            f"{prediction.waves:8.2f} waves{prediction.memory_bytes / 1e6:9.1f} MB{1e6 * prediction.seconds:10.1f} us  {prediction.bound}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {shape.name: shape for shape in (*SHAPES, *SAMPLES)}
    parser.add_argument("--shapes", nargs="+", choices=list(names), default=list(names), metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="write the predictions there too")
    parser.add_argument("--tiny", action="store_true", help="one small loss alone: that the command works")
    args = parser.parse_args(argv)
    found = []
    for shape, what, rows in predictions([SMOKE] if args.tiny else [names[name] for name in args.shapes]):
        print(table(shape, what, rows), flush=True)
        found += [{"shape": shape.name, "what": what, **asdict(row)} for row in rows] if args.json else []
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
