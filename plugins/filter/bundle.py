"""A bundle: every image of the lab as files in one directory, with a manifest of digests.

Each image has a tag in it that says what it was made from, so that what a bundle holds can be held
against what these files would build or pull.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_SHARED = {"dependencies": "application"}
"""Images that are in the file of another one, with which they share most layers."""


def bundled(reference: str, image: str) -> str:
    """What a bundle calls an image: its tag, or for one that was pulled a tag of its digest.

    An archive of images keeps tags and no digests of a registry.
    """
    if "@" not in reference:
        return reference
    return f"flowerbed/{image}:{reference.rpartition(':')[2][:12]}"


def bundle_images(
    references: Mapping[str, str], inspected: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """The images of a manifest.

    Args:
        references: image to what the engine calls it.
        inspected: what the engine tells of each, in their order.

    Returns:
        Image to its `reference` in the bundle, its `id`, and the `file` that holds it.
    """
    return {
        image: {
            "reference": bundled(reference, image),
            "id": str(told["Id"]),
            "file": f"{_SHARED.get(image, image)}.tar",
        }
        for (image, reference), told in zip(references.items(), inspected, strict=True)
    }


def bundle_file(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of a file, from what `stat` does."""
    return {"sha256": told["checksum"], "bytes": told["size"]}


def _right(image: str, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What an image may be called that a bundle of these files has brought."""
    return [bundled(reference, image) for reference in known[image].values()]


def bundle_candidates(
    manifest: Mapping[str, Any],
    known: Mapping[str, Mapping[str, str]],
    present: Iterable[str],
) -> dict[str, dict[str, str]]:
    """What the source `archive` calls each image: what is there already, or else in the bundle.

    For the arguments see `bundle_problems`; `present` are the names that the engine knows.
    """
    have, images = set(present), manifest.get("images") or {}
    names = {image: [name for name in _right(image, known) if name in have] for image in known}
    names |= {
        image: [images[image]["reference"]]
        for image, found in names.items()
        if not found and image in images
    }
    return {image: {"archive": found[0]} for image, found in names.items() if found}


def bundle_problems(
    manifest: Mapping[str, Any],
    *,
    needed: Iterable[str],
    known: Mapping[str, Mapping[str, str]],
    optional: Iterable[str],
    architecture: str,
    sizes: Mapping[str, int],
) -> list[str]:
    """Why a machine cannot take its images from a bundle; nothing where it can.

    Args:
        manifest: the bundle's; empty where it has none.
        needed: images that the machine needs and has not.
        known: image to what each other source calls it, with these files.
        optional: images that a bundle may lack.
        architecture: the machine's, as its engine says it; empty where there is none yet.
        sizes: bytes of each file that is there.
    """
    needed = list(needed)
    if not manifest:
        if set(needed) <= set(optional):
            return []
        return ["it has no manifest.yml, which is written last: it is no bundle, or half of one"]
    problems = []
    if needed and architecture and architecture != manifest["architecture"]:
        problems.append(
            f"its images are for {manifest['architecture']}, and the machine is {architecture}: "
            "make one on a machine of that architecture, and name it for this one alone, in "
            "host_vars"
        )
    images = manifest["images"]
    for image in needed:
        entry = images.get(image)
        if entry is None:
            if image not in optional:
                problems.append(f"it has no image of {image}")
            continue
        right = _right(image, known)
        if entry["reference"] not in right:
            problems.append(
                f"its image of {image} is {entry['reference']}, and this Flowerbed needs "
                f"{' or '.join(right)}: it was made by another one ({manifest['flowerbed']})"
            )
        size = sizes.get(entry["file"])
        if size is None:
            problems.append(f"{entry['file']} is missing")
        elif size != manifest["files"][entry["file"]]["bytes"]:
            problems.append(f"{entry['file']} is not whole")
    return list(dict.fromkeys(problems))


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "bundle_candidates": bundle_candidates,
            "bundle_file": bundle_file,
            "bundle_images": bundle_images,
            "bundle_problems": bundle_problems,
            "bundled": bundled,
        }
