"""Files that a playbook places: only what differs, whole or not at all, and no secret shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, run_task

action = load(ROOT / "plugins/action/place_files.py")


def place(root: Path, entries: list[dict[str, Any]], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a play printed that places the entries, and what the task returned."""
    return run_task(
        root.parent, {"place_files": {"root": str(root), "entries": entries}}, *arguments
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where things are placed; not there yet."""
    return tmp_path / "lab"


def test_what_differs_is_placed_and_nothing_else(root: Path, tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/one.yml").write_text("one: 1\n")
    (tmp_path / "rules/README").write_text("no rule")
    entries: list[dict[str, Any]] = [
        {"path": "rules", "mode": "0750"},
        {"path": "rules", "src": f"{tmp_path}/rules/*.yml", "mode": "0640"},
        {"path": "plain", "content": "text", "mode": "0644"},
    ]
    _, pretended = place(root, entries, "--check")
    assert not root.exists()
    printed, first = place(root, entries, "--diff")
    assert pretended["placed"] == first["placed"] == ["rules", "rules/one.yml", "plain"]
    assert "+one: 1" in printed
    assert (root / "rules/one.yml").read_text() == "one: 1\n"
    assert [
        (root / name).stat().st_mode & 0o777 for name in ("rules", "rules/one.yml", "plain")
    ] == [
        0o750,
        0o640,
        0o644,
    ]
    assert place(root, entries)[1]["changed"] is False
    (root / "plain").chmod(0o600)
    assert place(root, entries)[1]["placed"] == ["plain"]
    assert (root / "plain").stat().st_mode & 0o777 == 0o644


def test_a_secret_is_shown_nowhere_and_one_that_is_kept_stays(root: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("HUSH-from-a-file")
    entries: list[dict[str, Any]] = [
        {"path": ".", "mode": "0700"},
        {"path": "key", "src": str(tmp_path / "key"), "hidden": True, "mode": "0400"},
        {"path": "made", "secret": "HUSH-made", "keep": True, "mode": "0400"},
    ]
    printed, told = place(root, entries, "--diff", "-vvv")
    assert told["placed"] == [".", "key", "made"]
    assert "HUSH" not in printed + json.dumps(told)
    assert (root / "key").read_text() == "HUSH-from-a-file"
    entries[2] |= {"secret": "HUSH-another"}
    assert place(root, entries)[1]["changed"] is False
    assert (root / "made").read_text() == "HUSH-made"


def test_what_is_refused_leaves_what_was_there(root: Path) -> None:
    root.mkdir()
    (root / "file").write_text("good")
    entry = {"path": "file", "content": "bad", "validate": "grep -q good %s"}
    printed, told = place(root, [entry])
    assert told == {}
    assert f"{root}/file is refused, and stays as it was" in printed
    assert (root / "file").read_text() == "good"
    assert place(root, [entry | {"content": "as good"}])[1]["placed"] == ["file"]
    printed, _ = place(root, [{"path": "file"}])
    assert f"{root}/file must be a directory, and is none: remove it" in printed


def test_a_source_that_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    printed, told = place(root, [{"path": "file", "src": str(tmp_path / "none")}])
    assert told == {}
    assert f"{tmp_path}/none cannot be read: No such file or directory" in printed
