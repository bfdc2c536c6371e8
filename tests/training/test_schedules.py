"""Learning rates of the published schedules."""

from __future__ import annotations

import pytest

from gclkern.training.recipes import plan
from gclkern.training.schedules import Schedule


def rates(method: str, dataset: str, **settings: float) -> list[float]:
    phase = plan(method, "none", dataset, [500, 50, 5], stage1=settings)[0]
    return [phase.schedule.rate(phase.lr, epoch, phase.epochs) for epoch in range(phase.epochs)]


def test_cifar_warms_up_for_five_epochs() -> None:
    assert rates("gcl", "cifar100-lt")[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


@pytest.mark.parametrize(
    ("method", "settings", "factors"),
    [
        ("gcl", {}, (0.1, 0.01)),
        ("ldam-drw", {}, (0.01, 0.0001)),
        ("ce", {}, (0.01, 0.0001)),
        ("ce", {"mixup": 1.0}, (0.1, 0.01)),
        ("ldam-drw", {"mixup": 1.0}, (0.01, 0.0001)),
    ],
)
def test_cifar_steps_at_160_and_180(method: str, settings: dict[str, float], factors: tuple[float, float]) -> None:
    found = rates(method, "cifar10-lt", **settings)
    assert len(found) == 200
    assert [found[159], found[160], found[179], found[180], found[199]] == pytest.approx([0.1, *([0.1 * factors[0]] * 2), *([0.1 * factors[1]] * 2)])


def test_mixup_leaves_a_method_its_own_schedule() -> None:
    """De-confound-TDE's has the factors of plain CIFAR, at other epochs."""
    assert rates("tde", "cifar10-lt", mixup=1.0) == rates("tde", "cifar10-lt")


def test_a_warm_up_may_start_from_a_third() -> None:
    """BBN's: a third of the rate in the first epoch, all of it from the fifth on, steps at 120 and 160 of 200."""
    bbn = Schedule("steps", warmup=5, milestones=(120 / 200, 160 / 200), factors=(0.01, 0.0001), warmup_start=1 / 3)
    found = [bbn.rate(0.3, epoch, 200) for epoch in (0, 1, 4, 5, 119, 120, 159, 160)]
    assert found == pytest.approx([0.1, 0.14, 0.26, 0.3, 0.3, 0.003, 0.003, 0.00003])


def test_places_steps_at_60_and_80() -> None:
    found = rates("gcl", "places-lt")
    assert len(found) == 90
    assert [found[0], found[59], found[60], found[80]] == pytest.approx([0.2, 0.2, 0.02, 0.002])


def test_cosine_falls_to_zero() -> None:
    found = [Schedule("cosine").rate(1.0, epoch, 90) for epoch in range(91)]
    assert found[0] == 1.0
    assert found[45] == pytest.approx(0.5)
    assert found[90] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 10])
def test_short_runs_reach_the_base_rate(epochs: int) -> None:
    assert max(Schedule("steps", warmup=5, milestones=(0.8,), factors=(0.1,)).rate(1.0, epoch, epochs) for epoch in range(epochs)) == 1.0


@pytest.mark.parametrize("wrong", [{"kind": "linear"}, {"kind": "steps"}, {"kind": "steps", "milestones": (0.5,)}, {"milestones": (0.5,), "factors": (0.1,)}])
def test_wrong_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Schedule(**wrong)
