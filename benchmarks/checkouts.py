"""Labs of several checkouts on one machine, one of which is deployed at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
from measure import ROOT, deploy, lab, remove, say, stop

_KEPT = "flowerbed-benchmark/kept"


class Labs:
    """The labs that an inventory describes in this checkout and in others.

    Each deployment removes images that it does not know. Those of the other checkouts keep a second
    name meanwhile, and get their first one back before the next deployment of their checkout.

    Args:
        inventory: its directory in this checkout; it must have the same place in the others.
    """

    def __init__(self, engine: docker.DockerClient, inventory: Path) -> None:
        self._engine = engine
        self._place = inventory.relative_to(ROOT)
        self._deployed: Path | None = None
        self._images: dict[Path, dict[str, str]] = {}

    def inventory(self, root: Path) -> Path:
        """Return the inventory in a checkout."""
        return root / self._place

    def deploy(self, root: Path) -> None:
        """Deploy the lab of a checkout and stop its containers, unless it is deployed already."""
        if self._deployed == root:
            return
        if self._deployed:
            remove(self.inventory(self._deployed))
        for tag, image in self._images.get(root, {}).items():
            self._engine.images.get(image).tag(*tag.split(":"))
        say(f"deploying the lab of {root} (the first time its images are built)")
        self._deployed = root
        deploy(self.inventory(root))
        self._images[root] = self._tagged("flowerbed/")
        for image in set(self._images[root].values()):
            self._engine.images.get(image).tag(_KEPT, image.partition(":")[2])
        stop(self._engine)

    def _tagged(self, prefix: str) -> dict[str, str]:
        """Return the tags that begin with a prefix, and the ids of their images."""
        return {
            tag: str(image.id)
            for image in self._engine.images.list()
            for tag in image.tags
            if tag.startswith(prefix)
        }

    def close(self) -> None:
        """Remove the lab of another checkout, and the images' second names."""
        if self._deployed and self._deployed != ROOT:
            remove(self.inventory(self._deployed))
        for tag in self._tagged(_KEPT):
            self._engine.images.remove(tag)


@contextmanager
def labs(engine: docker.DockerClient, inventory: Path) -> Iterator[Labs]:
    """Make room for labs, and remove them at the end."""
    with lab(inventory):
        made = Labs(engine, inventory)
        try:
            yield made
        finally:
            made.close()
