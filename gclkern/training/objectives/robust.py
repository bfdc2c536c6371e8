"""The DRO-LT bound on several layers of a network at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gclkern.losses import DROLTLoss

FEATURES = "features"  # the name of the backbone's output among its layers


@torch.no_grad()
def check_layers(backbone: nn.Module, layers: Sequence[str], images: Tensor) -> None:
    """Check by a forward pass of `images` that the backbone has layers of these names, each with an output.

    Raises:
        ValueError: a layer does not exist, or has no output that is a tensor; the message names some that exist.
    """
    layers = [name for name in layers if name != FEATURES]
    if not layers:  # the usual case, in which a run starts without a forward pass
        return
    known = dict(backbone.named_modules())
    for name in layers:
        if not name or name not in known:
            own = ", ".join([FEATURES, *(child for child, _ in backbone.named_children())])
            raise ValueError(f"`robust_layers`: {type(backbone).__name__} has no layer {name!r}; take one of {own}, or a module within one")
    training = backbone.training
    with recorded(backbone, layers) as found:
        backbone.eval()(images)
    backbone.train(training)
    for name in layers:
        if not isinstance(found.get(name), Tensor):
            problem = f"gives a {type(found[name]).__name__}, not a tensor" if name in found else "is not called in a forward pass"
            raise ValueError(f"`robust_layers`: the layer {name} {problem}; take another one, such as the block that it is in")


def pooled(output: Tensor) -> Tensor:
    """The mean of a layer's output over its positions: (N, C, H, W) -> (N, C), of tokens (N, T, D) -> (N, D)."""
    if output.dim() == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.dim() > 2 else output


@contextmanager
def recorded(backbone: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers by name, filled by forward passes within the context."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return backbone.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.__setitem__(name, output))

    hooks = [keep(name) for name in layers if name != FEATURES]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]


class RobustLayers(nn.Module):
    """The mean of the DRO-LT bounds of several layers, each with an epsilon of its own.

    Args:
        class_counts: training images of each class.
        layers: modules of the backbone, or "features" for its output.
    """

    def __init__(self, class_counts: list[int], layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.losses = nn.ModuleList(DROLTLoss(class_counts) for _ in layers)

    def outputs(self, backbone: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features (N, D), and the pooled output of each layer."""
        with recorded(backbone, self.layers) as found:
            features = backbone(images)
        return features, [features if name == FEATURES else pooled(found[name]) for name in self.layers]

    def joined(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """The pooled outputs side by side, whose class means are the centroids of all layers."""
        return torch.cat([output.float() for output in self.outputs(backbone, images)[1]], 1)

    def forward(self, outputs: list[Tensor], target: Tensor, centroids: Tensor, counts: Tensor | None) -> Tensor:
        """The loss, from the outputs of each layer, and centroids and counts of :meth:`joined`."""
        parts = centroids.split([output.shape[1] for output in outputs], 1)
        losses = [loss(output, target, part.contiguous(), counts) for loss, output, part in zip(self.losses, outputs, parts, strict=True)]
        return torch.stack(losses).mean()
