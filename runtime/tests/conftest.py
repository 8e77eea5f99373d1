"""Small real data: what is tested is tested on it, in the image as it is shipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def plan() -> dict[str, Any]:
    """A plan over scikit-learn's digits for two devices."""
    return {
        "dataset": "digits",
        "examples": 400,
        "partitions": 2,
        "seed": 7,
        "test": True,
        "devices": [
            {"device": "phone", "partition": 0, "fraction": 1.0},
            {"device": "pi", "partition": 1, "fraction": 0.5},
        ],
    }


@pytest.fixture(scope="session")
def shards(plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `plan` on disk."""
    from flowerbed.data.place import prepare
    from flowerbed.data.plan import Plan

    output = tmp_path_factory.mktemp("shards")
    prepare(Plan.model_validate(plan), output)
    return output


@pytest.fixture
def device_settings() -> dict[str, Any]:
    """The configuration that a ClientApp hands over, for a small device."""
    return {
        "device": "phone",
        "device-class": "budget_phone",
        "machine": "local",
        "batch-size": 16,
    }


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same each time."""
    return np.random.default_rng(3)
