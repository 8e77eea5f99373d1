"""Settings of the run and of the device, checked once.

Flower hands both to an app as flat dictionaries with kebab-case keys: `context.run_config` holds
the keys of pyproject.toml, `context.node_config` what the device was started with.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Check `values`; a ValueError names each wrong key, its value and what is needed."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [f"{e['loc'][0]} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise ValueError(f"{cls.__name__}: {'; '.join(problems)}") from None


class ModelSettings(_Settings):
    """The network; server and devices must build the same one."""

    model: Literal["mobilenet", "mobilenetv2", "linear"]
    """`linear` is softmax regression in numpy; a device that trains it needs no TensorFlow."""
    alpha: Annotated[float, Field(gt=0, le=2)]
    """Width multiplier (Howard et al. 2017, https://arxiv.org/abs/1704.04861)."""
    recipe: Literal["small-images", "original"]
    """`original` is Keras' network unchanged, without augmentation; see `mobilenet.model`."""


class RunSettings(ModelSettings):
    """The run configuration; pyproject.toml holds the defaults and the rest of the meanings."""

    num_server_rounds: Annotated[int, Field(ge=1)]
    strategy: str
    strategy_parameters: Json[dict[str, Any]]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    dataset: str
    examples: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(ge=0)]
    local_epochs: Annotated[int, Field(ge=0)]
    optimizer: Literal["", "sgd", "adam"]

    @property
    def network(self) -> ModelSettings:
        """The part of the settings that defines the network."""
        return ModelSettings(model=self.model, alpha=self.alpha, recipe=self.recipe)


class DeviceSettings(_Settings):
    """How one device trains, from its node configuration, which may hold other keys as well."""

    model_config = ConfigDict(extra="ignore")

    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    local_epochs: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def of(cls, node_config: Mapping[str, Any], run: RunSettings) -> Self:
        """The device's settings, replaced by those that the run sets for all devices."""
        keys = {"learning_rate", "local_epochs", "optimizer"}
        overrides = run.model_dump(include=keys, by_alias=True).items()
        return cls.parse({**node_config, **{key: value for key, value in overrides if value}})
