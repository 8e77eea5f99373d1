"""What is still down of what was struck."""

from collections.abc import Mapping
from typing import Any


def left_down(strikes: list[dict[str, Any]], struck: Mapping[str, float]) -> list[dict[str, Any]]:
    """A rejoin for each target that is not back from its last fault.

    Args:
        strikes: all that were planned.
        struck: when each was, by its id.
    """
    last: dict[str, dict[str, Any]] = {}
    for strike in sorted(
        (strike for strike in strikes if str(strike["id"]) in struck),
        key=lambda strike: struck[str(strike["id"])],
    ):
        last[strike["target"]] = strike
    up = ("rejoin", "fill_memory", "restart_docker")
    return [dict(strike, do="rejoin") for strike in last.values() if strike["do"] not in up]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {"left_down": left_down}
