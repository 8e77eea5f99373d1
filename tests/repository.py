"""Shared by all tests: where things are, and how to read and run them."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def program(name: str) -> str:
    """Return the path of a program of the control node's virtual environment."""
    return str(Path(sys.executable).with_name(name))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if there is no such file."""
    return yaml.safe_load(path.read_text()) if path.exists() else None


def load(path: Path) -> ModuleType:
    """Load a plugin as a module: Ansible finds plugins by directory, not by import."""
    spec = importlib.util.spec_from_file_location(f"under_test_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_task(directory: Path, task: dict[str, Any], *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run a play of one task; return its output and the task's result, which is {} if it failed.

    Args:
        directory: for the files of the play.
        task: its module and keywords.
        arguments: of ansible-playbook.
    """
    playbook, result_file = directory / "play.yml", directory / "result.json"
    copy = {
        "ansible.builtin.copy": {"content": "{{ result | to_json }}", "dest": str(result_file)},
        "check_mode": False,
    }
    tasks = [task | {"register": "result"}, copy]
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    command = [program("ansible-playbook"), "-i", "localhost,", "--connection", "local"]
    command += ["-e", f"ansible_python_interpreter={sys.executable}", str(playbook), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    result: dict[str, Any] = json.loads(result_file.read_text()) if done.returncode == 0 else {}
    return done.stdout, result


def page_commands(name: str) -> list[str]:
    """Return the commands of a page of docs/ that a test runs, in order.

    They are the lines of the `console` blocks that follow the comment `<!-- test: NAME -->`.
    """
    text = (ROOT / "docs" / f"{name}.md").read_text()
    block = rf"^<!-- test: {name} -->\n```console\n(.*?)^```$"
    blocks = re.findall(block, text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def files(*directories: str) -> list[Path]:
    """Return all files that are or will be in the repository, or those of some directories."""
    # The clone may belong to another user than the one who runs the tests.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard", "--", *directories]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in sorted(set(listed.split("\0")) - {""})]
    return [path for path in paths if path.is_file()]


def texts(*directories: str) -> Iterator[tuple[str, str]]:
    """Yield the path in the repository and the content of each text file."""
    for path in files(*directories):
        content = path.read_bytes()
        if b"\0" not in content:
            yield str(path.relative_to(ROOT)), content.decode()
