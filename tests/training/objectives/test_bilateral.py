"""BBN's objective: its loss from the definition, its shares by epoch, and a trunk that sees each batch by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gclkern.training.network import build_network
from gclkern.training.objectives import Batch, build_objective
from gclkern.training.recipes import plan

COUNTS = [50, 20, 5]
PHASE = plan("bbn", None, "digits-lt", COUNTS)[0]


def setting(dataset: str = "digits-lt") -> tuple[Any, Any, Batch]:
    torch.manual_seed(0)
    network = build_network("two-branch:small-cnn", "linear", 3, in_channels=1, image_size=8)
    images, second = torch.randn(2, 6, 1, 8, 8)
    batch = Batch(images, torch.tensor([0, 1, 0, 0, 2, 0]), torch.tensor(1), second_images=second, second_target=torch.tensor([2, 2, 1, 2, 0, 2]))
    phase = plan("bbn", None, dataset, COUNTS)[0]
    return network, build_objective(phase, COUNTS, 128), batch


def test_the_loss_is_the_definition() -> None:
    """f = 2 [a f_c, (1 - a) f_r], and both labels' cross entropies of its logits, number by number."""
    network, objective, batch = setting()
    network.eval()
    objective.set_epoch(network, 40, 80, 0.1)
    assert float(objective.share) == 0.75
    loss = objective(network, batch).detach()
    first, second = network.backbone.branch(batch.images, 0).double(), network.backbone.branch(batch.second_images, 1).double()
    weight, bias = network.head.weight.double(), network.head.bias.double()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        logits = 2 * (weight[:, :64] @ (0.75 * first[i]) + weight[:, 64:] @ (0.25 * second[i])) + bias
        total -= 0.75 * logits.log_softmax(0)[batch.target[i]] + 0.25 * logits.log_softmax(0)[batch.second_target[i]]  # type: ignore[index]
    assert float(loss) == pytest.approx(float(total.detach()) / 6, rel=1e-5)  # float32 features


def test_prediction_has_half_of_each_branch() -> None:
    """With a = 1/2 and the same images in both branches, the features are those of the backbone's forward pass."""
    network, objective, batch = setting()
    network.eval()
    objective.share.fill_(0.5)
    target = batch.target
    loss = objective(network, batch._replace(second_images=batch.images, second_target=target))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(network(batch.images), target))


@pytest.mark.parametrize(("dataset", "epochs", "last"), [("cifar100-lt", 200, 1 - (199 / 200) ** 2), ("inat18", 180, 1 - (179 / 200) ** 2)])
def test_the_share_goes_from_the_usual_batch_to_the_reversed_one(dataset: str, epochs: int, last: float) -> None:
    network, objective, _ = setting(dataset)
    shares = []
    for epoch in range(epochs):
        objective.set_epoch(network, epoch, epochs, 0.1)
        shares.append(float(objective.share))
    assert shares[0] == 1.0
    assert shares[100] == pytest.approx(0.75)
    assert shares[-1] == pytest.approx(last)
    assert shares == sorted(shares, reverse=True)


def test_each_batch_passes_the_trunk_by_itself() -> None:
    """Statistics of a joint batch would be another method; the running ones have moved twice."""
    network, objective, batch = setting()
    normalisation = next(module for module in network.backbone.trunk.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[Tensor] = []
    normalisation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective(network.train(), batch).backward()
    assert [len(part) for part in seen] == [6, 6]
    assert int(normalisation.num_batches_tracked) == 2
    mean = 0.1 * (0.9 * seen[0].mean((0, 2, 3)) + seen[1].mean((0, 2, 3)))
    torch.testing.assert_close(normalisation.running_mean, mean.detach(), rtol=1e-4, atol=1e-6)


def test_the_plan_is_the_release_s() -> None:
    for dataset in ("digits-lt", "cifar10-lt", "imagenet-lt", "inat18", "places-lt", "folder"):
        phase = plan("bbn", None, dataset, COUNTS)[0]
        assert (phase.second_sampler, phase.nesterov, phase.backbone, phase.trains, phase.pretrained) == ("reversed", True, "two-branch", "all", False)
    with pytest.raises(ValueError, match=r"the loss bbn has no second target, which `mixup=0.2` needs"):
        build_objective(plan("bbn", None, "digits-lt", COUNTS, stage1={"mixup": 0.2})[0], COUNTS, 128)
