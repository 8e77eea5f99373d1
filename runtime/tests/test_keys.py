"""Key pairs of a machine's devices."""

import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from flowerbed.device.keys import keep_keys


def test_each_device_gets_a_key_that_flower_takes(tmp_path: Path) -> None:
    public = keep_keys(tmp_path, ["phone-1", "phone-2"])
    assert json.loads((tmp_path / "public.json").read_text()) == public
    assert len(set(public.values())) == 2
    for device, text in public.items():
        path = tmp_path / device / "key"
        assert path.stat().st_mode & 0o777 == 0o600
        private = load_ssh_private_key(path.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert load_ssh_public_key(text.encode()) == private.public_key()


def test_keys_stay_and_those_of_devices_that_are_gone_do_not(tmp_path: Path) -> None:
    before = keep_keys(tmp_path, ["phone-1", "phone-2"])
    after = keep_keys(tmp_path, ["phone-2", "phone-3"])
    assert after.keys() == {"phone-2", "phone-3"}
    assert after["phone-2"] == before["phone-2"]
    assert not (tmp_path / "phone-1").exists()
    again = keep_keys(tmp_path, ["phone-1", "phone-2", "phone-3"])
    assert again["phone-1"] != before["phone-1"]
