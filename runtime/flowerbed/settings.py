"""Settings of a device and of a run as the lab reads them.

A device's settings are Flower's node configuration, a flat dictionary with kebab-case keys; what an
app makes of them is the app's affair. A run's settings are the file run.json, which the control
node writes beside the results.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Fraction = Annotated[float, Field(gt=0, le=1)]
RUN_FILE = "run.json"


class SettingsError(ValueError):
    """A setting is missing, unknown or out of range; the message names it and its value."""


class _Settings(BaseModel):
    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Check `values` and return the settings.

        Raises:
            SettingsError: what was found and what is needed, for each wrong key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise SettingsError(f"{cls.__name__}: " + "; ".join(lines)) from None


class DeviceSettings(_Settings):
    """One device, from `flower-supernode --node-config`.

    The configuration may hold further keys for the app (`device_config` of the inventory).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    device: str
    device_class: str
    machine: str
    partition_id: int = 0
    num_partitions: int = 1
    cpus: float | None = None
    """Cores; None: the whole machine. For display: the cgroup is what counts."""
    memory: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    local_epochs: Annotated[int, Field(ge=1)] = 1
    data_fraction: Fraction = 1.0
    availability: Fraction = 1.0
    """Chance that the device may be asked in a round; drawn by the server from the run's seed."""
    out_of_memory_policy: Literal["fail", "halve_batch"] = "fail"
    """What follows when the kernel has killed the worker for its memory."""

    @field_validator("cpus", "memory", mode="before")
    @classmethod
    def _no_limit(cls, value: object) -> object:
        """Flower's configuration has no null: 0 and "" stand for no limit."""
        return value or None


class MetricNames(BaseModel):
    """Names of an app's metrics, where they are not the usual ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: str = ""
    loss: str = ""


class LabSettings(_Settings):
    """What the lab has to know of a run, see `RUN_FILE`; the app's own configuration is apart."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Names the directory of the results."""
    app: str = ""
    """Hash of the app's files."""
    layer: str = ""
    """Directory of the app's further dependencies below /apps; empty: it has none."""
    devices: tuple[str, ...] = ()
    """Devices that must be online before the first round; none: whoever is there."""
    device_wait: Annotated[float, Field(gt=0)] = 300.0
    """Seconds to wait for all devices before the first round."""
    round_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a round goes on without the devices that have not answered."""
    seed: int = 42
    """Of the devices' availability."""
    metrics: MetricNames = MetricNames()
    resume: bool = False
    """Whether the run goes on after its last checkpoint."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the settings of the run whose results are in `directory`."""
        return cls.parse(json.loads((directory / RUN_FILE).read_text()))
