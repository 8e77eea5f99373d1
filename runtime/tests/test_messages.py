"""Flower's records as a header and bytes, and back."""

import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flowerbed import messages
from flowerbed.messages import array_bytes, is_sealed, pack, seal, unpack, unseal


def _records() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "matrix": Array(np.arange(6.0).reshape(2, 3)),
                    "empty": Array(np.zeros((0, 4), np.float32)),
                    "number": Array(np.array(3, np.int16)),
                }
            ),
            "metrics": MetricRecord({"whole": 1, "real": 1.0, "nan": math.nan, "list": [1.5, 2.0]}),
            "config": ConfigRecord(
                {
                    "bytes": b"\x00\xff",
                    "text": "base64:looks like bytes",
                    "other": "text:looks like text",
                    "true": True,
                    "list": ["a", "base64:b"],
                    "blobs": [b"a", b""],
                }
            ),
        }
    )


def test_records_come_back_as_they_were() -> None:
    records = _records()
    header, blocks = pack(records)
    back = unpack(json.loads(json.dumps(header)), b"".join(blocks))
    assert list(back) == list(records)
    for key, array in records["arrays"].items():
        assert back["arrays"][key].numpy().tolist() == array.numpy().tolist()
        assert back["arrays"][key].dtype == array.dtype
    metrics = dict(back["metrics"])
    assert math.isnan(metrics.pop("nan"))
    assert metrics == {"whole": 1, "real": 1.0, "list": [1.5, 2.0]}
    assert type(metrics["real"]) is float
    assert dict(back["config"]) == dict(records["config"])
    assert array_bytes(back) == array_bytes(records) == sum(map(len, blocks))


@pytest.mark.parametrize("small", [0, 4 * 2**20])
def test_an_envelope_is_opened_again(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of a large message travel as an array, which Flower cuts into pieces."""
    monkeypatch.setattr(messages, "_SMALL", small)
    envelope = seal({"one": [1, "two"]}, b"\x01\x02")
    assert is_sealed(envelope)
    assert bool(envelope.array_records) == (small == 0)
    assert seal({}, messages.block(b"12"))["block"] == messages.block(b"12")
    header, data = unseal(envelope)
    assert (header, data) == ({"one": [1, "two"]}, b"\x01\x02")
    assert unseal(seal({}))[1] == b""


def test_an_apps_own_content_is_no_envelope() -> None:
    assert not is_sealed(_records())
