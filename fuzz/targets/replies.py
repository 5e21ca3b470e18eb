"""What another node answers to this node's own calls, when it lies: voters, servers, whoever holds a blob.

May be raised: MeshError. A liar's answer is an error of that call, or is asked of the next node; it never ends a task
of the agent.
Each frame is the answer to one call, in the order in which the calls are made; the first byte says which task asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import trio

from fuzz import world
from fuzz.inputs import join, split
from fuzz.targets import machine as commands
from fuzz.targets.methods import _CA_PEM, _KEY, SMALL, SMALL_REF, _Blobs, _Home, _Node
from fuzz.world import PEER, GivenTransport, Handlers
from meshd import codec
from meshd.admission.authority import Authority
from meshd.admission.keyring import KeyRing
from meshd.blobs.fetch import Fetcher
from meshd.blobs.messages import Contents, Presence, Sizes
from meshd.blobs.replicate import Replicator
from meshd.errors import MeshError
from meshd.model import BlobRef, JobId, Member
from meshd.net.identity_key import KeyPair, verify
from meshd.ports import ProposeResult
from meshd.raft.remote import MeshLog
from meshd.raft.replica import EventsReply, ProposeReply
from meshd.raft.state.commands import Accepted, Joined, Reason, Rejected, RevokeToken, SessionOpened
from meshd.views import EventView, GetJob, GetMembers, GetSummary, JobView, MembersView, Summary
from meshd.work.session_messages import DIGEST_BYTES, Granted, Refusal, Refused, Renew

FRAMED = True


def fuzz(data: bytes) -> None:
    frames = split(data)
    if frames and frames[0]:
        asks = _ASKS[frames[0][0] % len(_ASKS)]
        world.run(lambda: _ask(asks, [frames[0][1:], *frames[1:]]))


async def _ask(asks: Callable[[Handlers], Awaitable[object]], answers: list[bytes]) -> None:
    with suppress(MeshError), trio.move_on_after(120):
        await asks(Handlers(answers))


def _log(rpc: Handlers) -> MeshLog:
    return MeshLog(commands.A, rpc, lambda: [PEER, commands.B])


async def _proposes(rpc: Handlers) -> None:
    answer = await _log(rpc).propose(RevokeToken("x"), timeout_s=6)
    codec.encode(answer)


async def _lists_members(rpc: Handlers) -> None:
    await _log(rpc).query(GetMembers(), MembersView, timeout_s=6)


async def _sums_up(rpc: Handlers) -> None:
    await _log(rpc).query(GetSummary(), Summary, timeout_s=6)


async def _waits(rpc: Handlers) -> None:
    await _log(rpc).wait_job(JobId("x"), 0, timeout_s=6)


async def _follows_events(rpc: Handlers) -> None:
    await _log(rpc).events(None, timeout_s=6)


async def _looks_at_the_log(rpc: Handlers) -> None:
    await _log(rpc).status(timeout_s=6)


async def _gets_the_key(rpc: Handlers) -> None:
    authority = _authority(rpc)
    for certify in (authority.obtain_keys(), authority.certify(PEER, 1), authority.api_certificate("pem")):
        with suppress(MeshError):
            await certify


def _authority(rpc: Handlers) -> Authority:
    home: Any = _Home()
    return Authority(
        home=home, me=commands.A, mesh="mesh", keys=KeyRing("mesh", _KEY.public_bytes, verify), ca_pem=_CA_PEM, rpc=rpc,
        servers=lambda: [PEER], members=_nobody,
    )  # fmt: skip


async def _nobody() -> list[Member]:
    await trio.lowlevel.checkpoint()
    return []


async def _fetches(rpc: Handlers) -> None:
    store: Any = _Blobs()
    del store.blobs[SMALL_REF.hash]
    fetcher = Fetcher(GivenTransport(commands.A), rpc, store, lambda blob: [PEER])
    with suppress(MeshError):
        await fetcher.size_of(SMALL_REF.hash)
    with suppress(MeshError):
        await fetcher.fetch_many([SMALL_REF, BlobRef("b" * 64, 3)], timeout_s=20)
    with suppress(MeshError):
        await Replicator(rpc, store, fetcher, lambda: [PEER]).ensure([SMALL_REF], 2, timeout_s=20)
    assert all(data == SMALL for data in store.blobs.values()), "wrong bytes were kept"


async def _renews(rpc: Handlers) -> None:
    """A worker's session, told nonsense by its voter."""
    node = _Node()
    node.shell._rpc = rpc
    node.leading_term = lambda: None  # type: ignore[method-assign]
    node.leader = lambda: PEER  # type: ignore[method-assign]

    async def nowhere(command: bytes) -> ProposeResult:
        return await _log(rpc).propose_once(command, timeout_s=1)

    node.shell._propose = nowhere
    async with trio.open_nursery() as nursery:
        await node.start(nursery)
        with suppress(MeshError):
            await node.shell._renew(commands.A, Renew(1, b"d" * DIGEST_BYTES))
        await trio.sleep(15)
        nursery.cancel_scope.cancel()


_ASKS = (
    _proposes, _lists_members, _sums_up, _waits, _follows_events, _looks_at_the_log, _gets_the_key, _fetches, _renews,
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    def replies(asks: Callable[[Handlers], Awaitable[object]], *answers: object) -> bytes:
        bodies = [answer if isinstance(answer, bytes) else codec.encode(answer) for answer in answers]
        return join([bytes([_ASKS.index(asks)]) + bodies[0], *bodies[1:]])

    node = _MadeNode()
    member = node.members.members[0].member
    accepted = [
        codec.encode(answer)
        for answer in (Accepted(), Joined(member, 1), Rejected(Reason.BUSY, "m"), Rejected(Reason.GAP, "m"))
    ]
    for answer in accepted:
        yield replies(_proposes, ProposeReply(None, 0, False, "not now"), ProposeReply(answer, 5, False, ""))
    yield replies(_proposes, ProposeReply(None, 0, True, "unknown"), b"\xc1", b"", ProposeReply(b"\xc1", 5, False, ""))
    yield replies(_lists_members, b"", node.members)
    yield replies(_sums_up, node.summary)
    yield replies(_waits, node.job)
    yield replies(_follows_events, EventsReply((EventView(5, "job.ended", 1, JobId("x")),), 9))
    yield replies(_looks_at_the_log, node.status, node.status)
    other = KeyPair.from_secret(b"o" * 32)
    yield replies(_gets_the_key, _KEY.secret, b"\xa1x", "pem")
    yield replies(_gets_the_key, other.secret, b"\xc4\x01x", b"\xc1")
    yield replies(_gets_the_key, b"\xc4\x00")
    yield replies(_fetches, Sizes((len(SMALL),)), Contents((SMALL, None)), Contents((b"abc",)), Presence((True,)))
    yield replies(
        _fetches,
        Sizes((2**53,)),
        Contents((b"wrong", SMALL)),
        Sizes((3,)),
        Contents((None,)),
        Presence((True, False), "full"),
    )
    yield replies(_renews, Granted(), Granted(5), Refused(Refusal.OVER), Refused(Refusal.NOT_LEADING), Granted(2**53))
    opened = codec.encode(SessionOpened(2, ()))
    yield replies(
        _renews,
        Granted(),
        ProposeReply(opened, 5, False, ""),
        ProposeReply(opened, 5, False, ""),
        Granted(),
        b"\xc1",
        ProposeReply(codec.encode(SessionOpened(2**53, ())), 1, False, ""),
    )


class _MadeNode:
    """Views as an honest voter gives them."""

    def __init__(self) -> None:
        async def look() -> None:
            await trio.lowlevel.checkpoint()
            node = _Node()
            node._commit(commands.A, split(next(iter(commands.seeds())))[0][1:])
            self.members: MembersView = node.machine.answer(GetMembers())
            self.summary: Summary = node.machine.answer(GetSummary())
            self.job: JobView = node.machine.answer(GetJob("last"))
            self.status = node.status()

        world.run(look)
