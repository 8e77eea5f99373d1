"""Images and dependencies are pinned: versions and digests in one file, hashes in the locks."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, files, load, program, read_yaml, texts

images = load(ROOT / "plugins/filter/images.py")
bundle = load(ROOT / "plugins/filter/bundle.py")

VERSIONS = "roles/images/vars/main.yml"
REGISTRIES = re.compile(r"\b(?:docker|ghcr|quay|gcr)\.io/")
ENTRY = re.compile(
    r"^(?P<requirement>[^\s#\\-][^\\\n]*?)(?P<hashes>(?: \\\n +--hash=\S+)*)$", re.MULTILINE
)
LATEST = re.compile(r":lates[t]\b")  # which is not found in this line


def _locked(lock: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Name to requirement and hashes."""
    text = (ROOT / "runtime" / lock).read_text()
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
    wanted = _requirements("runtime/requirements.in")
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


# --- bundles -------------------------------------------------------------------------------------

PULLED = f"docker.io/grafana/grafana@sha256:{'ab' * 32}"
BUNDLED: dict[str, str] = {
    "dependencies": "flowerbed/dependencies:1",
    "application": "flowerbed/application:2",
    "grafana": PULLED,
}
KNOWN = {
    "dependencies": {"registry": "flowerbed/dependencies:0", "debian": "flowerbed/dependencies:1"},
    "gate": {"registry": "flowerbed/gate:0", "debian": "flowerbed/gate:1"},
    "grafana": {"registry": PULLED},
}


def _manifest(**changes: Any) -> dict[str, Any]:
    inspected = [{"Id": f"sha256:{number}"} for number in range(3)]
    images = bundle.bundle_images(BUNDLED, inspected)
    files = {entry["file"]: {"sha256": "00", "bytes": 7} for entry in images.values()}
    whole = {"flowerbed": "abc", "architecture": "x86_64", "images": images, "files": files}
    return whole | changes


def _problems(manifest: dict[str, Any], **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "needed": ["dependencies", "grafana"],
        "known": KNOWN,
        "optional": ["grafana"],
        "architecture": "x86_64",
        "sizes": {"application.tar": 7, "grafana.tar": 7},
    }
    told: list[str] = bundle.bundle_problems(manifest, **(given | changes))
    return told


def test_a_bundle_names_what_was_pulled_by_its_digest() -> None:
    images = _manifest()["images"]
    assert images["dependencies"]["file"] == images["application"]["file"] == "application.tar"
    assert images["application"]["reference"] == "flowerbed/application:2"
    assert images["grafana"]["reference"] == "flowerbed/grafana:abababababab"


def test_what_a_bundle_has_brought_is_there_without_it() -> None:
    known = {"dependencies": KNOWN["dependencies"], "grafana": KNOWN["grafana"]}
    names = {
        "dependencies": {"archive": "flowerbed/dependencies:1"},
        "grafana": {"archive": "flowerbed/grafana:abababababab"},
    }
    assert bundle.bundle_candidates(_manifest(), known, []) == names
    there = [name["archive"] for name in names.values()]
    assert bundle.bundle_candidates({}, known, [*there, "another:1"]) == names
    assert bundle.bundle_candidates({}, known, []) == {}
    assert _problems({}, needed=[]) == []
    assert _problems({}, needed=["grafana"]) == []
    assert _problems(_manifest(), needed=[], architecture="aarch64") == []


def test_a_bundle_of_these_files_is_good() -> None:
    assert _problems(_manifest()) == []
    without = {k: v for k, v in _manifest()["images"].items() if k != "grafana"}
    assert _problems(_manifest(images=without)) == []
    # Before there is an engine, nothing is known of it.
    assert _problems(_manifest(), architecture="") == []


@pytest.mark.parametrize(
    ("manifest", "changes", "says"),
    [
        ({}, {}, ("no manifest.yml",)),
        (_manifest(), {"architecture": "aarch64"}, ("for x86_64", "is aarch64", "host_vars")),
        (_manifest(), {"needed": ["gate"]}, ("no image of gate",)),
        (_manifest(), {"sizes": {"application.tar": 7}}, ("grafana.tar is missing",)),
        (
            _manifest(),
            {"sizes": {"application.tar": 6, "grafana.tar": 7}},
            ("application.tar is not whole",),
        ),
        (
            _manifest(),
            {"known": KNOWN | {"dependencies": {"debian": "flowerbed/dependencies:9"}}},
            ("is flowerbed/dependencies:1", "needs flowerbed/dependencies:9", "(abc)"),
        ),
    ],
)
def test_a_bundle_that_is_of_no_use_says_why(
    manifest: dict[str, Any], changes: dict[str, Any], says: tuple[str, ...]
) -> None:
    (text,) = _problems(manifest, **changes)
    assert all(words in text for words in says), text


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    """Before anything of it is brought to a machine."""
    (tmp_path / "application.tar").write_text("damaged")
    (tmp_path / "manifest.yml").write_text(yaml.safe_dump(_manifest()))
    load_it = {"name": "images", "tasks_from": "load"}
    tasks = [{"ansible.builtin.include_role": load_it, "vars": {"__images_name": "dependencies"}}]
    plays = [{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(plays))
    command = [program("ansible-playbook"), str(tmp_path / "play.yml")]
    command += ["-e", f"images_archive={tmp_path} images_source=archive"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    said = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert f"{tmp_path}/application.tar has been damaged or replaced" in said
    assert "changed=0" in said


def test_the_code_is_told_by_paths_and_contents(tmp_path: Path) -> None:
    runtime, app = tmp_path / "runtime", tmp_path / "my app"
    for path in (
        *(runtime / "Dockerfile", runtime / "other", runtime / "flowerbed/b"),
        *(runtime / "flowerbed/__pycache__/b.pyc", app / "pyproject.toml", app / "package/a"),
        *(app / "tests/test_a.py", app / ".venv/c"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    directories = str(runtime), str(app)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    names = ["Dockerfile", "app/package/a", "app/pyproject.toml", "flowerbed/b"]
    assert images.code_digests(*directories) == [[name, empty] for name in names]
    (runtime / "flowerbed/b").write_text("b = 1")
    assert images.code_digests(*directories)[-1][1] != empty
    (runtime / "flowerbed/b").chmod(0o700)
    assert images.code_entries(*directories) == [
        *({"path": path, "mode": "0755"} for path in (".", "app", "app/package", "flowerbed")),
        {"path": "Dockerfile", "src": f"{runtime}/Dockerfile", "mode": "0644"},
        {"path": "app/package/a", "src": f"{app}/package/a", "mode": "0644"},
        {"path": "app/pyproject.toml", "src": f"{app}/pyproject.toml", "mode": "0644"},
        {"path": "flowerbed/b", "src": f"{runtime}/flowerbed/b", "mode": "0755"},
    ]


def test_a_requirement_that_cannot_be_installed_is_named() -> None:
    """In one line, out of the engine's long message on a build that has failed."""
    failed = (
        "Error building flowerbed/layer - code: 1, message: The command ... returned 1, logs: "
        "['Step 7/10', 'flowerbed: numpy>=99 cannot be installed: no versions fit\\x1b[0m', '']"
    )
    told = images.layer_problem(failed, "server")
    assert told == "server: the app's requirement numpy>=99 cannot be installed: no versions fit"
    assert images.layer_problem("no such image", "server") == "server: no such image"


def test_what_is_there_is_taken_from_the_first_source_that_has_it() -> None:
    prometheus = {
        "registry": f"{'docker'}.io/prom/prometheus@sha256:1",
        "debian": "lab/prometheus:2",
    }
    candidates = {"prometheus": prometheus, "grafana": {"registry": "grafana@sha256:3"}}

    def found(*present: str) -> dict[str, str]:
        answer = images.found_in(candidates, present, candidates, ["registry", "debian"])
        return {image: told["source"] for image, told in answer.items()}

    assert found() == {}
    assert found("lab/prometheus:2") == {"prometheus": "debian"}
    assert found("lab/prometheus:2", "prom/prometheus@sha256:1") == {"prometheus": "registry"}
    assert found("grafana@sha256:3") == {"grafana": "registry"}
