"""The noise stream: known answers, one stream on every backend, its distribution, and independence from how a matrix is split."""

from __future__ import annotations

import math
import re
import struct
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.machine_code import aot
from gclkern.kernels.terms import PREFIXES
from gclkern.noise import cloud_noise
from gclkern.torch_backend import noise as torch_noise
from gclkern.torch_backend.noise import cloud_noise as torch_cloud_noise
from gclkern.torch_backend.noise import fill_noise, philox_words
from gclkern.validation import resolve_seed
from tests.support import oracle

ZERO_WORDS = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
SEED, ROW = 2**40 + 5, 2**33 + 1
DRAWS = [0.0689661, 0.1897665, 0.3705992, 0.1379022]
LAST_CLASS = 2**35 - 1
# Between backends and GPU models: the greatest difference, and the mean one.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 1e-4, 1e-6

int64s = st.integers(-(2**63), 2**63 - 1)


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


def counters(count: int) -> tuple[list[int], list[int], list[int]]:
    """Seeds, rows and groups over their whole ranges, the ends first."""
    generator = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).tolist()
    rows = torch.randint(0, 2**63 - 1, (count,), generator=generator).tolist()
    groups = torch.randint(0, 2**32, (count,), generator=generator).tolist()
    return [0, 0, -1, -(2**63), 2**63 - 1, *seeds], [0, ROW, 2**63 - 1, 2**32, 2**32 - 1, *rows], [0, 0, 2**32 - 1, 1, 2**31, *groups]


def draw(backend: str, device: torch.device, seed: int, rows: int, classes: int, row_offset: int = 0, class_offset: int = 0) -> Tensor:
    """The noise of one backend, on the device that it runs on in these tests."""
    device = device if backend == "triton" else torch.device("cpu")
    noise: Tensor = operator(backend)(torch.tensor(seed, device=device), rows, classes, row_offset, class_offset)
    return noise


def assert_close(noise: Tensor, expected: Tensor) -> None:
    difference = (noise.cpu().double() - expected.cpu().double()).abs()
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() <= MEAN_DIFFERENCE


# Known answers and the words


def test_words_of_a_zero_counter() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert unsigned(philox_words(zero[0], zero, zero)) == ZERO_WORDS


def test_known_draws(backend: str, device: torch.device) -> None:
    assert draw(backend, device, SEED, 1, 4, ROW).flatten().tolist() == pytest.approx(DRAWS, abs=MAX_DIFFERENCE)


def test_known_draws_of_the_public_function(device: torch.device) -> None:
    noise = cloud_noise(SEED, 1, 4, row_offset=ROW, device=device)
    assert noise.device.type == device.type
    assert noise.flatten().tolist() == pytest.approx(DRAWS, abs=MAX_DIFFERENCE)


def test_torch_words_equal_the_oracle() -> None:
    for seed, row, group in zip(*counters(200), strict=True):
        words = philox_words(torch.tensor(seed), torch.tensor([row]), torch.tensor([group]))
        assert unsigned(words) == list(oracle.philox(seed, (group, row & oracle.MASK, row >> 32, 0)))


def test_torch_words_of_a_grid_equal_the_oracle() -> None:
    rows, groups = torch.arange(5) + 2**32 - 2, torch.arange(7) + 2**31 - 3
    words = philox_words(torch.tensor(-SEED), rows, groups)
    for i, row in enumerate(rows.tolist()):
        for j, group in enumerate(groups.tolist()):
            assert unsigned(words[i, j]) == list(oracle.philox(-SEED, (group, row & oracle.MASK, row >> 32, 0)))


@pytest.mark.triton
def test_triton_words_equal_the_oracle(device: torch.device) -> None:
    from tests.support.noise_kernels import words_of_counters

    seeds, rows, groups = counters(60)
    words = torch.empty((len(seeds), 4), dtype=torch.int32, device=device)
    words_of_counters[(len(seeds),)](words, *(torch.tensor(values, device=device) for values in (seeds, rows, groups)))
    for found, seed, row, group in zip(words.cpu(), seeds, rows, groups, strict=True):
        assert unsigned(found) == list(oracle.philox(seed, (group, row & oracle.MASK, row >> 32, 0)))


# Values


def test_draws_equal_the_oracle(backend: str, device: torch.device) -> None:
    # Triton's interpreter keeps an int from 2**31 to 2**32 - 1 as an unsigned one.
    for row_offset, class_offset in ((0, 0), (ROW, 13), (2**32 - 3, 2**32 - 8), (2**31 + 1, 2**31 + 3), (2**63 - 10, LAST_CLASS - 40)):
        assert_close(draw(backend, device, SEED, 9, 41, row_offset, class_offset), oracle.noise(SEED, 9, 41, row_offset, class_offset))


def test_backends_agree(backend: str, device: torch.device) -> None:
    assert_close(draw(backend, device, -7, 40, 1021), draw("torch", device, -7, 40, 1021))


@pytest.mark.triton
def test_device_code_maps_every_field_to_its_draws(device: torch.device) -> None:
    """All values of either 16-bit half of a word, beside the formula in float64."""
    from gclkern.kernels.runtime import NVIDIA
    from tests.support.noise_kernels import draws_of_words

    field = torch.arange(65536)
    words = torch.cat((field | 0x4000 << 16, field << 16 | 0x0001, field << 16 | (field * 25253 & 0xFFFF)))
    draws = torch.empty(2 * words.numel(), device=device)
    draws_of_words[(words.numel() // 8192,)](draws, words.to(device), BLOCK=8192, NVIDIA=NVIDIA)
    uniform, angle = ((words & 0xFFFF).double() + 0.5) / 65536, math.pi / 2 * ((words >> 16).double() + 0.5) / 65536
    radius = (-2 * uniform.log()).sqrt() / 3
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).clamp(max=1).flatten()
    assert_close(draws, expected)
    if not NVIDIA:
        assert (draws.double() - expected).abs().max() <= 3e-7


@pytest.mark.triton
def test_nvidia_instructions_get_the_right_arguments() -> None:
    """The constants of the inline assembly, evaluated for every field: u is exact, and the angle is as good as float32 allows."""
    from gclkern.kernels.philox import _NVIDIA_ASM

    def rounded(value: Tensor) -> Tensor:
        return value.float().double()

    text = str(_NVIDIA_ASM.value)
    number = {name: [struct.unpack(">f", bytes.fromhex(digits))[0] for digits in constants] for name, *constants in re.findall(
        r"fma\.rn\.ftz\.f32 (\w), \w, 0f(\w{8}), 0f(\w{8});", text)}  # fmt: skip
    field = torch.arange(65536, dtype=torch.float64)
    exact = (field + 0.5) / 65536
    u = rounded((2**23 + field) * number["u"][0] + number["u"][1])
    assert torch.equal(u, exact)
    t = rounded((2**23 + 0xF0000 + field) * number["t"][0] + number["t"][1])
    error = (t - exact * math.pi / 2).abs()
    assert error.max() < 2e-7
    assert error.mean() < 5e-8
    (factor,) = re.findall(r"mul\.rn\.ftz\.f32 r, r, 0f(\w{8});", text)
    assert struct.unpack(">f", bytes.fromhex(factor))[0] == pytest.approx(-2 * math.log(2) / 9, rel=1e-7)


@pytest.mark.triton
def test_single_places_equal_the_tile(device: torch.device) -> None:
    from gclkern.kernels.runtime import NVIDIA
    from tests.support.noise_kernels import tile_and_places

    tile, places = torch.empty((2, 4, 32), device=device)
    tile_and_places[(1,)](tile, places, torch.tensor(SEED, device=device), ROW, 2**31 + 3, ROWS=4, GROUPS=4, NVIDIA=NVIDIA)
    assert torch.equal(tile, places)
    assert_close(tile, oracle.noise(SEED, 4, 32, ROW, 8 * (2**31 + 3)))


# The distribution


@pytest.fixture(scope="module")
def million() -> Tensor:
    return cloud_noise(11, 1000, 1000, device="cpu")


def _fits_a_clamped_half_normal(noise: Tensor) -> None:
    draws = noise.flatten().double().sort().values
    count = draws.numel()
    assert draws[0] >= 0
    assert draws[-1] == 1
    below = draws[draws < 1]
    cdf = torch.erf(3 * below / math.sqrt(2))
    place = torch.arange(below.numel(), dtype=torch.float64)
    distance = torch.maximum(cdf - place / count, (place + 1) / count - cdf).max()
    assert math.sqrt(count) * distance < 1.63  # the 1% point of Kolmogorov's distribution
    clamped = 1 - below.numel() / count
    expected = math.erfc(3 / math.sqrt(2))  # 0.0027
    assert abs(clamped - expected) < 4 * math.sqrt(expected / count)


def test_distribution(million: Tensor) -> None:
    _fits_a_clamped_half_normal(million)


@pytest.mark.gpu
def test_distribution_on_a_gpu() -> None:
    _fits_a_clamped_half_normal(cloud_noise(11, 1000, 1000, device="cuda").cpu())


def _correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((left.flatten(), right.flatten())).double())[0, 1])


@pytest.mark.parametrize("distance", [1, 2, 7, 8, 64])
def test_neighbours_are_uncorrelated(million: Tensor, distance: int) -> None:
    bound = 4.5 / math.sqrt(million.numel())
    assert abs(_correlation(million[distance:], million[:-distance])) < bound
    assert abs(_correlation(million[:, distance:], million[:, :-distance])) < bound
    assert abs(_correlation(million[:, distance:].square(), million[:, :-distance].square())) < bound


def test_pairs_from_one_word_are_uncorrelated(million: Tensor) -> None:
    """Cosine and sine of one angle share their radius, which Box and Muller's method makes harmless only for the whole normal distribution."""
    even, odd = million[:, 0::2], million[:, 1::2]
    bound = 4.5 / math.sqrt(even.numel())
    assert abs(_correlation(even, odd)) < bound
    assert abs(_correlation(even.square(), odd.square())) < bound


@pytest.mark.parametrize("seed", [12, 10, 11 + 2**32, 11 - 2**63])
def test_neighbouring_seeds_are_uncorrelated(million: Tensor, seed: int) -> None:
    assert abs(_correlation(million, cloud_noise(seed, 1000, 1000, device="cpu"))) < 4.5 / math.sqrt(million.numel())


# One matrix, however it is split


@given(data=st.data(), chunk=st.sampled_from([1, 3, 7, 20, 1000]), seed=int64s, row_offset=st.integers(0, 2**63 - 12), class_offset=st.integers(0, 2**35 - 61))
def test_torch_parts_equal_the_whole(data: st.DataObject, chunk: int, seed: int, row_offset: int, class_offset: int) -> None:
    whole = torch_cloud_noise(torch.tensor(seed), 11, 60, row_offset, class_offset)
    row, column = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 59))
    rows, columns = data.draw(st.integers(1, 11 - row)), data.draw(st.integers(1, 60 - column))
    with mock.patch.object(torch_noise, "_CPU_CHUNK", chunk):
        part = torch_cloud_noise(torch.tensor(seed), rows, columns, row_offset + row, class_offset + column)
    assert torch.equal(part, whole[row : row + rows, column : column + columns])


@pytest.mark.triton
@given(data=st.data(), seed=int64s, row_offset=st.integers(0, 2**63 - 12), class_offset=st.integers(0, 2**35 - 701))
def test_triton_parts_equal_the_whole(data: st.DataObject, device: torch.device, seed: int, row_offset: int, class_offset: int) -> None:
    whole = draw("triton", device, seed, 6, 700, row_offset, class_offset)
    row, column = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 699))
    rows, columns = data.draw(st.integers(1, 6 - row)), data.draw(st.integers(1, 700 - column))
    part = draw("triton", device, seed, rows, columns, row_offset + row, class_offset + column)
    assert torch.equal(part, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_values(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        noise = cloud_noise(SEED, 70, 8142, class_offset=5, device="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(noise[41:43, 100:120], cloud_noise(SEED, 2, 20, row_offset=41, class_offset=105, device="cpu"))


@pytest.mark.gpu
def test_torch_on_a_gpu_equals_torch_on_the_cpu() -> None:
    """Its values come from tables and exact integers."""
    seed = torch.tensor(SEED, device="cuda")
    assert torch.equal(torch_cloud_noise(seed, 50, 999, ROW, 3).cpu(), torch_cloud_noise(seed.cpu(), 50, 999, ROW, 3))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu() -> None:
    rows, classes = 2050, 2**20
    noise = cloud_noise(SEED, rows, classes, device="cuda")
    assert torch.equal(noise[-3:, -70:], cloud_noise(SEED, 3, 70, row_offset=rows - 3, class_offset=classes - 70, device="cuda"))


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_seed_when_it_is_replayed() -> None:
    seed = torch.tensor(1, device="cuda")
    cloud_noise(seed, 8, 100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = cloud_noise(seed, 8, 100)
    seed.fill_(SEED)
    graph.replay()
    assert torch.equal(noise, cloud_noise(SEED, 8, 100, device="cuda"))


# fill_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fill_writes_into_any_strides(dtype: torch.dtype) -> None:
    expected = torch.empty(6, 21, dtype=dtype)
    fill_noise(expected, torch.tensor(SEED), 4, 9)
    torch.testing.assert_close(expected.float(), cloud_noise(SEED, 6, 21, row_offset=4, class_offset=9, device="cpu"), rtol=0, atol=1e-6)
    padded = torch.full((6, 64), -1.0, dtype=dtype)
    fill_noise(padded[:, 3:24], torch.tensor(SEED), 4, 9)
    assert torch.equal(padded[:, 3:24], expected)
    assert (padded[:, :3] == -1).all()
    assert (padded[:, 24:] == -1).all()
    transposed = torch.empty((21, 6), dtype=dtype).t()
    fill_noise(transposed, torch.tensor(SEED), 4, 9)
    assert torch.equal(transposed, expected)


@pytest.mark.parametrize("chunk", [1000, 12, 5], ids=["one step", "steps of rows, the last smaller", "steps of groups, the last smaller"])
def test_every_step_fits_the_workspace(chunk: int) -> None:
    """Torch warns when it resizes a part of it."""
    with warnings.catch_warnings(), mock.patch.object(torch_noise, "_CPU_CHUNK", chunk):
        warnings.simplefilter("error")
        fill_noise(torch.empty(3, 42), torch.tensor(SEED))


def test_fill_of_nothing() -> None:
    fill_noise(torch.empty(0, 5), torch.tensor(1))
    fill_noise(torch.empty(5, 0), torch.tensor(1))


# Seeds and bad input


def test_an_unsigned_seed_is_the_signed_one_with_its_bits() -> None:
    assert torch.equal(cloud_noise(2**64 - 1, 2, 9), cloud_noise(-1, 2, 9))
    assert torch.equal(cloud_noise(2**63, 2, 9), cloud_noise(torch.tensor(-(2**63)), 2, 9))


def test_no_seed_is_governed_by_manual_seed(device: torch.device) -> None:
    torch.manual_seed(5)
    first, second = cloud_noise(None, 3, 40, device=device), cloud_noise(None, 3, 40, device=device)
    torch.manual_seed(5)
    assert torch.equal(cloud_noise(None, 3, 40, device=device), first)
    assert not torch.equal(first, second)


def test_a_drawn_seed_uses_all_64_bits() -> None:
    torch.manual_seed(0)
    seeds = [int(resolve_seed(None, torch.device("cpu"))) for _ in range(64)]
    assert min(seeds) < -(2**62)
    assert max(seeds) > 2**62


def test_a_seed_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is on meta but the noise is needed on cpu"):
        cloud_noise(torch.tensor(1, device="meta"), 2, 3, device="cpu")


# The operators


def operator(backend: str) -> Any:
    if backend == "triton":
        import gclkern.kernels.noise  # noqa: F401 (registers the operator)
    return getattr(torch.ops.gclkern, f"{PREFIXES[backend]}cloud_noise").default


def test_operator_is_well_formed(backend: str, device: torch.device) -> None:
    seed = torch.tensor(SEED, device=device if backend == "triton" else "cpu")
    torch.library.opcheck(operator(backend), (seed, 3, 21, ROW, 5))


@pytest.mark.parametrize("seed", [None, SEED])
def test_compiles_as_one_graph(device: torch.device, seed: int | None) -> None:
    compiled = torch.compile(lambda rows: cloud_noise(seed, rows, 13, class_offset=3, device=device) + 1, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 5):
        noise = compiled(rows) - 1
        assert noise.shape == (rows, 13)
        if seed is not None:
            assert_close(noise, oracle.noise(seed, rows, 13, 0, 3))


@pytest.mark.triton
def test_operator_launches_its_kernel(device: torch.device, launches: Any) -> None:
    draw("triton", device, 1, 2, 3)
    assert launches.names == ["cloud_noise_kernel"]


# The compiled kernel


def launch_cloud_noise() -> None:
    from gclkern.kernels.noise import cloud_noise as triton_cloud_noise

    triton_cloud_noise(torch.tensor(SEED), 512, 8142, 0, 0)


@pytest.mark.triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiled_kernel(target: str) -> None:
    (kernel,) = aot.compile_case(launch_cloud_noise, target)
    assert kernel.name == "cloud_noise_kernel"
    assert kernel.spill_stores == 0
    assert kernel.shared_bytes <= kernel.shared_limit
    if target == "sm_90":
        words = kernel.constants["ROWS"] * kernel.constants["GROUPS"] * 4 // 128  # of a thread, each for two draws
        body = kernel.program.body
        for special in ("LG2", "SQRT", "SIN", "COS"):
            assert body.count(f"MUFU.{special}") == words
        # Five full rounds of two wide products make four words; the first two rounds share theirs between the rows and groups of a thread.
        assert body.count("IMAD.WIDE") <= 5 * words
        assert body.count("I2F") <= 1  # of the block's number, to divide it: no field of a word goes that way
        assert body.count("CALL") == 0
