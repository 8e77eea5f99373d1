"""Follow a run on the coordinator and show a line a round as it is finished.

An action plugin and not a loop of tasks: a task shows nothing until it ends, and a run takes long.
The waiting is done on the coordinator, one command a round.
"""

import json
import time
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

PATIENCE = 30
"""Seconds that one look waits for the next round."""
START_PATIENCE = 180
"""Seconds after which a run that has written nothing is taken for dead."""
FINAL_STATES = ("completed", "failed")
HEADING = f"{'round':>7}  {'accuracy':>8}  {'loss':>7}  {'seconds':>7}  slowest device"


def _line(row: dict[str, Any], rounds: int) -> str:
    return (
        f"{row['round']:>3}/{rounds:<3}  {row['central_accuracy']:>8.4f}  "
        f"{row['central_loss']:>7.4f}  {row['seconds']:>7.1f}  "
        f"{row['slowest_device']} ({row['slowest_seconds']:.1f} s)"
        + (f", {row['failed']} failed" if row["failed"] else "")
    )


class ActionModule(ActionBase):
    """`follow_run: run=NAME`: returns the run's last status; fails when the run has failed."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("run",))

    def _exec(self, container: str, argv: list[str], task_vars: Any) -> dict[str, Any]:
        result = self._execute_module(
            module_name="community.docker.docker_container_exec",
            module_args={"container": container, "argv": argv},
            task_vars=task_vars,
        )
        if result.get("rc", 1) != 0:
            reason = result.get("msg") or result.get("stderr")
            raise AnsibleActionFail(f"{container}: {' '.join(argv)} failed: {reason}")
        answer: dict[str, Any] = json.loads(result["stdout"])
        return answer

    def _status(self, run: str, after: int, task_vars: Any) -> dict[str, Any]:
        command = ["python", "-m", "flowerbed.results", run]
        options = ["--after", str(after), "--timeout", str(PATIENCE)]
        return self._exec("flowerbed-metrics", [*command, *options], task_vars)

    def _dead(self, task_vars: Any) -> bool:
        """Whether Flower knows of no run that is under way."""
        try:
            command = ["flwr", "list", "lab", "--format", "json"]
            answer = self._exec("flowerbed-superlink", command, task_vars)
        except AnsibleActionFail:  # the SuperLink itself may be on its way back
            return False
        return all(run["status"].startswith("finished") for run in answer.get("runs", []))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Poll until the run is over."""
        super().run(tmp, task_vars)
        name = self._task.args["run"]
        started = time.monotonic()
        shown = 0
        message = ""
        while True:
            status = self._status(name, shown, task_vars)
            rows = status.get("history", [])
            if rows and not shown:
                display.display(HEADING)
            for row in rows[shown:]:
                display.display(_line(row, status["rounds"]))
            progressed = len(rows) > shown
            shown = len(rows)
            if status.get("message") and status["message"] != message:
                message = status["message"]
                display.display(f"{status['state']}: {message}")
            if status["state"] == "completed":
                return {"changed": True, "status": status}
            if status["state"] == "failed":
                raise AnsibleActionFail(f"run {name} failed: {message}")
            if status["state"] == "starting" and time.monotonic() > started + START_PATIENCE:
                raise AnsibleActionFail(f"run {name} has not begun after {START_PATIENCE} s")
            dead = not progressed and self._dead(task_vars)
            # It may have ended between the two looks.
            if dead and self._status(name, shown, task_vars)["state"] not in FINAL_STATES:
                raise AnsibleActionFail(f"run {name} ended without a word in round {shown + 1}")
