"""The loss of a classifier head: features (N, D) against one weight row for each class (C, D), without a normalised copy of the weights.

The three or four matrix products are torch's; between them, compiled loops make one pass over each row. The formulas and plans are in
gclkern.torch_backend.head, with one difference: <p_j, w_j> is computed when dw_j is written, from rows in the cache, so no second matrix (N, C) is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gclkern.cpu_backend.library import DTYPES, NULL, Logits, Rows, address, call
from gclkern.cpu_backend.logit_loss import STATISTICS, keeps_exponentials, pass_terms
from gclkern.kernels.terms import LossTerms, implements, shapes_of

_CHUNK_BYTES = 16 * 2**20  # of cosines: far above what a product needs to run at full speed
_PANEL_BYTES = 2 * 2**20  # of cosines: fits the cache, and is small beside the other tensors
_MIN_CLASSES = 64  # narrower products are inefficient
_WEIGHT_BYTES = 8 * 2**20  # of weight rows that are worked on at a time: with their gradient they stay in the third-level cache
_BLOCK = 512  # classes that share a peak; BLOCK of native/vector.h
_SUMS = 10  # numbers of struct sums of native/native.h
# Replaces 1 / |w_j| where the norm counts as 0: it makes cosines smaller than 1e-32, and unlike 0, the bias gradient can be divided by it.
_NO_DIRECTION = 1e-20


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _inverse_norms(matrix: Tensor, no_direction: float, inverse: Tensor) -> None:
    """1 / |row|; `no_direction` where the norm counts as 0, NaN where it is not finite."""
    arguments = Rows.pack(
        *matrix.shape, matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.stride(), no_direction, inverse.data_ptr(), NULL, NULL, NULL, 0, torch.get_num_threads()
    )
    call("inverse_norms", arguments)


def _project(products: Tensor, matrix: Tensor, inverse: Tensor | None, no_direction: float, factor: Tensor | None, out: Tensor) -> None:
    """out = factor * (p - <p, w> w / |w|^2); 0 where w has no direction or the factor is 0. Without `inverse` the products are only multiplied."""
    arguments = Rows.pack(
        *matrix.shape, matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.stride(), no_direction, address(inverse), products.data_ptr(), address(factor),
        out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    call("project", arguments)


def _times_rows(matrix: Tensor, factor: Tensor) -> Tensor:
    """Rows times their factor; 0 where the factor is 0, even if the row holds NaN."""
    product = matrix * factor.unsqueeze(1)
    return product if bool(factor.all()) else product.masked_fill_((factor == 0).unsqueeze(1), 0.0)


def _without_ignored(values: Tensor, terms: LossTerms) -> Tensor:
    """The values (N,), 0 in ignored rows."""
    ignored = terms.target == terms.ignore_index
    if terms.target_b is not None:
        ignored |= terms.target_b == terms.ignore_index
    return values.masked_fill(ignored, 0.0)


class _Head:
    """The products of one call, chunk of classes by chunk, and the compiled loops over them."""

    def __init__(self, features: Tensor, linear_weight: Tensor, terms: LossTerms, normalize: bool, plan: str) -> None:
        self.num_rows, self.num_classes = features.shape[0], linear_weight.shape[0]
        self.features = features.to(torch.float32)
        self.linear_weight = linear_weight
        self.terms = terms
        self.normalize = normalize
        size = {"materialised": self.num_classes, "chunked": _CHUNK_BYTES // (4 * self.num_rows), "recompute": _PANEL_BYTES // (4 * self.num_rows)}[plan]
        self.width = min(self.num_classes, max(_MIN_CLASSES, size))
        self.product_classes = min(self.width, max(_MIN_CLASSES, _WEIGHT_BYTES // (4 * linear_weight.shape[1])))
        self.panel = torch.Tensor()  # holds the products of a chunk
        self.top1: Tensor | None = None

    def chunks(self) -> Iterator[slice]:
        return _spans(0, self.num_classes, self.width)

    def matrix(self, chunk: slice) -> Tensor:
        """The part of the panel that holds a chunk, contiguous."""
        classes = chunk.stop - chunk.start
        return self.panel[: self.num_rows * classes].view(self.num_rows, classes)

    def products(self, unit: Tensor, chunk: slice, inverse: Tensor | None, find_norms: bool) -> Tensor:
        """<f_hat_i, w_j> for a chunk of classes. 16-bit weights pass through float32 a few rows at a time; `inverse` receives 1 / |w_j|."""
        matrix = self.matrix(chunk)
        for classes in _spans(chunk.start, chunk.stop, self.product_classes):
            rows = self.linear_weight[classes]
            if inverse is not None and find_norms:
                _inverse_norms(rows, _NO_DIRECTION, inverse[classes])
            torch.mm(unit, rows.to(torch.float32).t(), out=matrix[:, classes.start - chunk.start : classes.stop - chunk.start])
        return matrix

    def loops(
        self, name: str, matrix: Tensor, chunk: slice, inverse: Tensor | None, statistics: Tensor, *, sums: Tensor | None = None, losses: Tensor | None = None,
        loss: Tensor | None = None, block_peaks: Tensor | None = None, in_place: bool = False,
    ) -> None:  # fmt: skip
        """Call a function of the library on a chunk; `in_place` overwrites the products by the gradient, divided by the norms of the classes."""
        columns = chunk.stop - chunk.start
        kept = None if block_peaks is None else matrix
        arguments = Logits.pack(
            *pass_terms(self.num_rows, self.num_classes, self.terms), matrix.data_ptr(), 0, columns, 1, NULL if inverse is None else inverse[chunk].data_ptr(),
            address(kept), address(block_peaks), address(sums), chunk.start, columns, statistics.data_ptr(), address(losses), address(self.top1),
            address(loss), matrix.data_ptr() if in_place else NULL, inverse is not None, torch.get_num_threads(),
        )  # fmt: skip
        call(name, arguments)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@implements("head_forward", "cpu")
def head_forward(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.head.head_forward."""
    *fields, normalize, plan, for_backward, top1 = args
    terms = LossTerms(*fields)
    head = _Head(features, linear_weight, terms, normalize, plan)
    found = [_empty(head.num_rows)] if top1 else []
    head.top1 = found[0] if top1 else None
    feature_inverse = _empty(head.num_rows).fill_(1.0)
    if normalize:
        _inverse_norms(features, 0.0, feature_inverse)
    feature_inverse = _without_ignored(feature_inverse, terms)
    unit = _times_rows(head.features, feature_inverse)
    class_inverse = _empty(head.num_classes if normalize else 0)
    inverse = class_inverse if normalize else None
    statistics, losses = _empty(STATISTICS, head.num_rows), _empty(head.num_rows)
    loss = losses if terms.reduction == "none" else _empty()
    head.panel = _empty(head.num_rows * head.width)
    everything = slice(0, head.num_classes)
    if plan == "materialised":
        matrix = head.products(unit, everything, inverse, True)
        block_peaks = _empty(head.num_rows, -(-head.num_classes // _BLOCK)) if for_backward and keeps_exponentials(terms) else None
        head.loops(
            "logit_gradient" if for_backward else "logit_forward", matrix, everything, inverse, statistics, losses=losses, loss=loss,
            block_peaks=block_peaks, in_place=for_backward,
        )  # fmt: skip
        return loss, [feature_inverse, class_inverse, matrix, *found] if for_backward else found
    sums = torch.empty((head.num_rows, _SUMS), dtype=torch.float64, device="cpu")
    for chunk in head.chunks():
        matrix = head.products(unit, chunk, inverse, True)
        head.loops("logit_forward", matrix, chunk, inverse, statistics, sums=sums)
    head.loops("logit_finish", matrix, everything, inverse, statistics, sums=sums, losses=losses, loss=loss)
    return loss, [feature_inverse, class_inverse, statistics, *found] if for_backward else found


@implements("head_backward", "cpu")
def head_backward(grad_loss: Tensor, features: Tensor, linear_weight: Tensor, saved: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same as gclkern.kernels.head.head_backward."""
    *fields, normalize, plan, features_grad, weight_grad, bias_grad = args
    terms = LossTerms(*fields)
    head = _Head(features, linear_weight, terms, normalize, plan)
    feature_inverse, class_inverse, kept = saved  # kept: the gradient for a grad_loss of 1, or the statistics to make it from
    inverse = class_inverse if normalize else None
    upstream = _without_ignored(grad_loss.to(torch.float32).expand(head.num_rows), terms)
    scaled = _times_rows(head.features, feature_inverse * upstream) if weight_grad else None
    unit = head.features
    if plan != "materialised":
        unit = _times_rows(head.features, feature_inverse)
    head.panel = kept.view(-1) if plan == "materialised" else _empty(head.num_rows * head.width)
    grad_features = _empty(*features.shape) if features_grad else _empty(0)
    grad_weight = torch.empty(linear_weight.shape if weight_grad else (0,), dtype=linear_weight.dtype, device="cpu")
    own = grad_weight.dtype == torch.float32
    workspace = None if own or not weight_grad else _empty(head.product_classes, linear_weight.shape[1])
    grad_bias = _empty(head.num_classes if bias_grad else 0)
    for chunk in head.chunks():
        matrix = head.matrix(chunk)
        if plan != "materialised":
            head.products(unit, chunk, inverse, False)
            head.loops("logit_backward", matrix, chunk, inverse, kept, in_place=True)
        if bias_grad:
            torch.mv(matrix.t(), upstream, out=grad_bias[chunk])
        for classes in _spans(chunk.start, chunk.stop, head.product_classes):
            rows = linear_weight[classes]
            gradient = matrix[:, classes.start - chunk.start : classes.stop - chunk.start]
            if features_grad:
                grad_features.addmm_(gradient, rows.to(torch.float32), beta=0 if classes.start == 0 else 1)
            if scaled is not None:
                out = grad_weight[classes]
                products = out if workspace is None else workspace[: rows.shape[0]]
                torch.mm(gradient.t(), scaled, out=products)
                if normalize or workspace is not None:
                    _project(products, rows, class_inverse[classes] if normalize else None, _NO_DIRECTION, None, out)
    if bias_grad:
        grad_bias.div_(class_inverse * terms.scale if normalize else terms.scale)
    if features_grad:
        out = grad_features if features.dtype == torch.float32 else torch.empty(features.shape, dtype=features.dtype, device="cpu")
        _project(grad_features, features, feature_inverse if normalize else None, 0.0, feature_inverse * upstream, out)
        grad_features = out
    return grad_features, grad_weight, grad_bias


@shapes_of("head_forward", "cpu")
def _(features: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, normalize, plan, for_backward, top1 = args
    terms = LossTerms(*fields)
    num_rows, num_classes = features.shape[0], linear_weight.shape[0]
    loss = features.new_empty((num_rows,) if terms.reduction == "none" else (), dtype=torch.float32)
    found = [features.new_empty(num_rows, dtype=torch.float32)] if top1 else []
    if not for_backward:
        return loss, found
    kept = (num_rows, num_classes) if plan == "materialised" else (STATISTICS, num_rows)
    shapes = ((num_rows,), (num_classes if normalize else 0,), kept)
    return loss, [features.new_empty(shape, dtype=torch.float32) for shape in shapes] + found
