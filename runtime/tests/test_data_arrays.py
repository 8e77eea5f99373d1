"""How rows become arrays: columns as they are, or the app's own function."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Array2D, ClassLabel, Dataset, Features, List, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from flowerbed.data.arrays import convert_columns
from flowerbed.data.place import prepare
from flowerbed.data.placed import placed_data
from flowerbed.data.plan import DataError, Plan

REMEDY = r'Write a function .* pyproject\.toml: \[tool\.flowerbed\] arrays = "package\.module:fu'


def _images(*pictures: Image.Image | None) -> Dataset:
    return Dataset.from_dict({"picture": list(pictures)}, Features({"picture": ImageFeature()}))


def _column(kind: Any, values: list[Any]) -> Dataset:
    return Dataset.from_dict({"column": values}, Features({"column": kind}))


# --- column by column --------------------------------------------------------------------------


def test_grey_images_have_no_channels() -> None:
    dataset = _images(*(Image.new("L", (28, 20), number) for number in range(5)))
    array = convert_columns(dataset)(dataset.select([3, 1]))["picture"]
    assert (array.shape, array.dtype.name) == ((2, 20, 28), "uint8")
    assert array[:, 0, 0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("mode", "colour", "shape", "kind"),
    [
        ("RGBA", (1, 2, 3, 4), (4, 4, 4), "uint8"),
        ("P", 0, (4, 4, 3), "uint8"),
        ("1", 1, (4, 4), "uint8"),
        ("I;16", 1000, (4, 4), "uint16"),
    ],
)
def test_images_of_every_mode_are_pixels(
    mode: str, colour: Any, shape: tuple[int, ...], kind: str
) -> None:
    dataset = _images(Image.new(mode, (4, 4), colour))
    array = convert_columns(dataset)(dataset)["picture"][0]
    assert (array.shape, array.dtype.name) == (shape, kind)


@pytest.mark.parametrize(
    ("kind", "values", "dtype", "shape"),
    [
        (Value("float16"), [0.5, 1.5, 2.5], "float16", ()),
        (Value("bool"), [True, False, True], "bool", ()),
        (ClassLabel(names=["cat", "dog"]), [0, 1, 0], "int64", ()),
        (Sequence(Value("float32"), length=2), [[1, 2], [3, 4], [5, 6]], "float32", (2,)),
        (List(List(Value("int8"))), [[[1], [2]], [[3], [4]], [[5], [6]]], "int8", (2, 1)),
        (Array2D((2, 2), "uint8"), np.arange(12, dtype="uint8").reshape(3, 2, 2), "uint8", (2, 2)),
    ],
)
def test_numbers_of_every_shape_are_arrays(
    kind: Any, values: Any, dtype: str, shape: tuple[int, ...]
) -> None:
    dataset = _column(kind, values)
    # More rows than are read in one go, in another order.
    order = [2, 0, 1] * 500
    array = convert_columns(dataset)(dataset.select(order))["column"]
    assert (array.dtype.name, array.shape) == (dtype, (1500, *shape))
    np.testing.assert_array_equal(array, np.array(values, dtype)[order])


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (_column(Value("string"), ["a", "b"]), "the column column .*: it holds string"),
        (
            _column(List(Value("int64")), [[1], [1, 2]]),
            r"unequal lengths \(1 and 2\)",
        ),
        (_column(List(List(Value("int64"))), [[[1], [2, 3]]]), r"unequal lengths \(1 and 2\)"),
        (_column(List(Value("string")), [["a"]]), "it holds string"),
        (_column({"a": Value("int64")}, [{"a": 1}]), "it holds struct"),
        (_column(Value("int64"), [1, None]), "it has missing values"),
        (_column(List(Value("int64")), [[1], None]), "it has missing values"),
        (_column(Value("timestamp[s]"), [0, 1]), "it holds timestamp"),
        (_images(Image.new("L", (2, 2)), None), "an image is missing"),
        (
            _images(Image.new("L", (28, 28)), Image.new("L", (32, 32))),
            r"uint8 \(32, 32\), and uint8 \(28, 28\) in the first",
        ),
        (
            _images(Image.new("L", (2, 2)), Image.new("RGB", (2, 2))),
            r"uint8 \(2, 2, 3\), and uint8 \(2, 2\) in the first",
        ),
    ],
)
def test_what_is_no_array_is_refused_with_the_remedy(dataset: Dataset, reason: str) -> None:
    with pytest.raises(DataError, match=f"{reason}.*{REMEDY}"):
        convert_columns(dataset)(dataset)


@pytest.mark.parametrize(
    "dataset",
    [
        _images(*(Image.new("L", (size, size)) for size in (28, 28, 32, 32))),
        _column(List(Value("int64")), [[1], [2], [3, 4], [5, 6]]),
    ],
)
def test_what_differs_between_devices_is_refused(dataset: Dataset) -> None:
    """Each device's values are alike, but those of one device differ from those of another."""
    (name,) = dataset.column_names
    convert = convert_columns(dataset)
    assert len(convert(dataset.select([0, 1]))[name]) == 2
    with pytest.raises(
        DataError, match=f"{name} cannot become an array: its values differ .*{REMEDY}"
    ):
        convert(dataset.select([2, 3]))


# --- the app's function ------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sentences of several lengths with a label."""
    directory = tmp_path / "texts"
    directory.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": ["so " * (1 + n % 5) for n in range(60)], "label": [n % 2 for n in range(60)]}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features).to_parquet(directory / f"{split}.parquet")
    return directory


class App:
    """An app whose package has a name of its own, so that no test finds another one's module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.package = f"app_{abs(hash(directory))}"
        (directory / self.package).mkdir(parents=True)
        self.write("__init__", "")
        self.write("vocabulary", "WORDS = {'so': 7}\n")
        self.write("model", "raise RuntimeError('the model is not needed')\n")

    def write(self, module: str, code: str) -> None:
        """Write a module of the package."""
        (self.directory / self.package / f"{module}.py").write_text(code)

    def plan(self, dataset: Path, *, function: str = "tokens", **more: Any) -> Plan:
        """A plan for two devices and the server."""
        shares = [{"device": f"d{n}", "partition": n, "fraction": 1.0} for n in range(2)]
        app = {"directory": str(self.directory), "arrays": f"{self.package}.data:{function}"}
        values = {"dataset": str(dataset), "partitions": 2, "seed": 1, "test": True, "app": app}
        return Plan.model_validate(values | {"devices": shares} | more)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    """An app whose function makes 8 tokens of each text."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    app = App(tmp_path / "app")
    code = f"""
import numpy as np
from {app.package}.vocabulary import WORDS

def tokens(dataset):
    result = np.zeros((len(dataset), 8), np.int32)
    for row, text in zip(result, dataset["text"]):
        ids = [WORDS[word] for word in text.split()]
        row[: len(ids)] = ids
    return {{"tokens": result, "answer": np.array(dataset["label"], np.uint8)}}
"""
    app.write("data", code)
    return app


def test_text_needs_a_function_and_has_one(app: App, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the column text cannot become an array: it holds string"):
        prepare(app.plan(texts, app={}), tmp_path / "out")
    manifest = prepare(app.plan(texts), tmp_path / "out")
    data = placed_data(tmp_path / "out/devices/d1")
    assert data
    assert data.train["tokens"].shape == (24, 8)
    assert set(np.unique(data.train["tokens"])) == {0, 7}
    assert data.train["answer"].dtype == np.uint8
    assert data.labels == np.bincount(data.train["answer"]).tolist()
    assert data.classes == 2
    assert manifest["test"]["test_examples"] == 60
    assert data.origin["arrays"] == f"{app.package}.data:tokens"
    assert len(data.origin["arrays_hash"]) == 64


def test_the_origin_changes_with_the_modules_that_the_function_is_of(
    app: App, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(output: str) -> str:
        for name in [name for name in sys.modules if name.startswith(app.package)]:
            monkeypatch.delitem(sys.modules, name)
        return str(prepare(app.plan(texts), tmp_path / output)["origin"]["arrays_hash"])

    first = hash_of("first")
    app.write("model", "raise RuntimeError('still not needed')\n")
    assert hash_of("second") == first
    app.write("vocabulary", "WORDS = {'so': 7, 'another': 11}\n")
    assert hash_of("third") != first


def test_a_function_may_make_several_examples_of_a_row(
    app: App, texts: Path, tmp_path: Path
) -> None:
    app.write(
        "data", 'import numpy as np\ntokens = lambda rows: {"x": np.zeros((3 * len(rows), 2))}'
    )
    shares = [
        {"device": "d0", "partition": 0, "fraction": 1.0},
        # 16 bytes an example, three examples a row: room for 10 rows.
        {"device": "d1", "partition": 1, "fraction": 1.0, "bytes": 500},
    ]
    shards = prepare(app.plan(texts, devices=shares), tmp_path / "out")["shards"]
    assert [shards[name]["train_examples"] for name in ("d0", "d1")] == [72, 24]
    # Which label a row of another length has, only the app knows.
    assert shards["d0"]["labels"] == []


ARRAYS = r"\[tool\.flowerbed\] arrays = 'app_.*\.data:tokens' in the app's pyproject\.toml "


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import no_such_library",
            "cannot be imported: ModuleNotFoundError: No module named 'no_su",
        ),
        ("", "cannot be imported: AttributeError: module .* has no attribute 'tokens'"),
        (
            "def tokens(rows):\n    return rows['words']",
            r"failed: ValueError: Column 'words' doesn't exist\. \(data\.py, line 3\)",
        ),
        ("tokens = lambda rows: [1]", "returned a list: return a dictionary of named numpy arrays"),
        ("tokens = lambda rows: {}", "returned an empty dict: return a dictionary"),
        ("tokens = lambda rows: {1: np.ones(9)}", "returned the name 1: return"),
        ("tokens = lambda rows: {'x': [1, 2]}", "returned a list as x: return"),
        ("tokens = lambda rows: {'x': np.array(['a', None])}", "returned Python objects as x: ret"),
        ("tokens = lambda rows: {'x': np.array(1)}", "returned a single value as x: return"),
        (
            "tokens = lambda rows: {'x': np.ones(len(rows)), 'y': np.ones(2)}",
            r"returned arrays of unequal first dimensions \(24 of x, 2 of y\): return",
        ),
    ],
)
def test_a_function_that_does_not_work_is_refused(
    code: str, said: str, app: App, texts: Path, tmp_path: Path
) -> None:
    app.write("data", f"import numpy as np\n{code}\n")
    with pytest.raises(DataError, match=ARRAYS + said):
        prepare(app.plan(texts), tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("{'x': np.ones(0)}", "device d0: the arrays function left no examples to train"),
        (
            "{f'x{len(rows)}': np.ones(len(rows))}",
            r"device d0: the arrays function named \['x24'\] for training and \['x6'\] for testing",
        ),
    ],
)
def test_a_shard_must_have_the_same_arrays_in_both_splits(
    code: str, said: str, app: App, texts: Path, tmp_path: Path
) -> None:
    app.write("data", f"import numpy as np\ntokens = lambda rows: {code}\n")
    with pytest.raises(DataError, match=said):
        prepare(app.plan(texts), tmp_path / "out")
