"""How a machine becomes a member: it knocks at any member with an invite and leaves with a certificate.

        stranger                     any member                         voters
          ── mesh, secret, name ──▶  hash of the secret,
                                     proven peer id       ── Join ──▶   counted, expires?
          ◀── certificate, members, mesh's public key ──  ◀── Joined ──

A stranger can speak only this protocol: one bounded request, one answer, then the stream ends.
The connection has proven both keys; the secret is compared as its hash by the replicated state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog
import trio
from msgspec import Struct

from meshd import codec
from meshd.admission import invites
from meshd.admission.home import KnownPeer
from meshd.admission.invites import Invite
from meshd.directory import JOIN_PROTOCOL
from meshd.errors import Busy, InvalidRequest, MeshError, NotAllowed, PeerFault, TooLarge, Unavailable, from_code
from meshd.model import Certificate, EpochCertificate, KeyLink, Member, NodeId
from meshd.ports import Stream, Transport
from meshd.raft.state.commands import AnyAnswer, Join, Joined

REQUEST_BYTES_MAX = 16 << 10
REPLY_BYTES_MAX = 1 << 20
KNOCKS_MAX = 16
"""Strangers served at a time; the rest is told to come back."""
KNOCK_S = 10.0
"""For a stranger to say what it wants; the decision may then take the mesh as long again."""
MEMBERS_TOLD_MAX = 64
"""Members named to a newcomer; the rest it learns from the mesh."""

log = structlog.get_logger()


class JoinRequest(Struct, frozen=True, array_like=True):
    mesh: str
    secret: bytes
    name: str
    addresses: tuple[str, ...]
    api_address: str
    version: str
    wall_ms: int
    zone: str = ""


class Welcome(Struct, frozen=True, array_like=True, tag=True):
    public_key: bytes
    ca_pem: str
    certificate: Certificate
    members: tuple[KnownPeer, ...]
    wall_ms: int
    epoch: EpochCertificate = EpochCertificate()
    links: tuple[KeyLink, ...] = ()
    """From `public_key`, the first, to the present one."""


class Refusal(Struct, frozen=True, array_like=True, tag=True):
    code: str
    message: str
    hint: str


Reply = Welcome | Refusal


class JoinDesk:
    """A member's answer to those who knock."""

    def __init__(
        self,
        *,
        mesh: str,
        public_key: bytes,
        ca_pem: str,
        propose: Callable[[Join], Awaitable[AnyAnswer]],
        certify: Callable[[NodeId, int], Awaitable[Certificate]],
        members: Callable[[], Sequence[KnownPeer]],
        wall_ms: Callable[[], int],
        epoch: Callable[[], EpochCertificate],
        links: Callable[[], tuple[KeyLink, ...]] = tuple,
    ) -> None:
        self._mesh = mesh
        self._public_key = public_key
        self._ca_pem = ca_pem
        self._propose = propose
        self._certify = certify
        self._members = members
        self._wall_ms = wall_ms
        self._epoch = epoch
        self._links = links
        self._knocks = 0

    async def answer(self, stream: Stream) -> None:
        """The handler of the join protocol."""
        if self._knocks >= KNOCKS_MAX:
            reply: Reply = _refusal(Busy("many machines are joining just now", hint="try again in a moment"))
        else:
            self._knocks += 1
            try:
                with trio.fail_after(KNOCK_S):
                    request = codec.decode(await read_all(stream, REQUEST_BYTES_MAX), JoinRequest)
                reply = await self._decide(stream.peer, request)
            except trio.TooSlowError:
                return
            except MeshError as error:
                log.info("join.refused", peer=stream.peer, error=error.code, message=error.message)
                reply = _refusal(error)
            finally:
                self._knocks -= 1
        await stream.write(codec.encode(reply))
        await stream.close_write()

    async def _decide(self, peer: NodeId, request: JoinRequest) -> Welcome:
        if request.mesh != self._mesh:
            raise NotAllowed(
                f"the invite is for mesh {request.mesh[:20]!r}, this node belongs to {self._mesh}",
                hint="use an invite made in this mesh: `mesh node invite`",
            )
        member = Member(
            node=peer,
            name=request.name[:256],
            roles=(),  # the state takes them from the invite, never from the stranger
            addresses=request.addresses[:8],
            api_address=request.api_address[:256],
            joined_wall_ms=self._wall_ms(),
            zone=request.zone[:256],
        )
        answer = await self._propose(Join(invites.hash_secret(request.secret), member))
        if not isinstance(answer, Joined):
            raise PeerFault(f"the mesh answered a join with {type(answer).__name__}")
        certificate = await self._certify(peer, answer.certificate_version)
        log.info(
            "join.accepted", peer=peer, name=answer.member.name, roles=[role.value for role in answer.member.roles]
        )
        members = tuple(self._members())[:MEMBERS_TOLD_MAX]
        return Welcome(
            self._public_key, self._ca_pem, certificate, members, self._wall_ms(), self._epoch(), self._links()
        )


async def knock(transport: Transport, invite: Invite, request: JoinRequest, *, timeout_s: float) -> Welcome:
    """Join through the first door that answers. Raises the refusal, or Unavailable when nobody answers."""
    failure: MeshError = Unavailable("the invite names no member")
    for door in invite.doors:
        try:
            with trio.fail_after(timeout_s):
                await transport.connect(door.node, door.addresses, timeout_s=min(5.0, timeout_s))
                stream = await transport.open_stream(door.node, JOIN_PROTOCOL, timeout_s=min(5.0, timeout_s))
                try:
                    await stream.write(codec.encode(request))
                    await stream.close_write()
                    reply: Reply = codec.decode(
                        await read_all(stream, REPLY_BYTES_MAX), Reply, bytes_max=REPLY_BYTES_MAX
                    )
                finally:
                    await stream.aclose()
        except trio.TooSlowError:
            failure = Unavailable(f"{door.node} at {', '.join(door.addresses)} did not answer within {timeout_s:.0f} s")
            continue
        except (Unavailable, PeerFault, InvalidRequest) as error:
            failure = error
            continue
        if isinstance(reply, Refusal):
            refused = from_code(reply.code, reply.message, reply.hint)
            if not refused.may_retry:
                raise refused
            failure = refused
            continue
        return reply
    raise Unavailable(
        f"no member that the invite names lets us in: {failure}",
        hint="is one of them running, and reachable from here? `mesh node invite` names the present ones",
    )


async def read_all(stream: Stream, bytes_max: int) -> bytes:
    """Up to the peer's end of the stream. Raises TooLarge past `bytes_max`."""
    parts: list[bytes] = []
    size = 0
    while data := await stream.read(64 << 10):
        size += len(data)
        if size > bytes_max:
            raise TooLarge(f"over {bytes_max} bytes where a short message was expected")
        parts.append(data)
    return b"".join(parts)


def _refusal(error: MeshError) -> Refusal:
    return Refusal(error.code, error.message[:1024], error.hint[:512])
