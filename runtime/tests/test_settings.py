"""Settings from Flower's node configuration and from run.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowerbed.settings import RUN_FILE, DeviceSettings, LabSettings, SettingsError


def test_a_device_reads_kebab_case_and_keeps_what_is_the_apps(
    device_settings: dict[str, Any],
) -> None:
    device = DeviceSettings.parse(device_settings | {"note": "mine", "cpus": 0, "memory": ""})
    assert (device.device, device.batch_size, device.cpus, device.memory) == (
        "phone",
        16,
        None,
        None,
    )
    assert device.model_dump()["note"] == "mine"


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch-size", 0), ("availability", 0), ("data-fraction", 1.5), ("optimizer", "rmsprop")],
)
def test_a_wrong_value_is_named(device_settings: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{key} = {value!r}"):
        DeviceSettings.parse(device_settings | {key: value})


def test_a_run_is_read_from_its_file(tmp_path: Path) -> None:
    told = {"run_name": "one", "devices": ["a", "b"], "metrics": {"accuracy": "f1"}, "new": 1}
    (tmp_path / RUN_FILE).write_text(json.dumps(told))
    settings = LabSettings.read(tmp_path)
    assert settings.devices == ("a", "b")
    assert (settings.metrics.accuracy, settings.round_timeout) == ("f1", 600.0)


def test_a_runs_name_is_that_of_a_directory() -> None:
    with pytest.raises(SettingsError, match="run_name"):
        LabSettings.parse({"run_name": "../other"})
