"""When a device's container is made anew."""

from typing import Any

import pytest
from repository import ROOT, load, read_yaml

playbooks = load(ROOT / "plugins/filter/flowerbed.py")
SPEC = read_yaml(ROOT / "roles/device/meta/argument_specs.yml")["argument_specs"]["main"]["options"]
SHARD = {"fingerprint": "one", "fraction": 0.5}


def _lab() -> dict[str, dict[str, Any]]:
    return {
        "board": {
            "images_references": {"application": "flowerbed/application:1"},
            "device_shards": {"pi": dict(SHARD)},
            "certificates_identities": {"pi": "one"},
        },
        "pi": {"device_machine": "board", "device_class": "raspberry_pi_4", "device_cpus": 0.5},
    }


def _given(
    hostvars: dict[str, dict[str, Any]],
    batch: int = 32,
    recipe: str = "one",
    others: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    told = playbooks.given_to(
        ["pi"],
        "board",
        hostvars,
        everybody=[*others, "pi"],
        batches={"pi": batch},
        configs={"pi": config or {}},
        recipe=[recipe],
    )
    assert told.keys() == {"pi"}
    given: dict[str, Any] = told["pi"]
    return given


def test_a_device_is_given_what_was_found_on_its_machine() -> None:
    given = _given(_lab())
    assert given | {"definition": ""} == {
        "image": "flowerbed/application:1",
        "quota": 0.5,
        "batch": 32,
        "share": 0.5,
        "partition": 0,
        "partitions": 1,
        "app_config": {},
        "definition": "",
    }
    assert _given(_lab()) == given


@pytest.mark.parametrize(
    ("host", "variable", "value"),
    [
        ("board", "images_references", {"application": "flowerbed/application:2"}),
        ("board", "device_shards", {"pi": SHARD | {"fingerprint": "two"}}),
        ("board", "device_shards", {"pi": SHARD | {"fraction": 1.0}}),
        ("board", "certificates_identities", {"pi": "two"}),
        ("pi", "device_cpus", 0.25),
        *(("pi", variable, "another") for variable in playbooks.OF_ITS_OWN),
    ],
)
def test_whatever_it_is_made_of_makes_it_anew(host: str, variable: str, value: Any) -> None:
    changed = _lab()
    changed[host][variable] = value
    assert _given(changed)["definition"] != _given(_lab())["definition"]


def test_so_do_batch_configuration_other_devices_and_what_the_role_makes_of_it() -> None:
    others: list[dict[str, Any]] = [
        {},
        {"batch": 16},
        {"recipe": "two"},
        {"others": ("phone",)},
        {"config": {"camera": "front"}},
    ]
    definitions = {_given(_lab(), **other)["definition"] for other in others}
    assert len(definitions) == len(others)


def test_partitions_are_numbered_by_name() -> None:
    given = _given(_lab(), others=("laptop", "tablet"))
    assert (given["partition"], given["partitions"]) == (1, 3)


def test_a_network_does_not() -> None:
    """It is shaped from outside while the container runs."""
    changed = _lab()
    changed["pi"]["device_network_rate"] = "1mbit"
    assert _given(changed) == _given(_lab())


def test_nothing_that_the_role_takes_is_forgotten() -> None:
    derived = {f"device_{name}" for name in _given(_lab())}
    elsewhere = {"device_machine", "device_engine_running"}
    assert SPEC.keys() == derived | set(playbooks.OF_ITS_OWN) | elsewhere
