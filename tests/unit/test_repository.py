"""What must never be in the repository, and what its scripts need."""

import re
import subprocess

from repository import ROOT, files, texts

PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")
HOME_DIRECTORY = re.compile(r"(?<![\w.:/}-])/(?:work|root|home|Users)/")


def test_no_private_key_is_in_the_repository() -> None:
    assert [name for name, text in texts() if PRIVATE_KEY.search(text)] == []


def test_generated_secrets_are_ignored() -> None:
    example = "inventory/local/.secrets/grafana_admin_password"
    command = ["git", "-c", f"safe.directory={ROOT}", "check-ignore", "--quiet", example]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert [path for path in files() if ".secrets" in path.parts] == []


def test_no_path_of_a_home_directory_is_in_the_repository() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if HOME_DIRECTORY.search(line)
    ]
    assert found == []


def test_every_script_is_executable() -> None:
    scripts = [path for path in files() if path.read_bytes().startswith(b"#!")]
    assert {".ci/run", "tests/app"} <= {str(path.relative_to(ROOT)) for path in scripts}
    assert [path for path in scripts if not path.stat().st_mode & 0o100] == []
