"""How long a call takes: on a GPU the device's time, by replaying a CUDA graph of many calls; elsewhere the wall clock.

A caller gives makers, one for each set of inputs. A maker does the part that is not timed and returns the call to time. The calls take turns, so that no call
finds in the cache what training would read from memory; `cold_copies` returns the number of sets that this takes.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Maker = Callable[[], Call]

GRAPH_SECONDS = 5e-4  # a graph holds enough calls to run this long, so that what it does once, such as setting a generator's state, does not show
MAX_CALLS = 64
# Part of `Timed.how` after a failed capture, or of the message of an error that followed it: torch's allocator then waits for the end of the capture for ever,
# so that no later result of the process can be trusted.
CAPTURE_FAILED = "capture failed"
ROUND_SECONDS = {"cuda": 0.2, "cpu": 0.5}  # of all rounds of a group together
ROUNDS = {"cuda": (7, 50), "cpu": (5, 50)}  # their least number, for a median, and the most
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h


def load_average() -> float:
    """The load average of the last minute: processes that ran or waited for a core; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def load_warning(threads: int) -> str:
    """A warning if other processes leave fewer cores than a measurement with so many threads needs; empty if there are enough."""
    load, cores = load_average(), os.cpu_count() or 1
    if load <= cores - threads + 0.5:
        return ""
    return f"WARNING: the load of the last minute is {load:.1f} on {cores} cores: beside other processes times are too long, and ratios may be wrong"


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MB for the next tensors, for the rest of the process.

    Else it returns large blocks to the system, and the next tensor waits for the system to clear each page. When it does depends on the sizes that a process
    has freed before, so times would depend on the other contestants, those of plain torch most. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the largest value that it takes
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


class Stopwatch:
    """A clock that advances only by what is added to it. As pytest-benchmark's timer it makes a round last as long as the GPU's events measured."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class Timed:
    how: str
    seconds: Callable[[], float]  # one round: seconds of one call, on average over the round's calls
    round_seconds: float  # what a round takes


def cold_copies(input_bytes: int, device: torch.device) -> int:
    """The number of input sets that, used in turn, evict each other from a GPU's cache; at most 32, so the smallest problems stay in the cache."""
    if device.type != "cuda":
        return 1
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(32, 1 + math.ceil(2 * cache / max(input_bytes, 1))) if input_bytes < 2 * cache else 1


def number_of_rounds(contestants: Sequence[Timed], device: torch.device) -> int:
    low, high = ROUNDS[device.type]
    return max(low, min(high, int(ROUND_SECONDS[device.type] / max(sum(timed.round_seconds for timed in contestants), 1e-9))))


def rounds_in_turn(contestants: Sequence[Timed], number: int) -> list[list[float]]:
    """Seconds of each contestant's rounds. A round of one follows a round of the other, so that a machine that slows down slows them all down alike."""
    return [list(column) for column in zip(*([timed.seconds() for timed in contestants] for _ in range(number)), strict=True)]


def prepare(makers: Sequence[Maker], device: torch.device, *, graph: bool) -> Timed:
    """Makes and warms up the calls. With `graph`, calls that a CUDA graph cannot hold fall back to events around each round, and the result says so."""
    if device.type != "cuda":
        return wall_clock(makers)
    stream, outside = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):  # autograd runs a backward on its forward's stream, so both belong to the one that captures
        calls = [make() for make in makers]
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.synchronize(device)
    if not graph:
        return _events(calls, stream, "as a training loop launches it")
    if _waits_for_the_device(calls[0], stream):
        return _events(calls, stream, "it waits for the device")
    try:
        return _graph(calls, stream)
    except RuntimeError as error:
        reason = f"{CAPTURE_FAILED}: {str(error).splitlines()[0][:120]}"
    try:
        # a failed capture leaves its stream current, and torch's generator in the state of a capture; its memory is free, because the error is handled
        torch.cuda.set_stream(outside)
        torch.cuda.synchronize(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(torch.device("cuda", index)))
        return _events(calls, stream, reason)
    except RuntimeError as error:
        raise RuntimeError(f"{reason}; then {error}") from error


def _waits_for_the_device(call: Call, stream: torch.cuda.Stream) -> bool:
    """Whether the call synchronises, which no CUDA graph can hold."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def _between_events(work: Call, stream: torch.cuda.Stream, *, lead: bool = False) -> float:
    """Seconds that the work takes on the device; with `lead` it runs once before, so that the device is busy while the host launches what is timed."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        if lead:
            work()
        start.record()
        work()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _graph(calls: Sequence[Call], stream: torch.cuda.Stream) -> Timed:
    def capture(repeats: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(repeats):
                for call in calls:
                    call()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    captured, repeats = capture(1), 1
    seconds = _between_events(captured.replay, stream, lead=True)
    if seconds < GRAPH_SECONDS:
        repeats = max(1, min(math.ceil(GRAPH_SECONDS / seconds), MAX_CALLS // len(calls)))
        captured = capture(repeats)
    count = repeats * len(calls)
    return Timed("CUDA graph", lambda: _between_events(captured.replay, stream, lead=True) / count, 2 * _between_events(captured.replay, stream, lead=True))


def _events(calls: Sequence[Call], stream: torch.cuda.Stream, reason: str) -> Timed:
    def run() -> None:
        for call in calls:
            call()

    return Timed(f"CUDA events ({reason})", lambda: _between_events(run, stream) / len(calls), _between_events(run, stream))


def wall_clock(makers: Sequence[Maker]) -> Timed:
    """The time that passes for whoever waits for the calls."""
    calls = [make() for make in makers]

    def seconds() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    seconds()  # warms up
    return Timed("wall clock", seconds, seconds() * len(calls))
