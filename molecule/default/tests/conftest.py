"""The machines of the lab that Molecule has deployed."""

import pytest
import testinfra
from ssh_lab import EPHEMERAL, INVENTORY, listed
from testinfra.host import Host


@pytest.fixture(scope="session")
def machines() -> dict[str, Host]:
    """Each machine, reached by ssh as Ansible reaches it."""
    config = str(EPHEMERAL / "ssh_config")
    return {
        name: testinfra.get_host(f"ssh://{name}", ssh_config=config, sudo=True)
        for name in listed(INVENTORY)["machines"]["hosts"]
    }
