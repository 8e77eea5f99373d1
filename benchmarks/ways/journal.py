"""What a way tells the benchmark: lines of JSON on its standard output, each with its time."""

import json
import time
from typing import Any


def tell(event: str, **more: Any) -> None:
    """Print one line; `round` events begin a round, `end` ends the last one."""
    print(json.dumps({"event": event, "time": time.time(), **more}), flush=True)
