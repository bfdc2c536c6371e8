"""The DRO-LT bound: distances, softmax over the samples, and gradients, with one row for each class of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from gclkern.cpu_backend.library import NULL, REDUCTIONS, Bound, address, call
from gclkern.kernels.terms import implements, shapes_of


def _saved(features: Tensor, target: Tensor, centroids: Tensor) -> list[Tensor]:
    """Buffers for distances (R, N), statistics (4, R), classes (R,) and labels (N,), with R = min(N, C) rows; unused rows are not written."""
    samples = features.shape[0]
    rows = torch.sym_min(samples, centroids.shape[0])
    return [centroids.new_empty((rows, samples)), centroids.new_empty((4, rows)), target.new_empty(rows), target.new_empty(samples)]


def _epsilon_stride(epsilon: Tensor) -> int:
    return 0 if epsilon.dim() == 0 else 1


@implements("dro_lt_forward", "cpu")
def dro_lt_forward(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    """The same as gclkern.kernels.dro_lt.dro_lt_forward."""
    saved = _saved(features, target, centroids)
    features, centroids = features.to(torch.float32).contiguous(), centroids.contiguous()
    losses = centroids.new_empty(features.shape[0])
    loss = losses if reduction == "none" else centroids.new_empty(())
    members = target.new_empty(centroids.shape[0])
    arguments = Bound.pack(
        *features.shape[:1], *centroids.shape, saved[2].shape[0], features.data_ptr(), target.data_ptr(), centroids.data_ptr(), epsilon.data_ptr(),
        _epsilon_stride(epsilon), address(class_weight), temperature, REDUCTIONS[reduction], *map(address, saved), members.data_ptr(), losses.data_ptr(),
        loss.data_ptr(), NULL, 0, NULL, NULL, NULL, NULL, torch.get_num_threads(),
    )  # fmt: skip
    call("bound_forward", arguments)
    return loss, saved


@implements("dro_lt_backward", "cpu")
def dro_lt_backward(
    grad_loss: Tensor, features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, saved: list[Tensor],
    temperature: float, reduction: str, features_grad: bool, epsilon_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as gclkern.kernels.dro_lt.dro_lt_backward."""
    dtype = features.dtype
    features, centroids, grad_loss = features.to(torch.float32).contiguous(), centroids.contiguous(), grad_loss.to(torch.float32).contiguous()
    distance, _, classes, _ = saved
    pull, row_epsilon = torch.empty_like(distance), distance.new_empty(classes.shape[0])
    grad_features = torch.empty_like(features) if features_grad else features.new_empty(0)
    grad_epsilon = torch.empty_like(epsilon) if epsilon_grad else epsilon.new_empty(0)
    arguments = Bound.pack(
        *features.shape[:1], *centroids.shape, classes.shape[0], features.data_ptr(), target.data_ptr(), centroids.data_ptr(), epsilon.data_ptr(),
        _epsilon_stride(epsilon), NULL, temperature, 0, *map(address, saved), NULL, NULL, NULL,
        grad_loss.data_ptr(), 0 if grad_loss.dim() == 0 else 1,
        pull.data_ptr(), grad_features.data_ptr() if features_grad else NULL, grad_epsilon.data_ptr() if epsilon_grad else NULL, row_epsilon.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    call("bound_backward", arguments)
    return grad_features.to(dtype), grad_epsilon


@shapes_of("dro_lt_forward", "cpu")
def _(
    features: Tensor, target: Tensor, centroids: Tensor, epsilon: Tensor, class_weight: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, list[Tensor]]:
    return centroids.new_empty((features.shape[0],) if reduction == "none" else ()), _saved(features, target, centroids)
