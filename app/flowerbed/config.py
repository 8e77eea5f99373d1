"""Settings of a device and of a run, parsed once from Flower's node and run configuration.

Flower hands both over as flat dictionaries with kebab-case keys. Imported by every ClientApp
process, so it must stay cheap: pydantic is loaded there by Flower anyway.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Fraction = Annotated[float, Field(gt=0, le=1)]


class SettingsError(ValueError):
    """A setting is missing, unknown or out of range; the message names it and its value."""


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Check `values` and return the settings.

        Raises:
            SettingsError: one line a wrong key, with what was found and what is needed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise SettingsError(f"{cls.__name__}: " + "; ".join(lines)) from None

    def as_config(self) -> dict[str, Any]:
        """The settings under the names that Flower's configuration uses."""
        return self.model_dump(by_alias=True)


class DeviceSettings(_Settings):
    """One device, from `flower-supernode --node-config`."""

    device: str
    device_class: str
    machine: str
    cpus: float | None = None
    """Cores; None: the whole machine. For display: the cgroup is what counts."""
    memory: str | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    local_epochs: Annotated[int, Field(ge=1)] = 1
    data_fraction: Fraction = 1.0
    availability: Fraction = 1.0
    """Chance that it may be asked in a round; drawn by the server, from the run's seed."""
    out_of_memory_policy: Literal["fail", "halve_batch"] = "fail"
    """What follows when the kernel has killed the trainer for its memory."""

    @field_validator("cpus", "memory", mode="before")
    @classmethod
    def _no_limit(cls, value: object) -> object:
        """Flower's configuration has no null: 0 and "" stand for no limit."""
        return value or None


class ModelSettings(_Settings):
    """Which network is trained; everything that two sides must agree on to exchange weights."""

    model: Literal["mobilenet", "mobilenetv2", "linear"] = "mobilenet"
    """`linear` is softmax regression, for labs whose subject is not the learning."""
    alpha: Annotated[float, Field(gt=0, le=2)] = 0.25
    """Width multiplier (Howard et al. 2017, https://arxiv.org/abs/1704.04861)."""
    recipe: Literal["small-images", "original"] = "small-images"
    """`original` is Keras' network as it comes, without augmentation; see `flowerbed.model`."""


class RunSettings(ModelSettings):
    """One run, from `flwr run --run-config` over the defaults in pyproject.toml."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Names the directory of the results."""
    devices: tuple[str, ...]
    """Devices that must be online before the first round; none: whoever is there."""
    num_server_rounds: Annotated[int, Field(ge=1)]
    strategy: str
    strategy_parameters: dict[str, Any]
    """Arguments of the strategy's constructor, as a JSON object."""
    seed: int
    round_timeout: Annotated[float, Field(gt=0)]
    """Seconds after which a round goes on without the devices that have not answered."""
    device_wait: Annotated[float, Field(gt=0)]
    """Seconds to wait for all devices before the first round."""

    @field_validator("devices", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("strategy_parameters", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def model_settings(self) -> ModelSettings:
        """The part of the run that devices need."""
        return ModelSettings(**self.model_dump(include=set(ModelSettings.model_fields)))


class Task(ModelSettings):
    """What a message asks of a device's trainer, from the message's configuration record."""

    server_round: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    time_limit: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of training after which partial work is returned; 0: none."""
    fill_time: bool = False
    """Train on after the local epochs, until the time limit."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """Weight of FedProx's proximal term (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""

    @model_validator(mode="after")
    def _time_to_fill(self) -> Self:
        if self.fill_time and not self.time_limit:
            raise ValueError("fill-time needs a time-limit, or training would not end")
        return self
