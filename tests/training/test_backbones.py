"""Backbones give features of the dimension that they name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn

from gclkern.training.backbones import build_backbone, renew_last_block
from gclkern.training.composed_backbones import modulate
from gclkern.training.config import RunConfig
from gclkern.training.network import prepare
from gclkern.training.recipes import plan

needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")


@pytest.mark.parametrize(("name", "channels", "side"), [("small-cnn", 1, 8), ("small-cnn", 3, 32), ("resnet32", 3, 32), ("resnet32", 1, 28)])
def test_own_networks(name: str, channels: int, side: int) -> None:
    backbone = build_backbone(name, in_channels=channels)
    features = backbone(torch.randn(2, channels, side, side))
    assert features.shape == (2, backbone.feature_dim)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_every_feature_of_the_small_network_sees_the_whole_image(side: int) -> None:
    backbone = build_backbone("small-cnn", in_channels=1, image_size=side).eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    images = torch.zeros(1, 1, side, side, requires_grad=True)
    last = backbone.get_submodule("layers")(images + 1)
    last[0, 0, last.shape[2] // 2, last.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0, 0] > 0
    # 8 x 8 pixels keep the three convolutions that digits-lt was tuned with: 9 pixels in a row, of which the border cuts one off
    assert seen.float().mean() > (0.7 if side == 8 else 0.9)
    assert last.shape[2] == 4


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
        ("resnet32", {"pretrained": True}, "no pretrained weights; take `pretrained=False`"),
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
    with pytest.raises(FileNotFoundError, match=r"pretrained weights of resnet18 could not be fetched .*no route.*take `pretrained=False`"):
        build_backbone("resnet18", pretrained=True)


@needs_torchvision
@pytest.mark.parametrize(("name", "side", "cause"), [("densenet121", 16, "Given input size"), ("vit_b_16", 100, "Input shape indivisible by patch size!")])
def test_sizes_that_a_network_cannot_take_are_refused_before_training(name: str, side: int, cause: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} cannot take images of {side} pixels \({cause}.*; take image files with `image_size=224`, or another"):
        build_backbone(name, image_size=side)


@needs_torchvision
@pytest.mark.parametrize(("name", "side", "fewest"), [("resnet18", 32, 2), ("resnet18", 64, 1), ("small-cnn", 8, 1)])
def test_batch_normalisation_of_one_pixel_needs_two_images(name: str, side: int, fewest: int) -> None:
    backbone = build_backbone(name, image_size=side)
    assert backbone.fewest_images == fewest
    assert backbone.training, "as it was before it was tried"
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    images = torch.zeros(1, 3, side, side)
    if fewest == 1:
        backbone(images)
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            backbone(images)


@needs_torchvision
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    stored = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    stored.parent.mkdir()
    stored.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=rf"stored weights of resnet18 are damaged .*; delete {stored} and run again"):
        build_backbone("resnet18", pretrained=True)
    stored.unlink()

    def offline(*args: object, **options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        build_backbone("resnet18", pretrained=True)  # the remedy: it is fetched again


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"the network resnet50 needs torchvision, which is not installed; run: pip install 'gclkern\[train\]'"):
        build_backbone("resnet50")


@pytest.mark.parametrize(("plain", "dim", "options"), [
    ("small-cnn", 64, {"image_size": 8, "in_channels": 1}),
    ("resnet32", 64, {"image_size": 32}),
    pytest.param("resnet10", 512, {"image_size": 64}, marks=needs_torchvision),
])  # fmt: skip
def test_the_branches_of_a_network_share_its_trunk(plain: str, dim: int, options: dict[str, int]) -> None:
    """One branch alone is the plain network: it gives its features with the same weights."""
    torch.manual_seed(0)
    backbone: Any = build_backbone(f"two-branch:{plain}", **options).eval()  # type: ignore[arg-type]
    torch.manual_seed(0)
    whole = build_backbone(plain, **options).eval()  # type: ignore[arg-type]
    images = torch.randn(2, options.get("in_channels", 3), options["image_size"], options["image_size"])
    features = backbone(images)
    assert features.shape == (2, backbone.feature_dim) == (2, 2 * dim)
    assert torch.equal(features[:, :dim], whole(images))
    assert not torch.equal(features[:, :dim], features[:, dim:]), "the second block has weights of its own"
    for place in (0, 1):
        assert torch.equal(backbone.branch(images, place), features[:, place * dim : (place + 1) * dim])


def test_bbn_s_network_is_the_papers() -> None:
    """5-5-4 shared blocks, then two blocks of 64 channels, each two convolutions of 64 x 64 x 9 weights and two batch normalisations."""
    assert sum(parameter.numel() for parameter in build_backbone("two-branch:resnet32").parameters()) == 463_504 + 2 * 64 * 64 * 9 + 4 * 64 == 537_488


@needs_torchvision
def test_resnet10_has_ten_layers() -> None:
    backbone = build_backbone("resnet10")
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    assert len(convolutions) == 9, "and the classifier is the tenth"
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


@pytest.mark.parametrize(("kind", "dim"), [("embedded", 512), ("modulated", 64), ("embedded-modulated", 512)])
def test_embedding_and_attention(kind: str, dim: int) -> None:
    torch.manual_seed(0)
    backbone: Any = build_backbone(f"{kind}:small-cnn", image_size=8, in_channels=1).eval()
    torch.manual_seed(0)
    whole = build_backbone("small-cnn", image_size=8, in_channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    features = backbone(images)
    assert features.shape == (2, backbone.feature_dim) == (2, dim)
    # attention starts as the identity
    torch.testing.assert_close(features, torch.relu(backbone.embedding(whole(images))))
    features.sum().backward()
    unused = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert unused == set()
    assert [name for name, parameter in backbone.named_parameters() if name.startswith("attention")] == [] or "modulated" in kind


def test_attention_is_added_to_a_trained_network() -> None:
    """The embedding stays, and so does the trunk."""
    first = build_backbone("embedded:small-cnn", image_size=8, in_channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    before = first(images)
    second = modulate(first, "small-cnn", images[:1]).eval()
    assert torch.equal(second(images), before)
    names = build_backbone("embedded-modulated:small-cnn", image_size=8, in_channels=1).state_dict().keys()
    assert second.state_dict().keys() == names


def test_a_new_last_block() -> None:
    """Its weights are random, all others are those of the network."""
    torch.manual_seed(0)
    plain = build_backbone("resnet18")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(0.5)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    renew_last_block(plain)
    for name, value in plain.state_dict().items():
        if name.startswith("layer4.1.") and value.dim():
            assert name.endswith(("running_mean", "running_var")) or not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("trains", "renewed"), [("new-last-block", True), ("last-block", False)])
def test_a_fresh_network_has_a_new_last_block_where_that_is_trained(trains: str, renewed: bool) -> None:
    """torch's usual weights are uniform, up to 1 / sqrt(inputs); those of torchvision's networks are normal."""
    pytest.importorskip("torchvision")
    data: Any = SimpleNamespace(num_classes=3, channels=3, image_size=32, train=[])
    phase = plan("ce", None, "places-lt", [9, 5, 2], stage1={"trains": trains})[0]
    config = RunConfig(data="places-lt", model="resnet18", pretrained=False)
    weight = prepare(phase, None, data, config, torch.device("cpu")).backbone.layer4[1].conv2.weight
    assert bool(weight.abs().max() <= (512 * 9) ** -0.5) is renewed


def test_a_method_s_network_is_made_from_a_plain_one() -> None:
    """One that is composed already would take the place of the method's."""
    data: Any = SimpleNamespace(num_classes=3, channels=1, image_size=8, train=[])
    phase = plan("bbn", None, "digits-lt", [9, 5, 2])[0]
    for model in ("embedded:small-cnn", "two-branch:small-cnn"):
        with pytest.raises(ValueError, match=f"last block of the network, .* not for {model}; choose one of them by `model`"):
            prepare(phase, None, data, RunConfig(method="bbn", model=model), torch.device("cpu"))


def test_networks_whose_last_block_is_not_known() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"last block of the network, which is known for .*torchvision's ResNets, not for mobilenet_v3_small"):
        build_backbone("two-branch:mobilenet_v3_small")
