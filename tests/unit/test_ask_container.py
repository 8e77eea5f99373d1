"""What playbooks ask of containers and the engine, and how results come to the control node."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, run_task

lab = load(ROOT / "plugins/filter/inventory.py")
refusal = load(ROOT / "plugins/filter/refusal.py").refusal
fetch = load(ROOT / "plugins/action/fetch_results.py")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that writes its arguments and input down and prints the file `says`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "docker"
    program.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments\n"
        f'case "$*" in *--interactive*) cat > {tmp_path}/input;; esac\n'
        f"cat {tmp_path}/says\necho 'went wrong' >&2\nexit $(cat {tmp_path}/code)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "code").write_text("0")
    return tmp_path


ASK = {"container": "flowerbed-some", "command": ["python", "-m", "some.thing", "a b"]}


def ask(directory: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    return run_task(directory, {"ask_container": ASK | more})


def test_the_last_line_is_the_answer(docker: Path) -> None:
    (docker / "says").write_text('a warning\n{"problems": []}\n')
    printed, told = ask(docker)
    assert told["answer"] == {"problems": []}, printed
    assert told["changed"] is False
    arguments = (docker / "arguments").read_text().splitlines()
    assert arguments == ["exec", "flowerbed-some", "python", "-m", "some.thing", "a b"]


def test_input_and_files_are_json(docker: Path) -> None:
    (docker / "says").write_text("{}")
    (docker / "my file.py").write_text("x = 'ü'\n", encoding="utf-8")
    files = {"pack/file.py": str(docker / "my file.py")}
    printed, told = ask(docker, input={"settings": {"a": 1.5, "b": True}}, files=files)
    assert told["changed"] is True, printed
    assert json.loads((docker / "input").read_text()) == {
        "settings": {"a": 1.5, "b": True},
        "files": {"pack/file.py": "x = 'ü'\n"},
    }
    assert (docker / "arguments").read_text().splitlines()[:2] == ["exec", "--interactive"]


def test_what_is_no_json_is_a_failure_with_its_reason(docker: Path) -> None:
    (docker / "says").write_text("Traceback\n")
    (docker / "code").write_text("3")
    printed, told = ask(docker)
    assert told == {}
    assert "python -m some.thing 'a b' failed (3): went wrong" in printed


def test_a_lab_that_is_not_there_is_said_to_be(docker: Path) -> None:
    (docker / "says").write_text("Error response from daemon: No such container: flowerbed-some\n")
    (docker / "code").write_text("1")
    (docker / "bin/docker").write_text(
        (docker / "bin/docker").read_text().replace("echo 'went wrong' >&2", "")
    )
    printed, _ = ask(docker)
    assert "The lab is not deployed here" in printed
    assert "make lab" in printed


def test_the_lab_is_looked_at_in_three_commands(docker: Path) -> None:
    """What the stand-in prints is a container, an image, and a version."""
    (docker / "says").write_text(
        '{"Names": "flowerbed-device-a", "Image": "flowerbed/application:1", "State": "running", '
        '"Labels": "flowerbed.part=device,flowerbed.device=a,flowerbed.memory=", '
        '"Repository": "flowerbed/layer", "Tag": "2", "Server": {"Version": "26.1"}}\n'
    )
    printed, told = run_task(docker, {"inspect_lab": {}})
    assert told.get("layers") == ["flowerbed/layer:2"], printed
    assert told["engine"] == "26.1"
    assert told["containers"] == [
        {
            "Names": ["/flowerbed-device-a"],
            "Image": "flowerbed/application:1",
            "State": "running",
            "Labels": {
                "flowerbed.part": "device",
                "flowerbed.device": "a",
                "flowerbed.memory": "",
            },
        }
    ]


def test_images_are_those_that_the_parts_run() -> None:
    found = [
        {"Labels": {"flowerbed.part": part}, "Image": f"{part}:1"}
        for part in ("superlink", "serverapp", "gate", "prometheus")
    ]
    images = {"application": "superlink:1", "gate": "gate:1", "prometheus": "prometheus:1"}
    assert lab.images_of(found) == images
    # Another machine than the coordinator has devices alone.
    device = {"Labels": {"flowerbed.part": "device"}, "Image": "device:1"}
    assert lab.images_of([device]) == {"application": "device:1"}
    assert lab.images_of([device, *found])["application"] == "superlink:1"
    assert lab.images_of([{"Labels": None, "Image": "other"}]) == {}


def test_a_refusal_says_which_app_and_the_last_line_first() -> None:
    told = refusal({"problems": ["it raises: ZeroDivisionError\n  line 3"]}, "/my/app")
    assert told.splitlines() == [
        "/my/app cannot run in the lab; no run was started:",
        "it raises: ZeroDivisionError",
        "  line 3",
    ]


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plays outside of the role have its action."""
    monkeypatch.setenv("ANSIBLE_ACTION_PLUGINS", str(ROOT / "plugins/action"))


def fetched(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    task = {"fetch_results": {"src": str(tmp_path / "there"), "dest": str(tmp_path / "here/run")}}
    return run_task(tmp_path, task, *arguments)


@pytest.mark.usefixtures("role")
def test_the_files_of_a_directory_are_brought(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here/run"
    (there / "app").mkdir(parents=True)
    (there / "app/client.py").write_text("")
    contents = {"rounds.csv": b"a,b\n", "model of mine.keras": bytes(range(256)), "-odd": b""}
    for name, content in {**contents, ".status.json.draft": b"{"}.items():
        (there / name).write_bytes(content)
    printed, told = fetched(tmp_path)
    assert told.get("changed") is True, printed
    assert told["names"] == sorted(contents)
    assert told["large"] == []
    assert {path.name: path.read_bytes() for path in here.iterdir()} == contents
    _, told = fetched(tmp_path)
    assert told["changed"] is False
    (here / "rounds.csv").unlink()
    _, told = fetched(tmp_path, "--check")
    assert told["changed"] is False
    assert not (here / "rounds.csv").exists()


@pytest.mark.usefixtures("role")
def test_a_directory_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    printed, told = fetched(tmp_path)
    assert told == {}
    assert "No such file or directory" in printed


def test_what_is_large_is_left_for_others() -> None:
    sizes = {"model": 90, "rounds.csv": 10, "devices.csv": 20, "weights": 75}
    assert fetch.chosen(sizes, 100) == ["rounds.csv", "devices.csv"]
    assert fetch.chosen(sizes, 1000) == ["rounds.csv", "devices.csv", "weights", "model"]
