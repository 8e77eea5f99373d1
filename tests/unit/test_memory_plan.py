"""The memory planner: its arithmetic, what `auto` makes of a limit, and where its table is from."""

import importlib
import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, read_yaml

PLUGIN = ROOT / "playbooks/filter_plugins/memory_plan.py"
plan = load(PLUGIN)
MEBIBYTE = 2**20
NARROW = plan.Model("mobilenet", 0.25, "small-images")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Round numbers in the place of measured ones."""
    path = tmp_path / "table.csv"
    path.write_text(
        "model,recipe,alpha,fixed_mib,example_mib\n"
        "linear,,1.0,300,0.1\n"
        "mobilenet,small-images,0.5,600,2\n"
        "mobilenet,small-images,0.25,500,1\n"
    )
    monkeypatch.setattr(plan, "_table", plan.read_table(path))
    monkeypatch.setattr(plan, "MARGIN", 0.1)
    monkeypatch.setattr(plan, "SPARE", 10)


def hosts(**device: Any) -> dict[str, dict[str, Any]]:
    """A lab of one device."""
    return {
        "m": {"training_seed": 7},
        "d": {f"device_{key}": value for key, value in device.items()},
    }


# --- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "fixed", "example"),
    [(0.25, 500, 1), (0.5, 600, 2), (0.375, 550, 1.5), (0.1, 500, 1), (1.0, 1000, 4)],
)
def test_a_width_is_taken_from_those_of_the_table(
    table: None, alpha: float, fixed: float, example: float
) -> None:
    assert plan.need_of(NARROW._replace(alpha=alpha)) == pytest.approx((fixed, example))


def test_linear_has_no_width_and_no_recipe(table: None) -> None:
    assert plan.need_of(plan.Model("linear", 2.0, "original")) == (300, 0.1)


@pytest.mark.parametrize("change", [{"recipe": "original"}, {"name": "resnet"}])
def test_what_is_in_no_row_is_not_guessed(table: None, change: dict[str, Any]) -> None:
    with pytest.raises(plan.AnsibleFilterError, match="make bench-memory"):
        plan.need_of(NARROW._replace(**change))


def test_a_limit_has_margin_and_spare(table: None) -> None:
    assert plan.needed(NARROW, 100) == 670 * MEBIBYTE


@pytest.mark.parametrize("batch", [1, 2, 31, 100, 511])
def test_the_largest_batch_is_the_last_that_fits(table: None, batch: int) -> None:
    memory = plan.needed(NARROW, batch)
    assert plan.largest_batch(NARROW, memory + 1) == batch
    assert plan.largest_batch(NARROW, memory - MEBIBYTE) == batch - 1


def test_no_batch_fits_into_nothing(table: None) -> None:
    assert plan.largest_batch(NARROW, MEBIBYTE) == 0


# --- auto ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "batch"),
    [("600m", 32), ("631m", 64), ("630m", 32), ("3g", 512), ("560m", 8), ("100m", 8), (None, 32)],
)
def test_auto_is_the_largest_power_of_two_that_fits(
    table: None, memory: str | None, batch: int
) -> None:
    device = {"batch_size": "auto"} | ({"memory": memory} if memory else {})
    assert plan.batch_of("d", hosts(**device), "m") == batch


def test_a_number_stays_as_it_is(table: None) -> None:
    assert plan.batch_of("d", hosts(batch_size=33, memory="1g"), "m") == 33
    assert plan.batch_of("d", hosts(batch_size="33"), "m") == 33
    assert plan.batch_of("d", hosts(memory="1g"), "m") == 32


def test_auto_goes_by_the_network_of_the_coordinator(table: None) -> None:
    lab = hosts(batch_size="auto", memory="600m")
    lab["m"] = {"training_model": "linear"}
    assert plan.batch_of("d", lab, "m") == 512


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
def test_auto_holds_the_images_that_stay_in_memory(
    table: None, device: dict[str, Any], share: dict[str, Any]
) -> None:
    (found,) = plan.shares([{"device": "d", "partition": 3}], hosts(**device), "m")
    assert found.pop("bytes") == pytest.approx(share.pop("bytes"), abs=1)
    assert found == {"device": "d", "partition": 3} | share


# --- refusals ------------------------------------------------------------------------------------


def refused(**device: Any) -> str | None:
    """What is said of a device, if anything."""
    problems = plan.memory_problems({"d": hosts(**device)["d"]}, {})
    return problems[0][1] if problems else None


def test_a_device_that_fits_is_no_problem(table: None) -> None:
    assert refused() is None
    assert refused(batch_size=10**6) is None
    assert refused(memory="631m", batch_size=64) is None
    assert refused(memory="100g", batch_size="auto") is None


def test_a_refusal_says_what_fits(table: None) -> None:
    assert refused(memory="600m", batch_size=64) == (
        "device_memory is '600m', less than the 640m that mobilenet 0.25 (small-images) takes with "
        "device_batch_size 64: write 640m or more, or device_batch_size of 36 or less"
    )
    assert refused(memory="500m", batch_size="auto") == (
        "device_memory is '500m', less than the 570m that mobilenet 0.25 (small-images) takes with "
        "device_batch_size auto, which is 8 or more: write 570m or more, or train a smaller "
        "training_model"
    )


@pytest.mark.parametrize(
    "device",
    [{"memory": "2 lots"}, {"memory": 7}, {"memory": "1m", "batch_size": [1]}, {"memory": None}],
)
def test_wrong_values_are_told_of_elsewhere(table: None, device: dict[str, Any]) -> None:
    assert refused(**device) is None


def test_a_run_is_held_to_what_is_deployed(table: None) -> None:
    labels = {"flowerbed.device": "d", "flowerbed.memory": "600m", "flowerbed.batch_size": "32"}
    deployed = plan.as_deployed([labels, {"flowerbed.device": "e"}])
    assert plan.memory_problems(deployed, {}) == []
    ((device, text),) = plan.memory_problems(deployed, {"training_model_alpha": "0.5"})
    assert device == "d"
    assert "mobilenet 0.5 (small-images) takes with device_batch_size 32" in text


# --- the table -----------------------------------------------------------------------------------


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
                need = plan.need_of(plan.Model(name, alpha, recipe))
                assert need.fixed > 100
                assert need.example > 0


def test_defaults_are_those_of_the_roles_and_of_the_default_app() -> None:
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    told = app["config"]
    assert plan.model_of({}) == (told["model"], told["alpha"], told["recipe"])
    playbooks = _of_playbooks("device")
    device = read_yaml(ROOT / "roles/device/defaults/main.yml")
    assert device["device_batch"] == plan.DEFAULT_BATCH
    assert playbooks["device_batch_size"]["default"] == plan.DEFAULT_BATCH
    assert device["device_share"] == plan.DEFAULT_FRACTION
    assert playbooks["device_data_fraction"]["default"] == plan.DEFAULT_FRACTION


def test_the_table_is_not_for_another_app() -> None:
    devices = {"d": {"device_memory": "100m"}}
    assert plan.memory_problems(devices, {})
    assert plan.memory_problems(devices, {"training_app": "my-app"}) == []


def test_a_wider_network_and_a_larger_batch_take_more() -> None:
    for name in ("mobilenet", "mobilenetv2"):
        for recipe in ("original", "small-images"):
            widths = [plan.Model(name, alpha / 20, recipe) for alpha in range(2, 41)]
            needs = [plan.needed(model, 64) for model in widths]
            # Measured, so not to the byte.
            assert all(a < b * 1.03 for a, b in itertools.pairwise(needs)), (name, recipe)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command that measures."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("memory")


def test_the_table_is_fitted_to_the_figures(benchmark: Any) -> None:
    measure = importlib.import_module("measure")
    wanted = [
        {key: str(value) for key, value in row.items()}
        for row in benchmark.fitted(measure.results("memory"))
    ]
    networks = {(each.model, each.recipe, each.alpha) for each in benchmark.IN_TABLE}
    assert len(wanted) == len(networks)
    assert measure.read_rows(PLUGIN.with_suffix(".csv")) == wanted


def test_no_measured_point_is_above_its_line(benchmark: Any) -> None:
    fixed, example = benchmark.fit([(64, 560.0), (8, 550.0), (256, 760.0)])
    assert example == pytest.approx(200 / 192)
    for batch, peak in ((8, 550), (64, 560), (256, 760)):
        assert fixed + example * batch >= peak - 1e-9


def test_what_was_held_out_was_not_killed_and_is_in_no_row_of_the_table(benchmark: Any) -> None:
    measure = importlib.import_module("measure")
    held_out = [row for row in measure.results("memory") if row["limit_mib"]]
    assert len(held_out) == len(benchmark.HELD_OUT)
    assert not set(benchmark.HELD_OUT) & set(benchmark.IN_TABLE)
    for row in held_out:
        assert not row["died"], row
        assert int(row["peak_mib"]) <= int(row["limit_mib"])
