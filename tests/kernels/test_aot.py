"""The ahead-of-time compiler and the loop reader themselves, on a kernel whose machine code is known in advance."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine_code.aot import SHARED_LIMIT, compile_case
from benchmarks.machine_code.sass import Program

pytestmark = pytest.mark.triton

BLOCK = 1024
WARPS = 4


def row_sum_aligned() -> None:
    _row_sum(stride=8192)


def row_sum_odd() -> None:
    _row_sum(stride=8142)


def _row_sum(stride: int, **options: int) -> None:
    from tests.support.gpu_free.aot_kernels import row_sum_of_exponentials

    values = torch.empty(4, stride, dtype=torch.float32)
    row_sum_of_exponentials[(4,)](values, torch.empty(4), stride, 8142, BLOCK=BLOCK, MASKED=stride % 16 != 0, num_warps=WARPS, enable_fp_fusion=True, **options)


def too_few_registers() -> None:
    _row_sum(stride=8192, maxnreg=24)


def too_large_a_tile() -> None:
    from tests.support.gpu_free.aot_kernels import transpose

    transpose[(1,)](torch.empty(256 * 256), BLOCK=256, num_warps=16, enable_fp_fusion=True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_loop_is_found_and_its_work_counted(target: str) -> None:
    (kernel,) = compile_case(row_sum_aligned, target)
    loop = kernel.hot_loop("MUFU.EX2")
    assert kernel.name == "row_sum_of_exponentials"
    assert kernel.options["num_warps"] == WARPS
    assert kernel.constants["BLOCK"] == BLOCK
    logits_per_pass = BLOCK // (32 * WARPS)
    assert loop.count("MUFU.EX2") % logits_per_pass == 0
    assert set(loop.load_bits) == {128}
    assert len(loop.load_bits) * 4 == loop.count("MUFU.EX2")
    assert 2 < loop.instructions_per("MUFU.EX2") < 8
    assert loop.slow_paths == 0
    assert kernel.spill_stores == 0
    assert 0 < kernel.shared_bytes <= SHARED_LIMIT[target]


def test_the_launch_decides_the_specialisation() -> None:
    (kernel,) = compile_case(row_sum_odd, "sm_90")
    assert set(kernel.hot_loop("MUFU.EX2").load_bits) == {32}, "an odd stride leaves rows aligned to one element"


def test_spills_are_reported() -> None:
    (kernel,) = compile_case(too_few_registers, "sm_90")
    assert kernel.registers <= 24
    assert kernel.spill_stores > 0
    assert kernel.spills_in_loops > 0


def test_shared_memory_over_the_limit_is_reported() -> None:
    (kernel,) = compile_case(too_large_a_tile, "sm_120")
    assert kernel.shared_bytes > kernel.shared_limit, "Triton compiles what no such GPU can launch"


def test_amd_reports_registers_and_shared_memory() -> None:
    (kernel,) = compile_case(row_sum_aligned, "gfx942")
    assert kernel.registers > 0
    assert kernel.spill_stores == 0
    assert kernel.shared_bytes <= SHARED_LIMIT["gfx942"]


def test_a_kernel_that_is_not_launched_is_an_error() -> None:
    with pytest.raises(LookupError, match="row_sum_of_exponentials"):
        compile_case(row_sum_aligned, "sm_90", "no_such_kernel")


def test_an_out_of_line_slow_path_belongs_to_its_loop() -> None:
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, [R4] ;
        /*0020*/               @P0 BRA 0x80 ;
        /*0030*/                   MUFU.EX2 R2, R2 ;
        /*0040*/              @!P1 BRA 0x10 ;
        /*0050*/                   STG.E [R6], R2 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   FMUL R2, R2, R2 ;
        /*0090*/                   BRA 0x30 ;
    """
    program = Program.parse(text)
    (loop,) = program.loops
    assert (loop.header, loop.back_branch) == (0x10, 0x40)
    assert 0x80 in loop.body
    assert loop.code.slow_paths == 1
    assert loop.code.opcodes == ("LDG.E.64", "BRA", "MUFU.EX2", "BRA")
    assert loop.code.load_bits == (64,)
