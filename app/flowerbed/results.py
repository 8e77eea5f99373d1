"""What is left of a run: a directory of plain files, whole at every moment.

status.json    where the run is now; what the metrics endpoint serves
rounds.csv     a row a round             devices.csv    a row a device and round
faults.csv     a row a fault that was struck on purpose (`flowerbed.faults`)
run.yml        configuration, versions, devices, fingerprints    model.keras    at the end
"""

import csv
import io
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(os.environ.get("FLOWERBED_RESULTS", "/results"))
STATUS = "status.json"
CURRENT = "current"
"""A file beside the runs that names the newest one."""
FINAL_STATES = ("completed", "failed")

MODEL_OUTCOMES = ("completed", "partial")
"""Those of a device that has returned a model for its round."""
OUTCOMES = (
    *MODEL_OUTCOMES,
    "late",
    "out_of_memory",
    "timeout",
    "offline",
    "error",
    "unavailable",
)
"""What may become of a device in a round; `late` is a model that came when its round was over, and
`unavailable` a device that was there and, by its availability, not to be asked."""


@dataclass
class RoundRow:
    """One round. Accuracy and loss are of the model as it is after the round."""

    round: int
    started: float
    """Seconds of the wall clock (Unix) at which the round began."""
    accuracy: float | None
    """Mean over the devices' test splits, weighted by examples. Devices evaluate a model when
    they receive it, so this is filled in during the next round."""
    loss: float | None
    central_accuracy: float
    """On the test split of the data set."""
    central_loss: float
    seconds: float
    configure_seconds: float
    devices_seconds: float
    """From the first message out to the last reply in."""
    aggregate_seconds: float
    evaluate_seconds: float
    examples: int
    """Behind the models that were aggregated in it."""
    devices: int
    """Models that were aggregated in it."""
    failed: int
    """Devices that were not online, or were asked and had returned none when it was closed."""
    slowest_device: str
    slowest_seconds: float


@dataclass
class DeviceRow:
    """One device in one round; see `flowerbed.fleet.Times` for its parts.

    For a device that has answered in time, they and the round's other parts add up to the round.
    The examples of a round in rounds.csv are the sum of those whose `aggregated` is that round.
    """

    round: int
    """In which the device was asked."""
    started: float
    """Seconds of the wall clock (Unix) at which it was."""
    device: str
    device_class: str
    outcome: str
    reason: str
    aggregated: int | None
    """Round in which its model was aggregated: a later one where strategies wait for nobody. None:
    in none."""
    examples: int
    seconds: float
    """From the message until its reply was read, or it was given up."""
    receive_seconds: float
    queue_seconds: float
    evaluate_seconds: float
    train_seconds: float
    send_seconds: float
    wait_seconds: float
    """Idle from its reply until it was asked again, or a round was closed."""
    bytes_received: int
    """Size of the message's arrays."""
    bytes_sent: int
    examples_per_second: float
    batch_size: int | None
    """That it trained with: less than its setting where its memory was too small for that, or its
    shard."""
    throttled_share: float | None
    """Of the scheduler's periods while it evaluated and trained: in so many it had used up its
    quota."""
    throttled_seconds: float | None
    """That its threads were held back meanwhile."""
    loss: float | None
    """Of the received model on the device's test split."""
    accuracy: float | None
    train_loss: float | None
    """Means over the steps of its training, of the model as it was then."""
    train_accuracy: float | None


def write(path: Path, text: str) -> None:
    """Replace a file whole: a reader sees the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def to_csv(row_type: type, rows: Iterable[Any]) -> str:
    """Rows of a data class as the text of a file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in fields(row_type)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


def read_rows(kind: type, path: Path) -> list[Any]:
    """The rows of a file as `kind`; none where there is no such file."""
    if not path.exists():
        return []
    from pydantic import TypeAdapter  # whoever watches a run has nothing to read, and no use for it

    with path.open(newline="") as lines:
        # An empty cell is a value that was not measured, or an empty text.
        texts = [field.name for field in fields(kind) if field.type is str]
        rows = [
            {key: None if value == "" and key not in texts else value for key, value in row.items()}
            for row in csv.DictReader(lines)
        ]
    return list(TypeAdapter(list[kind]).validate_python(rows))  # type: ignore[valid-type]


class Recorder:
    """Writes one run's results as they come.

    Raises:
        FileExistsError: the run has results already; nothing is overwritten.
    """

    def __init__(self, run: str, rounds: int, round_timeout: float, root: Path = RESULTS) -> None:
        self.directory = root / run
        self.directory.mkdir(exist_ok=True)  # the inventory's part may be there already
        if (self.directory / STATUS).exists():
            raise FileExistsError(f"run {run!r} has results already: give it another run-name")
        self.rounds: list[RoundRow] = []
        self.devices: list[DeviceRow] = []
        self._status: dict[str, Any] = {
            "run": run,
            "state": "waiting",
            "message": "",
            "started": time.time(),
            "round": 0,
            "begun": 0,
            "rounds": rounds,
            "round_started": None,
            "round_timeout": round_timeout,
            "accuracy": None,
            "loss": None,
            "central_accuracy": None,
            "central_loss": None,
            "devices": {},
            "history": [],
        }
        self._save()
        write(root / CURRENT, run + "\n")

    def _save(self) -> None:
        write(self.directory / STATUS, json.dumps(self._status, indent=1))

    def state(self, state: str, message: str = "") -> None:
        """Tell where the run is: waiting, running, completed or failed."""
        self._status |= {"state": state, "message": message}
        self._save()

    def meet(self, name: str, device_class: str, info: Mapping[str, Any]) -> None:
        """Take note of a device that takes part."""
        entry = self._status["devices"].setdefault(name, {"last": None, "outcomes": {}})
        entry |= {
            "device_class": device_class,
            "info": dict(info),
            "online": True,
            "doing": "waiting",
        }
        self._save()

    def online(self, names: Collection[str]) -> None:
        """Take note of which devices Flower hears of."""
        for name, entry in self._status["devices"].items():
            entry["online"] = name in names
        self._save()

    def begin_round(self, started: float) -> None:
        """A round begins, in Unix seconds."""
        self._status |= {"round_started": started, "begun": self._status["round"] + 1}
        self._save()

    def doing(self, names: Iterable[str], what: str) -> None:
        """Take note of what devices do: working, waiting, or the outcome that they failed with."""
        for name in names:
            self._status["devices"][name]["doing"] = what
        self._save()

    def central(self, accuracy: float, loss: float) -> None:
        """The initial model's central evaluation; later ones come with their round."""
        self._status |= {"central_accuracy": accuracy, "central_loss": loss}
        self._save()

    def device_accuracy(self, accuracy: float | None, loss: float | None) -> None:
        """The devices' evaluation of the last finished round's model."""
        self._status |= {"accuracy": accuracy, "loss": loss}
        if self.rounds:
            self.rounds[-1].accuracy, self.rounds[-1].loss = accuracy, loss
            self._status["history"][-1] |= {"accuracy": accuracy, "loss": loss}
            write(self.directory / "rounds.csv", to_csv(RoundRow, self.rounds))
        self._save()

    def settle(self, device_rows: Iterable[DeviceRow]) -> None:
        """Record what has become of devices that were asked."""
        for device_row in device_rows:
            self.devices.append(device_row)
            entry = self._status["devices"][device_row.device]
            entry["last"] = asdict(device_row)
            entry["outcomes"][device_row.outcome] = entry["outcomes"].get(device_row.outcome, 0) + 1
        write(self.directory / "devices.csv", to_csv(DeviceRow, self.devices))
        self._save()

    def finish_round(self, row: RoundRow, device_rows: Iterable[DeviceRow]) -> None:
        """Record a finished round, and what became of devices in the course of it."""
        self.rounds.append(row)
        self._status |= {
            "round": row.round,
            "central_accuracy": row.central_accuracy,
            "central_loss": row.central_loss,
        }
        self._status["history"].append(asdict(row))
        write(self.directory / "rounds.csv", to_csv(RoundRow, self.rounds))
        self.settle(device_rows)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write run.yml: `description`, and under `lab` what the inventory told of the lab."""
        lab = self.directory / "lab.yml"
        known = {"lab": yaml.safe_load(lab.read_text())} if lab.exists() else {}
        text = yaml.safe_dump({**description, **known}, sort_keys=False)
        write(self.directory / "run.yml", text)


def read_status(root: Path = RESULTS, run: str | None = None) -> dict[str, Any] | None:
    """The status of a run, of the newest one by default; None where there is none."""
    try:
        name = run or (root / CURRENT).read_text().strip()
        status: dict[str, Any] = json.loads((root / name / STATUS).read_text())
    except FileNotFoundError:
        return None
    return status
