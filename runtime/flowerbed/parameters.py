"""What can be given to strategies and partitioners, as data for programs that cannot import them.

    python -m flowerbed.parameters > runtime/flowerbed/parameters.json

The control node reads the file before each run and refuses what cannot work; a test compares it
with the code.
"""

import inspect
import json
from typing import Any, get_args

from flowerbed.data.deal import settable_of
from flowerbed.data.place import FEWEST_EXAMPLES
from flowerbed.data.plan import Plan
from flowerbed.strategies import PRIVACY, RANGES, STRATEGIES, parameters_of, type_of


def _strategy(name: str) -> dict[str, Any]:
    found = {}
    for key, parameter in parameters_of(name).items():
        kind, optional = type_of(parameter.annotation)
        needed = parameter.default is inspect.Parameter.empty
        found[key] = {"type": kind.__name__, **RANGES.get(key, {})}
        found[key] |= {"needed": True} if needed else {}
        found[key] |= {"optional": True} if optional else {}
    return found


def _partitioner(name: str) -> dict[str, Any]:
    return {
        key: {"needed": True} if parameter.default is inspect.Parameter.empty else {}
        for key, parameter in settable_of(name).items()
    }


def table() -> dict[str, Any]:
    """Return all strategies and partitioners with their parameters."""
    return {
        "strategies": {name: _strategy(name) for name in sorted(STRATEGIES | PRIVACY)},
        "partitioners": {
            name: _partitioner(name)
            for name in sorted(get_args(Plan.model_fields["partitioner"].annotation))
        },
        "fewest_examples": FEWEST_EXAMPLES,
    }


if __name__ == "__main__":
    print(json.dumps(table(), indent=2))
