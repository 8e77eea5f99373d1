"""The image as it is shipped: what it must not hold, and who it runs as."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(sys.prefix) / "lib" / "python3.13" / "site-packages"


def test_it_runs_as_a_user_without_rights() -> None:
    assert os.getuid() == 10001
    assert not os.access("/runtime/flowerbed/settings.py", os.W_OK)
    assert not os.access("/app/pyproject.toml", os.W_OK)


@pytest.mark.parametrize("tool", ["gcc", "cc", "ld", "make", "pip", "pip3", "uvx", "git", "curl"])
def test_there_is_no_tool_to_build_or_fetch_with(tool: str) -> None:
    assert shutil.which(tool) is None


@pytest.mark.parametrize("module", ["pip", "ensurepip", "setuptools", "clang"])
def test_there_is_no_installer(module: str) -> None:
    if module == "ensurepip":  # Debian's Python has the module, but not what it installs
        assert not list(Path("/usr/share/python-wheels").glob("*.whl"))
    else:
        assert importlib.util.find_spec(module) is None


def test_there_are_no_headers_and_static_libraries() -> None:
    assert PACKAGES.is_dir()
    left = [path for suffix in ("h", "hpp", "a") for path in PACKAGES.rglob(f"*.{suffix}")]
    assert left == []


def test_nothing_of_the_builder_is_left() -> None:
    assert not Path("/build").exists()
    assert not list(Path("/etc").glob("pip*"))
    assert not [name for name in os.environ if name.startswith(("PIP_", "SSL_CERT", "REQUESTS_"))]


def test_the_package_is_found_and_the_app_is_not() -> None:
    """An app is what a run brings; the default one is there to measure machines with."""
    code = "from importlib.util import find_spec as find; "
    code += "print(find('flowerbed').origin, find('mobilenet'))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env={}, cwd="/tmp", capture_output=True, text=True
    )
    assert done.stdout.split() == ["/runtime/flowerbed/__init__.py", "None"]
    assert Path("/app/pyproject.toml").exists()
    assert not Path("/app/tests").exists()


def test_what_libraries_read_when_they_are_loaded_is_in_the_environment() -> None:
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"


def test_everything_is_compiled() -> None:
    """A process of its own for each message has no time to compile what it imports."""
    for source in (
        Path("/runtime/flowerbed/device/client.py"),
        Path("/app/mobilenet/client_app.py"),
        PACKAGES / "flwr" / "__init__.py",
    ):
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), source


def test_what_is_installed_fits_together() -> None:
    code = "import flwr, flwr_datasets, tensorflow, prometheus_client, matplotlib, PIL, pyarrow"
    subprocess.run([sys.executable, "-c", code], check=True)
