"""Who is calling: the machine's owner over the local socket, or the holder of a token.

A token is `mesh_SECRET_FINGERPRINT`. The state knows the BLAKE3 of the secret, with a
name and a role; the fingerprint is for the client, who checks by it whom it talks to.
"""

from __future__ import annotations

import hashlib
import secrets
import ssl
from collections.abc import Callable

from blake3 import blake3
from msgspec import Struct

from meshd.api.endpoint import QUERY_S, Caller, Rights
from meshd.api.face import Face
from meshd.errors import Busy, NotAllowed, NotFound
from meshd.views import CheckToken, TokenView

SECRET_BYTES = 24
FINGERPRINT_CHARS = 32
"""128 bits of the CA certificate's SHA-256: nobody makes a second certificate to it."""

KNOWN_S = 3.0
"""How long an answer about a token is believed: within this a revoked token stops working."""
KNOWN_MAX = 1024
FAILURES_MAX = 20
FAILURES_S = 30.0
"""So many wrong tokens from one address within so long; then it waits. The secret has 192 bits: this is against noise."""

ROLES = {"viewer": Rights.VIEWER, "operator": Rights.OPERATOR, "admin": Rights.ADMIN}


class _Known(Struct, frozen=True):
    until_s: float
    token: TokenView | None


class Doorkeeper:
    """Remembers answers about tokens for a moment, good and bad, and who keeps guessing."""

    def __init__(self, face: Face, now_s: Callable[[], float]) -> None:
        self._face = face
        self._now_s = now_s
        self._known: dict[str, _Known] = {}
        self._failures: dict[str, list[float]] = {}

    async def identify(self, authorization: str, address: str) -> Caller:
        """Raises NotAllowed, Busy (too many wrong tokens from there), Unavailable (nobody can say)."""
        self._check_patience(address)
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise NotAllowed("this needs a token", hint="`mesh token create NAME` on a machine of the mesh makes one")
        token = await self._look_up(hash_secret(secret_of(text.strip())))
        if token is None:
            self._note_failure(address)
            raise NotAllowed("this token is unknown or revoked", hint="`mesh token create NAME` makes a new one")
        return Caller(token.name, ROLES.get(token.role, Rights.ANYONE))

    async def _look_up(self, secret_hash: str) -> TokenView | None:
        known = self._known.get(secret_hash)
        if known is not None and known.until_s > self._now_s():
            return known.token
        try:
            token = await self._face.query(CheckToken(secret_hash), TokenView, timeout_s=QUERY_S)
        except (NotFound, NotAllowed):
            token = None
        while len(self._known) >= KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[secret_hash] = _Known(self._now_s() + KNOWN_S, token)
        return token

    def _check_patience(self, address: str) -> None:
        since_s = self._now_s() - FAILURES_S
        recent = [at_s for at_s in self._failures.get(address, ()) if at_s > since_s]
        if len(recent) >= FAILURES_MAX:
            raise Busy("too many wrong tokens from this address", hint=f"wait {FAILURES_S:.0f}s")

    def _note_failure(self, address: str) -> None:
        since_s = self._now_s() - FAILURES_S
        self._failures[address] = [at_s for at_s in self._failures.get(address, ()) if at_s > since_s] + [self._now_s()]
        while len(self._failures) > KNOWN_MAX:
            del self._failures[next(iter(self._failures))]


def new_token(ca_pem: bytes) -> tuple[str, str]:
    """A fresh token, and the hash of its secret."""
    secret = secrets.token_hex(SECRET_BYTES)
    return f"mesh_{secret}_{fingerprint(ca_pem)}", hash_secret(secret)


def secret_of(token: str) -> str:
    """The part that proves; text of any other form is taken whole, and is then unknown."""
    parts = token.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "mesh" else token


def hash_secret(secret: str) -> str:
    return blake3(secret.encode("utf-8", "replace")).hexdigest()


def fingerprint(ca_pem: bytes) -> str:
    """Of the mesh's CA, as tokens carry it. `-` for a mesh that has none."""
    if not ca_pem:
        return "-"
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_pem.decode())).hexdigest()[:FINGERPRINT_CHARS]
