"""Shards: same plan, same bytes; every example goes to one device; any data set can be dealt."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from flowerbed.data.place import prepare
from flowerbed.data.placed import PlacedData, placed_data
from flowerbed.data.plan import DataError, Plan


def _png(mode: str, size: tuple[int, int], colour: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the hub's schema of CIFAR-10, each image of one colour of its own."""
    directory = tmp_path_factory.mktemp("parquet")
    features = Features({"img": ImageFeature(), "label": ClassLabel(num_classes=10)})
    for split, numbers in (("train", range(200)), ("test", range(200, 240))):
        rows = {
            "img": [_png("RGB", (32, 32), (number, 0, 0)) for number in numbers],
            "label": [number % 10 for number in numbers],
        }
        Dataset.from_dict(rows, features).to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return directory


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table without a test split: numbers of seven users, who have 10 to 70 rows each."""
    directory = tmp_path_factory.mktemp("people")
    user = [f"user-{number}" for number in range(7) for _ in range(10 * (number + 1))]
    types = {"age": "float64", "capital gain/loss": "int32", "region": "int64", "income": "float32"}
    features = {"user": Value("string")} | {name: Value(kind) for name, kind in types.items()}
    rows = {
        "user": user,
        "age": [20 + number / 7 for number in range(280)],
        "capital gain/loss": list(range(280)),
        "region": [number % 4 for number in range(280)],
        "income": [number * 1.5 for number in range(280)],
    }
    Dataset.from_dict(rows, Features(features)).to_parquet(directory / "train.parquet")
    return directory


@pytest.fixture(scope="module")
def numbers(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table without the users."""
    directory = tmp_path_factory.mktemp("numbers")
    whole = Dataset.from_parquet(str(people / "train.parquet"), cache_dir=str(directory / "cache"))
    whole.remove_columns("user").to_parquet(directory / "train.parquet")
    return directory


def _plan(dataset: Path | str, **more: Any) -> Plan:
    shares = [{"device": f"d{n}", "partition": n, "fraction": 1.0} for n in range(4)]
    values = {"dataset": str(dataset), "partitions": 4, "seed": 5, "test": True, "devices": shares}
    return Plan.model_validate(values | more)


def _open(directory: Path) -> PlacedData:
    data = placed_data(directory)
    assert data
    return data


def _reds(directory: Path) -> list[int]:
    data = _open(directory)
    return [int(red) for split in (data.train, data.test) for red in split["img"][:, 0, 0, 0]]


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# --- what is placed ----------------------------------------------------------------------------


def test_every_example_goes_to_one_device(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    held = [_reds(tmp_path / "devices" / f"d{n}") for n in range(4)]
    assert [len(reds) for reds in held] == [50] * 4
    assert set().union(*held) == set(range(200))


def test_arrays_are_named_like_their_columns(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    data = _open(tmp_path / "devices" / "d2")
    for split, count in ((data.train, 40), (data.test, 10)):
        assert split["img"].shape == (count, 32, 32, 3)
        assert split["img"].dtype == np.uint8
        np.testing.assert_array_equal(split["img"][:, 0, 0, 0] % 10, split["label"])
    assert isinstance(data.train["img"], np.memmap)
    assert (data.partition, data.fraction, data.classes) == (2, 1.0, 10)
    assert data.labels == np.bincount(data.train["label"], minlength=10).tolist()


def test_the_server_has_the_test_split_and_nothing_to_train(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    data = _open(tmp_path / "test" / "shard")
    assert sorted(_reds(tmp_path / "test" / "shard")) == list(range(200, 240))
    assert data.train["img"].shape == (0, 32, 32, 3)
    assert sum(data.labels) == 0


def test_a_shard_says_what_it_was_made_from(parquet: Path, tmp_path: Path) -> None:
    plan = _plan(parquet, examples=100, partitioner="dirichlet")
    plan = plan.model_copy(update={"partitioner_parameters": {"alpha": 1.0}})
    manifest = prepare(plan, tmp_path)
    origin = _open(tmp_path / "devices" / "d0").origin
    assert origin == {
        "dataset": str(parquet),
        "asked": {
            "dataset": str(parquet),
            "configuration": "",
            "revision": "",
            "splits": {},
            "label": "",
            "examples": 100,
            "partitioner": "dirichlet",
            "partitioner_parameters": {"alpha": 1.0},
            "seed": 5,
        },
        "configuration": "",
        "revision": "",
        "splits": {"train": "train", "test": "test"},
        "label": "label",
        "fingerprint": origin["fingerprint"],
        "examples": 100,
        "partitioner": "dirichlet",
        "parameters": {"alpha": 1.0},
        "partitions": 4,
        "seed": 5,
        "arrays": "",
        "arrays_hash": "",
    }
    assert origin == _open(tmp_path / "test" / "shard").origin
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["origin"] == origin
    assert manifest["plan"] == plan.model_dump()
    record = json.loads((tmp_path / "devices/d0/shard.json").read_text())
    assert record == manifest["shards"]["d0"] | {"origin": origin}


def test_two_machines_write_the_same_bytes(parquet: Path, tmp_path: Path) -> None:
    plan = _plan(parquet, partitioner="pathological")
    plan.partitioner_parameters["num_classes_per_partition"] = 5
    prepare(plan, tmp_path / "one")
    prepare(plan, tmp_path / "other")
    assert _files(tmp_path / "one") == _files(tmp_path / "other")
    assert len(_files(tmp_path / "one")) == 1 + 5 * 5


def test_a_part_of_the_plan_gives_the_same_shards(parquet: Path, tmp_path: Path) -> None:
    """Each machine prepares its own devices only; together they must fit."""
    whole = prepare(_plan(parquet), tmp_path / "whole")
    mine = [{"device": "d3", "partition": 3, "fraction": 1.0}]
    part = prepare(_plan(parquet, devices=mine, test=False), tmp_path / "part")
    assert part["shards"]["d3"] == whole["shards"]["d3"]
    assert part["origin"] == whole["origin"]
    other = prepare(_plan(parquet, seed=6), tmp_path / "other")
    assert other["shards"]["d3"]["fingerprint"] != whole["shards"]["d3"]["fingerprint"]


def test_fraction_and_examples_limit_what_is_held(parquet: Path, tmp_path: Path) -> None:
    plan = _plan(parquet, examples=100, devices=[{"device": "d0", "partition": 0, "fraction": 0.4}])
    record = prepare(plan, tmp_path)["shards"]["d0"]
    assert (record["train_examples"], record["test_examples"]) == (8, 2)
    assert sum(record["labels"]) == 8


def test_a_device_holds_as_many_examples_as_it_has_bytes_for(parquet: Path, tmp_path: Path) -> None:
    size = 32 * 32 * 3 + 8
    shares = [
        {"device": "d0", "partition": 0, "fraction": 1.0, "bytes": 21 * size - 1},
        {"device": "d1", "partition": 1, "fraction": 0.5, "bytes": 1000 * size},
    ]
    shards = prepare(_plan(parquet, devices=shares), tmp_path)["shards"]
    held = {name: each["train_examples"] + each["test_examples"] for name, each in shards.items()}
    assert held == {"d0": 20, "d1": 25}
    # The node configuration tells a device which share of its partition it holds.
    assert (shards["d0"]["fraction"], shards["d1"]["fraction"]) == (0.4, 0.5)


def test_devices_that_are_gone_lose_their_shards(parquet: Path, tmp_path: Path) -> None:
    prepare(_plan(parquet), tmp_path)
    prepare(_plan(parquet, devices=[{"device": "d1", "partition": 1, "fraction": 1.0}]), tmp_path)
    assert [path.name for path in (tmp_path / "devices").iterdir()] == ["d1"]


def test_a_shard_that_is_there_is_left_alone(parquet: Path, tmp_path: Path) -> None:
    """A running device has the directory mounted and would keep the one that was removed."""

    def inodes() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (tmp_path / "devices").iterdir()}

    prepare(_plan(parquet), tmp_path)
    first = inodes()
    shares = [share.model_dump() for share in _plan(parquet).devices]
    shares[1]["fraction"] = 0.4
    prepare(_plan(parquet, devices=shares), tmp_path)
    again = inodes()
    assert again.pop("d1") != first.pop("d1")
    assert again == first


def test_the_record_alone_is_renewed_where_the_arrays_are_the_same(
    parquet: Path, tmp_path: Path
) -> None:
    prepare(_plan(parquet), tmp_path)
    inode = (tmp_path / "devices/d0").stat().st_ino
    prepare(_plan(parquet, splits={"train": "train", "test": ""}), tmp_path)
    assert (tmp_path / "devices/d0").stat().st_ino == inode
    assert _open(tmp_path / "devices/d0").origin["splits"] == {"train": "train", "test": ""}


def test_shards_that_are_half_written_are_dealt_anew(parquet: Path, tmp_path: Path) -> None:
    """The role compares the plan with the manifest's, and must not find an old one."""
    prepare(_plan(parquet), tmp_path)
    (tmp_path / "devices/d1.draft").write_text("in the way of a directory")
    with pytest.raises(NotADirectoryError):
        prepare(_plan(parquet, seed=6), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_nothing_is_placed_outside_of_the_lab(
    tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWERBED_DATA", str(tmp_path / "devices/d0"))
    assert placed_data() is None
    prepare(_plan(parquet), tmp_path)
    data = placed_data()
    assert data
    assert data.fingerprint == _open(tmp_path / "devices/d0").fingerprint


def test_reading_imports_no_data_set_library() -> None:
    code = (
        "import sys, flowerbed.data.placed; "
        "print(*{name.split('.')[0] for name in sys.modules} & "
        "{'datasets', 'flwr', 'flwr_datasets', 'pandas', 'pyarrow', 'pydantic', 'tensorflow'})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


# --- how it is dealt ---------------------------------------------------------------------------

PARTITIONERS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "inner_dirichlet": {"alpha": 0.5, "partition_sizes": [80, 40, 40, 40]},
    "pathological": {"num_classes_per_partition": 3, "class_assignment_mode": "deterministic"},
    "shard": {"num_shards_per_partition": 2},
    "continuous": {"partition_by": "label", "strictness": 0.5},
    "linear": {},
    "square": {},
    "exponential": {},
    "size": {"partition_sizes": [20, 30, 60, 90]},
    "natural_id": {"partition_by": "label"},
    "grouped_natural_id": {"partition_by": "label", "group_size": 2},
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_deals_each_example_once_and_alike(
    name: str, parquet: Path, tmp_path: Path
) -> None:
    plan = _plan(parquet, partitioner=name, partitioner_parameters=PARTITIONERS[name])
    first = prepare(plan, tmp_path / "first")["shards"]
    held = [red for device in first for red in _reds(tmp_path / "first/devices" / device)]
    assert len(held) == len(set(held)) > 75
    assert prepare(plan, tmp_path / "again")["shards"] == first


def test_a_distribution_gives_each_device_its_labels(numbers: Path, tmp_path: Path) -> None:
    plan = _plan(
        numbers,
        label="region",
        partitioner="distribution",
        partitioner_parameters={
            "distribution_array": [[1, 3], [1, 3], [1, 3], [1, 3]],
            "num_unique_labels_per_partition": 2,
            "preassigned_num_samples_per_label": 1,
        },
    )
    shards = prepare(plan, tmp_path)["shards"]
    assert [[count > 0 for count in shards[f"d{n}"]["labels"]] for n in range(4)] == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
        [True, False, False, True],
    ]


def test_every_partitioner_is_tested() -> None:
    choices = Plan.model_json_schema()["properties"]["partitioner"]["enum"]
    assert {*PARTITIONERS, "distribution"} == set(choices)


def test_dirichlet_shards_differ_in_labels_and_linear_ones_in_size(
    parquet: Path, tmp_path: Path
) -> None:
    def labels(name: str) -> np.ndarray:
        plan = _plan(parquet, partitioner=name, partitioner_parameters=PARTITIONERS[name])
        shards = prepare(plan, tmp_path / name)["shards"].values()
        return np.array([shard["labels"] for shard in shards])

    assert np.ptp(labels("dirichlet"), axis=0).mean() > 2 * np.ptp(labels("iid"), axis=0).mean()
    np.testing.assert_array_equal(labels("linear").sum(axis=1), [16, 32, 48, 64])


def test_a_natural_id_is_a_device(people: Path, tmp_path: Path) -> None:
    """Seven users and four devices: the first four users, whose names are no array."""
    by_user = {"partition_by": "user"}
    plan = _plan(people, partitioner="natural_id", partitioner_parameters=by_user)
    shards = prepare(plan, tmp_path)["shards"]
    held = [shards[f"d{n}"]["train_examples"] + shards[f"d{n}"]["test_examples"] for n in range(4)]
    assert held == [10, 20, 30, 40]
    assert shards["d0"]["arrays"] == ["age", "capital gain/loss", "region", "income"]
    data = _open(tmp_path / "devices/d1")
    rows = np.concatenate([data.train["capital gain/loss"], data.test["capital gain/loss"]])
    assert sorted(rows) == list(range(10, 30))
    assert (data.labels, data.classes) == ([], 0)


def test_a_group_of_natural_ids_is_a_device(people: Path, tmp_path: Path) -> None:
    parameters = {"partition_by": "user", "group_size": 3, "sort_unique_ids": True}
    shares = [{"device": f"d{n}", "partition": n, "fraction": 1.0} for n in range(3)]
    plan = _plan(
        people,
        partitioner="grouped_natural_id",
        partitioner_parameters=parameters,
        partitions=3,
        devices=shares,
    )
    shards = prepare(plan, tmp_path)["shards"]
    held = [shards[f"d{n}"]["train_examples"] + shards[f"d{n}"]["test_examples"] for n in range(3)]
    assert held == [60, 150, 70]


def test_numbers_keep_their_types(people: Path, tmp_path: Path) -> None:
    by_user = {"partition_by": "user"}
    prepare(_plan(people, partitioner="natural_id", partitioner_parameters=by_user), tmp_path)
    data = _open(tmp_path / "devices/d3")
    types = {name: array.dtype.name for name, array in data.train.items()}
    assert types == {
        "age": "float64",
        "capital gain/loss": "int32",
        "region": "int64",
        "income": "float32",
    }
    np.testing.assert_array_equal(data.train["income"], data.train["capital gain/loss"] * 1.5)


def test_without_a_test_split_the_server_knows_the_shapes(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train = next(parquet.glob("train*"))
    (tmp_path / "data/train.parquet").write_bytes(train.read_bytes())
    prepare(_plan(tmp_path / "data"), tmp_path / "out")
    data = _open(tmp_path / "out/test/shard")
    assert data.test["img"].shape == (0, 32, 32, 3)
    assert data.origin["splits"] == {"train": "train", "test": ""}


def test_a_column_of_whole_numbers_can_be_the_label(people: Path, tmp_path: Path) -> None:
    by_user = {"partition_by": "user"}
    plan = _plan(people, label="region", partitioner="natural_id", partitioner_parameters=by_user)
    prepare(plan, tmp_path)
    data = _open(tmp_path / "devices/d3")
    assert data.labels == np.bincount(data.train["region"]).tolist()
    # A number of values is no number of classes: they need not begin at 0.
    assert data.classes == 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dirichlet", {}, "training_partitioner_parameters: dirichlet needs alpha; it has alpha, min_"),
    ("iid", {"alpha": 1}, "training_partitioner_parameters: iid has no alpha; it has none"),
    (
        "pathological",
        {"num_classes_per_partition": 11},
        "training_partitioner = pathological with .* cannot deal 200 examples to 4 devices: ",
    ),
    (
        "natural_id",
        {"partition_by": "user"},
        "partition_by = user is no column of the data set. Write one of img, label",
    ),
    ("natural_id", {}, "training_partitioner_parameters: natural_id needs partition_by"),
    (
        "grouped_natural_id",
        {"partition_by": "label", "group_size": 4},
        "training_partitioner = grouped_natural_id with .* makes 3 partitions of 200 examples, and "
        "there are 4 devices. Use fewer devices, or parameters that give more partitions",
    ),
    ("grouped_natural_id", {"partition_by": "label", "group_size": 0}, "cannot deal 200 examples"),
    ("size", {"partition_sizes": [100, 100]}, "makes 2 partitions of 200 examples"),
    (
        "exponential",
        {},
        "device d0: device_data_fraction = 0.5 leaves 3 of 6 examples; at least 5 are needed",
    ),
]


@pytest.mark.parametrize(("name", "parameters", "said"), REFUSED)
def test_what_a_partitioner_cannot_do_is_one_error(
    name: str, parameters: dict[str, Any], said: str, parquet: Path, tmp_path: Path
) -> None:
    devices = [{"device": "d0", "partition": 0, "fraction": 0.5}]
    plan = _plan(parquet, partitioner=name, partitioner_parameters=parameters, devices=devices)
    with pytest.raises(DataError, match=said):
        prepare(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (
            "",
            "deals by a label, and .* has not exactly one ClassLabel column. Name a column in trai",
        ),
        (
            "colour",
            "training_dataset_label = colour: the data set has no such column. Write one of",
        ),
        ("income", "training_dataset_label = income holds float32, and .* partitioner continuous"),
    ],
)
def test_a_label_that_cannot_be_dealt_by_is_refused(
    label: str, said: str, numbers: Path, tmp_path: Path
) -> None:
    plan = _plan(
        numbers, label=label, partitioner="dirichlet", partitioner_parameters={"alpha": 0.5}
    )
    with pytest.raises(DataError, match=said):
        prepare(plan, tmp_path)


def test_a_share_with_nothing_left_is_refused(parquet: Path, tmp_path: Path) -> None:
    shares = [
        {"device": "d0", "partition": 0, "fraction": 0.02},
        {"device": "d1", "partition": 1, "fraction": 1.0, "bytes": 8000},
    ]
    with pytest.raises(DataError) as caught:
        prepare(_plan(parquet, devices=shares), tmp_path)
    assert str(caught.value) == (
        "device d0: device_data_fraction = 0.02 leaves 1 of 50 examples; "
        "device d1: device_data_fraction = auto leaves room for 2 of 50 examples; "
        "at least 5 are needed. The examples are dealt by training_partitioner = iid"
    )


def test_a_partition_that_no_device_can_have_is_no_plan(parquet: Path) -> None:
    with pytest.raises(ValueError, match="device d4: there is no partition 4"):
        _plan(parquet, devices=[{"device": "d4", "partition": 4, "fraction": 1.0}])


def test_the_digits_have_the_form_of_cifar_10(tmp_path: Path) -> None:
    shares = [{"device": "d0", "partition": 0, "fraction": 1.0}]
    prepare(_plan("digits", partitions=2, devices=shares), tmp_path)
    data = _open(tmp_path / "devices/d0")
    assert data.train["img"].shape == (575, 32, 32, 3)
    assert (data.train["img"].max(), data.classes) == (255, 10)
    assert set(data.train["label"]) == set(range(10))
    assert len(_open(tmp_path / "test/shard").test["img"]) == 360


# --- real images -------------------------------------------------------------------------------


def test_cifar_10_is_dealt_as_it_is(tmp_path: Path) -> None:
    default = Path(__file__).parent / "../../../shared/data/cifar10"
    data = Path(os.environ.get("FLOWERBED_TEST_DATA", default)).resolve()
    assert data.is_dir(), f"{data} is missing: set FLOWERBED_TEST_DATA to CIFAR-10 as parquet"
    shares = [{"device": "d0", "partition": 0, "fraction": 1.0}]
    plan = _plan(data, examples=2000, devices=shares, test=False)
    record = prepare(plan, tmp_path)["shards"]["d0"]
    placed = _open(tmp_path / "devices/d0")
    assert placed.train["img"].shape == (400, 32, 32, 3)
    assert record["classes"] == 10
    assert min(record["labels"]) > 20
    # The mean colour of CIFAR-10 is 125, 123, 114.
    np.testing.assert_allclose(placed.train["img"].mean((0, 1, 2)), [125, 123, 114], atol=5)
