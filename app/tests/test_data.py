"""Arrays from data sets of different kinds, and where a device finds its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, Value
from examples import CLASSES, make_images, run_config
from flowerbed import PlacedData
from flwr.app import Context, RecordDict
from mobilenet.data import load_data, load_test_data, to_arrays
from mobilenet.settings import RunSettings
from PIL import Image as Pictures

Settings = Callable[..., RunSettings]


def _context(**node_config: Any) -> Context:
    config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(1, 1, config, RecordDict(), {})


def _settings(**changes: Any) -> RunSettings:
    return RunSettings.parse(run_config(**changes))


def _pictures(size: tuple[int, int], label: Any = None) -> Dataset:
    """Three images of one colour each."""
    images = [Pictures.new("RGB", size, color) for color in ("red", "lime", "blue")]
    features = Features({"img": Image(), "label": label or ClassLabel(num_classes=CLASSES)})
    return Dataset.from_dict({"img": images, "label": [2, 0, 1]}, features)


# --- to_arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@pytest.mark.parametrize("label", [ClassLabel(num_classes=CLASSES), Value("int64")])
def test_images_become_arrays_of_one_size(size: tuple[int, int], label: Any) -> None:
    arrays = to_arrays(_pictures(size, label))
    assert arrays["image"].dtype == np.uint8
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    expected = np.broadcast_to(colors[:, None, None], (3, 32, 32, 3))
    np.testing.assert_array_equal(arrays["image"], expected)
    assert arrays["label"].dtype == np.int64
    assert arrays["label"].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("kind", "shape"), [(Array2D, (8, 8)), (Array3D, (8, 8, 1)), (Array3D, (8, 8, 3))]
)
def test_arrays_of_pixels_are_images_too(kind: type, shape: tuple[int, ...]) -> None:
    features = Features({"pixels": kind(shape, "uint8"), "digit": ClassLabel(num_classes=CLASSES)})
    values = {"pixels": [np.full(shape, 200, np.uint8)], "digit": [7]}
    arrays = to_arrays(Dataset.from_dict(values, features))
    np.testing.assert_array_equal(arrays["image"], np.full((1, 32, 32, 3), 200))
    assert arrays["label"].tolist() == [7]


def test_columns_that_cannot_be_told_apart_are_refused() -> None:
    two = _pictures((32, 32)).add_column("coarse", [0, 0, 0])
    to_arrays(two)  # of a label and a number, the label is the label
    two = two.cast_column("coarse", ClassLabel(num_classes=2))
    with pytest.raises(ValueError, match=r"one of labels.*coarse"):
        to_arrays(two)
    with pytest.raises(ValueError, match="one column of images"):
        to_arrays(two.remove_columns("img"))
    floats = Features({"img": Array3D((2, 2, 3), "float32"), "label": Value("int64")})
    with pytest.raises(ValueError, match="arrays of uint8"):
        to_arrays(Dataset.from_dict({"img": [np.zeros((2, 2, 3))], "label": [0]}, floats))


# --- in the lab ---------------------------------------------------------------------------------


def _place(
    monkeypatch: pytest.MonkeyPatch, train: int, test: int, classes: int, labels: int = 0
) -> None:
    placed = PlacedData(
        make_images(train, seed=1), make_images(test, seed=2), {}, 3, 1.0, "", [1] * labels, classes
    )
    monkeypatch.setattr("mobilenet.data.placed_data", lambda: placed)


def test_placed_data_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _place(monkeypatch, 30, 10, classes=12)
    data = load_data(_context(partition_id=3, num_partitions=4), _settings(dataset="none/such"))
    assert (len(data.train["label"]), len(data.test["label"])) == (30, 10)
    assert (data.classes, data.partition) == (12, 3)


def test_data_that_were_placed_anew_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for examples in (30, 50):
        _place(monkeypatch, examples, 10, classes=CLASSES)
        assert len(load_data(_context(), _settings()).train["label"]) == examples


def test_labels_that_name_no_classes_are_counted_by_the_lab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _place(monkeypatch, 30, 10, classes=0, labels=7)
    assert load_data(_context(), _settings()).classes == load_test_data(_settings()).classes == 7
    _place(monkeypatch, 30, 10, classes=0)
    with pytest.raises(ValueError, match="number of classes is unknown"):
        load_data(_context(), _settings())


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of parquet: 40 training and 10 test images."""
    directory = tmp_path_factory.mktemp("parquet")
    for split, examples in (("train", 40), ("test", 10)):
        _write(directory / f"{split}-0.parquet", examples)
    return directory


def _write(path: Path, examples: int) -> None:
    images = make_images(examples, seed=3)
    features = Features({"img": Image(), "label": ClassLabel(num_classes=CLASSES)})
    pictures = [Pictures.fromarray(image) for image in images["image"]]
    Dataset.from_dict({"img": pictures, "label": images["label"]}, features).to_parquet(path)


def test_each_client_has_a_partition_of_its_own(directory: Path) -> None:
    settings = _settings(dataset=str(directory), examples=30)
    parts = [load_data(_context(partition_id=id_, num_partitions=2), settings) for id_ in (0, 1)]
    assert [(len(d.train["label"]), len(d.test["label"])) for d in parts] == [(12, 3)] * 2
    assert [(d.partition, d.classes) for d in parts] == [(0, CLASSES), (1, CLASSES)]
    images = np.concatenate([d[s]["image"] for d in map(vars, parts) for s in ("train", "test")])
    assert len({image.tobytes() for image in images}) == 30
    again = load_data(_context(partition_id=0, num_partitions=2), settings)
    assert again is parts[0]
    test = load_test_data(settings)
    assert (len(test.train["label"]), len(test.test["label"]), test.classes) == (0, 10, CLASSES)


def test_a_partition_that_is_too_small_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="partition 0 has 1 images"):
        load_data(_context(partition_id=0, num_partitions=40), _settings(dataset=str(directory)))
