"""What an app needs beyond the image: its layer, a directory below /apps on every machine.

    python -m flowerbed.server.layer REQUIREMENTS TARGET

installs the requirements in the file REQUIREMENTS, one a line, into the directory TARGET. It is
called while an image is built, and nowhere else: nothing is installed when an app runs. The image's
own packages keep their versions; those that it has are left out of the layer.
"""

import compileall
import hashlib
import json
import py_compile
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LAYERS = Path("/apps")
_ALWAYS_THERE = ("flowerbed", "flwr")
"""Not asked for by version or extra: the first is no installed package, and of the second the
control node has compared the version. Its extra `simulation` is of no use in the lab."""
_ALSO_KNOWN_AS = {"tensorflow": "tensorflow-cpu"}
"""Packages under whose name the image may have another one with the same modules."""
_FAILURES = {
    "has no usable wheels|no wheels|--no-build|building from source is disabled": (
        "there is no wheel for this Python and processor, and the lab builds nothing from source"
    ),
    "Failed to fetch|error sending request|Could not connect|Connection": (
        "the package index cannot be reached from the machine that builds the layer"
    ),
    "No solution found": "no versions fit together and with the image's own packages",
}


class LayerError(Exception):
    """The requirements cannot be installed; the message names them and says why."""


def versions() -> dict[str, str]:
    """The packages of the image by their normalised names."""
    found = {canonicalize_name(each.name): each.version for each in metadata.distributions()}
    for name, other in _ALSO_KNOWN_AS.items():
        if other in found:
            found.setdefault(canonicalize_name(name), found[canonicalize_name(other)])
    return {str(name): version for name, version in found.items()}


def _applies(marker: Marker | None, extra: str = "") -> bool:
    return marker is None or marker.evaluate({"extra": extra})


def is_present(requirement: Requirement) -> bool:
    """Whether the image satisfies a requirement, what its extras need included."""
    name = canonicalize_name(requirement.name)
    if name in _ALWAYS_THERE:
        return True
    for known_as in (name, _ALSO_KNOWN_AS.get(name, name)):
        try:
            found = metadata.distribution(known_as)
        except metadata.PackageNotFoundError:
            continue
        if requirement.url or not requirement.specifier.contains(found.version, prereleases=True):
            return False
        needs = [Requirement(text) for text in found.requires or ()]
        return all(
            is_present(need)
            for extra in requirement.extras
            for need in needs
            if not _applies(need.marker) and _applies(need.marker, extra)
        )
    return False


def missing(dependencies: Iterable[str]) -> list[str]:
    """The requirements of an app that the image does not satisfy."""
    wanted = {text: Requirement(text) for text in dependencies}
    return sorted(
        text for text, each in wanted.items() if _applies(each.marker) and not is_present(each)
    )


def name_of(requirements: list[str]) -> str:
    """The name of a layer: a hash of what is asked for and of what it must fit to."""
    if not requirements:
        return ""
    parts = [requirements, sorted(versions().items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _uv(*arguments: str) -> None:
    """Run uv.

    Raises:
        subprocess.CalledProcessError: it has failed; what it printed is in the exception.
    """
    command = ["uv", "pip", *arguments, "--python", sys.executable, "--only-binary", ":all:"]
    subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def resolve(requirements: Iterable[str]) -> list[str]:
    """All that requirements need, as name==version, those that the image has included.

    Raises:
        subprocess.CalledProcessError: see `_uv`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted, constraints, chosen = (Path(scratch, name) for name in ("in", "constraints", "out"))
        wanted.write_text("\n".join(requirements))
        has = (f"{name}=={version}" for name, version in versions().items())
        constraints.write_text("\n".join(has))
        _uv(
            *("compile", str(wanted), "--constraints", str(constraints)),
            *("--output-file", str(chosen), "--no-header", "--no-annotate"),
        )
        return [line for line in chosen.read_text().splitlines() if line.strip()]


def install(requirements: list[str], target: Path) -> list[str]:
    """Install into `target` what the image does not have; return it as name==version.

    Raises:
        LayerError: that is not possible.
    """
    has = versions()
    try:
        chosen = resolve(requirements)
        more = [line for line in chosen if canonicalize_name(Requirement(line).name) not in has]
        target.mkdir(parents=True)
        _uv("install", "--no-deps", "--target", str(target), *more)
    except subprocess.CalledProcessError as error:
        raise LayerError(_explain(requirements, error.stdout)) from None
    (target / ".lock").unlink(missing_ok=True)  # uv's own, which anyone may write
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(target, quiet=2, invalidation_mode=unchecked)
    return more


def _explain(requirements: list[str], said: str) -> str:
    """One sentence on why requirements cannot be installed: the first that fails by itself, if any.

    Args:
        requirements: all that were asked for.
        said: what uv has printed.
    """
    for alone in requirements if len(requirements) > 1 else ():
        try:
            resolve([alone])
        except subprocess.CalledProcessError as error:
            return _explain([alone], error.stdout)
    told = " ".join(re.sub(r"[^\x20-\x7e]", " ", said).split())
    reason = next((why for words, why in _FAILURES.items() if re.search(words, told)), "uv failed")
    return f"{', '.join(requirements)} cannot be installed: {reason}. uv says: {told}"


def main(requirements: str, target: str) -> None:
    """Install what a file asks for."""
    lines = Path(requirements).read_text().splitlines()
    try:
        print("installed: " + ", ".join(install([line for line in lines if line], Path(target))))
    except LayerError as error:
        sys.exit(f"flowerbed: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
