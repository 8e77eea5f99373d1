"""The memory planner, held to real devices: what it asks for is enough, and not much too much."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import pytest
from repository import ROOT

BATCH = 48
"""Not in the planner's table."""
LITTLE = 0.75


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which has devices without a lab."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "plugins/filter"))
    return importlib.import_module("memory")


def test_a_device_lives_with_what_is_planned_and_dies_of_less(benchmark: Any) -> None:
    plan = importlib.import_module("memory_plan")
    setting = benchmark.Setting("mobilenet", "small-images", 0.25, BATCH)
    assert setting not in benchmark.IN_TABLE
    need = plan.need_of(plan.app_of({}))
    planned = plan.needed(need, BATCH)
    limits = [str(planned), str(int(planned * LITTLE))]
    with (
        benchmark.devices_without_a_lab(docker.from_env()) as devices,
        ThreadPoolExecutor(len(limits)) as pool,
    ):
        enough, little = pool.map(lambda limit: devices.run(setting, limit), limits)
    assert enough["died"] == ""
    assert enough["peak"] <= planned
    assert little["died"] == "out_of_memory"
