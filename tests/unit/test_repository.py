"""What is in the repository, and what must never be."""

import re
import subprocess

from repository import ROOT, files, texts

TOP_LEVEL = {
    "LICENSE",
    "Makefile",
    "README.md",
    "ansible.cfg",
    "app",
    "benchmarks",
    "files",
    "inventory",
    "molecule",
    "playbooks",
    "requirements.txt",
    "roles",
    "tests",
}
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")
HOME_DIRECTORY = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users)/")


def test_the_top_level_holds_what_the_design_names() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
    assert {"LICENSE", "Makefile", "ansible.cfg", "requirements.txt"} <= names


def test_no_private_key_is_in_the_repository() -> None:
    assert [name for name, text in texts() if PRIVATE_KEY.search(text)] == []


def test_generated_secrets_stay_out_of_it() -> None:
    example = "inventory/local/.secrets/grafana_admin_password"
    command = ["git", "-c", f"safe.directory={ROOT}", "check-ignore", "--quiet", example]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert [path for path in files() if ".secrets" in path.parts] == []


def test_no_path_of_somebodys_machine_is_in_the_repository() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if HOME_DIRECTORY.search(line)
    ]
    assert found == []


def test_what_is_run_can_be_run() -> None:
    scripts = [path for path in files() if path.read_bytes().startswith(b"#!")]
    assert {".ci/run", "tests/app"} <= {str(path.relative_to(ROOT)) for path in scripts}
    assert [path for path in scripts if not path.stat().st_mode & 0o100] == []
