"""What a process computes with."""

import os
from pathlib import Path

import numpy as np
import pytest

from flowerbed import environment
from flowerbed.environment import describe_environment

X86 = """processor\t: 0
model name\t: A Processor 9000
flags\t\t: fpu sse sse4_2 avx avx2 fma avx512f amx_int8 aes

processor\t: 1
model name\t: Another
"""
ARM = """processor : 0
Features : fp asimd asimddp crc32 sve2

Model : Raspberry Pi 5
"""


@pytest.mark.parametrize(
    ("text", "name", "extensions"),
    [
        (X86, "A Processor 9000", ["amx_int8", "avx", "avx2", "avx512f", "fma", "sse4_2"]),
        (ARM, "Raspberry Pi 5", ["asimd", "asimddp", "sve2"]),
        ("", os.uname().machine, []),
    ],
)
def test_the_processor_and_its_vector_extensions(
    text: str, name: str, extensions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)
    found = describe_environment(2, 1)
    assert (found["processor"], found["vector_extensions"]) == (name, extensions)


def test_switches_that_change_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("OTHER", "1")
    found = describe_environment(1.5, 2, 2**30)
    assert found["switches"]["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert "OTHER" not in found["switches"]
    assert (found["cores"], found["threads"], found["memory"]) == (1.5, 2, 2**30)
    assert found["libraries"]["numpy"] == np.__version__
    assert found["kernel"] == os.uname().release
