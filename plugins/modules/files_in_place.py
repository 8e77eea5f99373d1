"""Place directories and files on a machine, all in one go.

One module and not a loop of tasks: what a task costs (a process that unpacks and compiles Ansible's
own code, half a second on a small machine) is paid once for all the files of a role. It runs on the
machine's own Python, so it stays with what Python 3.9 knows.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: files_in_place
short_description: Place directories and files, all in one go
description:
  - In the order given, and only what differs. A file is replaced whole, never rewritten.
  - Roles use the action C(place_files), which reads files on the control node for it.
author: Flowerbed
options:
  root:
    description: Where relative paths begin. As an entry, C(.), it is made, too.
    type: path
    required: true
  owner:
    description: Who owns what is placed.
    type: str
  group:
    description: Which group owns what is placed.
    type: str
  mode:
    description: Of what has no mode of its own.
    type: raw
  entries:
    description: What to place; one with neither content nor secret is a directory.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where.
        type: path
        required: true
      content:
        description: What is in the file.
        type: str
      secret:
        description: The same for what nobody may see; it is shown nowhere.
        type: str
      mode:
        description: As in M(ansible.builtin.file).
        type: raw
      keep:
        description: Whether a file that is there stays, whatever is in it.
        type: bool
        default: false
      validate:
        description: A command that must succeed before the file takes its place, %s being the new.
        type: str
"""

EXAMPLES = r"""
- name: Place the files
  files_in_place:
    root: /var/lib/flowerbed/superlink
    owner: "10001"
    entries:
      - {path: state, mode: "0755"}
      - {path: secrets, mode: "0700"}
      - {path: secrets/key, secret: "{{ key }}", mode: "0400"}
"""

RETURN = r"""
placed:
  description: The paths of what was not as it is now.
  type: list
  returned: always
"""


class Placer:
    """What the entries have in common."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.root = Path(module.params["root"])
        self.diffs: list[dict[str, str]] = []

    def place(self, entry: dict[str, Any]) -> bool:
        """One entry; whether anything had to be done."""
        path = self.root / entry["path"]
        shown = entry.get("content")
        content = entry.get("secret") if shown is None else shown
        if content is None:
            changed = self._directory(path)
        else:
            changed = self._file(path, content, entry, secret=shown is None)
        if self.module.check_mode and not path.exists():
            return changed
        attributes = self.module.load_file_common_arguments(
            {**self.module.params, "mode": entry.get("mode") or self.module.params["mode"]},
            path=str(path),
        )
        return bool(self.module.set_fs_attributes_if_different(attributes, changed))

    def _directory(self, path: Path) -> bool:
        if path.is_dir():
            return False
        if path.exists():
            self.module.fail_json(msg=f"{path} must be a directory, and is none: remove it")
        if not self.module.check_mode:
            path.mkdir(parents=True)
        return True

    def _file(self, path: Path, content: str, entry: dict[str, Any], *, secret: bool) -> bool:
        new = content.encode()
        if path.is_dir():
            self.module.fail_json(msg=f"{path} must be a file, and is a directory: remove it")
        old = path.read_bytes() if path.exists() else None
        if old == new or (old is not None and entry["keep"]):
            return False
        if not secret:
            before = (old or b"").decode(errors="replace")
            self.diffs.append(
                {"before_header": str(path), "after_header": str(path)}
                | {"before": before, "after": content}
            )
        if not self.module.check_mode:
            self._replace(path, new, entry)
        return True

    def _replace(self, path: Path, new: bytes, entry: dict[str, Any]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.module.tmpdir)
        with os.fdopen(handle, "wb") as file:
            file.write(new)
        if entry["validate"]:
            Path(temporary).chmod(0o644)  # for whoever the command is run as
            command = entry["validate"].replace("%s", temporary)
            code, printed, complained = self.module.run_command(command)
            if code != 0:
                told = (complained or printed).strip()
                self.module.fail_json(msg=f"{path} is refused, and stays as it was: {told}")
        self.module.atomic_move(temporary, str(path))


def main() -> None:
    """Answer Ansible."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "entries": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "secret": {"type": "str", "no_log": True},
                    "mode": {"type": "raw"},
                    "keep": {"type": "bool", "default": False},
                    "validate": {"type": "str"},
                },
                "mutually_exclusive": [["content", "secret"]],
            },
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    placer = Placer(module)
    entries = module.params["entries"]
    placed = [str(entry["path"]) for entry in entries if placer.place(entry)]
    module.exit_json(changed=bool(placed), placed=placed, diff=placer.diffs)


if __name__ == "__main__":
    main()
