"""The interface of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

from torch import Tensor, nn

from gclkern.training.network import Network


class Samples(TypedDict, total=False):
    """What the data loader gives for a step. The first dimension of every tensor is that of the samples, so that a step can be split into parts."""

    images: Tensor  # (N, C, H, W), always there
    target: Tensor  # (N,), always there
    views: Tensor  # (N, V, C, H, W), with Phase.views
    second_images: Tensor  # (N, C, H, W), with Phase.second_sampler
    second_target: Tensor  # (N,)


class Batch(NamedTuple):
    """One part of a step on one process: all that an objective computes from, apart from the network. What the phase does not have is None."""

    images: Tensor  # (N, C, H, W)
    target: Tensor  # (N,)
    seed: Tensor  # () int64, of the noise of this step on all processes
    row_offset: int = 0  # place of the first sample in the step
    target_b: Tensor | None = None  # (N,), second target of mixup
    lam: Tensor | None = None  # (), weight of the first
    views: Tensor | None = None  # (N, V, C, H, W), further views of the same samples
    second_images: Tensor | None = None  # (N, C, H, W), of another sampler
    second_target: Tensor | None = None  # (N,)
    centroids: Tensor | None = None  # (C, D), class means of `centroid_features` at the beginning of the epoch
    counts: Tensor | None = None  # (C,), their numbers of samples


class Objective(nn.Module):
    """Base class: a subclass computes the loss of a batch, and is built from (phase, class_counts, feature_dim).

    Attributes:
        scale: factor on the classifier's output that makes it logits, for evaluation.
        takes_mixup: whether `target_b` and `lam` are used; without it, mixup in its phase is an error.
        plain_centroids: whether centroids are those of all training images without augmentation, or else of an epoch of the phase's batches.

    Example:
        >>> import torch.nn.functional as F
        >>> class CrossEntropy(Objective):
        ...     def forward(self, network: Network, batch: Batch) -> Tensor:
        ...         return F.cross_entropy(network.classify(network.backbone(batch.images)), batch.target)
    """

    scale: float = 1.0
    takes_mixup = False
    plain_centroids = False

    def forward(self, network: Network, batch: Batch) -> Tensor:
        """The loss of a batch, () float32."""
        raise NotImplementedError

    def set_epoch(self, network: Network, epoch: int, epochs: int, rate: float) -> None:
        """Write what depends on the epoch, counted from 0 of `epochs`, or on its learning rate, into buffers of the objective or the network.

        Called before an epoch, and again when a run resumes within it: the result must follow from the arguments alone.
        """

    def needs_centroids(self, epoch: int) -> bool:
        """Whether the class means of the features are to be computed before this epoch: they are then in the batches until they are computed again."""
        return False

    def centroid_features(self, network: Network, images: Tensor) -> Tensor:
        """What is averaged for the centroids, (N, D); default the features."""
        features: Tensor = network.backbone(images)
        return features

    def begin_epoch(self, network: Network, epoch: int, centroids: Mapping[str, Tensor]) -> None:
        """Called once before an epoch, not when a run resumes within it: may reset buffers or parameters of the objective or the network.

        Args:
            epoch: counted from 0.
            centroids: "centroids" (C, D) and "counts" (C,) if they have been computed.
        """
