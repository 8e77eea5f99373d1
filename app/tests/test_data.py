"""Shards: same plan, same bytes; and every image goes to one device only."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from flowerbed.data import DatasetError, Plan, load_shard, prepare


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the hub's schema of CIFAR-10, each image of one colour of its own."""
    directory = tmp_path_factory.mktemp("parquet")
    features = Features({"img": ImageFeature(), "label": ClassLabel(num_classes=10)})
    for split, count, offset in (("train", 200, 0), ("test", 40, 200)):
        rows: dict[str, list[Any]] = {"img": [], "label": []}
        for index in range(offset, offset + count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (index, 0, 0)).save(buffer, "PNG")
            rows["img"].append({"bytes": buffer.getvalue(), "path": None})
            rows["label"].append(index % 10)
        Dataset.from_dict(rows, features).to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return directory


def _plan(parquet: Path, **more: Any) -> Plan:
    shares = [{"device": f"d{n}", "partition": n, "fraction": 1.0} for n in range(4)]
    values = {"dataset": str(parquet), "partitions": 4, "seed": 5, "test": True, "devices": shares}
    return Plan.model_validate(values | more)


def _reds(directory: Path) -> set[int]:
    shard = load_shard(directory)
    return set(shard.train_images[:, 0, 0, 0]) | set(shard.test_images[:, 0, 0, 0])


def test_every_image_goes_to_one_device(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    held = [_reds(tmp_path / "devices" / f"d{n}") for n in range(4)]
    assert [len(reds) for reds in held] == [50] * 4
    assert set.union(*held) == set(range(200))
    assert _reds(tmp_path / "test" / "shard") == set(range(200, 240))


def test_labels_stay_with_their_images(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    shard = load_shard(tmp_path / "devices" / "d2")
    assert shard.train_images.dtype == np.uint8
    np.testing.assert_array_equal(shard.train_images[:, 0, 0, 0] % 10, shard.train_labels)
    assert (len(shard.train_labels), len(shard.test_labels), shard.classes) == (40, 10, 10)


def test_a_part_of_the_plan_gives_the_same_shards(parquet: Path, tmp_path: Path) -> None:
    """Each machine prepares its own devices only; together they must fit."""
    whole = prepare(_plan(parquet), tmp_path / "whole")
    part = prepare(
        _plan(parquet, devices=[{"device": "d3", "partition": 3, "fraction": 1.0}], test=False),
        tmp_path / "part",
    )
    assert part["shards"]["d3"] == whole["shards"]["d3"]
    other = prepare(_plan(parquet, seed=6), tmp_path / "other")
    assert other["shards"]["d3"]["fingerprint"] != whole["shards"]["d3"]["fingerprint"]


def test_fraction_and_examples_limit_what_is_held(parquet: Path, tmp_path: Path) -> None:
    plan = _plan(parquet, examples=100, devices=[{"device": "d0", "partition": 0, "fraction": 0.4}])
    record = prepare(plan, tmp_path)["shards"]["d0"]
    assert (record["train_examples"], record["test_examples"]) == (8, 2)
    assert sum(record["train_labels"]) == 8


def test_a_device_holds_as_many_images_as_it_has_room_for(parquet: Path, tmp_path: Path) -> None:
    shares = [
        {"device": "d0", "partition": 0, "fraction": 1.0, "images": 20},
        {"device": "d1", "partition": 1, "fraction": 0.5, "images": 1000},
    ]
    shards = prepare(_plan(parquet, devices=shares), tmp_path)["shards"]
    held = {name: each["train_examples"] + each["test_examples"] for name, each in shards.items()}
    assert held == {"d0": 20, "d1": 25}
    # What a device is told of itself.
    assert (shards["d0"]["fraction"], shards["d1"]["fraction"]) == (0.4, 0.5)


def test_devices_that_are_gone_lose_their_shards(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    prepare(_plan(parquet, devices=[{"device": "d1", "partition": 1, "fraction": 1.0}]), tmp_path)
    assert [path.name for path in (tmp_path / "devices").iterdir()] == ["d1"]


def test_digits_are_images_of_32_by_32(shards: Path) -> None:
    shard = load_shard(shards / "devices" / "phone")
    assert shard.image_shape == (32, 32, 3)
    assert shard.train_images.max() == 255
    assert set(np.unique(shard.train_labels)) == set(range(10))


def test_an_unreachable_data_set_is_an_error_that_names_it(
    tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lost = Plan.model_validate(plan | {"dataset": "nobody/nothing"})
    with pytest.raises(DatasetError, match="nobody/nothing"):
        prepare(lost, tmp_path)
    manifest = prepare(lost.model_copy(update={"fallback": "digits"}), tmp_path)
    assert manifest["dataset"] == "digits"


def test_a_directory_without_parquet_is_refused(tmp_path: Path, plan: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="no train and no test"):
        prepare(Plan.model_validate(plan | {"dataset": str(tmp_path)}), tmp_path)


PARTITIONERS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "pathological": {"num_classes_per_partition": 3, "class_assignment_mode": "deterministic"},
    "shard": {"num_shards_per_partition": 2},
    "linear": {},
    "exponential": {},
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_deals_each_image_once_and_alike(
    name: str, parquet: Path, tmp_path: Path
) -> None:
    plan = _plan(parquet, partitioner=name, partitioner_parameters=PARTITIONERS[name])
    first = prepare(plan, tmp_path / "first")["shards"]
    held = [_reds(tmp_path / "first/devices" / device) for device in first]
    assert sum(map(len, held)) == len(set.union(*held))
    assert prepare(plan, tmp_path / "again")["shards"] == first


def test_dirichlet_shards_differ_in_labels_and_linear_ones_in_size(
    parquet: Path, tmp_path: Path
) -> None:
    def labels(name: str) -> np.ndarray:
        plan = _plan(parquet, partitioner=name, partitioner_parameters=PARTITIONERS[name])
        shards = prepare(plan, tmp_path / name)["shards"].values()
        return np.array([shard["train_labels"] for shard in shards])

    assert np.ptp(labels("dirichlet"), axis=0).mean() > 2 * np.ptp(labels("iid"), axis=0).mean()
    np.testing.assert_array_equal(labels("linear").sum(axis=1), [16, 32, 48, 64])


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("dirichlet", {}, "dirichlet needs alpha; it has alpha, min_partition_size"),
        ("iid", {"alpha": 1}, "iid has no alpha; it has none"),
        ("pathological", {"num_classes_per_partition": 11}, "cannot deal 200 images to 4 devices"),
        ("exponential", {}, "device d0: device_data_fraction = 0.5 leaves 3 of 6 images"),
    ],
)
def test_what_a_partitioner_cannot_do_is_one_error(
    name: str, parameters: dict[str, Any], said: str, parquet: Path, tmp_path: Path
) -> None:
    devices = [{"device": "d0", "partition": 0, "fraction": 0.5}]
    plan = _plan(parquet, partitioner=name, partitioner_parameters=parameters, devices=devices)
    with pytest.raises(DatasetError, match=said):
        prepare(plan, tmp_path)


def test_a_share_with_nothing_left_is_refused(parquet: Path, tmp_path: Path) -> None:
    plan = _plan(parquet, devices=[{"device": "d0", "partition": 0, "fraction": 0.02}])
    with pytest.raises(DatasetError, match=r"device d0: device_data_fraction = 0\.02"):
        prepare(plan, tmp_path)


def test_a_shard_that_is_there_is_left_alone(plan: dict[str, Any], tmp_path: Path) -> None:
    """A running device has the directory mounted; another one in its place would be lost to it."""
    prepare(Plan.model_validate(plan), tmp_path)
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "devices").iterdir()}
    changed = dict(plan, devices=[plan["devices"][0], dict(plan["devices"][1], fraction=0.4)])
    prepare(Plan.model_validate(changed), tmp_path)
    again = {path.name: path.stat().st_ino for path in (tmp_path / "devices").iterdir()}
    assert again["phone"] == inodes["phone"]
    assert again["pi"] != inodes["pi"]
