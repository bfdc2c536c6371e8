"""The contrast with von Mises-Fisher distributions as a function of the cosine, and its derivative: one pass over (N, C) each.

See gclkern.torch_backend.vmf for the series. Bytes: forward reads and writes 4 for each cosine, backward reads 8 and writes 4; the three logarithms of a cosine
take about as long as its bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_loss import log1p
from .runtime import batch_kernel, on_device
from .terms import implements

_ROWS = 8
_COLUMNS = 128


@triton.jit
def _correction(root, order):
    p = order / root
    return p * (3.0 - 5.0 * p * p) / (24.0 * order)


@triton.jit
def _tile(cosine_ptr, concentration_ptr, num_rows, num_classes, row_blocks, order, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Places and whether they exist, concentrations (1, COLUMNS), and base^2 and root^2 - base^2 of each cosine. `inverse` is 1 / temperature."""
    block = tl.program_id(0)
    rows = (block % row_blocks) * ROWS + tl.arange(0, ROWS)
    columns = (block // row_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    present = columns < num_classes
    places = rows.to(tl.int64)[:, None] * num_classes + columns[None, :]
    inside = (rows < num_rows)[:, None] & present[None, :]
    concentration = tl.load(concentration_ptr + columns, mask=present, other=0.0)[None, :]
    cosine = tl.load(cosine_ptr + places, mask=inside, other=0.0)
    grown = inverse * inverse + 2.0 * inverse * concentration * cosine
    return places, inside, concentration, order * order + concentration * concentration, grown


@batch_kernel
def _vmf_kernel(
    cosine_ptr, concentration_ptr, out_ptr, num_rows, num_classes, row_blocks, order, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    places, inside, _, base_square, grown = _tile(cosine_ptr, concentration_ptr, num_rows, num_classes, row_blocks, order, inverse, ROWS, COLUMNS)
    base = tl.sqrt(base_square)
    root = tl.sqrt(tl.maximum(base_square + grown, order * order))
    step = grown / (root + base)
    value = step - order * log1p(step / (order + base)) - 0.5 * log1p(step / base) + log1p(_correction(root, order)) - log1p(_correction(base, order))
    tl.store(out_ptr + places, value, mask=inside)


@batch_kernel
def _vmf_grad_kernel(
    grad_ptr, cosine_ptr, concentration_ptr, out_ptr, num_rows, num_classes, row_blocks, order, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    places, inside, concentration, base_square, grown = _tile(cosine_ptr, concentration_ptr, num_rows, num_classes, row_blocks, order, inverse, ROWS, COLUMNS)
    root = tl.sqrt(tl.maximum(base_square + grown, order * order))
    p = order / root
    change = p * p * (15.0 * p * p - 3.0) / (24.0 * order * order * (1.0 + _correction(root, order)))
    slope = root / (order + root) - 0.5 / root + change
    grad = tl.load(grad_ptr + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, grad * slope * concentration * inverse / root, mask=inside)


def _grid(cosine: Tensor) -> tuple[int, int]:
    """Blocks of rows, and all blocks."""
    row_blocks = triton.cdiv(cosine.shape[0], _ROWS)
    return row_blocks, row_blocks * triton.cdiv(cosine.shape[1], _COLUMNS)


@implements("vmf_forward", "triton")
def vmf_forward(cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    """The contrast (N, C) of cosines (N, C) and concentrations (C,), all float32."""
    out = torch.empty(cosine.shape, dtype=torch.float32, device=cosine.device)
    row_blocks, blocks = _grid(cosine)
    with on_device(cosine):
        _vmf_kernel[(blocks,)](
            cosine.contiguous(), concentration.contiguous(), out, *cosine.shape, row_blocks, order, 1.0 / temperature,
            ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@implements("vmf_backward", "triton")
def vmf_backward(grad: Tensor, cosine: Tensor, concentration: Tensor, order: float, temperature: float) -> Tensor:
    """The gradient of the cosines from that of the contrast."""
    out = torch.empty(cosine.shape, dtype=torch.float32, device=cosine.device)
    row_blocks, blocks = _grid(cosine)
    with on_device(cosine):
        _vmf_grad_kernel[(blocks,)](
            grad.contiguous(), cosine.contiguous(), concentration.contiguous(), out, *cosine.shape, row_blocks, order, 1.0 / temperature,
            ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
