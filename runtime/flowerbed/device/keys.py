"""Key pairs of a machine's devices, made where they are used: private keys never travel.

    python -m flowerbed.device.keys DIRECTORY DEVICE...

gives each device DIRECTORY/DEVICE/key if it has none, removes the keys of all others, and writes
the public ones to DIRECTORY/public.json. Flower wants keys of a NIST curve in OpenSSH's format.
"""

import json
import shutil
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

KEY = "key"
PUBLIC = "public.json"


def keep_keys(directory: Path, devices: list[str]) -> dict[str, str]:
    """Leave exactly `devices` with keys; return the public ones by device, as OpenSSH writes them.

    An existing key stays. A new one is written to a draft and moved, so that no key is half
    written.
    """
    for stale in {path.parent.name for path in directory.glob(f"*/{KEY}")} - set(devices):
        shutil.rmtree(directory / stale)
    public = {}
    for device in sorted(devices):
        path = directory / device / KEY
        if not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            made = ec.generate_private_key(ec.SECP384R1())
            draft = path.with_suffix(".draft")
            draft.unlink(missing_ok=True)
            draft.touch(mode=0o600)
            draft.write_bytes(
                made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            )
            draft.replace(path)
        key = load_ssh_private_key(path.read_bytes(), None).public_key()
        public[device] = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    draft = directory / f"{PUBLIC}.draft"
    draft.write_text(json.dumps(public, indent=2) + "\n")
    draft.replace(directory / PUBLIC)
    return public


if __name__ == "__main__":
    keep_keys(Path(sys.argv[1]), sys.argv[2:])
