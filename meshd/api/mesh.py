"""The mesh as a whole over HTTP: is it well, who may use it, how to trust it."""

from __future__ import annotations

import re
import time
from typing import Annotated

from msgspec import Meta, Struct
from starlette.responses import Response

from meshd.api.auth import ROLES, new_token
from meshd.api.endpoint import PROPOSE_S, QUERY_S, Call, Endpoint, ReadQuery, Rights
from meshd.errors import InvalidRequest, NotFound
from meshd.model import NodeId
from meshd.raft.state.commands import WALL_MS_MAX, WALL_MS_MIN, ClockSet, CreateToken, RevokeToken
from meshd.views import ClockMove, ClusterStatus, GetMembers, GetSummary, GetTokens, MembersView, Summary, TokensView

_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
PEM = "application/x-pem-file"


class Health(Struct, frozen=True):
    status: str


class Me(Struct, frozen=True):
    node: NodeId
    name: str
    mesh: str
    version: str
    caller: str
    role: str


class ClockBody(Struct, forbid_unknown_fields=True):
    id: Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="Random, of your own: resending with it is safe")]
    to_ms: Annotated[int, Meta(description="Milliseconds since 1970; absent: the clock of the node asked")] | None = (
        None
    )


class TokenBody(Struct, forbid_unknown_fields=True):
    name: str
    role: str = "operator"
    """viewer | operator | admin"""


class TokenAnswer(Struct, frozen=True):
    name: str
    role: str
    token: str
    """Shown only here; the mesh keeps its hash."""


async def health(call: Call) -> Health:
    """The agent answers. Says nothing about the mesh, since it is open to everyone."""
    return Health("ok")


async def authority(call: Call) -> Response:
    """What signs the certificates of all nodes; a token carries its fingerprint. No secret."""
    if not call.face.ca_pem:
        raise NotFound("this mesh serves no TLS")
    return Response(call.face.ca_pem, media_type=PEM)


async def me(call: Call) -> Me:
    face = call.face
    return Me(face.me, face.name, face.mesh, face.version, call.caller.name, call.caller.rights.name.lower())


async def cluster(call: Call) -> ClusterStatus:
    return await call.face.cluster_status()


async def set_clock(call: Call) -> ClockMove:
    """What dates decide stays decided: no submission runs again, no invite lives longer."""
    body = await call.body(ClockBody)
    to_ms = time.time_ns() // 1_000_000 if body.to_ms is None else body.to_ms
    if not WALL_MS_MIN <= to_ms <= WALL_MS_MAX:
        raise InvalidRequest(f"{to_ms} ms since 1970 is no time to set a clock to")
    await call.face.propose(ClockSet(body.id, to_ms), timeout_s=PROPOSE_S)
    view = await call.face.query(GetMembers(), MembersView, timeout_s=QUERY_S)
    return next((move for move in view.clock_moves if move.id == body.id), ClockMove(view.position, to_ms, to_ms))


async def summary(call: Call) -> Summary:
    stale = call.query(ReadQuery).stale
    return await call.face.query(GetSummary(), Summary, timeout_s=QUERY_S, is_stale_ok=stale)


async def list_tokens(call: Call) -> TokensView:
    return await call.face.query(GetTokens(), TokensView, timeout_s=QUERY_S)


async def create_token(call: Call) -> TokenAnswer:
    body = await call.body(TokenBody)
    if body.role not in ROLES:
        raise InvalidRequest(f"{body.role[:40]!r} is not a role", hint=f"there are {', '.join(ROLES)}")
    if not _TOKEN_NAME.fullmatch(body.name):
        raise InvalidRequest(f"{body.name[:80]!r} is not a name for a token", hint="letters, digits and . _ @ -")
    token, secret_hash = new_token(call.face.ca_pem)
    await call.face.propose(CreateToken(secret_hash, body.name, body.role), timeout_s=PROPOSE_S)
    return TokenAnswer(body.name, body.role, token)


async def revoke_token(call: Call) -> Response:
    await call.face.propose(RevokeToken(call.path("name")[:256]), timeout_s=PROPOSE_S)
    return Response(status_code=204)


ENDPOINTS = (
    Endpoint("GET", "/v1/health", health, "Does the agent answer?", Rights.ANYONE, Health),
    Endpoint("GET", "/v1/ca", authority, "The mesh's CA certificate", Rights.ANYONE, PEM),
    Endpoint("GET", "/v1/me", me, "Which node this is, and who you are to it", Rights.VIEWER, Me),
    Endpoint("GET", "/v1/cluster", cluster, "Leader, voters, nodes, failures survived", Rights.VIEWER, ClusterStatus),
    Endpoint("POST", "/v1/cluster/clock", set_clock, "Set the mesh's time", Rights.ADMIN, ClockMove, body=ClockBody),
    Endpoint("GET", "/v1/summary", summary, "Counts over the whole queue", Rights.VIEWER, Summary, ReadQuery),
    Endpoint("GET", "/v1/tokens", list_tokens, "Tokens without secrets", Rights.ADMIN, TokensView),
    Endpoint("POST", "/v1/tokens", create_token, "Make a token", Rights.ADMIN, TokenAnswer, body=TokenBody, status=201),
    Endpoint("DELETE", "/v1/tokens/{name}", revoke_token, "Revoke a token", Rights.ADMIN, None, status=204),
)
