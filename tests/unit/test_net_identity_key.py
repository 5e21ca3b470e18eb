from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import InvalidRequest, StartRefused
from meshd.model import NodeId
from meshd.net.identity_key import KeyPair, node_id, public_bytes, verify


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = KeyPair.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyPair.load_or_create(path).node_id == first.node_id
    assert os.listdir(tmp_path) == ["identity.key"]


def test_an_existing_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = KeyPair.load_or_create(path)
    with pytest.raises(StartRefused):
        KeyPair.generate().save(path)
    assert KeyPair.load(path).node_id == first.node_id
    assert os.listdir(tmp_path) == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    KeyPair.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(StartRefused) as caught:
        KeyPair.load(path)
    assert caught.value.hint == f"chmod 600 {path}"


_OTHER_KIND = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("content", [b"", b"garbage", os.urandom(10_000), _OTHER_KIND])
def test_a_file_that_holds_no_such_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(StartRefused):
        KeyPair.load_or_create(path)
    assert path.read_bytes() == content


def test_a_key_that_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused):
        KeyPair.load_or_create(tmp_path)
    with pytest.raises(StartRefused):
        KeyPair.load_or_create(tmp_path / "missing" / "identity.key")


def test_ids_are_the_peer_ids_of_libp2p() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    for seed in (b"\0" * 31 + b"\1", b"\xff" * 32, os.urandom(32)):
        assert KeyPair.from_secret(seed).node_id == str(ID.from_pubkey(create_new_key_pair(seed).public_key))


@given(st.binary(min_size=32, max_size=32))
def test_an_id_holds_its_public_key(public: bytes) -> None:
    assert public_bytes(node_id(public)) == public


@given(st.text(max_size=80))
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        public_bytes(NodeId(text))


def test_only_the_signer_and_only_these_bytes_verify() -> None:
    key, other = KeyPair.generate(), KeyPair.generate()
    signature = key.sign(b"data")
    assert verify(key.node_id, b"data", signature)
    assert verify(key.public_bytes, b"data", signature)
    assert not verify(other.node_id, b"data", signature)
    assert not verify(key.node_id, b"date", signature)
    assert not verify(key.node_id, b"data", b"")
    assert not verify(NodeId("nobody"), b"data", signature)
    assert not verify(b"short", b"data", signature)


def test_a_secret_makes_the_same_key_again_and_does_not_show_in_its_repr() -> None:
    key = KeyPair.generate()
    assert KeyPair.from_secret(key.secret).node_id == key.node_id
    assert key.secret.hex() not in repr(key)
    with pytest.raises(InvalidRequest):
        KeyPair.from_secret(b"short")
