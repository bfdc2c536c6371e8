"""Backbones give features of the dimension that they name."""

from __future__ import annotations

import importlib.util
from urllib.error import URLError

import pytest
import torch
from torch import nn

from gclkern.training.backbones import build_backbone

needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")


@pytest.mark.parametrize(("name", "channels", "side"), [("small-cnn", 1, 8), ("small-cnn", 3, 32), ("resnet32", 3, 32), ("resnet32", 1, 28)])
def test_own_networks(name: str, channels: int, side: int) -> None:
    backbone = build_backbone(name, in_channels=channels)
    features = backbone(torch.randn(2, channels, side, side))
    assert features.shape == (2, backbone.feature_dim)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_resnet32_is_the_papers() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet32")
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 31, "and the classifier is the 32nd layer"
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 463_504
    assert [c.out_channels for c in convolutions] == [16] * 11 + [32] * 10 + [64] * 10
    assert [c.stride for c in convolutions].count((2, 2)) == 2
    widest = convolutions[-1].weight
    assert float(widest.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02), "Kaiming-normal"


def test_a_shortcut_without_parameters_keeps_every_second_pixel_and_adds_empty_channels() -> None:
    block = build_backbone("resnet32").eval().get_submodule("blocks.5")
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    images = torch.rand(1, 16, 6, 6)
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small"])
def test_torchvision_networks(name: str) -> None:
    backbone = build_backbone(name).eval()
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, {"resnet50": 2048, "mobilenet_v3_small": 1024}[name])
    assert backbone.feature_dim == {"resnet50": 2048, "mobilenet_v3_small": 1024}[name]


def test_timm_networks() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm:mobilenetv3_small_050", in_channels=1).eval()
    assert backbone(torch.zeros(1, 1, 64, 64)).shape == (1, backbone.feature_dim)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet33", {}, "unknown network 'resnet33'; take small-cnn, resnet32"),
        ("resnet18", {"in_channels": 1}, "takes images of 3 channels, but these have 1"),
        ("googlenet", {}, "does not end in one linear classifier"),
        ("resnet32", {"pretrained": True}, "no pretrained weights"),
    ],
)
def test_names_and_options_that_do_not_fit(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, **options)


@needs_torchvision
def test_no_connection_for_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"pretrained weights of resnet18 could not be fetched .*no route.*leave out --pretrained"):
        build_backbone("resnet18", pretrained=True)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"the network resnet50 needs torchvision, which is not installed; run: pip install 'gclkern\[train\]'"):
        build_backbone("resnet50")
