"""The metrics of the app, read from its source: its libraries are not on the control node."""

import ast

from repository import ROOT

SOURCE = ROOT / "app/flowerbed/metrics.py"


def flowerbed_metrics() -> set[str]:
    """Every metric's name, as Prometheus shows it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        match node:
            # The tables RUN_METRICS and DEVICE_METRICS, by their keys.
            case ast.Assign([ast.Name(table)], value) if table.endswith("_METRICS"):
                names |= set(ast.literal_eval(value))
            # Those made one by one; a counter's name ends with _total.
            case ast.Call(ast.Name("GaugeMetricFamily"), [ast.Constant(str(name)), *_]):
                names.add(name)
            case ast.Call(ast.Name("CounterMetricFamily"), [ast.Constant(str(name)), *_]):
                names.add(f"{name}_total")
    return names
