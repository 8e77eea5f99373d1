"""Place directories and files on a machine, all in one go: what the control node reads of them."""

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


def entries_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What the machine is told of an entry: itself, with what its `src` holds.

    A pattern such as `rules/*.yml` as `src` stands for each file that it meets, its `path` for
    their directory. Of an entry with `hidden`, the content is a secret.

    Raises:
        FileNotFoundError: there is no such file on the control node.
    """
    entry = dict(entry)
    told = "secret" if entry.pop("hidden", False) else "content"
    if "src" not in entry:
        return [entry]
    source = Path(entry.pop("src"))
    if "*" not in source.name:
        return [entry | {told: source.read_text()}]
    return [
        entry | {told: file.read_text(), "path": f"{entry['path']}/{file.name}"}
        for file in sorted(source.parent.glob(source.name))
    ]


class ActionModule(ActionBase):
    """`place_files: root=… entries=…`: as the module files_in_place, with `src` and `hidden`."""

    TRANSFERS_FILES = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Read, and have it placed."""
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        try:
            arguments["entries"] = [
                told for entry in arguments["entries"] for told in entries_of(entry)
            ]
        except OSError as error:
            raise AnsibleActionFail(f"{error.filename} cannot be read: {error.strerror}") from error
        answer = self._execute_module(
            module_name="files_in_place", module_args=arguments, task_vars=task_vars
        )
        return dict(result | answer)
