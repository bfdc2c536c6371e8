"""OLTR: a classifier whose features draw on a memory of class centroids, the loss that trains the memory, and attention over places of an image.

(Liu, Miao, Zhan, Wang, Gong and Yu, "Large-scale long-tailed recognition in an open world", CVPR 2019; numbers that the paper does not give are the release's.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gclkern.devices import without_autocast
from gclkern.kernels.terms import statistics_dtype
from gclkern.layers import unit_rows
from gclkern.validation import check_int, check_matrix, check_number, check_same_device, check_target

# Below this distance a feature counts as equal to its nearest centroid. The factor 10 / distance then is 1e7, and the length of the meta-embedding, squashed to
# length / (1 + length), is 1 to float32 for any feature of ordinary size.
_SMALLEST_DISTANCE = 1e-6


class MetaEmbeddingClassifier(nn.Module):
    r"""OLTR's classifier of dynamic meta-embeddings (section 3.1 of the paper): rare classes borrow from a memory M of one centroid for each class.

    (Liu, Miao, Zhan, Wang, Gong and Yu, "Large-scale long-tailed recognition in an open world", CVPR 2019; numbers that the paper does not give are those of
    its release.)

        m = softmax(H x) M                             memory feature; H is a linear classifier, which in the release starts as stage 1's
        e = tanh(S x)                                  how much of m each dimension takes
        v = 10 / min_c \|x - M_c\| (x + e * m)           far from all centroids, v is short
        z_j = scale \|v\| / (1 + \|v\|) cos(v, w_j)

    Cross entropy of z sends no gradient to M: :class:`MemoryLoss` trains it, and needs it as an argument. The nearest centroid is found by products
    (N, C); its distance, which enters the result, is taken by differences. The release builds (N, C, D).

    Args:
        in_features: dimensions D of a feature.
        num_classes: classes C.
        scale: 16 in the release.
        device, dtype: of the parameters, as in torch's layers.

    Attributes:
        hallucinator, selector: the linear layers H (C, D) and S (D, D), with biases.
        weight: (C, D), learned; starts as uniform(-1, 1) / sqrt(D).
        memory: (C, D), learned; starts at 0. Set it to the class means of features before training: ``classifier.memory.data.copy_(means)``.

    Shapes: features (N, D) -> logits (N, C), in float32 or better.

    Raises:
        TypeError, ValueError: an argument out of its range; features of another shape than (N, D).

    Example:
        >>> import torch
        >>> classifier = MetaEmbeddingClassifier(8, 3)
        >>> classifier(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, in_features: int, num_classes: int, *, scale: float = 16.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, 1)
        self.num_classes = check_int("num_classes", num_classes, 1)
        self.scale = check_number("scale", scale, 0.0, open_low=True)
        self.hallucinator = nn.Linear(in_features, num_classes, device=device, dtype=dtype)
        self.selector = nn.Linear(in_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.memory = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again; the memory is 0."""
        self.hallucinator.reset_parameters()
        self.selector.reset_parameters()
        with torch.no_grad():
            self.weight.uniform_(-1.0, 1.0).mul_(self.in_features**-0.5)
            self.memory.zero_()

    def forward(
        self,
        features: Tensor,  # (N, D)
    ) -> Tensor:  # (N, C)
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features must have shape (N, {self.in_features}), got {list(features.shape)}")
        dtype = statistics_dtype(features)
        with without_autocast(features.device.type):
            x, memory = features.to(dtype), self.memory.detach().to(dtype)
            # |x - M_c|^2 without |x|^2, relative to the memory's centre so that no digits are lost far from the origin; ONNX has no torch.cdist
            centre = memory.mean(0)
            around = memory - centre
            nearest = (around.square().sum(1) - 2.0 * (x.detach() - centre) @ around.t()).argmin(1)
            distance = torch.linalg.vector_norm(x - memory[nearest], dim=1, keepdim=True).clamp(min=_SMALLEST_DISTANCE)
            borrowed = _linear(self.hallucinator, x).softmax(1) @ memory
            embedding = 10.0 / distance * (x + _linear(self.selector, x).tanh() * borrowed)
            length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
            return self.scale * (length / (1.0 + length) * unit_rows(embedding)) @ unit_rows(self.weight.to(dtype)).t()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, scale={self.scale:g}"


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of x, which may be a better one than that of its parameters."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class MemoryLoss(nn.Module):
    r"""OLTR's loss between features and the memory: it pulls features to the centroid of their class, and pushes them away from the other centroids.

    (Liu, Miao, Zhan, Wang, Gong and Yu, "Large-scale long-tailed recognition in an open world", CVPR 2019; numbers that the paper does not give are those of
    its release.)

        attraction = 1 / (2 N) sum_i \|x_i - M_{y_i}\|^2
        repulsion = max(0, margin - 1 / (N C) sum_i sum_{j != y_i} \|x_i - M_j\|^2)
        loss = attraction + repulsion_weight * repulsion

    The hinge is on the mean over all pairs, so repulsion ends once that mean is `margin`. The sum over pairs is computed in closed form from sums of squares,
    O((N + C) D), relative to the centre of the memory, so that no digits are lost far from the origin. The release builds (N, C, D).

    The gradient of the attraction with respect to the memory is not its derivative. As in the release it is, for the centroid of class c,

        sum over samples i of class c of (M_c - x_i) / ((1 + count_c) N)

    The paper adds 0.01 times this loss to cross entropy.

    Args:
        margin: of the mean squared distance; 10 in the release.
        repulsion_weight: 0.01 in the release.

    Shapes: features (N, D), target (N,) int64, memory (C, D) -> (), float32 or better.

    Raises:
        TypeError, ValueError: an argument out of its range; tensors that do not fit. A label out of range is an error on the CPU and NaN on a GPU.

    Example:
        >>> import torch
        >>> memory = torch.zeros(3, 8, requires_grad=True)
        >>> features = torch.randn(5, 8, requires_grad=True)
        >>> MemoryLoss()(features, torch.tensor([0, 1, 2, 0, 1]), memory).backward()
        >>> MemoryLoss()(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), torch.zeros(2, 2))  # 9 / 2 + 0.01 * (10 - 9 / 2)
        tensor(4.5550)
    """

    def __init__(self, *, margin: float = 10.0, repulsion_weight: float = 0.01) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, 0.0)
        self.repulsion_weight = check_number("repulsion_weight", repulsion_weight, 0.0)

    def forward(
        self,
        features: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        memory: Tensor,  # (C, D)
    ) -> Tensor:
        check_matrix("features", features)
        check_matrix("memory", memory)
        check_same_device("memory", memory, "features", features)
        if memory.shape[1] != features.shape[1]:
            raise ValueError(f"memory must have {features.shape[1]} columns like features, got shape {tuple(memory.shape)}")
        num_samples, num_classes = features.shape[0], memory.shape[0]
        target = check_target("target", target, num_samples, num_classes, None, "features", features)
        dtype = statistics_dtype(features)
        with without_autocast(features.device.type):
            x, centroids = features.to(dtype), memory.to(dtype)
            known = (target >= 0) & (target < num_classes)
            target = target.clamp(0, num_classes - 1)
            # equal to the memory, but with the release's share of its gradient
            count = x.new_zeros(num_classes).index_add_(0, target, x.new_ones(num_samples))
            fixed = centroids.detach()
            moving = fixed + (centroids - fixed) / (1.0 + count[:, None])
            attraction = (x - moving[target]).square().sum(1).mean() / 2
            centre = fixed.mean(0)
            own = (x - centroids[target]).square().sum()
            around_x, around_m = x - centre, centroids - centre
            pairs = num_classes * around_x.square().sum() + num_samples * around_m.square().sum() - 2 * around_x.sum(0) @ around_m.sum(0) - own
            repulsion = (self.margin - pairs / (num_samples * num_classes)).clamp(min=0.0)
            loss: Tensor = attraction + self.repulsion_weight * repulsion
            return torch.where(known.all(), loss, torch.nan)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, repulsion_weight={self.repulsion_weight:g}"


class ModulatedAttention(nn.Module):
    r"""OLTR's modulated attention on a map of features (section 3.2 of the paper): self-attention over the places of an image, weighted place by place.

    (Liu, Miao, Zhan, Wang, Gong and Yu, "Large-scale long-tailed recognition in an open world", CVPR 2019; numbers that the paper does not give are those of
    its release.)

        a = W softmax(theta(x)^T phi(x)) g(x)          non-local block of channels / 2; the softmax is over places, W starts at 0
        output = x + softmax(L x) * a                  L is linear, from the whole map to one number for each place

    It starts as the identity, because W starts at 0.

    Args:
        channels: of the map, at least 2.
        height, width: of the map; fixed, because L has weights for each place.

    Shapes: (N, channels, height, width) -> the same.

    Raises:
        TypeError, ValueError: an argument out of its range; a map of another shape.

    Example:
        >>> import torch
        >>> attention = ModulatedAttention(16, 4, 4)
        >>> maps = torch.randn(2, 16, 4, 4)
        >>> torch.equal(attention(maps), maps)
        True
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.channels = check_int("channels", channels, 2)
        self.height, self.width = check_int("height", height, 1), check_int("width", width, 1)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.output = nn.Conv2d(channels // 2, channels, 1)
        self.places = nn.Linear(channels * height * width, height * width)
        for layer in (self.theta, self.phi, self.g):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.get_parameter("bias"))

    def forward(
        self,
        maps: Tensor,  # (N, channels, height, width)
    ) -> Tensor:  # (N, channels, height, width)
        shape = (self.channels, self.height, self.width)
        if maps.dim() != 4 or maps.shape[1:] != shape:
            raise ValueError(f"maps must have shape (N, {', '.join(map(str, shape))}), got {list(maps.shape)}")
        theta, phi, g = (layer(maps).flatten(2) for layer in (self.theta, self.phi, self.g))  # (N, channels / 2, places)
        attended = (theta.transpose(1, 2) @ phi).softmax(2) @ g.transpose(1, 2)  # (N, places, channels / 2)
        attention = self.output(attended.transpose(1, 2).unflatten(2, (self.height, self.width)))
        return maps + self.places(maps.flatten(1)).softmax(1).view(-1, 1, self.height, self.width) * attention

    def extra_repr(self) -> str:
        return f"channels={self.channels}, height={self.height}, width={self.width}"
