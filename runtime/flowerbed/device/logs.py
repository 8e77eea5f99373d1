"""The log of a device's container."""

import logging


def log_to_stderr() -> None:
    """Write the lab's own lines, and leave the root logger to Flower and to the app.

    What the supervisor forks inherits its handlers: on the root logger they would write Flower's
    lines twice. An app that configures logging finds the root logger as it is elsewhere.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    own = logging.getLogger("flowerbed")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False
