"""The model of time: what it counts, on cases that a pencil can check."""

from __future__ import annotations

import math
from unittest import mock

import pytest

from benchmarks.common import HUNDRED_THOUSAND, INATURALIST, MILLION, SMOKE, Shape
from benchmarks.machine_code.aot import in_worker
from benchmarks.machine_code.launches import LibraryProduct
from benchmarks.machine_code.sass import Program
from benchmarks.predict_times import (
    CLOCK,
    LAUNCH,
    LIBRARY_RATE,
    PROCESSORS,
    TENSOR_RATE,
    Compiled,
    Demand,
    Operand,
    TorchOperators,
    bare_float32_seconds,
    launches_of,
    memory_reads,
    predict,
    predict_product,
    product_step,
    raster,
    resident_blocks,
    walk,
)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "blocks"),
    [
        (128, 2048, 4, 4),  # 128 * 32 registers a warp, 16 warps of 65536
        (101, 2048, 4, 4),  # rounded up to 104
        (72, 2048, 4, 7),
        (129, 98304, 8, 1),  # registers: 136 * 32 * 8 is more than half
        (128, 98304, 8, 2),
        (32, 120 * 1024, 8, 1),  # shared memory
        (16, 0, 4, 16),  # 64 warps
    ],
)
def test_resident_blocks(registers: int, shared_bytes: int, warps: int, blocks: int) -> None:
    assert resident_blocks(registers, shared_bytes, warps) == blocks


def test_a_wave_reads_a_panel_once_and_the_cache_forgets() -> None:
    def reads(program: int) -> list[tuple[object, float]]:
        return [(("a", program // 4), 10.0), (("b", program % 4), 3.0)]

    assert memory_reads(8, 4, reads) == 2 * 10 + 4 * 3, "each panel once while the cache holds all"
    assert memory_reads(8, 4, reads, cache=0.0) == 2 * 10 + 2 * 4 * 3, "b again in the second wave"
    assert memory_reads(8, 8, reads, cache=0.0) == 2 * 10 + 4 * 3, "one wave"


@pytest.mark.triton
@pytest.mark.parametrize("shape", [HUNDRED_THOUSAND, MILLION], ids=str)
def test_the_weight_gradient_reads_the_large_operand_once(shape: Shape) -> None:
    """The order of its tiles, simulated: with the class tile on the fast axis the gradient (N, C) came from memory once for every column tile."""
    row_panel, column_panel, column_tiles = 2.0 * 128 * shape.rows, 2.0 * 128 * shape.rows, shape.dim // 128
    programs = math.ceil(shape.classes / 128) * column_tiles

    def reads(program: int) -> list[tuple[object, float]]:
        classes, column = raster(program, column_tiles)
        return [(("G", classes), row_panel), (("x", column), column_panel)]

    whole = 2.0 * shape.rows * (128 * math.ceil(shape.classes / 128) + shape.dim)
    assert memory_reads(programs, PROCESSORS, reads) <= 1.15 * whole  # a wave over the cache size reads the small operand again


@pytest.mark.triton
@pytest.mark.parametrize("shape", [INATURALIST, HUNDRED_THOUSAND, MILLION], ids=str)
@pytest.mark.parametrize("summing", [True, False])
def test_the_last_wave_of_the_gradient_is_nearly_whole(shape: Shape, summing: bool) -> None:
    from gclkern.kernels.logit_loss import GRADIENT_COLUMNS, GRADIENT_RESIDENT, SUMMING_GRADIENT_RESIDENT, gradient_splits, padded_columns

    class_tiles, row_tiles = math.ceil(padded_columns(shape.classes) / GRADIENT_COLUMNS), shape.rows // 4
    waves = (
        class_tiles * gradient_splits(class_tiles, row_tiles, summing=summing) / (PROCESSORS * (SUMMING_GRADIENT_RESIDENT if summing else GRADIENT_RESIDENT))
    )
    assert waves / math.ceil(waves) > 0.93


def test_a_step_of_a_product() -> None:
    """A step of 128 x 128 x 64: eight wgmma of 64 clocks, 48 KiB read from and 32 KiB copied to shared memory."""
    step = product_step(128, 128, 64, 2)
    assert (step.tensor, step.shared) == (512, 640)
    assert step.l2 == pytest.approx(845, abs=1)


def test_a_product_by_the_library() -> None:
    """4096 x 8192 x 512: 64 x 2 tiles are one wave; of 129 the last wave is nearly empty; few tiles are split along the depth."""
    flops = 2.0 * 8192 * 4096 * 512
    whole, wasted, split = (predict_product(LibraryProduct(rows, 4096, 512, 2, 4)) for rows in (8192, 8576, 512))
    assert whole.memory_bytes == 2 * 4096 * (8192 + 512) + 4 * 8192 * 512
    assert whole.seconds == pytest.approx(LAUNCH + flops / LIBRARY_RATE * PROCESSORS / 128, rel=0.02)
    assert wasted.seconds == pytest.approx(LAUNCH + flops / LIBRARY_RATE * PROCESSORS / 128 * 2, rel=0.02)
    assert split.seconds == pytest.approx(LAUNCH + flops / 16 / LIBRARY_RATE, rel=0.2)


def launches_with(shape: Shape, exponentials: bool) -> list[tuple[Compiled | LibraryProduct | TorchOperators, int]]:
    """In a worker."""
    with mock.patch("gclkern.kernels.head.exponentials_pay", return_value=exponentials):
        return launches_of(shape, "materialised")


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("shape", [INATURALIST, Shape("many samples", 1536, 8142, 512)], ids=str)
def test_exponentials_are_kept_where_the_model_has_them_faster(shape: Shape) -> None:
    from gclkern.kernels.head import exponentials_pay

    cosines, exponentials = (sum(predict(*launch).seconds for launch in in_worker(launches_with, shape, pay).result()) for pay in (False, True))
    assert (exponentials < cosines) is exponentials_pay(shape.rows, shape.classes, shape.dim)


def test_resources_add_up_and_the_busiest_decides() -> None:
    demand = Demand(issue=100, mufu=10, latency=50).plus(Demand(mufu=90), times=1)
    assert demand.clocks(1) == pytest.approx(100 * (2 + 1 / 16) ** 0.25)
    assert demand.clocks(4) == pytest.approx(400 * 2**0.25, rel=1e-4)


def test_a_warp_waits_for_its_scoreboards() -> None:
    listing = """
        /*0000*/                   MUFU.EX2 R2, R2 ;                     /* 0x0000000200027308 */
                                                                         /* 0x000e620000000800 */
        /*0010*/                   FMUL R2, R2, R2 ;                     /* 0x0000000202027220 */
                                                                         /* 0x002fc80000400000 */
    """
    code = Program.parse(listing).instructions
    assert [i.stall for i in code] == [1, 4]
    assert (code[0].result_board, code[0].operands_board, code[0].waits) == (1, None, ())
    assert (code[1].result_board, code[1].waits) == (None, (1,))
    assert walk(code) == 22 + 4


@pytest.mark.slow
@pytest.mark.triton
def test_every_launch_has_a_prediction() -> None:
    found = in_worker(launches_of, SMOKE, "materialised").result()
    names = [launch.kernel.name for launch, _ in found if isinstance(launch, Compiled)]
    assert {"_cosine_kernel", "_row_stats_kernel", "_gradient_kernel", "_weight_gradient_kernel"} <= set(names)
    assert all(1e-6 < predict(launch, repeats).seconds < 1e-3 for launch, repeats in found)
    assert isinstance(found[0][0].arguments["x_ptr"], Operand)
    assert isinstance(found[-1][0], LibraryProduct), "the features' gradient"


@pytest.mark.slow
@pytest.mark.triton
def test_a_contrastive_loss_is_predicted_by_its_products() -> None:
    """Three products of halves in forward and six in backward: on the tensor cores, and beside the other work between once and four times as long."""
    shape = Shape("samples", 4096, 100, 128)
    launches = in_worker(launches_of, shape, "SupCon").result()
    found = {launch.kernel.name: predict(launch, repeats) for launch, repeats in launches if isinstance(launch, Compiled)}
    product = 2.0 * shape.rows**2 * shape.dim / (PROCESSORS * CLOCK * TENSOR_RATE[2])
    assert 3 * product < found["_denominator_kernel"].seconds < 12 * product
    assert 6 * product < found["_pull_kernel"].seconds < 24 * product
    assert not any(isinstance(launch, TorchOperators) for launch, _ in launches), "no operator of torch runs beside the kernels"
    total = sum(predict(launch, repeats).seconds for launch, repeats in launches)
    assert total < 1.5 * bare_float32_seconds(shape)
