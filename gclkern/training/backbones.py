"""Backbones by name: networks from images to features, without a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gclkern.training.composed_backbones import KINDS, TwoBranchBackbone, embed, modulate
from gclkern.training.extras import need


class SmallCNN(nn.Module):
    """A convolution, then for each halving of the image two more, the first with stride 2; the last map, about 4 x 4 pixels, is averaged.

    The number of halvings depends on the image size: 1 for 8 x 8 pixels (3 convolutions, 56,000 parameters), 3 for 32 x 32 (7; 574,000), 4 for 64 x 64.

    Args:
        in_channels: channels of an image.
        image_size: height and width in pixels.
    """

    def __init__(self, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        halvings = max(1, round(math.log2(image_size / 4)))
        self.feature_dim = 64 if halvings == 1 else 128
        layers: list[nn.Module] = []
        channels = in_channels
        for width, stride in [(32, 1)] + [(64 if step == 0 else 128, stride) for step in range(halvings) for stride in (2, 1)]:
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of images (B, C, H, W)."""
        return self.layers(images).mean((2, 3))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The network without its last block, a convolution with batch normalisation and ReLU, and that block."""
        return self.layers[:-3], self.layers[-3:]


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

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The network without its last block, and that block."""
        return nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.blocks[:-1]), self.blocks[-1]


def build_backbone(name: str, *, image_size: int | None = None, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """A network without its classifier. Its attribute `feature_dim` is D; `fewest_images` is the smallest batch that it can be trained on.

    Args:
        name: "small-cnn", "resnet32", "resnet10", a classification network of torchvision such as "resnet50", or "timm:" and a name of timm; or a network made
            from one of them, see :mod:`gclkern.training.composed_backbones`.
        image_size: height and width in pixels. If given, the network is tried on one image, which raises an error if it cannot take this size;
            small-cnn and vision transformers are built for it. None is the network's usual size.
        in_channels: channels of an image; torchvision's networks take three.
        pretrained: start from pretrained weights, which torchvision or timm download.

    Returns:
        A module with forward(images (B, in_channels, H, W)) -> features (B, D). `fewest_images` is 2 if batch normalisation gets maps of a single pixel.

    Raises:
        ValueError: an unknown name, or one that has no pretrained weights, no linear classifier, not this number of channels or not this size; a damaged
            file among the stored weights.
        ImportError: torchvision or timm is missing; the message names the command to install it.
        FileNotFoundError: the pretrained weights could not be fetched.

    Example:
        >>> backbone = build_backbone("resnet32", image_size=32)
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape, backbone.feature_dim
        (torch.Size([2, 64]), 64)
    """
    if pretrained and name in ("small-cnn", "resnet32", "resnet10"):
        raise ValueError(f"{name} has no pretrained weights; take `pretrained=False` or a `model` of torchvision or timm")
    backbone: Any
    kind, _, plain = name.partition(":")
    if kind in KINDS:
        return _composed(kind, plain, image_size, in_channels, pretrained)
    if name == "small-cnn":
        backbone, usual = SmallCNN(in_channels, image_size or 32), 32
    elif name == "resnet32":
        backbone, usual = ResNet32(in_channels), 32
    elif name == "resnet10":
        backbone, usual = _resnet10(in_channels), 224
    elif name.startswith("timm:"):
        backbone, usual = _from_timm(name.removeprefix("timm:"), image_size, in_channels, pretrained)
    else:
        backbone, usual = _from_torchvision(name, image_size, in_channels, pretrained)
    backbone.fewest_images = 1 if image_size is None else _try(backbone, name, torch.zeros(1, in_channels, image_size, image_size), usual)
    return backbone


def _composed(kind: str, plain: str, image_size: int | None, in_channels: int, pretrained: bool) -> Any:
    """A network of this kind, made from that of the name `plain`."""
    first: Any = build_backbone(plain, image_size=image_size, in_channels=in_channels, pretrained=pretrained)
    backbone: Any
    if kind == "two-branch":
        backbone = TwoBranchBackbone(first, build_backbone(plain, image_size=image_size, in_channels=in_channels, pretrained=pretrained), plain)
    else:
        backbone = embed(first, plain) if kind.startswith("embedded") else first
        if kind.endswith("modulated"):
            side = image_size or (32 if plain in ("small-cnn", "resnet32") else 224)
            backbone = modulate(backbone, plain, torch.zeros(1, in_channels, side, side))
    backbone.fewest_images = first.fewest_images
    return backbone


def last_block(backbone: nn.Module) -> nn.Module:
    """The last block of one of torchvision's ResNets.

    Raises:
        ValueError: it is another network.
    """
    blocks = getattr(backbone, "layer4", None)
    if not isinstance(blocks, nn.Sequential):
        name = type(backbone).__name__
        raise ValueError(f"the last block can be trained by itself only in torchvision's ResNets, not in {name}; take `train=all`")
    return blocks[-1]


def renew_last_block(backbone: nn.Module) -> None:
    """Give the last block new random weights, torch's usual ones; raises as :func:`last_block`."""
    for module in last_block(backbone).modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


def _resnet10(in_channels: int) -> Any:
    """ResNet-10, with one block in each of its four layers; torchvision does not have it."""
    resnet = need("torchvision.models.resnet", "the network resnet10")
    if in_channels != 3:
        raise ValueError(f"resnet10 takes images of 3 channels, but these have {in_channels}; take small-cnn, resnet32 or a network of timm")
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model.feature_dim, model.fc = model.fc.in_features, nn.Identity()
    return model


@torch.no_grad()
def _try(backbone: Any, name: str, images: Tensor, usual: int) -> int:
    """The smallest batch that the network can be trained on.

    Raises:
        ValueError: it cannot take images of this size, or does not give features.
    """
    lone: list[nn.Module] = []
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: lone.append(norm) if inputs[0].numel() == inputs[0].shape[1] else None) for norm in norms]
    training = backbone.training
    try:
        features = backbone.eval()(images)
    except Exception as error:  # each network fails in its own way
        raise _wrong_size(name, images.shape[-1], usual, error) from error
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    if features.shape != (1, backbone.feature_dim):
        given = tuple(features.shape)
        raise ValueError(f"{name} gives {given} for an image instead of ({backbone.feature_dim},) features; take another `model`, such as resnet50")
    return 2 if lone else 1


def _wrong_size(name: str, image_size: int, usual: int, error: Exception) -> ValueError:
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    remedy = f"take image files with `image_size={usual}`, or another `model`, such as {'resnet32' if image_size <= 64 else 'resnet50'}"
    return ValueError(f"{name} cannot take images of {image_size} pixels ({cause}); {remedy}")


def _load(name: str, pretrained: bool, stored: str, create: Callable[[], Any]) -> Any:
    """The network that `create` builds; `stored` is where its downloaded weights are cached.

    Raises:
        FileNotFoundError, ValueError: see :func:`build_backbone`.
    """
    try:
        return create()
    except OSError as error:
        remedy = "take `pretrained=False`, or connect to the internet once"
        raise FileNotFoundError(f"the pretrained weights of {name} could not be fetched ({error}); {remedy}") from error
    except Exception as error:
        if not pretrained:
            raise
        cause = str(error).strip().partition("\n")[0]
        if "size mismatch" in str(error):
            raise ValueError(f"the pretrained weights of {name} are for another size of images; leave out `image_size` or take `pretrained=False`") from error
        if "No pretrained weights" in cause:
            raise ValueError(f"{name} has no pretrained weights; take `pretrained=False` or another `model`") from error
        raise ValueError(f"the stored weights of {name} are damaged ({cause}); delete {stored} and run again, which fetches them again") from error


def _from_torchvision(name: str, image_size: int | None, in_channels: int, pretrained: bool) -> tuple[Any, int]:
    """The network and its usual image size."""
    models = need("torchvision.models", f"the network {name}")
    if name not in models.list_models(module=models):
        known = "small-cnn, resnet32, timm:<name> or a classification network of torchvision such as resnet50"
        raise ValueError(f"unknown network {name!r}; take {known}")
    if in_channels != 3:
        raise ValueError(f"{name} takes images of 3 channels, but these have {in_channels}; take small-cnn, resnet32 or a network of timm")
    if name.startswith(("googlenet", "inception", "squeezenet")):
        raise ValueError(f"{name} does not end in one linear classifier; take another network, such as resnet50")
    weights = models.get_model_weights(name).DEFAULT
    (usual,) = weights.transforms().crop_size
    options: dict[str, Any] = {"image_size": image_size} if image_size is not None and name.startswith("vit_") else {}
    stored = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(weights.url).name)
    try:
        model = _load(name, pretrained, str(stored), lambda: models.get_model(name, weights=weights if pretrained else None, **options))
    except AssertionError as error:  # a transformer whose patches do not divide the image
        raise _wrong_size(name, image_size or usual, usual, error) from error
    classifiers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    parent, _, last = classifiers[-1].rpartition(".")
    model.feature_dim = model.get_submodule(classifiers[-1]).in_features
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model, usual


def _from_timm(name: str, image_size: int | None, in_channels: int, pretrained: bool) -> tuple[Any, int]:
    """The network and its usual image size."""
    timm = need("timm", f"the network timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}; timm.list_models() lists them")
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    usual = config.input_size[-1] if config is not None else 224

    def create() -> Any:
        build = partial(timm.create_model, name, pretrained=pretrained, num_classes=0, in_chans=in_channels)
        if image_size is None:
            return build()
        try:
            return build(img_size=image_size)
        except TypeError:  # the network takes any size, and has no such argument
            return build()

    stored = f"the folder of {getattr(config, 'hf_hub_id', None) or name} in the cache of huggingface_hub or torch.hub"
    try:
        model = _load(f"timm:{name}", pretrained, stored, create)
    except (AssertionError, RuntimeError) as error:
        raise _wrong_size(f"timm:{name}", image_size or usual, usual, error) from error
    model.feature_dim = model.head_hidden_size  # that of the features before the classifier, which some networks widen
    return model, usual
