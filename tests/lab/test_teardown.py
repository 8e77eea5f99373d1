"""The end of the local lab. By its name this is the last file: no lab is there after it."""

import docker
from conftest import HOME, RESULTS, run_yml
from labs import Played, play


def test_teardown_leaves_the_data_and_purge_nothing(
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
    play("teardown", teardown_purge=True)
    assert not HOME.exists()
    assert not engine.images.list(filters={"label": "flowerbed.image"})
    assert (RESULTS / "test-first/model.keras").exists()
