"""The file by which the control node knows strategies and partitioners agrees with the code."""

import json
from pathlib import Path

import flowerbed
from flowerbed.parameters import table
from flowerbed.strategies import PRIVACY, STRATEGIES


def test_the_file_is_what_the_code_says() -> None:
    """To write it anew: python -m flowerbed.parameters > runtime/flowerbed/parameters.json."""
    file = Path(flowerbed.__file__).with_name("parameters.json")
    assert json.loads(file.read_text()) == table()


def test_what_the_table_says() -> None:
    found = table()
    assert set(found["strategies"]) == set(STRATEGIES) | set(PRIVACY)
    assert found["partitioners"]["dirichlet"]["alpha"] == {"needed": True}
    assert "partition_by" not in found["partitioners"]["dirichlet"]  # the label's column
    assert found["partitioners"]["natural_id"] == {"partition_by": {"needed": True}}
    assert found["strategies"]["qfedavg"]["client_learning_rate"] == {
        "type": "float",
        "above": 0,
        "needed": True,
    }
    assert "min_available_nodes" not in found["strategies"]["fedavg"]
