"""Fixtures, and the environment of the tests."""

import os
import sys
import tempfile
from pathlib import Path

# The data-set libraries read these when they are imported.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mobilenet-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FLOWERBED_DATA", None)
sys.path.insert(0, str(Path(__file__).parent))  # examples.py, in every import mode of pytest

import numpy as np
import pytest
from examples import CLASSES, make_images
from flwr.supercore.task_identity import TaskIdentity
from mobilenet.data import Data

TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # messages carry it


@pytest.fixture(scope="session")
def data() -> Data:
    """The images of one device: 160 for training, 40 for evaluation."""
    return Data(make_images(160, seed=1), make_images(40, seed=2), CLASSES)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same each time."""
    return np.random.default_rng(3)
