"""Where a data set comes from, and what is said when it cannot be had."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import datasets
import httpx
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from flowerbed.data import progress, source
from flowerbed.data.place import prepare
from flowerbed.data.plan import DataError, Plan
from flowerbed.data.source import content_fingerprint, load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
---
"""


def _numbers(count: int) -> Dataset:
    features = Features({"x": Value("float32"), "y": ClassLabel(num_classes=3)})
    rows = {"x": [number / 2 for number in range(count)], "y": [n % 3 for n in range(count)]}
    return Dataset.from_dict(rows, features)


def _plan(dataset: Path | str, **more: Any) -> Plan:
    shares = [{"device": "d0", "partition": 0, "fraction": 1.0}]
    values = {"dataset": str(dataset), "partitions": 2, "seed": 1, "devices": shares}
    return Plan.model_validate(values | more)


# --- the hub -----------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `datasets` asks for a public data set, lab/numbers."""

    root: Path

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """Answer a request for a file or for the description of a repository."""
        parts = unquote(urlparse(self.path).path).strip("/").removeprefix("api/").split("/")
        repository, revision = "/".join(parts[1:3]), "".join(parts[4:5]) or "main"
        if parts[0] != "datasets":
            self._answer(404)
        elif repository == "lab/broken":
            self._answer(500)
        elif repository != "lab/numbers":
            self._answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif parts[3:4] == ["resolve"]:
            self._file(self.root.joinpath(*parts[5:]))
        elif parts[3:4] == ["tree"]:
            self._json([self._entry(path) for path in sorted(self.root.rglob("*"))])
        else:
            self._json({"id": repository, "sha": COMMIT, "siblings": []})

    do_HEAD = do_GET  # noqa: N815 - http.server calls it

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "file" if path.is_file() else "directory"
        name, size = str(path.relative_to(self.root)), path.stat().st_size
        return {"type": kind, "path": name, "size": size, "oid": "0" * 40}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        body = file.read_bytes()
        tag = hashlib.sha256(body).hexdigest()
        self._answer(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)


# The hub's address and its cache are read when `datasets` is imported: hence another process.
PROGRAM = """
import json, sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the pauses before huggingface_hub asks again
from flowerbed.data.place import prepare
from flowerbed.data.plan import DataError, Plan
told = []
for plan in json.loads(sys.argv[1]):
    try:
        told.append(prepare(Plan.model_validate(plan), Path(sys.argv[2]))["origin"])
    except DataError as error:
        told.append(str(error))
print(json.dumps(told))
"""


def _told(plans: list[Plan], directory: Path, endpoint: str) -> list[Any]:
    """The origin of the shards of each plan, or what it is refused with."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(directory / "cache")}
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    content = json.dumps([plan.model_dump() for plan in plans])
    command = [sys.executable, "-c", PROGRAM, content, str(directory / "out")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    told: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with one data set."""
    root = tmp_path_factory.mktemp("hub")
    for split, count in (("train", 60), ("validation", 20)):
        _numbers(count).to_parquet(root / f"data/{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(README)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def told(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of plans while the hub can be reached, and later when it cannot."""
    directory = tmp_path_factory.mktemp("machine")
    plan = _plan("lab/numbers", test=True, fallback="digits")
    while_there = {
        "as it is": plan,
        "by tag": plan.model_copy(update={"revision": "v1", "configuration": "small"}),
        "sliced": plan.model_copy(
            update={"splits": {"train": "train[:50%]+validation", "test": "train[50%:]"}}
        ),
        "unknown name": _plan("lab/nothing", fallback="digits"),
        "no name": _plan("not a name", fallback="digits"),
        "three parts": _plan("lab/numbers/small", fallback="digits"),
        "broken": _plan("lab/broken", fallback="digits"),
        "unknown revision": plan.model_copy(update={"revision": "v9"}),
        "unknown configuration": plan.model_copy(update={"configuration": "large"}),
        "unknown split": plan.model_copy(update={"splits": {"test": "test"}}),
        "bad split": plan.model_copy(update={"splits": {"train": "train[:x"}}),
    }
    when_gone = {
        "cached": plan,
        "cached commit": plan.model_copy(update={"revision": COMMIT}),
        "cached tag": plan.model_copy(update={"revision": "v1"}),
        "unreachable": _plan("lab/others"),
    }
    results = _told(list(while_there.values()), directory, hub)
    results += _told(list(when_gone.values()), directory, "http://127.0.0.1:9")
    return dict(zip((*while_there, *when_gone), results, strict=True))


def test_a_data_set_of_the_hub_has_its_commit(told: dict[str, Any]) -> None:
    origin = told["as it is"]
    assert (origin["dataset"], origin["configuration"]) == ("lab/numbers", "small")
    assert origin["revision"] == COMMIT
    assert origin["splits"] == {"train": "train", "test": "validation"}
    assert origin["examples"] == 60
    assert told["cached"] == origin
    for case, asked in {"by tag": "v1", "cached commit": COMMIT}.items():
        assert told[case]["asked"]["revision"] == asked
        assert told[case] == origin | {"asked": told[case]["asked"]}


def test_splits_may_be_parts_of_splits(told: dict[str, Any]) -> None:
    assert told["sliced"]["examples"] == 30 + 20


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "unknown name",
            "training_dataset = lab/nothing: Dataset 'lab/nothing' doesn't exist on the Hub or "
            "cannot be accessed. Write the name of a public data set, or an absolute directory",
        ),
        ("no name", "training_dataset = not a name: Repo id must use alphanumeric chars"),
        ("three parts", "training_dataset = lab/numbers/small: Couldn't find any data file"),
        ("broken", "training_dataset = lab/broken: the hub answered with an error of its own. Try"),
        (
            "unknown revision",
            "training_dataset_revision = v9: Revision 'v9' doesn't exist for dataset 'lab/numbers' "
            "on the Hub. Write a branch, tag or commit",
        ),
        (
            "unknown configuration",
            "training_dataset_configuration = 'large': BuilderConfig 'large' not found. Available: "
            "['small']",
        ),
        (
            "unknown split",
            "training_dataset_splits: lab/numbers has no split test. Write train and test as two "
            "of its splits (train, validation), or an empty test",
        ),
        (
            "bad split",
            "training_dataset_splits: Unrecognized instruction format: train[:x (lab/numbers has "
            "the splits train, validation)",
        ),
        (
            "cached tag",
            "training_dataset_revision = v1: the hub cannot be reached to look it up, and the "
            f"cache of this machine holds commit {COMMIT}. Write that commit, or check the",
        ),
        (
            "unreachable",
            "training_dataset = lab/others: the Hugging Face hub cannot be reached from this "
            "machine (",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_refused(case: str, said: str, told: dict[str, Any]) -> None:
    """Never with the fallback, which each of these plans but the last has."""
    assert str(told[case]).startswith(said)


# --- failures of all kinds ---------------------------------------------------------------------


def _fails_with(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, cause: BaseException | None = None
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error from cause

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectionError("no route to the hub"), None),
        (httpx.ProxyError("no route to the hub"), None),
        (
            DatasetGenerationError("while it was generated"),
            httpx.ReadTimeout("no route to the hub"),
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_leads_to_the_fallback(
    error: Exception,
    cause: Exception | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _fails_with(monkeypatch, error, cause)
    with pytest.raises(DataError) as caught:
        prepare(_plan("lab/numbers"), tmp_path)
    assert str(caught.value) == (
        "training_dataset = lab/numbers: the Hugging Face hub cannot be reached from this machine "
        "(no route to the hub). Check the machine's connection, or give a directory of parquet "
        "files that every machine has"
    )
    # The label is a column of the data set that is not there.
    manifest = prepare(_plan("lab/numbers", fallback="digits", label="y"), tmp_path)
    assert manifest["dataset"] == manifest["origin"]["dataset"] == "digits"
    assert manifest["origin"]["asked"]["dataset"] == "lab/numbers"
    assert "WARNING: training_dataset = lab/numbers: the Hugging Face" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "cause", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            None,
            r"shards_directory of this machine cannot be written \(\[Errno 28\] No space left on d",
        ),
        (
            DatasetGenerationError("while it was generated"),
            OSError(errno.ENOSPC, "No space left on device"),
            r"shards_directory of this machine cannot be written .* Free space there, correct its "
            "owner and mode, or set shards_directory to another disk",
        ),
        (OSError("Not enough disk space. Needed: 1 GB"), None, "shards_directory .* Needed: 1 GB"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            None,
            "shards_directory .* Permission",
        ),
        # A connection that is lost because the disk is full does not count.
        (ConnectionError("lost"), OSError(errno.EDQUOT, "Quota exceeded"), "shards_directory"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found numbers.py"),
            None,
            "training_dataset = lab/numbers: .*training_dataset_revision = refs/convert/parquet",
        ),
        (
            DatasetGenerationError("while it was generated"),
            ValueError("a column is missing"),
            r"training_dataset = lab/numbers cannot be loaded \(DatasetGenerationError: a column i",
        ),
    ],
)
def test_other_failures_are_refusals_even_with_a_fallback(
    error: Exception,
    cause: Exception | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fails_with(monkeypatch, error, cause)
    with pytest.raises(DataError, match=said):
        prepare(_plan("lab/numbers", fallback="digits"), tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("9 requested and 2 written")],
)
def test_a_disk_that_is_full_when_shards_are_written_is_refused(
    error: OSError, numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("numpy.save", save)
    with pytest.raises(DataError, match="shards_directory of this machine cannot be written"):
        prepare(_plan(numbers), tmp_path / "out")


def test_a_long_download_is_not_silent(
    numbers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(source, "_builder", lambda _: time.sleep(0.5))
    with pytest.raises(AttributeError):  # there is no builder
        load(_plan(numbers))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"loading {numbers}"
    assert len(lines) > 3
    assert "MB in the cache" in lines[1]


# --- directories -------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A directory with 60 rows to train and 20 to test."""
    directory = tmp_path / "numbers"
    _numbers(60).to_parquet(directory / "train-00000-of-00001.parquet")
    _numbers(20).to_parquet(directory / "test-00000-of-00001.parquet")
    return directory


def test_a_directory_may_have_a_folder_a_configuration_and_a_split(tmp_path: Path) -> None:
    for configuration, count in (("small", 40), ("large", 90)):
        _numbers(count).to_parquet(tmp_path / configuration / "train/0000.parquet")
        _numbers(10).to_parquet(tmp_path / configuration / "validation/0000.parquet")
    loaded = load(_plan(tmp_path, configuration="large"))
    assert len(loaded.train) == 90
    assert loaded.splits == {"train": "train", "test": "validation"}
    assert (loaded.configuration, loaded.revision) == ("large", "")


def test_a_split_is_not_taken_for_one_whose_name_begins_alike(numbers: Path) -> None:
    for name in ("test_unseen", "training", "train_clean"):
        _numbers(5).to_parquet(numbers / f"{name}.parquet")
    _numbers(7).to_parquet(numbers / "train_1.parquet")
    loaded = load(_plan(numbers))
    assert (len(loaded.train), len(loaded.test)) == (67, 20)
    other = load(_plan(numbers, splits={"train": "train_clean", "test": "test_unseen"}))
    assert (len(other.train), len(other.test)) == (5, 5)


def test_a_data_set_needs_no_test_split(numbers: Path) -> None:
    assert load(_plan(numbers, splits={"test": ""})).test is None
    next(numbers.glob("test*")).unlink()
    loaded = load(_plan(numbers))
    assert loaded.test is None
    assert loaded.splits == {"train": "train", "test": ""}


def test_a_part_of_the_only_split_may_be_the_test(numbers: Path) -> None:
    next(numbers.glob("test*")).unlink()
    loaded = load(_plan(numbers, splits={"train": "train[:80%]", "test": "train[80%:]"}))
    assert (len(loaded.train), len(loaded.test)) == (48, 12)
    assert loaded.test["x"][0] == 24


def test_a_directory_that_cannot_be_used_is_refused(numbers: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    _numbers(5).to_parquet(tmp_path / "other/part.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"no parquet")
    (tmp_path / "none").mkdir()
    _numbers(0).to_parquet(tmp_path / "none/train.parquet")
    for plan, said in (
        (_plan(tmp_path / "missing"), "training_dataset: .*missing is no directory that user"),
        (_plan(numbers, configuration="x"), "training_dataset_configuration: .*numbers/x is no"),
        (_plan(numbers, revision="v1"), "training_dataset_revision = v1: training_dataset is a di"),
        (_plan(tmp_path / "empty"), r"there is no train\*\.parquet \(found: no parquet file\)"),
        (_plan(tmp_path / "other"), r"found: part\.parquet\). .* in training_dataset_splits where"),
        (_plan(tmp_path / "broken"), "training_dataset = .*broken cannot be loaded .*[Pp]arquet"),
        (
            _plan(tmp_path / "none"),
            r"training_dataset_splits: .* no data! \(.*none has the splits train\)",
        ),
        (_plan(numbers, splits={"tests": "test"}), "training_dataset_splits has tests. Write {tr"),
        (
            _plan(numbers, splits={"test": "validation"}),
            "training_dataset_splits: .* has no split validation. .* splits .*train.* or an empty",
        ),
    ):
        with pytest.raises(DataError, match=said):
            prepare(plan, tmp_path / "out")


# --- fingerprints ------------------------------------------------------------------------------


def test_a_fingerprint_is_that_of_the_rows_alone(tmp_path: Path) -> None:
    """Not of the files: neither how many there are nor where their row groups end."""
    text = Features({"text": Value("string"), "numbers": datasets.List(Value("int16"))})
    rows: dict[str, Any] = {
        "text": [None if n % 7 == 0 else "x" * (n % 9) for n in range(3000)],
        "numbers": [list(range(n % 4)) for n in range(3000)],
    }
    whole = Dataset.from_dict(rows, text)
    whole.to_parquet(tmp_path / "one/train.parquet", batch_size=700)
    whole.select(range(1111)).to_parquet(tmp_path / "two/train-0.parquet", batch_size=1000)
    whole.select(range(1111, 3000)).to_parquet(tmp_path / "two/train-1.parquet", batch_size=300)
    found = {content_fingerprint(load(_plan(tmp_path / name)).train) for name in ("one", "two")}
    assert found == {content_fingerprint(whole)}
    for changed in (
        whole.select(range(2999)),
        whole.shuffle(seed=1),
        whole.rename_column("text", "words"),
        Dataset.from_dict(rows | {"text": [*rows["text"][:-1], "y"]}, text),
    ):
        assert content_fingerprint(changed) not in found


# --- the command -------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong_in_one_line(numbers: Path, tmp_path: Path) -> None:
    def run(content: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "plan.json").write_text(content)
        command = [sys.executable, "-m", "flowerbed.data", str(tmp_path / "plan.json")]
        return subprocess.run(
            [*command, str(tmp_path / "out")], check=False, capture_output=True, text=True
        )

    good = run(_plan(numbers).model_dump_json())
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[:2] == [f"loading {numbers}", "placing the data of 1 device"]
    assert good.stderr == ""
    wrong = run(_plan(numbers, revision="v1").model_dump_json())
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("ERROR: training_dataset_revision = v1: ")
    assert wrong.stderr.count("\n") == 1
    assert "plan.json is no plan: dataset: Field required; " in run("{}").stderr
