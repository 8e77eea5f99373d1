"""Limits as cgroup v1 and v2 show them; the files are as kernels write them."""

from pathlib import Path

import pytest

from flowerbed.device.quota import (
    Quota,
    Throttling,
    memory_in_use,
    out_of_memory_kills,
    read_quota,
    read_throttling,
)


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = {"cpu.max": "50000 100000", "memory.max": "1073741824"}
V1 = {
    "cpu/cpu.cfs_quota_us": "50000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "1073741824",
}
V2_FREE = {"cpu.max": "max 100000", "memory.max": "max"}
V1_FREE = {
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "9223372036854771712",
}


@pytest.mark.parametrize("files", [V1, V2])
def test_limits_are_read(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_quota(_write(tmp_path, files), machine_cores=4) == Quota(0.5, 2**30)


@pytest.mark.parametrize("files", [V1_FREE, V2_FREE, {}])
def test_no_limit_is_the_whole_machine(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_quota(_write(tmp_path, files), machine_cores=4) == Quota(4, None)


def test_a_quota_above_the_machine_is_the_machine(tmp_path: Path) -> None:
    root = _write(tmp_path, {"cpu.max": "800000 100000", "memory.max": "max"})
    assert read_quota(root, machine_cores=4).cores == 4


@pytest.mark.parametrize(
    ("cores", "threads"),
    [(0.1, 1), (0.99, 1), (1.0, 1), (1.14, 1), (1.15, 2), (1.37, 2), (2.0, 2), (2.1, 2), (3.9, 4)],
)
def test_threads_use_up_the_quota(cores: float, threads: int) -> None:
    assert Quota(cores, None).threads == threads


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "cpu.stat",
            "usage_usec 9000000\nnr_periods 200\nnr_throttled 150\nthrottled_usec 12500000",
        ),
        ("cpu/cpu.stat", "nr_periods 200\nnr_throttled 150\nthrottled_time 12500000000"),
    ],
)
def test_throttling_is_counted(tmp_path: Path, name: str, text: str) -> None:
    now = read_throttling(_write(tmp_path, {name: text}))
    assert now == Throttling(200, 150, 12.5)
    before = Throttling(100, 100, 10.0)
    assert now.since(before) == Throttling(100, 50, 2.5)
    assert now.since(before).share == 0.5
    assert read_throttling(tmp_path / "nothing") == Throttling(0, 0, 0.0)
    assert now.since(now).share == 0.0


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.current": "1000",
            "memory.stat": "anon 500\nfile 300\ninactive_file 200\nactive_file 50",
        },
        {
            "memory/memory.usage_in_bytes": "1000",
            "memory/memory.stat": "active_file 9\ntotal_inactive_file 200\ntotal_active_file 50",
        },
    ],
)
def test_memory_in_use_is_without_files(tmp_path: Path, files: dict[str, str]) -> None:
    assert memory_in_use(_write(tmp_path, files)) == 750
    assert memory_in_use(tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2"),
        ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2"),
    ],
)
def test_out_of_memory_kills_are_counted(tmp_path: Path, name: str, text: str) -> None:
    assert out_of_memory_kills(_write(tmp_path, {name: text})) == 2
    assert out_of_memory_kills(tmp_path / "nothing") == 0
