"""What an image is made from, and where it is there already."""

import re
from collections.abc import Container, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from stat import S_IXUSR
from typing import Any

_DEFAULT_REGISTRY = re.compile(r"^docker\.io/(library/)?")


def _context(runtime: str, app: str) -> dict[str, Path]:
    """Path in the build context of the application image to the file on the control node.

    Bytecode, hidden files and the tests of the app are left out.
    """
    parts = {
        "": Path(runtime, "Dockerfile"),
        "flowerbed": Path(runtime, "flowerbed"),
        "app": Path(app),
    }
    found = {
        str(Path(prefix or "Dockerfile", path.relative_to(base) if prefix else "")): path
        for prefix, base in parts.items()
        for path in [base, *base.rglob("*")]
        if path.is_file() and path.suffix != ".pyc"
    }
    return {
        name: path
        for name, path in sorted(found.items())
        if not name.startswith("app/tests/") and "/." not in f"/{name}"
    }


def code_digests(runtime: str, app: str) -> list[list[str]]:
    """The build context of the application image: each path with its SHA-256.

    Args:
        runtime: directory of the Dockerfile and of the package `flowerbed`.
        app: directory of the default app.
    """
    return [
        [name, sha256(path.read_bytes()).hexdigest()]
        for name, path in _context(runtime, app).items()
    ]


def code_entries(runtime: str, app: str) -> list[dict[str, str]]:
    """The same files as `place_files` takes them, with their directories."""
    files = _context(runtime, app)
    parents = {parent for name in files for parent in Path(name).parents}
    return [
        *({"path": str(parent), "mode": "0755"} for parent in sorted(parents)),
        *(
            {
                "path": name,
                "src": str(path),
                "mode": "0755" if path.stat().st_mode & S_IXUSR else "0644",
            }
            for name, path in files.items()
        ),
    ]


def known_as(reference: str) -> str:
    """What an engine calls an image: without its default registry."""
    return _DEFAULT_REGISTRY.sub("", reference)


def found_in(
    candidates: Mapping[str, Mapping[str, str]],
    present: Container[str],
    images: Iterable[str],
    sources: list[str],
) -> dict[str, dict[str, str]]:
    """Images that need not be brought, each with the first source whose image is there.

    Args:
        candidates: image to source to what that source calls it.
        present: what the engine calls what it has.
    """
    return {
        image: {"source": source, "reference": candidates[image][source]}
        for image in images
        for source in reversed(sources)
        if known_as(candidates[image].get(source, "")) in present
    }


def layer_problem(message: str, machine: str) -> str:
    """Why the image of an app's further dependencies cannot be built.

    Args:
        message: of the failed build, with its output.
        machine: the one that has built.
    """
    found = re.search(r"flowerbed: (.+?)(?:\\x1b|\x1b|\\n|\n|$)", str(message))
    return f"{machine}: the app's requirement {found[1]}" if found else f"{machine}: {message}"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Their names."""
        return {
            "code_digests": code_digests,
            "code_entries": code_entries,
            "found_in": found_in,
            "known_as": known_as,
            "layer_problem": layer_problem,
        }
