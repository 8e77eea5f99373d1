"""Names of the lab's images, the files that they are built from, and images to remove.

The tag of an image that the lab builds is a hash of everything that it is built from. An image that
exists is therefore never built again, and one whose parts have changed always is.
"""

import json
import os
import re
import shlex
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


def _tag(*parts: Any) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()[:12]


def base_images(
    pins: Mapping[str, list[str]], release: str, arguments: list[str]
) -> dict[str, str]:
    """Name of the Debian base by source.

    Args:
        pins: image to repository and digest in a registry.
        release: the release of Debian that the source `debian` installs.
        arguments: of mmdebstrap.
    """
    return {
        "registry": "@".join(pins["base"]),
        "debian": f"flowerbed/base:{release}-{_tag(release, list(arguments))}",
    }


def known_images(
    pins: Mapping[str, list[str]],
    base: Mapping[str, str],
    *,
    files: str,
    runtime: str,
    cadvisor_release: str,
) -> dict[str, dict[str, str]]:
    """Name of each image by source: `registry` or `debian`.

    The application is not among them: it is built on `dependencies`.

    Args:
        pins: image to repository and digest in a registry.
        base: see `base_images`.
        files: directory of the Dockerfiles of the role, one folder for each image.
        runtime: directory of the Dockerfile and the locks of the dependencies.
        cadvisor_release: the release of Debian that has a package of cAdvisor.
    """

    def built(image: str, source: str, *parts: str) -> str:
        dockerfile = Path(files, image, "Dockerfile").read_text()
        return f"flowerbed/{image}:{_tag(dockerfile, base[source], *parts)}"

    names = ("dependencies.Dockerfile", "requirements.lock", "digits.lock")
    locked = [Path(runtime, name).read_text() for name in names]
    known = {
        image: {"registry": "@".join(pins[image])}
        for image in ("prometheus", "grafana", "cadvisor")
    }
    known["prometheus"]["debian"] = built("prometheus", "debian")
    known["cadvisor"]["debian"] = built("cadvisor", "debian", cadvisor_release)
    known["gate"] = {source: built("gate", source) for source in base}
    known["dependencies"] = {
        source: f"flowerbed/dependencies:{_tag(*locked, base[source])}" for source in base
    }
    return known


def application_image(dependencies: str, runtime: str, app: str) -> str:
    """Name of the application image.

    Args:
        dependencies: name of the image that it is built on.
        runtime: directory of the Dockerfile and of the package `flowerbed`.
        app: directory of the default app.
    """
    return f"flowerbed/application:{_tag(code_digests(runtime, app), dependencies)}"


def known_as(reference: str) -> str:
    """The name that an engine gives an image: without the default registry."""
    return _DEFAULT_REGISTRY.sub("", reference)


def names_in(engine: Mapping[str, Any]) -> list[str]:
    """Tags and digests of all images that an engine has.

    Args:
        engine: the fact docker_engine of the role docker.
    """
    return [
        name
        for image in engine.get("images", [])
        for name in (*(image.get("RepoTags") or []), *(image.get("RepoDigests") or []))
    ]


def has_builder(engine: Mapping[str, Any]) -> bool:
    """Whether an engine has the builder stage of an image, which an interrupted build leaves."""
    labels = [image.get("Labels") or {} for image in engine.get("images", [])]
    return any(each.get("flowerbed.image") == "builder" for each in labels)


def _unused(engine: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Images that no container uses, the newest first."""
    used = {container["ImageID"] for container in engine.get("containers", [])}
    unused = [image for image in engine.get("images", []) if image["Id"] not in used]
    return sorted(unused, key=lambda image: image["Created"], reverse=True)


def _tags(images: Iterable[Mapping[str, Any]], pattern: str) -> list[str]:
    """Tags of images that begin with a pattern."""
    tags = [tag for image in images for tag in image.get("RepoTags") or []]
    return [tag for tag in tags if re.match(pattern, tag)]


def replaced_images(
    engine: Mapping[str, Any], chosen: Mapping[str, Mapping[str, str]], base: str
) -> list[str]:
    """Images that the lab has built before and does not need any more.

    The application before the present one stays: its containers run until they are replaced. An
    image that a container uses stays until a later call.

    Args:
        engine: the fact docker_engine of the role docker.
        chosen: image to what was chosen: its `source` and `reference`.
        base: name of the Debian base.
    """
    unused, needed = _unused(engine), {base, *(each["reference"] for each in chosen.values())}
    others = "|".join(["base", *(image for image in chosen if image != "application")])
    built = _tags(unused, rf"flowerbed/({others}):")
    applications = [tag for tag in _tags(unused, "flowerbed/application:") if tag not in needed]
    # A push gives an image another name for a moment, which an interrupted one leaves.
    pushed = _tags(engine.get("images", []), r"127\.0\.0\.1:\d+/flowerbed/")
    return [*(tag for tag in built if tag not in needed), *applications[1:], *pushed]


def outdated_images(
    engine: Mapping[str, Any], registry: str, delivered: Iterable[str]
) -> list[str]:
    """Images that the coordinator's registry has delivered before. Layers of apps are left out.

    Args:
        engine: the fact docker_engine of the role docker.
        registry: host and port of the registry.
        delivered: images that it delivers now.
    """
    now = set(delivered)
    pattern = rf"{re.escape(registry)}/flowerbed/(?!layer:)"
    return [tag for tag in _tags(_unused(engine), pattern) if tag not in now]


def pip_settings(lines: Iterable[str]) -> dict[str, str]:
    """Settings of pip by name. Those of the environment take precedence over those of files.

    Args:
        lines: output of `pip config list`.
    """
    found = [re.match(r"(global|:env:)\.([a-z-]+)='(.*)'$", line) for line in lines]
    settings = [match.groups() for match in found if match]
    return {
        name: value
        for section in ("global", ":env:")
        for where, name, value in settings
        if where == section
    }


def ca_bundle(settings: Mapping[str, str]) -> str:
    """File of the authorities that the control node trusts; empty if there is none.

    Args:
        settings: see `pip_settings`.
    """
    candidates = [settings.get("cert", "")]
    candidates += [os.environ.get(name, "") for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    candidates += ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    return next((path for path in candidates if path and Path(path).is_file()), "")


def index_environment(settings: Mapping[str, str], certificates: str) -> str:
    """Shell commands that set the package index of the control node's pip for pip and uv.

    Settings that name a file of the control node are left out, because a build does not have it.

    Args:
        settings: see `pip_settings`.
        certificates: path of the authorities in the build; empty if there are none.
    """

    def words(option: str, pattern: str = "") -> str:
        given = settings.get(option, "").replace("\\n", " ").split()
        return " ".join(word for word in given if re.match(pattern, word))

    values = {
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"): words("index-url", "https?:"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"): words("extra-index-url", "https?:"),
        ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST"): words("trusted-host"),
        ("PIP_DEFAULT_TIMEOUT", "UV_HTTP_TIMEOUT"): words("timeout") or words("default-timeout"),
        ("PIP_RETRIES", "UV_HTTP_RETRIES"): words("retries"),
        ("PIP_PROXY", "ALL_PROXY"): words("proxy"),
        ("PIP_CERT", "SSL_CERT_FILE"): certificates,
    }
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for names, value in values.items()
        if value
        for name in names
    )


def found_in(
    candidates: Mapping[str, Mapping[str, str]],
    present: Container[str],
    images: Iterable[str],
    sources: list[str],
) -> dict[str, dict[str, str]]:
    """Images that the machine already has, each with the first source whose image it is.

    Args:
        candidates: image to source to name.
        present: names of the images that the engine has.
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
        machine: name of the machine that built it.
    """
    found = re.search(r"flowerbed: (.+?)(?:\\x1b|\x1b|\\n|\n|$)", str(message))
    return f"{machine}: the app's requirement {found[1]}" if found else f"{machine}: {message}"


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "application_image": application_image,
            "base_images": base_images,
            "ca_bundle": ca_bundle,
            "code_entries": code_entries,
            "found_in": found_in,
            "has_builder": has_builder,
            "index_environment": index_environment,
            "known_as": known_as,
            "known_images": known_images,
            "layer_problem": layer_problem,
            "names_in": names_in,
            "outdated_images": outdated_images,
            "pip_settings": pip_settings,
            "replaced_images": replaced_images,
        }
