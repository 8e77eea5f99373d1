"""The metrics of the app, read from its source: its libraries are not on the control node."""

import ast
from typing import Any

from repository import ROOT

SOURCE = ROOT / "app/flowerbed/metrics.py"
DEVICE_LABELS = ("device", "device_class")


def flowerbed_metrics() -> dict[str, tuple[str, ...]]:
    """Every metric's name, as Prometheus shows it, and its labels."""
    tree = ast.parse(SOURCE.read_text())
    constants: dict[str, Any] = {}
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        match node:
            # The tables of metrics, by their keys.
            case ast.Assign([ast.Name(table)], value) if table.endswith("_METRICS"):
                labels = DEVICE_LABELS if table == "DEVICE_METRICS" else ()
                found |= dict.fromkeys(ast.literal_eval(value), labels)
            case ast.Assign([ast.Name(name)], ast.Tuple() as value) if name.isupper():
                constants[name] = ast.literal_eval(value)
    assert constants["DEVICE_LABELS"] == DEVICE_LABELS
    for node in ast.walk(tree):
        match node:
            # Those made one by one; a counter's name ends with _total.
            case ast.Call(ast.Name(kind), [ast.Constant(str(name)), *_], keywords) if kind in (
                "GaugeMetricFamily",
                "CounterMetricFamily",
            ):
                (told,) = (word.value for word in keywords if word.arg == "labels")
                full = f"{name}_total" if kind == "CounterMetricFamily" else name
                found[full] = tuple(_labels(told, constants))
    return found


def _labels(told: ast.expr, constants: dict[str, Any]) -> list[str]:
    """The labels of an expression of names and constants."""
    match told:
        case ast.Tuple(elements):
            return [label for element in elements for label in _labels(element, constants)]
        case ast.Starred(value):
            return _labels(value, constants)
        case ast.Name(name):
            return list(constants[name])
        case ast.Constant(str(label)):
            return [label]
    raise AssertionError(f"{ast.unparse(told)} is no list of labels")
