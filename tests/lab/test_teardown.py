"""The end of the local lab, and the commands of the pages. By its name this is the last file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import docker
import pytest
import yaml
from conftest import HOME, RESULTS, run_yml
from labs import Played, play
from repository import ROOT, files, page_commands


def test_teardown_leaves_the_data_and_other_containers(
    lab: Played, engine: docker.DockerClient
) -> None:
    stranger = engine.containers.run(
        run_yml("test-first")["lab"]["images"]["prometheus"],
        entrypoint=["sleep", "300"],
        name="stranger",
        detach=True,
        auto_remove=True,
    )
    try:
        play("teardown")
        assert not engine.containers.list(all=True, filters={"label": "flowerbed.part"})
        left = {network.name for network in engine.networks.list()}
        assert not left & {"flowerbed", "flowerbed-control"}
        assert (HOME / "superlink/results/test-first/model.keras").exists()
        assert engine.images.list(filters={"label": "flowerbed.image=application"})
        assert play("teardown").changed == 0
        stranger.reload()
        assert stranger.status == "running"
    finally:
        stranger.kill()


@pytest.fixture
def clone(lab: Played, tmp_path: Path) -> Path:
    """The project as a user has it on a machine without a lab, with a model that trains quickly."""
    shutil.rmtree(HOME, ignore_errors=True)
    for path in files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy, follow_symlinks=False)
    variables = tmp_path / "inventory/local/group_vars/all.yml"
    values = yaml.safe_load(variables.read_text())
    values |= {"training_dataset": "digits", "training_model": "linear", "training_examples": 800}
    variables.write_text(yaml.safe_dump(values))
    return tmp_path


def test_the_commands_of_the_pages_work_as_they_stand(
    clone: Path, engine: docker.DockerClient
) -> None:
    started, own = page_commands("get-started"), page_commands("your-own-app")
    *started, down = started
    assert (started[0], down) == ("make lab", "make down")
    for command in (*started, *own, down):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=clone,
            env=os.environ | {"VENV": str(Path(sys.executable).parents[1])},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        print(done.stdout)
        assert done.returncode == 0, command
    runs = [path.parent for path in clone.glob("results/*/report.html")]
    trained = 1 + sum("make train" in command for command in (*started, *own))
    assert len([run for run in runs if (run / "rounds.csv").exists()]) == trained
    assert {"average", "boxed"} <= {run.name for run in runs}
    assert list(clone.glob("results/**/*average*boxed*.html"))
    assert not engine.containers.list(all=True, filters={"label": "flowerbed.part"})


def test_purge_leaves_nothing(engine: docker.DockerClient) -> None:
    play("teardown", teardown_purge=True)
    assert not HOME.exists()
    assert not engine.images.list(filters={"label": "flowerbed.image"})
    assert (RESULTS / "test-first/model.keras").exists()
