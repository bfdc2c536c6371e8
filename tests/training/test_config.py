"""The settings of a run."""

from __future__ import annotations

import pytest

import train
from gclkern.training.config import MAY_CHANGE_ON_RESUME, STAGE_1_IGNORES, RunConfig


def test_round_trip() -> None:
    config = RunConfig(method="ce", lr=0.05, mixup=0.0)
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("values", [{}, RunConfig().to_dict() | {"momentum": 0.9}])
def test_settings_of_another_version_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"written by another version of gclkern.*(momentum|lr)"):
        RunConfig.from_dict(values)


def test_sets_of_settings_name_fields() -> None:
    assert RunConfig().to_dict().keys() >= STAGE_1_IGNORES
    assert MAY_CHANGE_ON_RESUME < STAGE_1_IGNORES


def test_a_resumed_run_may_change_how_but_not_what() -> None:
    config = RunConfig(lr=0.1)
    assert config.resumed({"workers": 2}) == RunConfig(lr=0.1, workers=2)
    with pytest.raises(ValueError, match=r"`lr`: the run was started with 0\.1, now it is 0\.2"):
        config.resumed({"lr": 0.2})


def test_every_setting_has_a_flag() -> None:
    parser = train.build_parser()
    flags = {action.dest for action in parser._actions} - {"help", "resume", "evaluate", "out"}
    assert flags == RunConfig().to_dict().keys()
    assert vars(parser.parse_args([])) == {}, "defaults stand in RunConfig alone"


def test_errors_name_flags() -> None:
    message = "`retrain_lr` and `amp=bf16`, `capture`, `pictures=False`; a line `path label`"
    assert train.as_flags(message) == "--retrain-lr and --amp bf16, --capture, --no-pictures; a line `path label`"
