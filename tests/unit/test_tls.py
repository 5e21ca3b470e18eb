"""A node's API key and certificate: whatever a crash or a full disk left of them, the next start has a pair that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.admission import tls
from meshd.durable import replace_file

MESH_KEY = Ed25519PrivateKey.generate()
CA = tls.make_authority(MESH_KEY, "a-mesh")


def started(directory: Path) -> str:
    """What a start does; the certificate that it made, if it made one."""
    key, certificate, made = directory / "api.key", directory / "api.pem", ""
    request = tls.make_request(key, "a-node", ())
    if tls.server_context(certificate, key) is None:
        made = tls.issue_leaf(MESH_KEY, CA, "a-node", tls.read_request(request))
        replace_file(certificate, made.encode())
    assert tls.server_context(certificate, key) is not None
    assert key.stat().st_mode & 0o077 == 0
    return made


def test_the_pair_is_made_once(tmp_path: Path) -> None:
    assert started(tmp_path) and not started(tmp_path)


@pytest.mark.parametrize("name", ["api.key", "api.pem"])
@pytest.mark.parametrize("left", [b"", b"-----BEGIN", None])
def test_half_a_key_or_certificate_is_made_anew(tmp_path: Path, name: str, left: bytes | None) -> None:
    started(tmp_path)
    if left is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(left)
    assert started(tmp_path) and not started(tmp_path)


def test_a_replaced_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    replace_file(file, b"one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"two")
    assert file.read_bytes() == b"one"
    monkeypatch.undo()
    replace_file(file, b"3")
    assert file.read_bytes() == b"3" and [each.name for each in tmp_path.iterdir()] == ["file"]
