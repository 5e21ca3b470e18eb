"""Ed25519 keys in files, and the names that follow from them.

A node is its key: its id is the libp2p peer id of the public half, computed here so that nobody
has to import libp2p (0.7 s of CPU) for a name. The mesh's own key is of the same kind.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from meshd.durable import sync_directory
from meshd.errors import InvalidRequest, StartRefused
from meshd.model import NodeId

KEY_FILE_BYTES_MAX = 4096
"""A PEM Ed25519 key is 119 bytes; whatever is much larger is another file."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash of 36 bytes: the protobuf PublicKey {type: Ed25519, data: 32 bytes} (libp2p peer-ids spec)."""
_ID_CHARS_MAX = 64
"""Ours have 52; a bound, since decoding base58 is quadratic."""


class KeyPair:
    """An Ed25519 key. Never printed: its repr is the public half's id."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self.private = private
        self.public_bytes = private.public_key().public_bytes_raw()
        self.node_id = node_id(self.public_bytes)

    def __repr__(self) -> str:
        return f"KeyPair({self.node_id})"

    @classmethod
    def generate(cls) -> KeyPair:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_secret(cls, secret: bytes) -> KeyPair:
        """From the 32 bytes of `secret`. Raises InvalidRequest."""
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(secret))
        except ValueError as error:
            raise InvalidRequest(f"an Ed25519 key has 32 bytes, not {len(secret)}") from error

    @classmethod
    def load(cls, path: Path) -> KeyPair:
        """Raises StartRefused when the file is missing, open to others, unreadable or no key."""
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise StartRefused(
                        f"others can read or write the key {path} (mode {mode:04o})", hint=f"chmod 600 {path}"
                    )
                pem = file.read(KEY_FILE_BYTES_MAX + 1)
        except OSError as error:
            raise StartRefused(
                f"cannot read the key {path}: {error.strerror}", hint="run as the user that owns the data directory"
            ) from error
        try:
            private = load_pem_private_key(pem[:KEY_FILE_BYTES_MAX], password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise StartRefused(
                f"{path} holds no key", hint="restore it from a backup, or start anew elsewhere"
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise StartRefused(f"{path} holds a key of another kind than Ed25519")
        return cls(private)

    @classmethod
    def load_or_create(cls, path: Path) -> KeyPair:
        """The key in the file; made and saved when there is no file. Raises StartRefused."""
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)

    @property
    def secret(self) -> bytes:
        """The 32 bytes that are the key. For other servers only; never log them."""
        return self.private.private_bytes_raw()

    def save(self, path: Path) -> None:
        """Durably, readable by this user only, all or nothing; an existing file stays. Raises StartRefused."""
        pem = self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(beside, path)  # unlike a rename it never replaces a key
            finally:
                os.unlink(beside)
            sync_directory(path.parent)
        except FileExistsError as error:
            raise StartRefused(f"{path} exists already; a key is never replaced") from error
        except OSError as error:
            raise StartRefused(
                f"cannot write the key {path}: {error.strerror}", hint="give this user rights to the data directory"
            ) from error

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self.private.sign(data)


def verify(signer: NodeId | bytes, data: bytes, signature: bytes) -> bool:
    """Did the holder of this key sign exactly these bytes? False for what is no key or no signature."""
    try:
        public = signer if isinstance(signer, bytes) else public_bytes(signer)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, InvalidRequest, ValueError):
        return False
    return True


def node_id(public: bytes) -> NodeId:
    """The peer id of a public key of 32 bytes, as libp2p writes it ("12D3KooW…")."""
    assert len(public) == 32
    number = int.from_bytes(_ID_PREFIX + public, "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return NodeId("1" + text)  # the prefix's leading zero byte


def public_bytes(node: NodeId) -> bytes:
    """The public key that is in a node's id. Raises InvalidRequest."""
    number = 0
    if len(node) <= _ID_CHARS_MAX and node.startswith("1"):
        for char in node[1:]:
            digit = _ALPHABET.find(char)
            if digit < 0:
                break
            number = number * 58 + digit
        else:
            data = number.to_bytes(_ID_CHARS_MAX, "big").lstrip(b"\0")
            data = _ID_PREFIX[:1] + data
            if data.startswith(_ID_PREFIX) and len(data) == len(_ID_PREFIX) + 32:
                return data[len(_ID_PREFIX) :]
    raise InvalidRequest(f"{node[:_ID_CHARS_MAX]!r} is no node id")
