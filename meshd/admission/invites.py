"""An invite: one string that lets a machine join. Addresses, the mesh's id, a secret that expires and counts its uses.

The replicated state holds only the secret's hash, so that no log, snapshot or backup can be
used to join. The string also names the roles it grants, for people; what counts is the state.
"""

from __future__ import annotations

import base64
import binascii

from blake3 import blake3
from msgspec import Struct

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import NodeId, Role

PREFIX = "meshd1-"
SECRET_BYTES = 18
CHECKSUM_BYTES = 4
"""Against slips in copying, not against people."""
INVITE_CHARS_MAX = 8192
DOORS_MAX = 4
"""Members named in one invite: enough that one of them answers, few enough to paste."""


class Door(Struct, frozen=True, array_like=True):
    """A member to knock at."""

    node: NodeId
    addresses: tuple[str, ...]


class Invite(Struct, frozen=True, array_like=True):
    mesh: str
    secret: bytes
    roles: tuple[Role, ...]
    doors: tuple[Door, ...]

    def __str__(self) -> str:
        body = codec.encode(self)
        return PREFIX + base64.urlsafe_b64encode(_checksum(body) + body).decode().rstrip("=")

    @property
    def secret_hash(self) -> str:
        return hash_secret(self.secret)


def hash_secret(secret: bytes) -> str:
    return blake3(secret).hexdigest()


def parse(text: str) -> Invite:
    """The invite that a person pasted. Raises InvalidRequest."""
    text = "".join(text.split())
    if not text.startswith(PREFIX) or len(text) > INVITE_CHARS_MAX:
        raise InvalidRequest(
            "this is not an invite", hint=f"an invite starts with {PREFIX}; `mesh node invite` makes one"
        )
    body = text[len(PREFIX) :]
    try:
        data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        if data[:CHECKSUM_BYTES] != _checksum(data[CHECKSUM_BYTES:]):
            raise InvalidRequest("the checksum does not fit")
        invite = codec.decode(data[CHECKSUM_BYTES:], Invite)
    except (binascii.Error, ValueError, InvalidRequest) as error:
        raise InvalidRequest("this invite is damaged", hint="copy the whole line again") from error
    if not invite.doors or len(invite.secret) != SECRET_BYTES:
        raise InvalidRequest("this invite is damaged", hint="copy the whole line again")
    return invite


def _checksum(body: bytes) -> bytes:
    return blake3(body).digest(length=CHECKSUM_BYTES)
