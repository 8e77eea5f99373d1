"""What a device computes with: recorded with a run, so that its numbers can be understood."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from flowerbed.device.quota import read_quota

_LIBRARIES = {
    "flwr": ("flwr",),
    "numpy": ("numpy",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "torch": ("torch",),
    "jax": ("jax",),
    "scikit-learn": ("scikit-learn",),
}
"""Names of distributions by library."""
_SWITCHES = ("KERAS_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHONHASHSEED", "TF_", "XLA_")


def _processor() -> str:
    """The processor's name, or the architecture where the kernel tells no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    parts = [line.partition(":") for line in reversed(lines)]
    names = {name.strip(): value.strip() for name, _, value in parts}
    return names.get("model name") or names.get("Model") or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for library, distributions in _LIBRARIES.items():
        for distribution in distributions:
            try:
                found[library] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    return found


def describe_environment() -> dict[str, Any]:
    """Processor, limits, versions of the libraries that are there, and switches that they read."""
    quota = read_quota()
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": quota.cores,
        "threads": quota.threads,
        "memory": quota.memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": _versions(),
        "switches": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)},
    }
