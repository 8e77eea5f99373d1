"""Flower's command line, called from Python.

A command runs in a fork of this process: Flower is imported once, which takes seconds, however many
commands there are.
"""

import contextlib
import json
import os
import sys
from typing import Any


class FlowerError(RuntimeError):
    """A command of Flower has failed; the message is Flower's own."""


def flwr(*arguments: str) -> dict[str, Any]:
    """Run `flwr` with these arguments and return the JSON that it prints.

    Raises:
        FlowerError: it has failed.
    """
    from flwr.cli.app import app

    what = f"flwr {' '.join(arguments[:2])}"
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(into, sys.stdout.fileno())
        with contextlib.suppress(BaseException):  # what it has printed says how it ended
            app([*arguments, "--format", "json"], prog_name="flwr")
        sys.stdout.flush()
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    try:
        answer: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        raise FlowerError(f"{what}: {text!r}") from None
    if not answer.get("success"):
        raise FlowerError(f"{what}: {answer.get('error-message', answer)}")
    return answer
