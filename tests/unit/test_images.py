"""Images and dependencies are pinned: versions and digests in one file, hashes in the locks."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, files, read_yaml, texts

VERSIONS = "roles/images/vars/main.yml"
REGISTRIES = re.compile(r"\b(?:docker|ghcr|quay|gcr)\.io/")
ENTRY = re.compile(
    r"^(?P<requirement>[^\s#\\-][^\\\n]*?)(?P<hashes>(?: \\\n +--hash=\S+)*)$", re.MULTILINE
)
LATEST = re.compile(r":lates[t]\b")  # which is not found in this line


def _locked(lock: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Name to requirement and hashes."""
    text = (ROOT / "app" / lock).read_text()
    entries: dict[str, tuple[Requirement, list[str]]] = {}
    for match in ENTRY.finditer(text):
        requirement = Requirement(match["requirement"])
        hashes = re.findall(r"--hash=(\S+)", match["hashes"])
        entries[canonicalize_name(requirement.name)] = requirement, hashes
    assert len(re.findall(r"^\S+==", text, re.MULTILINE)) == len(entries)
    return entries


def _pinned(requirement: Requirement) -> bool:
    return re.fullmatch(r"==[^*,]+", str(requirement.specifier)) is not None


def _requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    lines = [line.split(" #")[0].strip() for line in lines if not line.startswith(("#", "-"))]
    return [Requirement(line) for line in lines if line]


def test_every_image_of_a_registry_is_pinned_by_digest() -> None:
    images = read_yaml(ROOT / VERSIONS)["__images_registry"]
    assert {"base", "prometheus", "grafana", "cadvisor"} <= set(images)
    for name, (repository, digest) in images.items():
        assert REGISTRIES.match(repository), name
        assert ":" not in repository, f"{name}: the digest says which, a tag does not"
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest), name


def test_no_other_file_names_an_image_of_a_registry() -> None:
    found = [
        name
        for name, text in texts()
        if not name.startswith("tests/") and not name.endswith(".md") and REGISTRIES.search(text)
    ]
    assert found == [VERSIONS]


def test_nothing_is_the_newest_that_there_is() -> None:
    assert [name for name, text in texts() if LATEST.search(text)] == []


def test_dockerfiles_build_on_what_they_are_given() -> None:
    dockerfiles = [path for path in files() if path.name.endswith("Dockerfile")]
    assert dockerfiles
    for path in dockerfiles:
        bases = re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)
        assert bases, path
        assert all(base == "scratch" or base.startswith("${") for base in bases), path


@pytest.mark.parametrize("lock", ["requirements.lock", "digits.lock"])
def test_the_locks_hold_a_version_and_hashes_for_each_requirement(lock: str) -> None:
    for name, (requirement, hashes) in _locked(lock).items():
        assert _pinned(requirement), name
        assert hashes, name
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), name


def test_the_lock_is_that_of_requirements_in() -> None:
    wanted = _requirements("app/requirements.in")
    assert wanted
    locked = _locked("requirements.lock")
    for requirement in wanted:
        found, _ = locked[canonicalize_name(requirement.name)]
        assert found.specifier == requirement.specifier, requirement.name
        assert found.marker == requirement.marker, requirement.name


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements.txt"])
def test_the_control_node_is_pinned(file: str) -> None:
    requirements = _requirements(file)
    assert requirements
    assert [str(each) for each in requirements if not _pinned(each)] == []
