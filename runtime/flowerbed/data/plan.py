"""The plan of a machine's data: which data set is dealt, how, and to which devices."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DataError(Exception):
    """The data cannot be placed; the message names the variable and says what to do."""


class DeviceShare(BaseModel):
    """Which partition a device holds and how much of it."""

    model_config = ConfigDict(extra="forbid")
    device: str
    partition: Annotated[int, Field(ge=0)]
    fraction: Annotated[float, Field(gt=0, le=1)]
    bytes: Annotated[int, Field(ge=0)] = 0
    """Size of the device's arrays at most; 0: no limit."""


class AppArrays(BaseModel):
    """The app's function that turns a data set into arrays; without one the columns are taken."""

    model_config = ConfigDict(extra="forbid")
    directory: str = ""
    """Where the app's files are."""
    arrays: str = ""
    """`package.module:function` in that directory, or empty."""
    hash: str = ""
    """Hash of the app's files, so that a plan changes when the function may have changed."""


class Plan(BaseModel):
    """What one machine prepares."""

    model_config = ConfigDict(extra="forbid")
    dataset: str
    """A name on the Hugging Face hub, an absolute directory of parquet files, or `digits`."""
    configuration: str = ""
    """Configuration of the data set; of a directory, the subdirectory that holds its files."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: the newest."""
    splits: dict[str, str] = {}
    """What `train` and `test` are called. By default train, and test or else validation, if there
    is one; an empty `test`: none."""
    label: str = ""
    """Column that partitioners deal by; by default the only ClassLabel column."""
    fallback: Literal["", "digits"] = ""
    """Used instead where the hub cannot be reached."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Training examples that are dealt to all devices together; 0: all."""
    partitioner: Literal[
        "iid",
        "dirichlet",
        "inner_dirichlet",
        "pathological",
        "shard",
        "distribution",
        "continuous",
        "linear",
        "square",
        "exponential",
        "size",
        "natural_id",
        "grouped_natural_id",
    ] = "iid"
    """Of flwr_datasets.partitioner: all that deal examples and need no function."""
    partitioner_parameters: dict[str, Any] = {}
    """Arguments of its constructor beyond the label, the number of devices and the seed."""
    partitions: Annotated[int, Field(ge=1)]
    """Number of devices of the lab."""
    seed: int
    devices: list[DeviceShare]
    test: bool = False
    """Also write the test split, for central evaluation."""
    app: AppArrays = AppArrays()

    @model_validator(mode="after")
    def _partitions_exist(self) -> "Plan":
        for share in self.devices:
            if share.partition >= self.partitions:
                raise ValueError(f"device {share.device}: there is no partition {share.partition}")
        return self
