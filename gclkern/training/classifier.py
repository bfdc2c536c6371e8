"""Use a trained classifier from its checkpoint, without the training data: :func:`load_classifier`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gclkern.training.checkpoint import Checkpoint, CheckpointError, final_checkpoint, load_checkpoint
from gclkern.training.data import EvaluationTransform
from gclkern.training.data.decode import open_image, resize_and_crop, to_rgb
from gclkern.training.network import Network, load_network

# For programs that show probabilities of a classifier that is not calibrated.
NOT_CALIBRATED = "note: no temperature was fitted, so probabilities may be too large or too small; train with --holdout 0.1"


class Prediction(NamedTuple):
    """A class of an image: its number `label`, its `name`, and its `probability` in [0, 1]."""

    label: int
    name: str
    probability: float


class Classifier(nn.Module):
    """A network with everything needed to use it: class names, the transform of its images, and the temperature of its probabilities.

    It is in eval mode and stays there; its parameters do not require gradients.

    Args:
        checkpoint: as :func:`gclkern.training.checkpoint.load_checkpoint` returns it; usually :func:`load_classifier` builds this class.
        device: where the network runs.

    Attributes:
        class_names: (C,) names in the order of the logits; class numbers as text if the data set has no names.
        class_counts: (C,) training images of each class.
        image_size: height and width of the input images, in pixels.
        in_channels: channels of the input images.
        architecture: name of the backbone.
        temperature: divisor of the logits; 1 if none was fitted (train.py fits one with `--holdout`).
        calibrated: whether a temperature was fitted.
        transform: makes an image file or a PIL image into an input (in_channels, image_size, image_size).

    Shapes: images (N, in_channels, H, W) as `transform` makes them -> logits (N, C), float32.

    Raises:
        CheckpointError: the weights do not fit the network that the checkpoint names.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.network: Network = load_network(checkpoint, torch.device(device), averaged=True)
        self.class_counts = checkpoint["data"]["class_counts"]
        self.class_names = checkpoint["data"]["class_names"] or [str(label) for label in range(len(self.class_counts))]
        self.architecture, self.in_channels, self.image_size = checkpoint["model"], checkpoint["in_channels"], checkpoint["image_size"]
        self.temperature, self.calibrated = checkpoint["temperature"] or 1.0, checkpoint["temperature"] is not None
        self.transform = ImageTransform(checkpoint["transform"], self.in_channels)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Classifier:
        """Stays in eval mode: batch normalisation in training mode would make the prediction of an image depend on the images beside it."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.network.scale.device

    def forward(
        self,
        images: Tensor,  # (N, in_channels, H, W)
    ) -> Tensor:  # (N, C)
        """Logits: scale * cosine / temperature for a cosine classifier. Their softmax is :meth:`predict_proba`."""
        logits: Tensor = self.network(images) / self.temperature
        return logits

    @torch.no_grad()
    def predict_proba(
        self,
        images: Tensor,  # (N, in_channels, H, W)
    ) -> Tensor:  # (N, C)
        """The probability of each class, calibrated where a temperature was fitted. `images` may be on another device than the network."""
        return self(images.to(self.device)).softmax(1)

    def predict(self, images: Sequence[Any], top: int = 5, *, batch_size: int = 64) -> list[list[Prediction]]:
        """The `top` most probable classes of each image, the best first.

        Args:
            images: paths of image files, PIL images, or both.
            top: classes per image, at least 1; all classes if there are fewer. 5 as in top-5 accuracy.
            batch_size: images per forward pass; it changes the predictions only by rounding.

        Returns:
            For each image a list of predictions.

        Raises:
            TypeError: `images` is a single path instead of a list.
            CorruptImageError: a file is missing or cannot be read; the message begins with its path.
            ValueError: `top` or `batch_size` below 1.
        """
        if isinstance(images, str | Path):
            raise TypeError(f"images must be a list of paths or images, got {images!r}; put it into a list")
        if top < 1 or batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
        return [predictions for batch in _batches(images, batch_size) for predictions in self._best(batch, top)]

    def _best(self, images: Sequence[Any], top: int) -> list[list[Prediction]]:
        probabilities = self.predict_proba(torch.stack([self.transform(image) for image in images]))
        best, labels = probabilities.topk(min(top, len(self.class_names)), dim=1)
        rows = zip(best.tolist(), labels.tolist(), strict=True)
        return [[Prediction(label, self.class_names[label], share) for share, label in zip(*row, strict=True)] for row in rows]

    def extra_repr(self) -> str:
        return f"{len(self.class_names)} classes, {self.image_size} pixels, temperature={self.temperature:.3g}"


class ImageTransform:
    """Turns an image file or a PIL image into the input of a network: resize, centre crop and normalise, as in evaluation.

    Example:
        >>> from PIL import Image
        >>> transform = ImageTransform({"resize": 8, "crop": 8, "mean": [0.5], "std": [0.25]}, in_channels=1)
        >>> transform(Image.new("L", (16, 12), 255)).shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, transform: EvaluationTransform, in_channels: int) -> None:
        if in_channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, the network takes {in_channels}")
        self.settings, self.mode = transform, "L" if in_channels == 1 else "RGB"
        self._mean, self._std = (torch.tensor(transform[name]).view(-1, 1, 1) for name in ("mean", "std"))

    def __call__(self, image: Any) -> Tensor:
        """The input (channels, crop, crop), float32, of a PIL image or of the image file at a path."""
        image = open_image(str(image)) if isinstance(image, str | Path) else to_rgb(image)
        image = resize_and_crop(image.convert(self.mode), resize=self.settings["resize"], crop=self.settings["crop"])
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def load_classifier(path: Path | str, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a checkpoint that train.py wrote; the training data is not needed.

    Args:
        path: the folder of a finished run, for the network of its last stage; or a checkpoint such as ``runs/digits-lt-gcl/stage-2.pt`` or ``best.pt``.
        device: where the network runs.

    Returns:
        The network with its class names, the transform of its images and its temperature.

    Raises:
        FileNotFoundError: there is no such file; for a folder without a finished run the message names the checkpoints in it.
        CheckpointError: the file is damaged, of another program or of another version of the format.

    Example (not run, since it needs a checkpoint)::

        classifier = load_classifier("runs/folder-gcl-ldam-drw")
        for path, predictions in zip(paths, classifier.predict(paths, top=3)):
            print(path, predictions[0].name, predictions[0].probability)
    """
    path = Path(path)
    if path.is_dir():
        path = final_checkpoint(path)
    checkpoint = load_checkpoint(path)
    if "network" not in checkpoint:
        raise CheckpointError(f"{path} holds no network; give a checkpoint that train.py wrote, such as stage-2.pt in the folder of a run")
    return Classifier(checkpoint, device)
