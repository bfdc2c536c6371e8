"""Backbones by name: networks from images to features, without a classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions for images of 8 x 8 to 32 x 32 pixels, 56,000 parameters."""

    feature_dim = 64

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        widths = [in_channels, 32, 64, self.feature_dim]
        self.layers = nn.Sequential(
            *(
                layer
                for i in range(3)
                for layer in (nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + (i == 1), padding=1, bias=False), nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
            )
        )

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
    """ResNet-32 for CIFAR (He et al., CVPR 2016, section 4.2): three stages of five basic blocks, shortcuts without parameters (option A)."""

    feature_dim = 64

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(_BasicBlock(16 << max(stage - (block == 0), 0), 16 << stage, 1 + (stage > 0 and block == 0)) for block in range(5)))
                for stage in range(3)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, C, H, W)."""
        return self.stages(F.relu(self.bn1(self.conv1(images)))).mean((2, 3))


def build_backbone(name: str, *, image_size: int | None = None, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """The network `name` with an attribute `feature_dim`; forward(images (B, C, H, W)) returns features (B, feature_dim)."""
    if name == "small-cnn":
        return SmallCNN(in_channels)
    if name == "resnet32":
        return ResNet32(in_channels)
    raise ValueError(f"unknown network {name!r}")
