"""Settings: what Flower's flat configuration becomes, and what is refused."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from flowerbed.config import DeviceSettings, RunSettings, SettingsError, Task

PYPROJECT = tomllib.loads(Path("/app/pyproject.toml").read_text())
DEFAULTS: dict[str, Any] = PYPROJECT["tool"]["flwr"]["app"]["config"]


def test_the_defaults_of_the_app_are_a_run() -> None:
    settings = RunSettings.parse(DEFAULTS)
    assert settings.devices == ()
    assert settings.strategy_parameters == {}
    assert set(settings.as_config()) == set(DEFAULTS)


def test_devices_and_parameters_are_unpacked() -> None:
    settings = RunSettings.parse(
        DEFAULTS | {"devices": "pi, phone", "strategy-parameters": '{"beta": 0.2}'}
    )
    assert settings.devices == ("pi", "phone")
    assert settings.strategy_parameters == {"beta": 0.2}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num-server-rounds", 0),
        ("alpha", 0),
        ("model", "resnet"),
        ("recipe", "none"),
        ("round-timeout", -1),
        ("run-name", "../elsewhere"),
        ("learning-rate", 0.1),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(key: str, value: object) -> None:
    with pytest.raises(SettingsError) as error:
        RunSettings.parse(DEFAULTS | {key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)


def test_no_limit_has_two_spellings(device_settings: dict[str, Any]) -> None:
    assert DeviceSettings.parse(device_settings | {"cpus": 0.0, "memory": ""}).cpus is None
    assert DeviceSettings.parse(device_settings | {"cpus": 0.5, "memory": "1g"}).memory == "1g"


def test_settings_survive_the_journey(device_settings: dict[str, Any]) -> None:
    device = DeviceSettings.parse(device_settings)
    assert DeviceSettings.parse(device.as_config()) == device
    with pytest.raises(SettingsError, match="fill-time needs a time-limit"):
        Task.parse({"fill-time": True})
    task = Task(server_round=3, seed=1, time_limit=2.5)
    assert Task.parse(task.as_config()) == task
