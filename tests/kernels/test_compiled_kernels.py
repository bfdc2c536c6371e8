"""The kernels as a GPU gets them: compiled, and run by ptx.py. First that interpreter itself, on instructions whose results are known."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.gpu_free import ptx

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 64
PROLOGUE = """
.visible .entry add(.param .u64 add_param_0, .param .u64 add_param_1, .param .u32 add_param_2)
.reqntid 64
{
	.reg .pred %p<4>;
	ld.param.b64 %rd1, [add_param_0];
	ld.param.b64 %rd2, [add_param_1];
	ld.param.b32 %r1, [add_param_2];
	mov.u32 %r2, %tid.x;
	mov.u32 %r3, %ctaid.x;
	shl.b32 %r4, %r3, 6;
	or.b32 %r5, %r4, %r2;
	mul.wide.u32 %rd3, %r5, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	setp.lt.u32 %p1, %r5, %r1;
"""


def run(body: str, values: np.ndarray, size: int, shared: int = 0) -> np.ndarray:
    """The float32 output of a kernel of one thread for each element, of which the first `size` are there for it."""
    out = np.zeros_like(values)
    spans = [(array.ctypes.data, array.nbytes) for array in (values, out)]
    ptx.run(f"{PROLOGUE}{body}\tret;\n}}\n", (-(-size // BLOCK),), BLOCK, [values.ctypes.data, out.ctypes.data, size], spans, shared)
    return out


def numbers(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(np.float32)


def test_guarded_threads_change_nothing() -> None:
    values = numbers(100)
    out = run("mov.b32 %r6, 0; @%p1 ld.global.b32 %r6, [%rd4]; add.f32 %r7, %r6, 0f3F800000; @%p1 st.global.b32 [%rd5], %r7;", values, 90)
    assert np.array_equal(out[:90], values[:90] + 1)
    assert not out[90:].any()


def test_threads_may_diverge_and_reconverge() -> None:
    loop = """
	mov.b32 %r6, 0f00000000;
	and.b32 %r8, %r2, 3;
$again:
	setp.eq.b32 %p2, %r8, 0;
	@%p2 bra $done;
	add.f32 %r6, %r6, 0f40000000;
	sub.s32 %r8, %r8, 1;
	bra.uni $again;
$done:
	shfl.sync.bfly.b32 %r9, %r6, 1, 31, -1;
	add.f32 %r9, %r9, %r6;
	@%p1 st.global.b32 [%rd5], %r9;
	"""
    assert np.array_equal(run(loop, numbers(64), 64)[:4], [2, 2, 10, 10])  # twice 0 + 1 and 2 + 3


def test_shared_memory_crosses_warps() -> None:
    reverse = """
	@%p1 ld.global.b32 %r6, [%rd4];
	shl.b32 %r7, %r2, 2;
	st.shared.b32 [%r7], %r6;
	bar.sync 0;
	sub.s32 %r8, 63, %r2;
	shl.b32 %r8, %r8, 2;
	ld.shared.b32 %r9, [%r8];
	@%p1 st.global.b32 [%rd5], %r9;
	"""
    values = numbers(128)
    assert np.array_equal(run(reverse, values, 128, shared=256), values.reshape(2, 64)[:, ::-1].reshape(-1))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("ld.global.b32 %r6, [%rd4];", MemoryError, "4 bytes at offset 400 of a buffer of 400 bytes"),
        ("@%p1 ld.global.v2.b32 {%r6, %r7}, [%rd4];", MemoryError, "an access of 8 bytes"),
        ("ld.shared.b32 %r6, [%r2];", MemoryError, "an access of 4 bytes"),
        ("mov.b32 %r6, 256; ld.shared.b32 %r7, [%r6];", MemoryError, "shared memory of 256 bytes at 256"),
        ("add.f32 %r6, %r7, %r7;", LookupError, "%r7 was never written"),
        ("setp.lt.u32 %p2, %r2, 7; @%p2 bra $skip; bar.sync 0; $skip: @%p2 bra $skip;", RuntimeError, "no end"),
        ("setp.lt.u32 %p2, %r2, 7; @%p2 shfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;", RuntimeError, "part of a warp is not here"),
    ],
)
def test_faults_that_a_gpu_may_ignore_are_errors(body: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "_LIMIT", 1000)
    with pytest.raises(error, match=message):
        run(body, numbers(100), 100, shared=256)


@pytest.mark.parametrize("waited", [True, False])
def test_data_of_a_copy_that_was_not_waited_for_is_nan(waited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "DEFERRED", True)
    copy = f"""
	shl.b32 %r7, %r2, 2;
	cp.async.ca.shared.global [%r7], [%rd4], 4;
	cp.async.commit_group;
	{"cp.async.wait_group 0;" if waited else "cp.async.wait_group 1;"}
	ld.shared.b32 %r9, [%r7];
	@%p1 st.global.b32 [%rd5], %r9;
	"""
    values = numbers(64)
    found = run(copy, values, 64, shared=256)
    assert np.array_equal(found, values) if waited else np.isnan(found).all()


# Of every kernel all options at once, the dtypes, odd sizes and strides, and rows that are not to be read. Any other test runs so, too: see compiled.py.
SELECTED = {
    "noise": ("test_noise.py", "test_triton"),
    "losses": ("test_gcl_cross_entropy.py", "triton and (everything-mean or test_sixteen_bit_cosines or 2-8142 or nan-everything)"),
    "heads": ("test_linear_gcl_cross_entropy.py", "triton and (triton-everything or test_sixteen_bit_features)"),
    "angles": ("test_angular_losses.py", "triton and (test_every_option or test_heads) and everything"),
    "tiles": ("kernels/test_head.py", "wide_tiles or tf32"),
    "exponentials": (
        "kernels/test_exponentials.py",
        "(loss_and_gradients and (plain or focal_stage_2)) or (test_dtypes and bfloat16) or ends or digits or no_number",
    ),
    "bounds": ("test_dro_lt.py", "triton and (test_loss_and_gradients and True or test_sixteen_bit_features or out_of_range or near_one)"),
    "centroids": ("test_centroids.py", "triton and (test_sixteen_bit_features or column_tiles or out_of_range)"),
    "strides": ("test_operations.py", "triton and test_any_strides and (transposed or offset) and not angles"),
    "samples": ("test_supervised_contrastive.py", "triton and test_loss_and_gradients and mean and (SupCon or BCL) and not out"),
    "distributions": ("test_proco.py", "triton and keeps_its_digits"),
}


FAST = ("sm_90", "centroids")
# Angles are arithmetic alone, which the interpreter executes as well; they are exhaustive.
SLOW_FOR_SM_80 = ("heads",)  # whose products differ most from those of sm_90; the losses of ready logits are part of them


def _marks(target: str, part: str) -> list[pytest.MarkDecorator]:
    if (target, part) == FAST:
        return []
    slow = part != "angles" if target == "sm_90" else part in SLOW_FOR_SM_80
    return [pytest.mark.slow if slow else pytest.mark.exhaustive]


@pytest.mark.interpreter
@pytest.mark.parametrize(("target", "part"), [pytest.param(*run, marks=_marks(*run)) for run in itertools.product(("sm_80", "sm_90"), SELECTED)])
def test_kernels_as_compiled_for(target: str, part: str) -> None:
    file, selection = SELECTED[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"tests/{file}", "-k", selection]
    assert_passes(command, {"PTX_TARGET": target})


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("file", "selection"),
    [
        pytest.param("test_linear_gcl_cross_entropy.py", "triton and triton-everything", marks=pytest.mark.exhaustive),
        pytest.param("test_linear_gcl_cross_entropy.py", "triton and test_sixteen_bit_features and bfloat16", marks=pytest.mark.slow),
        pytest.param("kernels/test_head.py", "wide_tiles or tf32", marks=pytest.mark.slow),
    ],
)
def test_products_wait_for_their_copies(file: str, selection: str) -> None:
    """With copies and products of sm_90 done as late as their waits allow."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"tests/{file}", "-k", selection]
    assert_passes(command, {"PTX_TARGET": "sm_90", "PTX_DEFERRED": "1"})


def assert_passes(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"[1-9]\d* passed", done.stdout)
