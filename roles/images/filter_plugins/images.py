"""What an image is made from, and where it is there already."""

import re
from collections.abc import Container, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from stat import S_IXUSR
from typing import Any

_DEFAULT_REGISTRY = re.compile(r"^docker\.io/(library/)?")


_CODE = ("Dockerfile", "pyproject.toml", "flowerbed")


def _files_of(directory: str) -> list[Path]:
    """The files of the application's image in its directory on the control node.

    Bytecode is passed over: it follows from the rest.
    """
    found = (
        path
        for name in _CODE
        for path in [Path(directory, name), *Path(directory, name).rglob("*")]
    )
    return sorted(path for path in found if path.is_file() and path.suffix != ".pyc")


def code_digests(directory: str) -> list[list[str]]:
    """The files of the application's image, each path with its SHA-256."""
    return [
        [str(path.relative_to(directory)), sha256(path.read_bytes()).hexdigest()]
        for path in _files_of(directory)
    ]


def code_entries(directory: str) -> list[dict[str, str]]:
    """The same files as `place_files` takes them, with their directories."""
    files = _files_of(directory)
    parents = {parent for path in files for parent in path.relative_to(directory).parents}
    return [
        *({"path": str(parent), "mode": "0755"} for parent in sorted(parents)),
        *(
            {
                "path": str(path.relative_to(directory)),
                "src": str(path),
                "mode": "0755" if path.stat().st_mode & S_IXUSR else "0644",
            }
            for path in files
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


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Their names."""
        return {
            "code_digests": code_digests,
            "code_entries": code_entries,
            "found_in": found_in,
            "known_as": known_as,
        }
