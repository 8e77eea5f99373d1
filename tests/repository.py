"""What the tests have in common: where things are and how they are read."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def program(name: str) -> str:
    """A program of the control node's virtual environment."""
    return str(Path(sys.executable).with_name(name))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, None where there is no such file."""
    return yaml.safe_load(path.read_text()) if path.exists() else None


def load(path: Path) -> ModuleType:
    """A plugin as a module: Ansible finds plugins by directory, not by import."""
    spec = importlib.util.spec_from_file_location(f"under_test_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_task(directory: Path, task: dict[str, Any], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a play of one task printed, and what the task returned; {} where it failed.

    Args:
        directory: where there is room for the play.
        task: its module and keywords.
        arguments: of ansible-playbook.
    """
    playbook, answer = directory / "play.yml", directory / "answer.json"
    copy = {
        "ansible.builtin.copy": {"content": "{{ told | to_json }}", "dest": str(answer)},
        "check_mode": False,
    }
    tasks = [task | {"register": "told"}, copy]
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
    told: dict[str, Any] = json.loads(answer.read_text()) if done.returncode == 0 else {}
    return done.stdout, told


def files(*directories: str) -> list[Path]:
    """All files that are, or are about to be, in the repository; or those of some directories."""
    # The clone may belong to somebody else than who runs the tests.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard", "--", *directories]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in sorted(set(listed.split("\0")) - {""})]
    return [path for path in paths if path.is_file()]


def texts(*directories: str) -> Iterator[tuple[str, str]]:
    """Path in the repository and content of each text file."""
    for path in files(*directories):
        content = path.read_bytes()
        if b"\0" not in content:
            yield str(path.relative_to(ROOT)), content.decode()
