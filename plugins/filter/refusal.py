"""What an app is refused with that cannot run in the lab."""

from collections.abc import Mapping
from typing import Any


def refusal(answer: Mapping[str, Any], app: str) -> str:
    """The message, from what `flowerbed.server.check` has answered.

    Args:
        answer: with its `problems`, each a text whose first line says what is wrong.
        app: what the app is called.
    """
    problems = list(answer.get("problems") or [])
    return "\n".join([f"{app} cannot run in the lab; no run was started:", *problems])


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {"refusal": refusal}
