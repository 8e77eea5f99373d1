"""What the server's bookkeeping costs in a lab of many devices, which are simulated.

    python benchmarks/bookkeeping.py [--devices 500] [--rounds 3] [--weights 220000] [--most 5]

Prints the seconds that each part takes in a round: sending, reading and recording messages, writing
the status file, and FedAvg's aggregation; the time in which the server only waits does not count.
Fails if a round takes more than `--most` seconds. Needs the application image (`make images`).
"""

import subprocess
import sys
from pathlib import Path

from measure import HERE, ROOT

IMAGE = ROOT / ".cache/application-image"


def main() -> None:
    """Measure in a container of the application image, without a network."""
    command = ["docker", "run", "--rm", "--network", "none", "--read-only"]
    command += ["--tmpfs", str(Path("/", "tmp")), "--volume", f"{HERE / 'ways'}:/ways:ro"]
    command += [IMAGE.read_text().strip(), "python", "/ways/many_devices.py", *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
