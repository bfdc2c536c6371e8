"""SGD that updates only the rows that a step has sampled, and an optimizer's state as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gclkern.distributed.layers import ShardedCosineLinear
from gclkern.validation import check_number


class RowSGD(torch.optim.Optimizer):
    r"""SGD with momentum and weight decay for weights of which a step trains only some rows; the others, and their momentum, do not change.

        v_r = momentum * v_r + g_r + weight_decay * w_r,     w_r = w_r - lr * v_r       for the rows r of a sparse gradient, for all rows of a dense one

    For dense gradients this equals torch.optim.SGD, which for sparse gradients does not support weight decay and reads and writes the momentum of every row.

    Args:
        params: parameters or groups of them, such as those of a :class:`ShardedCosineLinear`.
        lr: learning rate.
        momentum: 0.9, as in the recipes of all methods here.
        weight_decay: factor on the weights that are added to their gradient.

    Raises:
        ValueError, TypeError: a setting that is not a finite number of at least 0.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4, 2))
        >>> optimizer = RowSGD([weight], lr=0.1)
        >>> weight.grad = torch.sparse_coo_tensor([[2]], [[1.0, 1.0]], (4, 2), check_invariants=True)
        >>> optimizer.step()
        >>> weight[:, 0].tolist()
        [1.0, 1.0, 0.8999999761581421, 1.0]
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {name: check_number(name, value, 0.0) for name, value in settings.items()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter]["momentum"], group)
        return loss

    def _update(self, weight: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        grad = weight.grad
        assert grad is not None
        if not grad.is_sparse:
            momentum.mul_(group["momentum"]).add_(grad).add_(weight, alpha=group["weight_decay"])
            weight.add_(momentum, alpha=-group["lr"])
            return
        grad = grad.coalesce()  # sums the gradients of several backward passes; on a GPU it synchronises to read the number of rows
        rows = grad.indices()[0]
        new = momentum[rows].mul_(group["momentum"]).add_(grad.values()).add_(weight[rows], alpha=group["weight_decay"])
        momentum.index_copy_(0, rows, new)
        weight.index_add_(0, rows, new, alpha=-group["lr"])


def sharded_optimizer_state(optimizer: torch.optim.Optimizer, classifier: ShardedCosineLinear) -> dict[str, Tensor]:
    """An optimizer's state for a classifier's weight, as DTensors over all classes that share memory with it.

    ``torch.distributed.checkpoint`` saves them, and loads them in place, on any number of ranks. Only tensors that exist can be loaded: :class:`RowSGD` has its
    momentum from the start, torch's optimizers only after their first step.

    Args:
        optimizer: one that trains ``classifier.weight``, such as :class:`RowSGD` or torch.optim.SGD.
        classifier: the sharded layer.

    Returns:
        The optimizer's tensors of the weight's shape by their names, such as "momentum", each (C, D); in one process plain tensors.

    Example:
        >>> classifier = ShardedCosineLinear(16, 10)
        >>> optimizer = RowSGD(classifier.parameters(), lr=0.1)
        >>> sharded_optimizer_state(optimizer, classifier)["momentum"].shape
        torch.Size([10, 16])
    """
    kept = optimizer.state[classifier.weight].items()
    return {name: classifier.as_dtensor(value) for name, value in kept if isinstance(value, Tensor) and value.shape == classifier.weight.shape}
