"""What a process computes with: recorded with a run, so that its numbers can be understood."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
_LIBRARIES = {
    "flwr": ("flwr",),
    "flwr-datasets": ("flwr-datasets",),
    "numpy": ("numpy",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "torch": ("torch",),
    "jax": ("jax",),
    "scikit-learn": ("scikit-learn",),
}
"""Names of distributions by library."""
_VECTORS = re.compile(r"(sse4|avx|fma|f16c|amx|neon|asimd|sve|i8mm|bf16)\w*")
"""Extensions by which numerical libraries choose their kernels, as Linux names them."""
_SWITCHES = ("KERAS_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHONHASHSEED", "TF_", "XLA_")


def _processor() -> dict[str, Any]:
    """The processor's name (the architecture where the kernel tells none) and its extensions."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    parts = [line.partition(":") for line in reversed(lines)]
    told = {name.strip(): value.strip() for name, _, value in parts}
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {
        "processor": told.get("model name") or told.get("Model") or platform.machine(),
        "vector_extensions": sorted(flag for flag in flags if _VECTORS.fullmatch(flag)),
    }


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


def describe_environment(cores: float, threads: int, memory: int | None = None) -> dict[str, Any]:
    """Processor, limits, versions of the libraries that are there, and switches that they read.

    Args:
        cores: that may be used.
        threads: that libraries are told to use.
        memory: bytes; None: no limit.
    """
    return _processor() | {
        "architecture": platform.machine(),
        "cores": cores,
        "threads": threads,
        "memory": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": _versions(),
        "switches": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)},
    }
