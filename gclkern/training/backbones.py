"""Backbones by name: networks from images to features, without a classifier."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.training.extras import need


class SmallCNN(nn.Module):
    """Three convolutions for images of 8 x 8 to 32 x 32 pixels, 56,000 parameters."""

    feature_dim = 64

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        widths = [in_channels, 32, 64, self.feature_dim]
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + (i == 1), padding=1, bias=False), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, C, H, W)."""
        return self.layers(images).mean((2, 3))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.missing:
            before = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))
        return F.relu(out + x)


class ResNet32(nn.Module):
    """ResNet-32 for CIFAR (He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2): 5-5-5 blocks of 16, 32 and 64 channels.

    Shortcuts have no parameters (option A: every second pixel, and zeros for the new channels). 463,504 parameters for three channels; Kaiming-normal weights.
    """

    feature_dim = 64

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for stage in range(3):
            for block in range(5):
                blocks.append(_BasicBlock(channels, 16 << stage, 2 if stage > 0 and block == 0 else 1))
                channels = 16 << stage
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, C, H, W)."""
        return self.blocks(F.relu(self.bn1(self.conv1(images)))).mean((2, 3))


def build_backbone(name: str, *, image_size: int | None = None, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """A network without its classifier; the attribute `feature_dim` is D.

    Args:
        name: "small-cnn", "resnet32", a classification network of torchvision such as "resnet50", or "timm:" and a name of timm.
        image_size: pixels of a side; only vision transformers need it, and not at their usual size.
        in_channels: colours of an image; torchvision's networks take three.
        pretrained: start from the weights that torchvision or timm offer, which they download.

    Returns:
        A module with forward(images (B, in_channels, H, W)) -> features (B, D).

    Raises:
        ValueError: an unknown name, or one that has no pretrained weights, no linear classifier or not this number of channels.
        ImportError: torchvision or timm is missing; the message names the command to install it.
        FileNotFoundError: the pretrained weights could not be fetched.

    Example:
        >>> backbone = build_backbone("resnet32")
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape, backbone.feature_dim
        (torch.Size([2, 64]), 64)
    """
    own = {"small-cnn": SmallCNN, "resnet32": ResNet32}
    if name in own:
        if pretrained:
            raise ValueError(f"{name} has no pretrained weights; leave out --pretrained or take a network of torchvision or timm")
        return own[name](in_channels)
    try:
        if name.startswith("timm:"):
            return _from_timm(name.removeprefix("timm:"), image_size, in_channels, pretrained)
        return _from_torchvision(name, image_size, in_channels, pretrained)
    except OSError as error:
        raise FileNotFoundError(f"the pretrained weights of {name} could not be fetched ({error}); leave out --pretrained, or connect once") from error


def _from_torchvision(name: str, image_size: int | None, in_channels: int, pretrained: bool) -> nn.Module:
    models = need("torchvision.models", f"the network {name}")
    if name not in models.list_models(module=models):
        known = "small-cnn, resnet32, timm:<name> or a classification network of torchvision such as resnet50"
        raise ValueError(f"unknown network {name!r}; take {known}")
    if in_channels != 3:
        raise ValueError(f"{name} takes images of 3 channels, but these have {in_channels}; take small-cnn, resnet32 or a network of timm")
    if name.startswith(("googlenet", "inception", "squeezenet")):
        raise ValueError(f"{name} does not end in one linear classifier; take another network, such as resnet50")
    options: dict[str, Any] = {"image_size": image_size} if image_size is not None and name.startswith("vit_") else {}
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    classifiers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    parent, _, last = classifiers[-1].rpartition(".")
    model.feature_dim = model.get_submodule(classifiers[-1]).in_features
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model


def _from_timm(name: str, image_size: int | None, in_channels: int, pretrained: bool) -> nn.Module:
    timm = need("timm", f"the network timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}; timm.list_models() lists them")
    options: dict[str, Any] = {"img_size": image_size} if image_size is not None and name.startswith(("vit_", "deit", "swin")) else {}
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **options)
    model.feature_dim = model.head_hidden_size  # that of the features before the classifier, which some networks widen
    return model
