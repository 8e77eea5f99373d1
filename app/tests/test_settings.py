"""Settings of the run and of the device: defaults, what overrides them, and what is refused."""

from typing import Any

import pytest
from examples import run_config
from mobilenet.settings import DeviceSettings, RunSettings


def test_the_defaults_of_pyproject_are_accepted() -> None:
    settings = RunSettings.parse(run_config())
    assert (settings.strategy_parameters, settings.num_server_rounds) == ({}, 5)
    assert settings.network.model_dump() == {
        "model": "mobilenet",
        "alpha": 0.25,
        "recipe": "small-images",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "resnet"),
        ("alpha", 0.0),
        ("num-server-rounds", 0),
        ("seed", -1),
        ("strategy-parameters", "[1]"),
        ("strategy-parameters", "{eta: 1}"),
        ("optimizer", "lion"),
        ("learning-rat", 0.1),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"RunSettings: {key} = "):
        RunSettings.parse(run_config() | {key: value})


def test_a_device_has_settings_of_its_own_unless_the_run_sets_them() -> None:
    node = {"device": "pi", "batch-size": 8, "learning-rate": 0.01, "optimizer": "adam"}
    own = DeviceSettings.of(node, RunSettings.parse(run_config()))
    assert own.model_dump() == {
        "batch_size": 8,
        "learning_rate": 0.01,
        "optimizer": "adam",
        "local_epochs": 1,
    }
    run = RunSettings.parse(run_config(learning_rate=0.5, local_epochs=3, optimizer="sgd"))
    assert DeviceSettings.of(node, run).model_dump() == {
        "batch_size": 8,
        "learning_rate": 0.5,
        "optimizer": "sgd",
        "local_epochs": 3,
    }
    assert DeviceSettings.of({}, RunSettings.parse(run_config())).learning_rate == 0.05
    with pytest.raises(ValueError, match="DeviceSettings: batch-size = 0"):
        DeviceSettings.of({"batch-size": 0}, run)
