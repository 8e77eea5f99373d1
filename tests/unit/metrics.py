"""The metrics of the lab, read from their source: its libraries are not on the control node."""

import ast
from typing import Any

from repository import ROOT

SOURCE = ROOT / "runtime/flowerbed/server/metrics.py"
RESULTS = ROOT / "runtime/flowerbed/results.py"
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
                (expression,) = (word.value for word in keywords if word.arg == "labels")
                full = f"{name}_total" if kind == "CounterMetricFamily" else name
                found[full] = tuple(_labels(expression, constants))
    return found


def _labels(expression: ast.expr, constants: dict[str, Any]) -> list[str]:
    """The labels of an expression of names and constants."""
    match expression:
        case ast.Tuple(elements):
            return [label for element in elements for label in _labels(element, constants)]
        case ast.Starred(value):
            return _labels(value, constants)
        case ast.Name(name):
            return list(constants[name])
        case ast.Constant(str(label)):
            return [label]
    raise AssertionError(f"{ast.unparse(expression)} is not a list of labels")


def outcomes() -> set[str]:
    """The outcomes of a message."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(RESULTS.read_text()).body:
        match node:
            case ast.Assign([ast.Name(name)], ast.Tuple() as value) if name.endswith("OUTCOMES"):
                found[name] = tuple(_labels(value, found))
    return set(found["OUTCOMES"])
