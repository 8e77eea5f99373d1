"""The trainer: a process that keeps TensorFlow, the compiled model and the shard in memory.

    python -m flowerbed.trainer SHARD

Answers the requests of ClientApp processes one after another (`flowerbed.handoff`). Importing
TensorFlow, building and compiling the model cost many times what an epoch costs on a small
device; here they are paid once.
"""

import logging
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.config import DeviceSettings, ModelSettings, SettingsError, Task
from flowerbed.data import Shard, load_shard
from flowerbed.handoff import TRAINER_SOCKET, receive_frame, send_frame
from flowerbed.learning import Learner
from flowerbed.linear import LinearLearner
from flowerbed.quota import read_quota, read_throttling

log = logging.getLogger("flowerbed.trainer")

_MEASURED = 1.0
"""Seconds of training from which a device's speed is known before its first round."""


class Trainer:
    """One device's shard and the learners it has been asked for, compiled and kept."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._learner: Learner | None = None
        self._learner_key: tuple[ModelSettings, DeviceSettings] | None = None

    def _learner_for(self, task: Task, device: DeviceSettings) -> Learner:
        settings = ModelSettings(**task.model_dump(include=set(ModelSettings.model_fields)))
        if self._learner is None or self._learner_key != (settings, device):
            log.info("building %s alpha %g (%s)", task.model, task.alpha, task.recipe)
            self._learner = self._build(settings, device)
            self._learner_key = (settings, device)
            self._warm_up(self._learner)
        return self._learner

    def _build(self, settings: ModelSettings, device: DeviceSettings) -> Learner:
        shape, classes = self.shard.image_shape, self.shard.classes
        options: dict[str, Any] = {
            # A shard smaller than a batch is one batch.
            "batch_size": min(device.batch_size, len(self.shard.train_images)),
            "optimizer": device.optimizer,
            "learning_rate": device.learning_rate,
        }
        if settings.model == "linear":
            return LinearLearner(shape, classes, **options)
        load_tensorflow()
        from flowerbed.network import NetworkLearner

        return NetworkLearner(settings, shape, classes, **options)

    def _warm_up(self, learner: Learner) -> None:
        """Compile the steps, so that the first round is as fast as the others."""
        weights = learner.get_weights()
        shard = self.shard
        learner.evaluate(weights, shard.test_images[:1], shard.test_labels[:1])
        one_step = 1e-9
        learner.train(weights, shard.train_images, shard.train_labels, time_limit=one_step)

    def _speed(self, learner: Learner) -> float:
        """Examples trained on a second, measured."""
        weights, shard = learner.get_weights(), self.shard
        started = time.monotonic()
        trained = learner.train(
            weights,
            shard.train_images,
            shard.train_labels,
            time_limit=_MEASURED,
            fill_time=True,
        )
        return trained.examples / (time.monotonic() - started)

    def prepare(self, task: Task, device: DeviceSettings) -> dict[str, Any]:
        """Compile what the run will need; answer with the shard and how fast it is trained on."""
        started = time.monotonic()
        speed = self._speed(self._learner_for(task, device))
        return {
            "outcome": "completed",
            "shard": self.shard.fingerprint,
            "labels": self.shard.labels,
            "metrics": {
                "num-examples": len(self.shard.train_images),
                "examples-per-second": speed,
                "prepare-seconds": time.monotonic() - started,
            },
        }

    def evaluate(self, task: Task, device: DeviceSettings, weights: Any) -> dict[str, Any]:
        """Evaluate the received weights on the device's test split."""
        learner = self._learner_for(task, device)
        began, started = time.time(), time.monotonic()
        result = learner.evaluate(weights, self.shard.test_images, self.shard.test_labels)
        return {
            "outcome": "completed",
            "began": began,
            "metrics": {
                "num-examples": result.examples,
                "eval-loss": result.loss,
                "eval-accuracy": result.accuracy,
                "eval-examples": result.examples,
                "evaluate-seconds": time.monotonic() - started,
            },
        }

    def train(
        self, task: Task, device: DeviceSettings, weights: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Evaluate the received weights, then train them: one exchange a round, not two."""
        before = read_throttling()
        answer = self.evaluate(task, device, weights)
        started = time.monotonic()
        learner = self._learner_for(task, device)
        result = learner.train(
            weights,
            self.shard.train_images,
            self.shard.train_labels,
            epochs=device.local_epochs,
            seed=_seed(task, self.shard.partition),
            time_limit=task.time_limit,
            fill_time=task.fill_time,
            proximal_mu=task.proximal_mu,
        )
        throttled = read_throttling().since(before)
        answer["outcome"] = "partial" if result.partial else "completed"
        answer["metrics"] |= {
            "num-examples": result.examples,
            "train-loss": result.loss,
            "train-loss-rms": result.rms_loss,
            "train-accuracy": result.accuracy,
            "train-steps": result.steps,
            "effective-steps": result.effective_steps,
            "train-seconds": time.monotonic() - started,
            "batch-size": learner.batch_size,
            "throttled-share": throttled.share,
            "throttled-seconds": throttled.seconds,
        }
        return answer, result.weights.tobytes()

    def answer(self, header: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        """Do what a request asks.

        Raises:
            ValueError: unknown operation, bad settings, weights of another model.
        """
        task = Task.parse(header["task"])
        device = DeviceSettings.parse(header["device"])
        weights = np.frombuffer(payload, np.float32)
        match header["operation"]:
            case "prepare":
                return self.prepare(task, device), b""
            case "evaluate":
                return self.evaluate(task, device, weights), b""
            case "train":
                return self.train(task, device, weights)
            case unknown:
                raise ValueError(f"unknown operation {unknown!r}")


def _seed(task: Task, partition: int) -> int:
    """A seed of its own for every run, round and device, the same whenever it is repeated."""
    return int(
        np.random.SeedSequence((task.seed, task.server_round, partition)).generate_state(1)[0]
    )


def load_tensorflow() -> None:
    """Import TensorFlow with as many threads as can run at once.

    Not before it is needed: a device that waits for its first run, or trains a model without it,
    does not pay for it.
    """
    if "flowerbed.network" in sys.modules:
        return
    # Keras takes them in where they are installed, for what no trainer does: 50 MiB and a second.
    for package in ("matplotlib", "pandas"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    import tensorflow as tf

    threads = read_quota().threads
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    log.info("TensorFlow %s ready with %d thread(s)", tf.__version__, threads)


def serve(trainer: Trainer, listener: socket.socket) -> None:
    """Answer requests until the process ends. A failed request is answered, not fatal."""
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                header, payload = receive_frame(connection)
                log.info("%s, round %s", header["operation"], header["task"].get("server-round"))
                try:
                    send_frame(connection, *trainer.answer(header, payload))
                except (SettingsError, ValueError) as error:
                    log.error("%s", error)  # noqa: TRY400 - the message says it all
                    send_frame(connection, {"error": str(error)})
                except ConnectionError:
                    raise
                except Exception as error:
                    log.exception("request failed")
                    reason = traceback.format_exception_only(error)[-1].strip()
                    send_frame(connection, {"error": reason})
            except ConnectionError:
                log.warning("the ClientApp went away before it had its answer")


def main() -> None:
    """Open the shard and answer requests until the process ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    TRAINER_SOCKET.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(TRAINER_SOCKET))
    listener.listen()
    shard = load_shard(Path(sys.argv[1]))
    serve(Trainer(shard), listener)


if __name__ == "__main__":
    main()
