"""Cores and memory that this container may use, and what it has used of them.

Reads cgroup v2 (https://docs.kernel.org/admin-guide/cgroup-v2.html) and v1
(https://docs.kernel.org/admin-guide/cgroup-v1/) as they look from inside a container,
where the container's own cgroup is mounted at the root of the hierarchy.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

CGROUP_ROOT = Path(os.environ.get("FLOWERBED_CGROUP", "/sys/fs/cgroup"))
_WORTH_A_THREAD = 0.15
"""Fraction of a core from which on it pays to have a thread for it."""


@dataclass(frozen=True)
class Quota:
    """What a container may use.

    Attributes:
        cores: CPU cores, fractions allowed; the machine's cores where there is no limit.
        memory: bytes, or None where there is no limit.
    """

    cores: float
    memory: int | None

    @property
    def threads(self) -> int:
        """Threads that use up the quota: with one less a part is idle, one more is throttled."""
        return max(1, math.floor(self.cores + 1 - _WORTH_A_THREAD + 1e-9))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _keyed(text: str | None, key: str) -> int:
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def read_quota(root: Path = CGROUP_ROOT, machine_cores: int | None = None) -> Quota:
    """Read the limits of the cgroup mounted at `root`."""
    machine = machine_cores or len(os.sched_getaffinity(0))
    if cpu_max := _read(root / "cpu.max"):  # v2: "50000 100000" or "max 100000"
        quota, period = cpu_max.split()
        cores = machine if quota == "max" else int(quota) / int(period)
    else:
        quota_us = int(_read(root / "cpu" / "cpu.cfs_quota_us") or -1)
        period_us = int(_read(root / "cpu" / "cpu.cfs_period_us") or 100_000)
        cores = quota_us / period_us if quota_us > 0 else machine
    limit = _read(root / "memory.max") or _read(root / "memory" / "memory.limit_in_bytes")
    # v1 writes "no limit" as the largest multiple of a page below 2^63.
    memory = int(limit) if limit and limit != "max" and int(limit) < 2**62 else None
    return Quota(cores=min(cores, machine), memory=memory)


@dataclass(frozen=True)
class Throttling:
    """What the scheduler has counted since the container was made.

    Attributes:
        periods: periods in which it wanted to run.
        throttled: periods of these in which it had used up its quota.
        seconds: time for which its threads, taken together, were held back.
    """

    periods: int
    throttled: int
    seconds: float

    def since(self, earlier: "Throttling") -> "Throttling":
        """What has been added since an earlier reading."""
        return Throttling(
            self.periods - earlier.periods,
            self.throttled - earlier.throttled,
            self.seconds - earlier.seconds,
        )

    @property
    def share(self) -> float:
        """Throttled periods as a share of all periods."""
        return self.throttled / self.periods if self.periods else 0.0


def read_throttling(root: Path = CGROUP_ROOT) -> Throttling:
    """Read the counters; all 0 where there is no limit."""
    text = _read(root / "cpu.stat") or _read(root / "cpu" / "cpu.stat")
    # v2 counts in microseconds, v1 in nanoseconds, each under a name of its own.
    seconds = _keyed(text, "throttled_usec") / 1e6 + _keyed(text, "throttled_time") / 1e9
    return Throttling(_keyed(text, "nr_periods"), _keyed(text, "nr_throttled"), seconds)


def memory_in_use(root: Path = CGROUP_ROOT) -> int:
    """Bytes of this cgroup that the kernel cannot take back at once: no pages of files."""
    if current := _read(root / "memory.current"):
        stat, prefix = _read(root / "memory.stat"), ""
    else:
        current = _read(root / "memory" / "memory.usage_in_bytes") or "0"
        stat, prefix = _read(root / "memory" / "memory.stat"), "total_"
    files = _keyed(stat, f"{prefix}active_file") + _keyed(stat, f"{prefix}inactive_file")
    return max(0, int(current) - files)


def out_of_memory_kills(root: Path = CGROUP_ROOT) -> int:
    """How many processes of this cgroup the kernel has killed because memory ran out."""
    v2 = _read(root / "memory.events")
    return _keyed(v2 or _read(root / "memory" / "memory.oom_control"), "oom_kill")


if __name__ == "__main__":
    # What the device role compares with the inventory.
    print(json.dumps(asdict(read_quota())))
