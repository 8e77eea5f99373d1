"""Flower's records as one JSON header and one block of bytes, and back.

Flower ships each array of a message as an object of its own, and asks for each with a request of
its own: a model of 262 arrays takes a slow device 9 to 18 seconds to receive. The lab therefore
sends one message as one array (an *envelope*, see `seal`), and hands the same bytes from the
ClientApp process to the worker, who alone makes arrays of them. Only Flower's public names are
used, and nothing that is received is executed.
"""

import base64
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Buffer = bytes | bytearray | memoryview

_ENVELOPE = "flowerbed"
_BLOCK = "block"
_SMALL = 4 * 2**20
"""Bytes up to which data are one value of a ConfigRecord, see `block`."""
_BYTES = "base64:"
"""Marks a value of a ConfigRecord that was bytes. Text that begins so is marked, too."""
_TEXT = "text:"


def _config_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return _BYTES + base64.b64encode(value).decode()
    if isinstance(value, str) and value.startswith((_BYTES, _TEXT)):
        return _TEXT + value
    if isinstance(value, list):
        return [_config_value(each) for each in value]
    return value


def _from_config_value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_BYTES):
        return base64.b64decode(value.removeprefix(_BYTES))
    if isinstance(value, str) and value.startswith(_TEXT):
        return value.removeprefix(_TEXT)
    if isinstance(value, list):
        return [_from_config_value(each) for each in value]
    return value


def pack(records: RecordDict) -> tuple[list[Any], list[Buffer]]:
    """Take records apart.

    Returns:
        What `unpack` needs beside the bytes, as JSON values; and the bytes of all arrays in order.
    """
    header: list[Any] = []
    blocks: list[Buffer] = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            entries = []
            for key, array in record.items():
                entries.append([key, array.dtype, list(array.shape), array.stype, len(array.data)])
                blocks.append(array.data)
            header.append([name, "arrays", entries])
        elif isinstance(record, MetricRecord):
            header.append([name, "metrics", dict(record)])
        else:
            values = {key: _config_value(value) for key, value in record.items()}
            header.append([name, "config", values])
    return header, blocks


def unpack(header: Iterable[Any], data: Buffer) -> RecordDict:
    """Put records together again; `data` are the bytes of `pack`, one after another."""
    records = RecordDict()
    view, start = memoryview(data), 0
    for name, kind, content in header:
        if kind == "arrays":
            arrays = ArrayRecord()
            for key, dtype, shape, stype, size in content:
                # Not copied where one array is all there is: that may be a large model.
                whole = isinstance(data, bytes) and size == len(data)
                part = data if whole else bytes(view[start : start + size])
                arrays[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=part)
                start += size
            records[name] = arrays
        elif kind == "metrics":
            records[name] = MetricRecord(content)
        else:
            values = {key: _from_config_value(value) for key, value in content.items()}
            records[name] = ConfigRecord(values)
    return records


def array_bytes(records: RecordDict) -> int:
    """Size of all arrays in bytes."""
    return sum(len(a.data) for record in records.array_records.values() for a in record.values())


def block(data: Buffer) -> ConfigRecord | ArrayRecord:
    """Bytes as a record of an envelope.

    One record may be in many envelopes: Flower then computes its hash and sends it once. Large data
    become an array, which Flower cuts into pieces; smaller ones save two requests at either end.
    """
    if len(data) > _SMALL:
        array = Array(dtype="uint8", shape=(len(data),), stype="flowerbed", data=bytes(data))
        return ArrayRecord({_BLOCK: array})
    return ConfigRecord({_BLOCK: bytes(data)})


def seal(header: dict[str, Any], data: Buffer | ConfigRecord | ArrayRecord = b"") -> RecordDict:
    """An envelope: the content of a message that carries `header` and `data` for the lab.

    Args:
        header: JSON values.
        data: bytes, or the record that `block` has made of them.
    """
    records = RecordDict({_ENVELOPE: ConfigRecord({"header": json.dumps(header)})})
    if data:
        records[_BLOCK] = block(data) if isinstance(data, bytes | bytearray | memoryview) else data
    return records


def is_sealed(records: RecordDict) -> bool:
    """Whether the content of a message is an envelope."""
    return _ENVELOPE in records.config_records


def unseal(records: RecordDict) -> tuple[dict[str, Any], bytes]:
    """The header and data of an envelope."""
    header: dict[str, Any] = json.loads(str(records.config_records[_ENVELOPE]["header"]))
    if _BLOCK not in records:
        return header, b""
    data = records[_BLOCK][_BLOCK]
    return header, data.data if isinstance(data, Array) else data


def as_numpy(records: RecordDict) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """All arrays by record and key."""
    return {
        name: {key: array.numpy() for key, array in record.items()}
        for name, record in records.array_records.items()
    }
