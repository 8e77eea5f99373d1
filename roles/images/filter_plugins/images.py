"""What an image is made from, and where it is there already."""

import re
from collections.abc import Container, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

_DEFAULT_REGISTRY = re.compile(r"^docker\.io/(library/)?")


def code_digests(directory: str) -> list[list[str]]:
    """The files under a directory of the control node, each path with its SHA-256.

    Bytecode is passed over: it follows from the rest.
    """
    root = Path(directory)
    return [
        [str(path.relative_to(root)), sha256(path.read_bytes()).hexdigest()]
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
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
        return {"code_digests": code_digests, "known_as": known_as, "found_in": found_in}
