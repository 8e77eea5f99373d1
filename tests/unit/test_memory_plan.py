"""The memory planner: its arithmetic, what `auto` makes of a limit, and where its table is from."""

import importlib
import itertools
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, read_yaml

plan = load(ROOT / "plugins/filter/memory_plan.py")
MEBIBYTE = 2**20
TABLE = """\
model,recipe,alpha,fixed_mib,example_mib
linear,,,300,0.1
mobilenet,small-images,0.5,600,2
mobilenet,small-images,0.25,500,1
"""
NARROW = plan.Need(500, 1)


def write_app(directory: Path, table: str = "", config: str = "") -> Path:
    """A directory with what the planner reads of an app."""
    directory.mkdir()
    (directory / "pyproject.toml").write_text(f"[tool.flwr.app.config]\n{config}\n")
    if table:
        (directory / plan.TABLE).write_text(table)
    return directory


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the planner warns of."""
    texts: list[str] = []
    monkeypatch.setattr(plan.display, "warning", texts.append)
    return texts


@pytest.fixture
def default_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The default app with round numbers in the place of measured ones."""
    directory = tmp_path / "app"
    directory.mkdir()
    shutil.copy(ROOT / "app/pyproject.toml", directory)
    (directory / plan.TABLE).write_text(TABLE)
    monkeypatch.setattr(plan, "DEFAULT_APP", directory)
    monkeypatch.setattr(plan, "MARGIN", 0.1)
    monkeypatch.setattr(plan, "SPARE", 10)
    return directory


def hosts(**device: Any) -> dict[str, dict[str, Any]]:
    """A lab of one device."""
    return {
        "m": {"training_seed": 7},
        "d": {f"device_{key}": value for key, value in device.items()},
    }


def need(**variables: Any) -> Any:
    """What the variables of a coordinator need."""
    app = plan.app_of(variables)
    assert app
    return plan.need_of(app)


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "fixed", "example"),
    [(0.25, 500, 1), (0.5, 600, 2), (0.375, 550, 1.5), (0.1, 500, 1), (1.0, 1000, 4)],
)
def test_a_width_is_taken_from_those_of_the_table(
    default_app: Path, alpha: float, fixed: float, example: float
) -> None:
    assert need(training_model_alpha=alpha) == pytest.approx((fixed, example))
    assert need(training_config={"alpha": alpha}) == pytest.approx((fixed, example))


def test_an_empty_cell_stands_for_any_value(default_app: Path) -> None:
    found = need(training_model="linear", training_model_alpha=2.0, training_recipe="original")
    assert found == (300, 0.1)


@pytest.mark.parametrize("change", [{"recipe": "original"}, {"model": "resnet"}])
def test_what_is_in_no_row_is_not_guessed(default_app: Path, change: dict[str, Any]) -> None:
    assert need(**{f"training_{key}": value for key, value in change.items()}) is None


def test_a_table_without_keys_is_for_every_configuration(tmp_path: Path) -> None:
    app = write_app(tmp_path / "own", "fixed_mib,example_mib\n250,0.5\n", "rounds = 3")
    assert need(training_app=str(app), training_config={"rounds": 9}) == (250, 0.5)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, (200, 0)),
        ({"wide": True}, (300, 0)),
        ({"wide": True, "layers": 4}, (500, 0)),
        ({"wide": True, "layers": 8}, (1300, 0)),
        ({"kind": "other"}, None),
    ],
)
def test_truth_and_numbers_are_read_from_a_table(
    tmp_path: Path, config: dict[str, Any], found: tuple[float, float] | None
) -> None:
    table = (
        "kind,wide,layers,fixed_mib,example_mib\n"
        "cnn,false,2,200,0\ncnn,true,2,300,0\ncnn,true,4,500,0\n"
    )
    app = write_app(tmp_path / "own", table, 'kind = "cnn"\nwide = false\nlayers = 2')
    assert need(training_app=str(app), training_config=config) == found


@pytest.mark.parametrize(
    ("peaks", "fixed", "example"),
    [
        ({64: 560.0, 8: 550.0, 256: 760.0}, 541.667, 200 / 192),
        ({8: 500.0, 32: 530.0, 128: 560.0}, 514, 0.5),
        ({8: 400.0, 32: 403.0, 128: 402.0}, 403, 0),
        ({8: 400.0, 32: 300.0, 128: 200.0}, 400, 0),
        ({8: 321.5}, 321.5, 0),
    ],
)
def test_no_measured_peak_is_above_the_line(
    peaks: dict[int, float], fixed: float, example: float
) -> None:
    line = plan.fit(peaks)
    assert line == pytest.approx((fixed, example), abs=0.001)
    assert all(line.fixed + line.example * batch >= peak - 1e-9 for batch, peak in peaks.items())


def test_a_measurement_becomes_the_table_of_an_app(tmp_path: Path) -> None:
    app = write_app(tmp_path / "own", "", "hidden = 64\nmodel = 'cnn'")
    text = plan.with_measurement(str(app), {"hidden": 64}, {"8": 209.2, "128": 269.0}, [])
    assert text == "fixed_mib,example_mib\n206,0.498\n"
    (app / plan.TABLE).write_text(text)
    assert plan.keys_of(app) == []
    text = plan.with_measurement(str(app), {"hidden": 64}, {8: 211, 128: 211}, [])
    assert text == "fixed_mib,example_mib\n211,0.000\n"


def test_a_measurement_replaces_the_row_of_the_same_configuration(tmp_path: Path) -> None:
    app = write_app(tmp_path / "own")
    keys = ["model", "hidden"]

    def measured(peak: float, keys: list[str], **config: Any) -> list[str]:
        text = plan.with_measurement(str(app), config, {8: peak}, keys)
        (app / plan.TABLE).write_text(text)
        return list(text.splitlines()[1:])

    assert measured(100, keys, model="cnn", hidden=64) == ["cnn,64,100,0.000"]
    assert len(measured(150, keys, model="cnn", hidden=128)) == 2
    rows = ["cnn,128,150,0.000", "cnn,64,120,0.000"]
    assert measured(120, keys, model="cnn", hidden=64) == rows
    assert measured(130, ["model"], model="cnn", hidden=64) == ["cnn,130,0.000"]


def test_a_measurement_is_told(tmp_path: Path) -> None:
    app = write_app(tmp_path / "own", "fixed_mib,example_mib\n206,0.498\n")
    first, second = plan.measured_need(str(app), {}, {"8": 209.2, "128": 269.0})
    assert first == "own takes 209 MiB with batches of 8, 269 MiB with batches of 128."
    assert "device_memory: 270m for batches of 32" in second
    (app / plan.TABLE).write_text("fixed_mib,example_mib\n206,0.000\n")
    first, second = plan.measured_need(str(app), {}, {"8": 205.0, "128": 206.0})
    assert first == "own takes 206 MiB, whatever the batch size."
    assert "device_memory: 250m." in second


# --- arithmetic ----------------------------------------------------------------------------------


def test_a_limit_has_margin_and_spare(default_app: Path) -> None:
    assert plan.needed(NARROW, 100) == 670 * MEBIBYTE


@pytest.mark.parametrize("batch", [1, 2, 31, 100, 511])
def test_the_largest_batch_is_the_last_that_fits(default_app: Path, batch: int) -> None:
    memory = plan.needed(NARROW, batch)
    assert plan.largest_batch(NARROW, memory + 1) == batch
    assert plan.largest_batch(NARROW, memory - MEBIBYTE) == batch - 1


def test_no_batch_fits_into_nothing(default_app: Path) -> None:
    assert plan.largest_batch(NARROW, MEBIBYTE) == 0


def test_there_is_no_largest_batch_where_its_size_does_not_matter() -> None:
    assert plan.largest_batch(plan.Need(500, 0), 2**30) is None


# --- auto ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "batch"),
    [("600m", 32), ("631m", 64), ("630m", 32), ("3g", 512), ("560m", 8), ("100m", 8), (None, 32)],
)
def test_auto_is_the_largest_power_of_two_that_fits(
    default_app: Path, memory: str | None, batch: int
) -> None:
    device = {"batch_size": "auto"} | ({"memory": memory} if memory else {})
    assert plan.batch_of("d", hosts(**device), "m") == batch


def test_a_number_stays_as_it_is(default_app: Path) -> None:
    assert plan.batch_of("d", hosts(batch_size=33, memory="1g"), "m") == 33
    assert plan.batch_of("d", hosts(batch_size="33"), "m") == 33
    assert plan.batch_of("d", hosts(memory="1g"), "m") == 32


def test_auto_goes_by_the_app_of_the_coordinator(default_app: Path, tmp_path: Path) -> None:
    lab = hosts(batch_size="auto", memory="600m")
    lab["m"] = {"training_model": "linear"}
    assert plan.batch_of("d", lab, "m") == 512
    app = write_app(tmp_path / "own", "fixed_mib,example_mib\n500,0.5\n")
    lab["m"] = {"training_app": str(app)}
    assert plan.batch_of("d", lab, "m") == 64


@pytest.mark.parametrize("table", ["", "fixed_mib,example_mib\n500,0.000\n"])
def test_auto_is_the_default_where_memory_says_nothing_about_it(tmp_path: Path, table: str) -> None:
    lab = hosts(batch_size="auto", data_fraction="auto", memory="600m")
    lab["m"] = {"training_app": str(write_app(tmp_path / "own", table))}
    assert plan.batch_of("d", lab, "m") == plan.DEFAULT_BATCH
    (share,) = plan.shares([{"device": "d"}], lab, "m")
    assert share["fraction"] == 1.0
    assert (share["bytes"] == 0) == (table == "")


@pytest.mark.parametrize(
    ("device", "share"),
    [
        ({}, {"fraction": 1.0, "bytes": 0}),
        ({"data_fraction": 0.3, "memory": "1g"}, {"fraction": 0.3, "bytes": 0}),
        ({"data_fraction": "auto"}, {"fraction": 1.0, "bytes": 0}),
        # 600 MiB without the 585.2 of a batch of 32; the 10 that files keep in any case are theirs.
        (
            {"data_fraction": "auto", "memory": "600m"},
            {"fraction": 1.0, "bytes": int(14.8 * MEBIBYTE) + 1},
        ),
    ],
)
def test_auto_holds_the_data_that_stay_in_memory(
    default_app: Path, device: dict[str, Any], share: dict[str, Any]
) -> None:
    (found,) = plan.shares([{"device": "d", "partition": 3}], hosts(**device), "m")
    assert found.pop("bytes") == pytest.approx(share.pop("bytes"), abs=1)
    assert found == {"device": "d", "partition": 3} | share


# --- refusals ------------------------------------------------------------------------------------


def refused(coordinator: dict[str, Any] | None = None, **device: Any) -> str | None:
    """What is said of a device, if anything."""
    problems = plan.memory_problems({"d": hosts(**device)["d"]}, coordinator or {})
    return problems[0][1] if problems else None


def test_a_device_that_fits_is_no_problem(default_app: Path, warnings: list[str]) -> None:
    assert refused() is None
    assert refused(batch_size=10**6) is None
    assert refused(memory="631m", batch_size=64) is None
    assert refused(memory="100g", batch_size="auto") is None
    assert warnings == []


def test_a_refusal_says_what_fits(default_app: Path) -> None:
    assert refused(memory="600m", batch_size=64) == (
        "device_memory is '600m', less than the 640m that app (model mobilenet, recipe "
        "small-images, alpha 0.25) takes with device_batch_size 64: write 640m or more, or "
        "device_batch_size of 36 or less"
    )
    assert refused(memory="500m", batch_size="auto") == (
        "device_memory is '500m', less than the 570m that app (model mobilenet, recipe "
        "small-images, alpha 0.25) takes with device_batch_size auto, which is 8 or more: write "
        "570m or more, or train a smaller model"
    )


def test_a_refusal_is_by_the_table_of_the_app(tmp_path: Path) -> None:
    coordinator = {"training_app": str(write_app(tmp_path / "own", "fixed_mib,example_mib\n300,0"))}
    assert refused(coordinator, memory="400m", batch_size=4096) is None
    text = "device_memory is '300m', less than the 350m that own takes: write 350m or more"
    assert refused(coordinator, memory="300m") == text
    assert refused(coordinator, memory="300m", batch_size="auto") == text


@pytest.mark.parametrize(
    "device",
    [{"memory": "2 lots"}, {"memory": 7}, {"memory": "1m", "batch_size": [1]}, {"memory": None}],
)
def test_wrong_values_are_told_of_elsewhere(default_app: Path, device: dict[str, Any]) -> None:
    assert refused(**device) is None


def test_an_app_that_was_not_measured_is_warned_of(tmp_path: Path, warnings: list[str]) -> None:
    app = write_app(tmp_path / "own")
    coordinator = {"training_app": str(app)}
    assert refused(coordinator) is None
    assert warnings == [], "there is no limit that could be too small"
    assert refused(coordinator, memory="100m") is None
    assert len(warnings) == 1
    assert "how much memory own takes" in warnings[0]
    assert f"run 'make measure APP={app}'" in warnings[0]


def test_a_network_that_was_not_measured_is_warned_of(
    default_app: Path, warnings: list[str]
) -> None:
    assert refused({"training_recipe": "original"}, memory="100m") is None
    assert "app (model mobilenet, recipe original, alpha 0.25) takes" in warnings[0]
    assert warnings[0].endswith("run 'make measure'")


def test_an_app_that_cannot_be_read_is_told_of_elsewhere(
    tmp_path: Path, warnings: list[str]
) -> None:
    assert refused({"training_app": str(tmp_path / "nothing")}, memory="100m") is None
    assert warnings == []
    assert plan.batch_of("d", hosts(batch_size="auto", memory="1g"), "m")


def test_a_run_is_held_to_what_is_deployed(default_app: Path) -> None:
    labels = {"flowerbed.device": "d", "flowerbed.memory": "600m", "flowerbed.batch_size": "32"}
    deployed = plan.as_deployed([labels, {"flowerbed.device": "e"}])
    assert plan.memory_problems(deployed, {}) == []
    ((device, text),) = plan.memory_problems(deployed, {"training_model_alpha": "0.5"})
    assert device == "d"
    assert "alpha 0.5) takes with device_batch_size 32" in text


# --- the default app's table ---------------------------------------------------------------------


def _of_playbooks(role: str) -> dict[str, dict[str, Any]]:
    told = read_yaml(ROOT / "roles/preflight/vars/main.yml")["__preflight_of_playbooks"][role]
    options: dict[str, dict[str, Any]] = told
    return options


def test_the_table_has_every_network_that_can_be_trained() -> None:
    options = _of_playbooks("training")
    rules = read_yaml(ROOT / "roles/preflight/vars/main.yml")["__preflight_rules"]
    for name in options["training_model"]["choices"]:
        for recipe in options["training_recipe"]["choices"]:
            for alpha in (0.01, 0.3, rules["training_model_alpha"]["maximum"]):
                found = need(
                    training_model=name, training_model_alpha=alpha, training_recipe=recipe
                )
                assert found.fixed > 100
                assert found.example > 0 or name == "linear"


def test_defaults_are_those_of_the_roles_and_of_the_default_app() -> None:
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    found = plan.app_of({})
    assert found
    assert (found.directory, found.config) == (ROOT / "app", app["config"])
    playbooks = _of_playbooks("device")
    device = read_yaml(ROOT / "roles/device/defaults/main.yml")
    assert device["device_batch"] == plan.DEFAULT_BATCH
    assert playbooks["device_batch_size"]["default"] == plan.DEFAULT_BATCH
    assert device["device_share"] == plan.DEFAULT_FRACTION
    assert playbooks["device_data_fraction"]["default"] == plan.DEFAULT_FRACTION


def test_a_wider_network_and_a_larger_batch_take_more() -> None:
    for name in ("mobilenet", "mobilenetv2"):
        for recipe in ("original", "small-images"):
            needs = [
                plan.needed(
                    need(
                        training_model=name,
                        training_model_alpha=alpha / 20,
                        training_recipe=recipe,
                    ),
                    64,
                )
                for alpha in range(2, 41)
            ]
            # Measured, so not to the byte.
            assert all(a < b * 1.03 for a, b in itertools.pairwise(needs)), (name, recipe)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command that measures."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "plugins/filter"))
    return importlib.import_module("memory")


def test_the_table_is_fitted_to_the_figures(benchmark: Any) -> None:
    measure = importlib.import_module("measure")
    wanted = benchmark.fitted(measure.results("memory"))
    assert len(wanted) == len(benchmark.NETWORKS)
    assert (ROOT / "app" / plan.TABLE).read_text() == plan.table_text(wanted)


def test_what_was_held_out_was_not_killed_and_is_in_no_row_of_the_table(benchmark: Any) -> None:
    measure = importlib.import_module("measure")
    held_out = [row for row in measure.results("memory") if row["limit_mib"]]
    assert len(held_out) == len(benchmark.HELD_OUT)
    assert not set(benchmark.HELD_OUT) & set(benchmark.IN_TABLE)
    for row in held_out:
        assert not row["died"], row
        assert int(row["peak_mib"]) <= int(row["limit_mib"])
