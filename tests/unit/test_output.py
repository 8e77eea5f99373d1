"""What playbooks print: small real ones are played with the callback of ansible.cfg."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT, files, load, program

steps = load(ROOT / "plugins/callback/steps.py")

SAY = {"name": "Say hello", "ansible.builtin.debug": {"msg": "hello"}}
FAIL = {"name": "Give up", "ansible.builtin.fail": {"msg": "first line\nsecond line"}}
SECRET = "hunter2"  # noqa: S105  # looked for in output


@dataclass
class Played:
    """What a playbook printed, without its recap, and how it ended."""

    text: str
    recap: str
    code: int

    @property
    def lines(self) -> list[str]:
        """Lines, with seconds replaced by `S`."""
        return [re.sub(r"\d+\.\d s", "S s", line) for line in self.text.splitlines()]

    @property
    def steps(self) -> dict[str, str]:
        """What the lines of steps say after the seconds, by the name of the step."""
        found = re.findall(r"^(\S.*?) +\d+\.\d s *(.*)$", self.text, re.MULTILINE)
        return dict(found)


def a_play(*tasks: dict[str, Any], name: str = "One step", **keywords: Any) -> dict[str, Any]:
    return {"name": name, "hosts": "all", "gather_facts": False, "tasks": [*tasks], **keywords}


def play(
    directory: Path,
    *plays: dict[str, Any],
    arguments: tuple[str, ...] = (),
    hosts: dict[str, dict[str, Any]] | None = None,
    environment: dict[str, str] | None = None,
) -> Played:
    """Play on hosts that are all this computer; on one of them if no hosts are given."""
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    named = {name: local | more for name, more in (hosts or {"here": {}}).items()}
    (directory / "hosts.yml").write_text(json.dumps({"all": {"hosts": named}}))
    (directory / "play.yml").write_text(yaml.safe_dump([*plays], sort_keys=False))
    command = [program("ansible-playbook"), "-i", f"{directory}/hosts.yml"]
    done = subprocess.run(
        [*command, f"{directory}/play.yml", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text, _, recap = done.stdout.partition("\nPLAY RECAP")
    return Played(text, recap, done.returncode)


def copy(directory: Path, **more: Any) -> dict[str, Any]:
    """Write a file with two lines."""
    file = {"content": "one\ntwo\n", "dest": f"{directory}/{{{{ inventory_hostname }}}}.txt"}
    return {"name": "Write the file", "ansible.builtin.copy": file | {"mode": "0644"}} | more


def test_a_step_is_a_line_and_a_step_without_work_is_none(tmp_path: Path) -> None:
    nothing = {"name": "Skip it", "ansible.builtin.debug": {"msg": "skipped"}, "when": False}
    keep = {"name": "Keep a value", "ansible.builtin.set_fact": {"value": 1}}
    look = {"name": "Look", "ansible.builtin.stat": {"path": "/"}}
    played = play(
        tmp_path,
        a_play(copy(tmp_path), name="Write"),
        a_play(nothing, keep, name="Do nothing"),
        a_play(look, name="Look"),
    )
    assert played.code == 0
    # Nothing but these lines, and no control characters.
    assert [re.sub(" +", " ", line) for line in played.lines] == [
        "Write S s 1 changed",
        "Look S s",
        "Total S s 1 changed",
    ]
    assert re.search(r"^here +: ok=3 +changed=1 .* failed=0 ", played.recap, re.MULTILINE)


def test_a_message_stands_below_its_step(tmp_path: Path) -> None:
    lines = {"ansible.builtin.debug": {"msg": ["Prometheus  http://x", "Grafana  http://y"]}}
    each = {"ansible.builtin.debug": {"msg": "item {{ item }}"}, "loop": ["p", "q"]}
    flat = {"ansible.builtin.debug": {"msg": [{"image": "gate", "tag": 1}, {"image": "app"}]}}
    shape = {"ansible.builtin.debug": {"msg": [{"images": ["gate"]}]}}
    variable = {"ansible.builtin.debug": {"var": "inventory_hostname"}}
    assert play(tmp_path, a_play(SAY, lines, each, flat, shape, variable)).lines[:-2] == [
        "One step",
        "  hello",
        "  Prometheus  http://x",
        "  Grafana  http://y",
        "  item p",
        "  item q",
        "  image: gate, tag: 1",
        "  image: app",
        "  msg:",
        "  -   images:",
        "      - gate",
        "  inventory_hostname: here",
    ]


def test_hosts_are_named_where_there_are_several(tmp_path: Path) -> None:
    own = {"ansible.builtin.debug": {"msg": "{{ inventory_hostname }}: ready"}}
    lines = {"ansible.builtin.debug": {"msg": ["p", "q"]}, "when": "inventory_hostname == 'pi-1'"}
    played = play(tmp_path, a_play(SAY, own, lines, copy(tmp_path)), hosts={"pi-1": {}, "pi-2": {}})
    assert sorted(played.lines[1:4]) == ["  pi-1, pi-2: hello", "  pi-1: ready", "  pi-2: ready"]
    assert played.lines[4:7] == ["  pi-1:", "  p", "  q"]
    assert played.steps == {"One step": "2 changed", "Total": "2 changed"}
    assert len(re.findall(r"^pi-\d +: ok=\d+ +changed=1 ", played.recap, re.MULTILINE)) == 2


def test_many_hosts_are_counted() -> None:
    assert steps.names_of({"b", "a"}) == "a, b"
    names = [f"phone-{number}" for number in range(1, 10)]
    assert steps.names_of(names) == "phone-1, phone-2, phone-3, phone-4, phone-5 and 4 more"


def test_a_failure_is_complete_with_host_and_file(tmp_path: Path) -> None:
    played = play(tmp_path, a_play(SAY, FAIL, name="Try"), a_play(SAY, name="Never"))
    assert played.code == 2
    number = 1 + (tmp_path / "play.yml").read_text().splitlines().index("  - name: Give up")
    assert played.lines[:-2] == [
        "Try",
        "  hello",
        "  FAILED [here]: Give up",
        f"  {tmp_path}/play.yml:{number}",
        "    first line",
        "    second line",
    ]
    assert played.steps == {"Try": "1 failed", "Total": "1 failed"}
    assert "failed=1" in played.recap


def test_what_a_command_has_printed_belongs_to_its_failure(tmp_path: Path) -> None:
    task = {"ansible.builtin.command": {"argv": ["ls", f"{tmp_path}/nothing"]}}
    said = play(tmp_path, a_play(task)).text
    assert re.search(rf"^    stderr: .*{tmp_path}/nothing.*No such file", said, re.MULTILINE)
    assert "    rc: 2\n" in said


def test_an_undefined_variable_is_named(tmp_path: Path) -> None:
    task = {"name": "Say", "ansible.builtin.debug": {"msg": "{{ nowhere }}"}}
    assert "'nowhere' is undefined" in play(tmp_path, a_play(task)).text


def test_each_item_that_fails_says_why(tmp_path: Path) -> None:
    task = {
        "name": "Judge",
        "ansible.builtin.assert": {"that": "item == 'good'", "fail_msg": "{{ item }} is bad"},
        "loop": ["good", "poor", "worse"],
    }
    said = play(tmp_path, a_play(task)).text
    assert "    poor: poor is bad\n" in said
    assert "    worse: worse is bad\n" in said
    assert "good: " not in said
    assert said.count("FAILED [here]: Judge") == 1


def test_hosts_that_fail_alike_share_the_message(tmp_path: Path) -> None:
    said = play(tmp_path, a_play(FAIL), hosts={"pi-1": {}, "pi-2": {}}).text
    assert said.count("second line") == 1
    assert re.search(r"^    as on pi-[12]$", said, re.MULTILINE)
    assert {*re.findall(r"FAILED \[(.*)\]", said)} == {"pi-1", "pi-2"}


def test_an_ignored_failure_is_one_line(tmp_path: Path) -> None:
    played = play(tmp_path, a_play(FAIL | {"ignore_errors": True}, SAY))
    assert played.code == 0
    assert played.lines[:3] == [
        "One step",
        "  failed, ignored [here]: Give up: first line",
        "  hello",
    ]
    assert played.steps == {"One step": "", "Total": ""}


def test_a_rescued_failure_is_one_line_and_one_in_the_rescue_is_complete(tmp_path: Path) -> None:
    included = tmp_path / "included.yml"
    included.write_text(json.dumps([FAIL]))
    include = {"ansible.builtin.include_tasks": str(included)}
    block = {"block": [{"block": [include], "always": [SAY]}], "rescue": [FAIL | {"name": "End"}]}
    played = play(tmp_path, a_play(block))
    assert played.code == 2
    assert played.lines[:5] == [
        "One step",
        "  failed, handled [here]: Give up: first line",
        "  hello",
        "  FAILED [here]: End",
        played.lines[4],
    ]
    assert played.lines[5:7] == ["    first line", "    second line"]
    assert played.steps["One step"] == "1 failed"


def test_an_unreachable_host_is_named_with_the_reason(tmp_path: Path) -> None:
    away = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    ping = {"name": "Ask it", "ansible.builtin.ping": {}}
    played = play(
        tmp_path,
        a_play(ping | {"ignore_unreachable": True}, ping | {"name": "Ask it again"}),
        hosts={"here": {}, "away": away},
    )
    assert played.code == 4
    assert re.search(r"^  unreachable, ignored \[away\]: Ask it: ", played.text, re.MULTILINE)
    block = r"^  UNREACHABLE \[away\]: Ask it again\n  /.*\n    .*Connection refused"
    assert re.search(block, played.text, re.MULTILINE)
    assert played.steps["One step"] == "1 failed"
    assert re.search(r"^away .* unreachable=1 ", played.recap, re.MULTILINE)


@pytest.mark.parametrize("check", [True, False])
def test_differences_are_shown_with_their_task(tmp_path: Path, check: bool) -> None:
    arguments = ("--check", "--diff") if check else ("--diff",)
    twice = copy(tmp_path, loop=["x"])
    twice["ansible.builtin.copy"] |= {"dest": f"{tmp_path}/{{{{ item }}}}.txt"}
    played = play(tmp_path, a_play(copy(tmp_path), twice), arguments=arguments)
    verb = "would change" if check else "changed"
    for name in ("here", "x"):
        block = rf"^  {verb} \[here\]: Write the file\n  --- before\n  \+\+\+ .*{name}\.txt\n"
        assert re.search(block + r"(  @.*\n)  \+one\n  \+two\n", played.text, re.MULTILINE)
    assert played.steps == {"One step": f"2 {verb}", "Total": f"2 {verb}"}
    assert (tmp_path / "here.txt").exists() is not check


def test_check_mode_names_the_tasks_that_would_change(tmp_path: Path) -> None:
    hosts: dict[str, dict[str, Any]] = {"pi-1": {}, "pi-2": {}}
    played = play(tmp_path, a_play(SAY, copy(tmp_path)), hosts=hosts, arguments=("--check",))
    assert played.lines[:3] == [
        "One step",
        "  pi-1, pi-2: hello",
        "  pi-1, pi-2: would change: Write the file",
    ]
    assert played.steps["One step"] == "2 would change"


@pytest.mark.parametrize("arguments", [(), ("--diff",), ("--check", "--diff")])
def test_a_secret_stays_hidden(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    hidden: dict[str, Any] = {"no_log": True, "ignore_errors": True}
    write = copy(tmp_path, **hidden)
    write["ansible.builtin.copy"] |= {"content": SECRET}
    command = {"ansible.builtin.command": {"argv": ["sh", "-c", f"echo {SECRET}; exit 1"]}}
    played = play(
        tmp_path,
        a_play(
            write,
            command | hidden | {"name": "Whisper"},
            command | hidden | {"name": "Whisper", "loop": [SECRET]},
            {"ansible.builtin.fail": {"msg": SECRET}, "no_log": True},
        ),
        arguments=arguments,
    )
    assert played.code == 2
    assert SECRET not in played.text
    assert "output has been hidden" in played.text


def test_warnings_and_deprecations_are_shown(tmp_path: Path) -> None:
    """Whether the task changes anything or not, and from items, too."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library/warn.py").write_text(
        "from ansible.module_utils.basic import AnsibleModule\n"
        "module = AnsibleModule({'about': {'type': 'str'}})\n"
        "module.warn('beware of ' + module.params['about'])\n"
        "module.deprecate('the old way', version='9.9.9', collection_name='a.b')\n"
        "module.exit_json(changed=False)\n"
    )
    warn = {"name": "Warn", "warn": {"about": "the dog"}}
    each = {"name": "Warn", "warn": {"about": "{{ item }}"}, "loop": ["cats"]}
    said = play(
        tmp_path,
        a_play(warn, each),
        environment={
            "ANSIBLE_LIBRARY": f"{tmp_path}/library",
            "ANSIBLE_DEPRECATION_WARNINGS": "true",
        },
    ).text
    assert "[WARNING]: beware of the dog" in said
    assert "[WARNING]: beware of cats" in said
    assert re.search(r"\[DEPRECATION WARNING\]: the old way", said)


def _impatient(directory: Path) -> dict[str, str]:
    """The environment in which the callback waits for a second, and not for ten."""
    text = (ROOT / "plugins/callback/steps.py").read_text()
    assert text.count("PATIENCE = 10.0\n") == 1
    (directory / "callbacks").mkdir()
    (directory / "callbacks/steps.py").write_text(text.replace("= 10.0\n", "= 1.0\n"))
    return {"ANSIBLE_CALLBACK_PLUGINS": f"{directory}/callbacks"}


def test_a_task_that_takes_long_is_named_with_its_hosts(tmp_path: Path) -> None:
    wait = {
        "name": "Wait for it",
        "ansible.builtin.command": {"argv": ["sleep", "{{ seconds }}"]},
        "changed_when": False,
    }
    hosts = {"pi-1": {"seconds": 6}, "pi-2": {"seconds": 1}}
    said = play(tmp_path, a_play(wait), hosts=hosts, environment=_impatient(tmp_path)).text
    waited = re.findall(r"^  Wait for it: (\d+) s, on (.*)$", said, re.MULTILINE)
    assert said.startswith("One step\n")
    assert waited[-1][1] == "pi-1"
    # Less and less often.
    assert 2 <= len(waited) <= 3


FOLLOW = """
import time
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        for number in (1, 2):
            Display().display(f"  round {number}")
            time.sleep(2.5)
        return {"changed": True}
"""


def test_lines_of_an_action_stand_below_the_step_and_nothing_between_them(tmp_path: Path) -> None:
    (tmp_path / "action_plugins").mkdir()
    (tmp_path / "action_plugins/follow_it.py").write_text(FOLLOW)
    task = {"name": "Follow the run", "follow_it": {}}
    environment = _impatient(tmp_path) | {"ANSIBLE_ACTION_PLUGINS": f"{tmp_path}/action_plugins"}
    played = play(tmp_path, a_play(task), environment=environment)
    assert played.lines[:3] == ["One step", "  round 1", "  round 2"]
    assert played.steps["One step"] == "1 changed"
    assert len(played.lines) == 5


def test_actions_that_print_are_known_by_their_prefix() -> None:
    actions = [path for path in files() if path.parent.name in ("action_plugins", "action")]
    printing = {path.stem for path in actions if "display.display(" in path.read_text()}
    assert {name for name in printing if not name.startswith(steps.SHOWS_ITSELF)} == {
        "run_container"
    }


def test_with_v_the_output_is_ansibles_own(tmp_path: Path) -> None:
    said = play(tmp_path, a_play(SAY, FAIL), arguments=("-v",)).text
    assert "PLAY [One step]" in said
    assert "TASK [Say hello]" in said
    assert "fatal: [here]: FAILED!" in said
    assert "Total" not in said


def test_lines_reach_a_pipe_as_they_come(tmp_path: Path) -> None:
    """And not when kilobytes have come together: the first is read while the play runs."""
    wait = {"ansible.builtin.pause": {"seconds": 8}}
    (tmp_path / "play.yml").write_text(json.dumps([a_play(SAY, wait, hosts="localhost")]))
    command = [program("ansible-playbook"), "-i", "localhost,", f"{tmp_path}/play.yml"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "One step\n"
        assert process.stdout.readline() == "  hello\n"
        running = process.poll() is None
        process.terminate()
    assert running
