"""Read the lab's variables of all hosts at once, each with its value or with why it has none.

An action plugin and not a template: in a template the first variable that cannot be resolved ends
it, and here that is a finding like the others.
"""

import json
import re
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars


def reason(error: AnsibleError) -> str:
    """What went wrong in a template, without Ansible's words around the message of a filter."""
    return re.sub(r"^The filter plugin '[^']*' failed: ", "", str(error)).strip().rstrip(".")


class ActionModule(ActionBase):
    """`read_variables: hosts=… prefixes=…`: the variables whose names begin with a prefix.

    Returns `hosts`, host to variable to its `value`, or to what stands there (`raw`) and the
    `reason` why that cannot be resolved; and `given`, the variables of the command line.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("hosts", "prefixes"))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Resolve every variable on its own."""
        super().run(tmp, task_vars)
        hostvars = task_vars["hostvars"]
        prefixes = tuple(self._task.args["prefixes"])
        hosts: dict[str, dict[str, Any]] = {}
        for host in self._task.args["hosts"]:
            raw, resolved = hostvars.raw_get(host), hostvars[host]
            names = sorted(name for name in raw if name.startswith(prefixes))
            hosts[host] = {name: self._read(raw, resolved, name) for name in names}
        given = sorted(load_extra_vars(self._loader))
        return {"changed": False, "hosts": hosts, "given": given}

    def _read(self, raw: Any, resolved: Any, name: str) -> dict[str, Any]:
        value = raw[name]
        try:
            if self._templar.is_template(value):
                value = resolved[name]
        except AnsibleError as error:
            return {"raw": str(value), "reason": reason(error)}
        # Plain values: without Ansible's tags, and with dates as text.
        return {"value": json.loads(json.dumps(value, default=str))}
