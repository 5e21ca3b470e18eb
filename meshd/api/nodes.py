"""Nodes over HTTP: who is a member and what each offers, inviting, draining, removing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from msgspec import Meta, Struct
from starlette.responses import Response

from meshd.api.endpoint import PROPOSE_S, QUERY_S, Call, Endpoint, ReadQuery, Rights
from meshd.api.streams import EventStream, format_event
from meshd.errors import Conflict, InvalidRequest, NotFound
from meshd.model import Count, NodeId, Role
from meshd.raft.state.commands import RevokeInvite, SetDraining
from meshd.views import DrainView, GetInvites, GetMembers, InvitesView, MembersView, MemberView

_EVENTS = "text/event-stream"
SUFFIX_CHARS_MIN = 4


class InviteBody(Struct, forbid_unknown_fields=True):
    roles: Annotated[tuple[Role, ...], Meta(min_length=1)] = (Role.SERVER, Role.WORKER)
    uses: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    lifetime_ms: Annotated[int, Meta(ge=1, le=366 * 86_400_000)] = 3_600_000


class InviteAnswer(Struct, frozen=True):
    invite: str
    """The whole line for `meshd up --join`; its secret is shown only here."""


class DrainBody(Struct, forbid_unknown_fields=True):
    deadline_ms: Annotated[Count, Meta(description="Then running work is handed over; absent: wait")] | None = None
    cancel: Annotated[bool, Meta(description="Take work again instead")] = False


async def list_nodes(call: Call) -> MembersView:
    return await _members(call, is_stale_ok=call.query(ReadQuery).stale)


async def show_node(call: Call) -> MemberView:
    return await _select(call, is_stale_ok=call.query(ReadQuery).stale)


async def drain(call: Call) -> EventStream | DrainView:
    """Events named `progress`, each a DrainView, until it is safe to stop the node."""
    body = await call.body(DrainBody)
    member = (await _select(call)).member
    if body.cancel:
        await call.face.propose(SetDraining(member.node, False), timeout_s=PROPOSE_S)
        return DrainView(member.node, "working", 0, f"{member.name} takes work again", False)

    async def source() -> AsyncGenerator[bytes, None]:
        async with aclosing(call.face.drain(member.node, deadline_ms=body.deadline_ms)) as progress:
            async for view in progress:
                yield format_event("progress", view)

    return EventStream(source())


async def remove(call: Call) -> Response:
    text = call.path("node")
    try:
        node = (await _select(call)).member.node
    except NotFound:
        # Removing again is fine when the whole id says who it was.
        if NodeId(text) not in (await _members(call)).revoked:
            raise
        node = NodeId(text)
    await call.face.remove(node)
    return Response(status_code=204)


async def invite(call: Call) -> InviteAnswer:
    body = await call.body(InviteBody)
    return InviteAnswer(await call.face.create_invite(body.roles, body.uses, body.lifetime_ms))


async def list_invites(call: Call) -> InvitesView:
    return await call.face.query(GetInvites(), InvitesView, timeout_s=QUERY_S)


async def revoke_invite(call: Call) -> Response:
    text = call.path("hash")
    found = [it.secret_hash for it in (await list_invites(call)).invites if it.secret_hash.startswith(text)]
    if len(text) < SUFFIX_CHARS_MIN or len(found) != 1:
        raise NotFound(f"{len(found)} open invites begin with {text[:64]!r}", hint="mesh node invites")
    await call.face.propose(RevokeInvite(found[0]), timeout_s=PROPOSE_S)
    return Response(status_code=204)


async def _members(call: Call, *, is_stale_ok: bool = False) -> MembersView:
    return await call.face.query(GetMembers(), MembersView, timeout_s=QUERY_S, is_stale_ok=is_stale_ok)


async def _select(call: Call, *, is_stale_ok: bool = False) -> MemberView:
    """By id, by name, by the beginning or the end of the id (ids of one kind begin alike), or `self`."""
    text = call.path("node")
    if not text or len(text) > 256:
        raise InvalidRequest("this is not a node's name or id")
    members = (await _members(call, is_stale_ok=is_stale_ok)).members
    if text == "self":
        text = call.face.me
    exact = [row for row in members if text in (row.member.node, row.member.name)]
    found = exact or [
        row
        for row in members
        if len(text) >= SUFFIX_CHARS_MIN and (row.member.node.startswith(text) or row.member.node.endswith(text))
    ]
    if not found:
        raise NotFound(f"this mesh has no node {text!r}", hint="mesh node ls")
    if len(found) > 1:
        raise Conflict(f"{len(found)} nodes are called {text!r}", hint="use the id: mesh node ls -o wide")
    return found[0]


ENDPOINTS = (
    Endpoint(
        "GET", "/v1/nodes", list_nodes, "All members with sessions and offers", Rights.VIEWER, MembersView, ReadQuery
    ),
    Endpoint("GET", "/v1/nodes/{node}", show_node, "One member", Rights.VIEWER, MemberView, ReadQuery),
    Endpoint(
        "POST",
        "/v1/nodes/{node}/drain",
        drain,
        "Stop giving it work; follow until it is safe to stop",
        Rights.ADMIN,
        _EVENTS,
        body=DrainBody,
        event=DrainView,
    ),
    Endpoint("DELETE", "/v1/nodes/{node}", remove, "The node is gone for good", Rights.ADMIN, None, status=204),
    Endpoint("POST", "/v1/invites", invite, "Make an invite", Rights.ADMIN, InviteAnswer, body=InviteBody, status=201),
    Endpoint("GET", "/v1/invites", list_invites, "Open invites", Rights.ADMIN, InvitesView),
    Endpoint("DELETE", "/v1/invites/{hash}", revoke_invite, "Revoke an invite", Rights.ADMIN, None, status=204),
)
