"""A member that lies, floods and stalls, and a stranger that tries everything: the mesh works on, and no agent dies.

The rogue is genuine: it joined with an invite as a worker, has a key and a certificate of its own, and speaks through
the product's own transport. What it says on top of that is what this file makes up.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from msgspec import Raw
from msgspec.structs import replace

import meshd
from meshd import codec
from meshd.admission.authority import CertifyCall
from meshd.admission.certificates import Greeting, certify
from meshd.admission.invites import Invite, hash_secret, parse
from meshd.admission.join import JoinRequest, Welcome, knock, read_all
from meshd.blobs.messages import Name, Want
from meshd.directory import BLOB_PROTOCOL, JOIN_PROTOCOL, RAFT_PROTOCOL, RPC_PROTOCOL
from meshd.errors import InvalidRequest, MeshError, NotAllowed, NotFound, PeerFault, Unavailable
from meshd.gossip.messages import (
    BUCKETS,
    Beat,
    Chunk,
    Claim,
    Compare,
    News,
    SignedChunk,
    Swap,
    Versions,
    chunk_payload,
)
from meshd.model import (
    AttemptKey,
    BackendOffer,
    BlobRef,
    EndReason,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
)
from meshd.net.frames import BODY_BYTES_MAX, Answer, Request, framed
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import StreamRpc
from meshd.ports import Stream
from meshd.raft.clocks import wall_clock_ms
from meshd.raft.replica import EventsCall, ProposeCall, ProposeReply, ReadCall, WaitCall
from meshd.raft.state import commands
from meshd.raft.state.commands import (
    AnyAnswer,
    Command,
    CreateInvite,
    CreateToken,
    Ended,
    EndSession,
    Found,
    Join,
    OpenSession,
    Reason,
    Rejected,
    RemoveMember,
    Report,
    Reported,
    SessionOpened,
    SetDraining,
    UpdateMember,
)
from meshd.shell import RenewCall
from meshd.views import GetMembers
from meshd.work.logs import LogCall
from meshd.work.session_messages import Notice, Renew, digest_of
from tests.cluster.conftest import Mesh, eventually

NAMES = ("node1", "node2", "node3")
METHODS = (
    *("mesh.hello", "mesh.certify", "mesh.key", "mesh.next_key", "mesh.api_certificate"),
    *("drain.state", "drain.hand_over"),
    *("log.propose", "log.read", "log.wait", "log.events", "log.status", "log.newest", "session.renew"),
    *("attempt.notice", "attempt.log", "blob.pull", "blob.get", "blob.have", "blob.list", "blob.remove"),
    *("gossip.ping", "gossip.indirect", "gossip.exchange", "gossip.tell"),
)
PROCESS = Offer(backends=(BackendOffer("process"),), resources=Resources(cpu_milli=8000, memory=8 << 30))
NOBODYS = "f" * 64


@dataclass
class Identity:
    """Somebody with a key; a member once it has a welcome."""

    key: KeyPair
    doors: dict[NodeId, tuple[str, ...]]
    greeting: Callable[[], bytes]
    starts: int = 0


@dataclass
class Rogue:
    key: KeyPair
    transport: Libp2pTransport
    rpc: StreamRpc
    lost: dict[NodeId, float] = field(default_factory=dict)

    @property
    def me(self) -> NodeId:
        return self.key.node_id

    async def propose(self, at: NodeId, command: Command) -> object:
        """What the mesh answers to the command, proposed in the rogue's own name: it has no other."""
        call = ProposeCall(Raw(codec.encode(command)), 5000)
        reply = codec.decode(await self.rpc.call(at, "log.propose", codec.encode(call), timeout_s=6), ProposeReply)
        assert reply.answer is not None, reply.why
        return codec.decode(reply.answer, AnyAnswer)

    async def stream(self, to: NodeId, protocol: str) -> Stream:
        return await self.transport.open_stream(to, protocol, timeout_s=5)


class Lost:
    def __init__(self) -> None:
        self.at: dict[NodeId, float] = {}

    def peer_up(self, peer: NodeId) -> None:
        self.at.pop(peer, None)

    def peer_down(self, peer: NodeId) -> None:
        self.at[peer] = trio.current_time()


@asynccontextmanager
async def running(identity: Identity, *, answers: bool = True) -> AsyncIterator[Rogue]:
    """The rogue at work. `answers` False: whatever is asked of it stays open and unanswered."""
    identity.starts += 1
    lost = Lost()
    transport = Libp2pTransport(
        identity.key,
        listen=["/ip4/127.0.0.1/tcp/0"],
        gate=lambda _peer, _protocol: True,
        book=lambda peer: identity.doors[peer],
        events=lost,
    )
    rpc = StreamRpc(transport, greeting=identity.greeting)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        await nursery.start(rpc.serve)
        if not answers:
            for protocol in (RPC_PROTOCOL, RAFT_PROTOCOL, BLOB_PROTOCOL):
                transport.handle(protocol, never)
        yield Rogue(identity.key, transport, rpc, lost.at)
        nursery.cancel_scope.cancel()


async def never(_stream: Stream) -> None:
    await trio.sleep_forever()


@pytest.fixture(scope="module")
def ids(mesh3: Mesh) -> dict[str, NodeId]:
    return {name: NodeId(node) for name, node in mesh3.ids().items() if name in NAMES}


@pytest.fixture(scope="module")
def joined(mesh3: Mesh) -> tuple[KeyPair, Welcome]:
    """A worker by a real invite; the mesh cannot know what it is up to."""
    with mesh3.client("node1") as client:
        invite = parse(client.invite(["worker"], uses=1))
    key = KeyPair.generate()

    async def knocking() -> Welcome:
        door = Identity(key, {}, lambda: b"")
        async with running(door) as rogue:
            return await knock(rogue.transport, invite, join_request(invite), timeout_s=10)

    return key, trio.run(knocking)


@pytest.fixture(scope="module")
def member(joined: tuple[KeyPair, Welcome]) -> Identity:
    key, welcome = joined
    doors = {peer.node: peer.addresses for peer in welcome.members}
    identity = Identity(key, doors, lambda: b"")

    def greeting() -> bytes:
        said = Greeting(welcome.certificate, identity.starts, b"r" * 16, wall_clock_ms(), "rogue", (), "", "0")
        return codec.encode(said)

    identity.greeting = greeting
    return identity


def join_request(invite: Invite, **changed: object) -> JoinRequest:
    return replace(JoinRequest(invite.mesh, invite.secret, "rogue", (), "", "0", wall_clock_ms()), **changed)


@pytest.fixture(autouse=True)
def alive(mesh3: Mesh):
    """After each kind of mischief: no agent died, none tripped over its own code, jobs run from anywhere to anywhere."""
    marks = {name: (mesh3.home(name) / "agent.log").stat().st_size for name in NAMES}
    yield
    for name in NAMES:
        assert mesh3.agents[name].poll() is None, f"{name} died"
        text = (mesh3.home(name) / "agent.log").read_bytes()[marks[name] :].decode(errors="replace")
        assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:4000]
    works(mesh3)


def works(mesh: Mesh, *, within_s: float = 30) -> float:
    """A job from each node, done; how long the three took."""
    began = time.monotonic()
    for name in NAMES:
        with mesh.client(name) as client:
            job = client.submit({"run": {"args": ["echo", name]}})
            assert client.wait(job, timeout_s=within_s).state.value == "done"
            assert client.output(job) == f"{name}\n".encode()
    return time.monotonic() - began


def said(mesh: Mesh, name: str, pattern: str) -> bool:
    return re.search(pattern, (mesh.home(name) / "agent.log").read_text(errors="replace")) is not None


async def in_thread(check: Callable[[], object], *, within_s: float) -> object:
    """Wait for it without keeping the rogue from its work."""
    return await trio.to_thread.run_sync(lambda: eventually(check, within_s=within_s))


async def refused(call: Awaitable[object]) -> NotAllowed:
    with pytest.raises(NotAllowed) as caught:
        await call
    return caught.value


# --- a stranger ------------------------------------------------------------------------------------------------------


async def test_a_stranger_gets_no_further_than_the_door(mesh3, ids, member, joined):
    one = ids["node1"]
    key = KeyPair.generate()
    _, welcome = joined
    mesh_id = welcome.certificate.mesh
    forged = certify(KeyPair.generate().sign, mesh_id, key.node_id, (Role.SERVER, Role.WORKER), 1)

    def greeting(certificate):
        return lambda: codec.encode(Greeting(certificate, 1, b"r" * 16, wall_clock_ms(), "x", (), "", "0"))

    for wrong in (
        greeting(forged),  # signed by a key of its own
        greeting(welcome.certificate),  # another's
        greeting(replace(welcome.certificate, node=key.node_id)),  # changed after it was signed
        lambda: b"",
        lambda: os.urandom(200),
        lambda: b"\x91" * 10_000,
    ):
        async with running(Identity(key, member.doors, wrong)) as stranger:
            for method in ("mesh.key", "log.status", "gossip.tell"):
                with pytest.raises((NotAllowed, InvalidRequest)):
                    await stranger.rpc.call(one, method, b"", timeout_s=5)
            for protocol in (RAFT_PROTOCOL, BLOB_PROTOCOL, "/meshd/nothing/1"):
                await refused(stranger.stream(one, protocol))
    async with running(Identity(key, member.doors, lambda: b"")) as stranger:
        for data in (b"", os.urandom(1000), b"\x97" + b"\xc0" * 7, os.urandom(64 << 10)):
            stream = await stranger.stream(one, JOIN_PROTOCOL)
            with suppress(Unavailable):
                await stream.write(data)
                await stream.close_write()
                assert len(await read_all(stream, 4096)) < 4096
            await stream.aclose()
        invite = Invite(mesh_id, b"?" * 18, (), ())
        door = [replace(peer, certificate=None) for peer in welcome.members if peer.node == one]
        assert door
        stream = await stranger.stream(one, JOIN_PROTOCOL)
        await stream.write(codec.encode(join_request(invite)))
        await stream.close_write()
        assert b"knows no such invite" in await read_all(stream, 4096)
        # It may stand at the door for 15 s; a member may stay.
        with trio.fail_after(20):
            while one not in stranger.lost:
                await trio.sleep(0.1)
    assert said(mesh3, "node1", "peer.refused")


# --- what a worker may not have --------------------------------------------------------------------------------------


async def test_a_worker_gets_neither_the_meshs_key_nor_a_servers_place(mesh3, ids, member):
    one, two = ids["node1"], ids["node2"]
    async with running(member) as rogue:
        for node in ids.values():
            for method in ("mesh.key", "mesh.next_key"):
                assert "not a server" in (await refused(rogue.rpc.call(node, method, b"", timeout_s=5))).message
            await refused(rogue.stream(node, RAFT_PROTOCOL))
        with mesh3.client("node2") as client:
            # In a thread: the rogue may be asked to hold a copy, and has to answer.
            blob = await trio.to_thread.run_sync(client.put_bytes, b"precious" * 1000)
        for node in ids.values():
            remove = rogue.rpc.call(node, "blob.remove", codec.encode(Name(blob.hash)), timeout_s=5)
            assert "may not remove" in (await refused(remove)).message
        with mesh3.client("node1") as client:
            found = io.BytesIO()
            client.get_blob(blob.hash, found)
            assert found.getvalue() == b"precious" * 1000
            open_invite = parse(client.invite(["server", "worker"], uses=3))
        # A certificate names the roles that the state knows, whatever is asked for.
        call = codec.encode(CertifyCall(rogue.me, 99))
        body = await rogue.rpc.call(one, "mesh.certify", call, timeout_s=5)
        assert b"server" not in body and b"worker" in body
        newcomer = Member(KeyPair.generate().node_id, "accomplice", ())
        for command in (
            CreateInvite("e" * 64, (Role.SERVER, Role.WORKER), 1, 60_000),
            Join(hash_secret(open_invite.secret), newcomer),
            CreateToken("d" * 64, "mine", "admin"),
            RemoveMember(two),
            SetDraining(two, True),
            EndSession(two, 1),
        ):
            answer = await rogue.propose(one, command)
            assert isinstance(answer, Rejected) and answer.reason is Reason.NOT_ALLOWED, (command, answer)
            assert answer.message.startswith("only a server")
        founded = await rogue.propose(one, Found("mine", Member(rogue.me, "rogue", (Role.SERVER,))))
        assert isinstance(founded, Rejected) and founded.reason is Reason.CONFLICT
    with mesh3.client() as client:
        assert {row.member.name for row in client.nodes().members} == {*NAMES, "rogue"}
        assert client.cluster().failures_survived == 1


# --- in another's name -----------------------------------------------------------------------------------------------


async def test_nobody_acts_in_anothers_name(mesh3, ids, member):
    names = {node: name for name, node in ids.items()}

    def long_job():
        with mesh3.client("node1") as client:
            job = client.submit({"run": {"args": ["sh", "-c", "sleep 3; echo mine"]}})
            eventually(lambda: client.task(job).state.value == "running", within_s=20)
            return client.task(job)

    async with running(member) as rogue:
        task = await trio.to_thread.run_sync(long_job)
        key = AttemptKey(task.job, task.task, task.attempt, task.fence)
        lie = Outcome(EndReason.EXIT, exit_code=0, message="forged")
        for node in ids.values():
            notice = codec.encode(Notice(1, leases=(key,), stops=(key,)))
            assert (
                "only servers lease"
                in (await refused(rogue.rpc.call(node, "attempt.notice", notice, timeout_s=5))).message
            )
            renew = codec.encode(RenewCall(Renew(1, digest_of(())), task.node))
            why = await refused(rogue.rpc.call(node, "session.renew", renew, timeout_s=5))
            assert "only servers pass on" in why.message
        opened = await rogue.propose(ids["node1"], OpenSession(1, (key,), 0, PROCESS))
        assert isinstance(opened, SessionOpened) and opened.leased == ()
        answer = await rogue.propose(ids["node2"], Report(1, 1, ended=(Ended(key, lie),), running=(key,)))
        assert answer == Reported(stale=(key,))
        # The seq and epoch of others are theirs: these count against the rogue's own session.
        answer = await rogue.propose(ids["node3"], commands.Claim(7, 1, 0, Offer()))
        assert isinstance(answer, Rejected) and answer.reason is Reason.WRONG_EPOCH
        assert names[task.node] in NAMES

    with mesh3.client("node3") as client:
        assert client.wait(task.job, timeout_s=20).state.value == "done"
        assert client.output(task.job) == b"mine\n" and client.task(task.job).attempt == 1


async def test_forged_and_replayed_gossip_convinces_nobody(mesh3, ids, member):
    one, two = ids["node1"], ids["node2"]
    sign = member.key.sign

    async with running(member) as rogue:

        async def tell(to: NodeId, news: News) -> None:
            await rogue.rpc.call(to, "gossip.tell", codec.encode(news), timeout_s=5)

        async def chunks_known_at(to: NodeId) -> list[SignedChunk]:
            body = await rogue.rpc.call(to, "gossip.exchange", codec.encode(Compare(bytes(8 * BUCKETS))), timeout_s=5)
            theirs = codec.decode(body, Versions)
            swap = codec.encode(Swap(theirs.buckets, (), News()))
            return list(codec.decode(await rogue.rpc.call(to, "gossip.exchange", swap, timeout_s=5), News).chunks)

        genuine = [signed for signed in await chunks_known_at(one) if codec.decode(signed.body, Chunk).node == two]
        assert genuine, "node1 knows what node2 says of itself"
        newest = max(codec.decode(signed.body, Chunk).incarnation for signed in genuine)
        forged = []
        for chunk in (
            Chunk(two, newest, 1000, 1, (("addr", codec.encode((("/ip4/6.6.6.6/tcp/6",), ""))),)),
            Chunk(two, newest + 5, 1, 1, (("leader", codec.encode(2**40)),)),
            Chunk(one, 2**53, 1, 1, ()),
        ):
            body = codec.encode(chunk)
            forged += [
                SignedChunk(body, sign(chunk_payload(body))),
                SignedChunk(body, b""),
                SignedChunk(body, bytes(64)),
            ]
        twisted = [SignedChunk(signed.body[:-1] + b"\0", signed.signature) for signed in genuine[:4]]
        for node in ids.values():
            for _ in range(50):
                await tell(node, News(chunks=tuple((genuine * 8)[:8])))  # replayed: a duplicate changes nothing
            for chunk in (*forged, *twisted):
                await tell(node, News(chunks=(chunk,)))
            for claim in (
                Claim(two, newest + 9, False, sign(b"x")),
                Claim(two, newest + 9, True, b""),
                Claim(NodeId("nobody"), 1, True, b""),
            ):
                await tell(node, News(claims=(claim,)))
            beat = Beat(bytes(8), Claim(two, newest, False, b""))
            with pytest.raises(InvalidRequest):
                await rogue.rpc.call(node, "gossip.ping", codec.encode(beat), timeout_s=5)
            with pytest.raises(NotFound):
                await rogue.rpc.call(node, "gossip.indirect", codec.encode(("nobody", None)), timeout_s=5)
        # A true accusation needs no proof; whoever is accused objects, and nobody alive is taken for dead.
        for _ in range(20):
            await tell(one, News(claims=(Claim(two, newest, True, b""),)))
            await trio.sleep(0.05)

    with mesh3.client() as client:

        def healthy():
            return {node.name for node in client.cluster().nodes if node.health == "alive"} >= set(NAMES)

        eventually(healthy, within_s=10)
        assert all("6.6.6.6" not in address for row in client.nodes().members for address in row.member.addresses)
    assert not said(mesh3, "node1", rf"node.dead.*{two}")
    eventually(lambda: said(mesh3, "node1", "chunks_forged"), within_s=15)


# --- nonsense --------------------------------------------------------------------------------------------------------


def test_every_method_is_among_those_that_are_abused():
    text = "".join(path.read_text() for path in Path(meshd.__file__).parent.rglob("*.py"))
    named = set(re.findall(r'register\(\s*"([a-z_.]+)"', text)) | set(
        re.findall(r'^[A-Z]+ = "(gossip\.[a-z]+)"', text, re.M)
    )
    assert named == set(METHODS)


def bodies(rng: random.Random) -> list[bytes]:
    """Empty, random, deep, vast, and of the right shape with wrong values in it."""
    shapes = [
        ReadCall(Raw(codec.encode(GetMembers())), -1, False),
        ReadCall(Raw(b"\x93\xa8ListJobs\xc0\xff"), 1 << 62, True),
        WaitCall("no job", -5, -5),
        WaitCall("x" * 100_000, 2**62, 2**62),
        EventsCall(-(2**60), -1),
        LogCall(-1, "../../identity.key", -1, -1),
        LogCall(2**63, "stdout", 2**63, 2**63),
        ProposeCall(Raw(b"\xc0"), 10),
        ProposeCall(Raw(b"\x91" * 10_000), 10),
        ProposeCall(Raw(codec.encode("x" * 1_000_000)), 10),
        Want(NOBODYS, 0, 1),
        ("../../etc/passwd",),
        [["../../etc/passwd"]],
        {"blobs": ["../../../etc/passwd", "x"]},
        {"blob": "../identity.key"},
        {"refs": [{"hash": NOBODYS, "size": 2**62}], "datas": [b"x"], "timeout_ms": 1},
        {"after": "\0"},
        [None] * 10,
        [2**63] * 10,
        [-1] * 10,
        [[]] * 10,
        {},
        "x",
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    found = [codec.encode(shape) for shape in shapes]
    found += [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ]
    found += [rng.randbytes(rng.choice((1, 7, 60, 5000))) for _ in range(12)]
    return found


async def test_nonsense_in_calls_is_answered_with_an_error(mesh3, ids, member):
    rng = random.Random(5)
    vast = (bytes(BODY_BYTES_MAX), b"\x91" * BODY_BYTES_MAX, b"\xdd\x00\x3f\x00\x00" + b"\xc0" * (BODY_BYTES_MAX - 5))
    outcomes: dict[str, int] = {}

    async def abuse(rogue: Rogue, node: NodeId, method: str, body: bytes) -> None:
        failure: MeshError | None = None
        try:
            await rogue.rpc.call(node, method, body, timeout_s=20)
        except MeshError as error:
            failure = error
        outcome = "answered" if failure is None else failure.code
        assert failure is None or "has no method" not in failure.message, method
        assert not isinstance(failure, PeerFault), f"{method} tripped: {failure} over {body[:60]!r}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async with running(member) as rogue:
        for method in METHODS:
            async with trio.open_nursery() as calls:
                for node in ids.values():
                    for body in bodies(rng):
                        calls.start_soon(abuse, rogue, node, method, body)
        for method in ("log.propose", "gossip.tell", "blob.pull", "attempt.notice"):
            for body in vast:
                await abuse(rogue, ids["node1"], method, body)
        await trio.to_thread.run_sync(works, mesh3)
    assert outcomes["invalid_request"] > 1000, outcomes


async def test_nonsense_on_streams_costs_the_stream_only(mesh3, ids, member):
    rng = random.Random(6)
    greeting = framed_greeting(member)
    pieces = [
        b"",
        b"\xff\xff\xff\xff",
        (64 << 20).to_bytes(4, "big") + b"x" * 1000,
        b"\0\0\0\1\xc1",
        b"\0\0\0\0" * 1000,
        rng.randbytes(20_000),
        greeting,
        greeting + b"\0\0\0\4abcd",
        greeting + rng.randbytes(300_000),
        greeting + b"\0\0\xff\xff" + b"\x91" * 0xFFFF,
        greeting + framed(Request(1, "no.such", 0, b"")) * 5000,
        greeting + framed(Request(0, "", 0, b"")) * 20_000,
        greeting + framed(Request(1, "mesh.hello", 2**40, b"")) * 5000,
        greeting + framed(Request(1, "log.status", 1, b""))[:-1],
        codec.encode(Want(NOBODYS, 0, 1)),
        len(codec.encode(Want(NOBODYS, 0, 1))).to_bytes(4, "big") + codec.encode(Want(NOBODYS, 0, 1)),
    ]

    async def spoil(rogue: Rogue, node: NodeId, protocol: str, data: bytes) -> None:
        with trio.move_on_after(3), suppress(MeshError):
            stream = await rogue.stream(node, protocol)
            with suppress(MeshError):
                await stream.write(data)
                if rng.random() < 0.5:
                    await stream.close_write()
                await stream.read(100)
            await stream.aclose()

    async with running(member) as rogue:
        for _ in range(2):
            async with trio.open_nursery() as streams:
                for data in pieces:
                    for node in ids.values():
                        for protocol in (RPC_PROTOCOL, BLOB_PROTOCOL, RAFT_PROTOCOL, JOIN_PROTOCOL):
                            streams.start_soon(spoil, rogue, node, protocol, data)
        # Hundreds of streams that say nothing: past the limit they are refused, and the connection lives.
        idle: list[Stream] = []

        async def sit() -> None:
            with suppress(MeshError), trio.move_on_after(3):
                idle.append(await rogue.stream(ids["node1"], BLOB_PROTOCOL))

        async with trio.open_nursery() as sitting:
            for _ in range(400):
                sitting.start_soon(sit)
        await trio.to_thread.run_sync(works, mesh3)
        for stream in idle:
            await stream.aclose()
    assert said(mesh3, "node1", "rpc.malformed")


def framed_greeting(member: Identity) -> bytes:
    return framed(Answer(0, True, member.greeting()))


async def test_a_member_that_comes_and_goes_leaves_nothing_behind(mesh3, ids, member):
    one, pid = ids["node1"], mesh3.agents["node1"].pid

    def open_files() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    before = open_files()
    for _ in range(60):
        async with running(member) as rogue:
            assert await rogue.rpc.call(one, "mesh.hello", b"", timeout_s=5) == b""
    await in_thread(lambda: open_files() <= before + 3, within_s=20)


# --- too much, and nothing at all ------------------------------------------------------------------------------------


async def test_a_flood_of_calls_slows_the_mesh_but_does_not_stop_it(mesh3, ids, member):
    leader = ids[mesh3.leader()]
    sent = gushed = 0

    async with running(member) as rogue:

        async def flood(method: str, body: bytes) -> None:
            nonlocal sent
            while True:
                with suppress(MeshError):
                    sent += 1
                    await rogue.rpc.call(leader, method, body, timeout_s=5)
                await trio.sleep(0)

        async def gush() -> None:
            """Raw frames, faster than anybody would call; a stream whose answers pile up is ended, so another."""
            nonlocal gushed
            burst = framed(Request(9, "log.status", 100, b"")) * 8000

            async def drink(stream: Stream) -> None:
                with suppress(MeshError):
                    while await stream.read(1 << 20):
                        pass

            while True:
                with suppress(MeshError):
                    stream = await rogue.stream(leader, RPC_PROTOCOL)
                    await stream.write(framed_greeting(member))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(drink, stream)
                        with suppress(MeshError):
                            while True:
                                await stream.write(burst)
                                gushed += 8000
                await trio.sleep(0.01)

        update = ProposeCall(Raw(codec.encode(UpdateMember("rogue", ()))), 4000)
        read = ReadCall(Raw(codec.encode(GetMembers())), 4000, False)
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(flood, "log.propose", codec.encode(update))
                nursery.start_soon(flood, "log.read", codec.encode(read))
                nursery.start_soon(flood, "gossip.exchange", codec.encode(Compare(bytes(8 * BUCKETS))))
            await in_thread(lambda: sent > 5_000, within_s=30)
            took_s = await trio.to_thread.run_sync(works, mesh3)
            nursery.cancel_scope.cancel()
        calls = sent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gush)
            await in_thread(lambda: gushed > 50_000, within_s=30)
            gushed_s = await trio.to_thread.run_sync(works, mesh3)
            nursery.cancel_scope.cancel()
    print(f"{calls} calls: {took_s:.1f} s for three jobs; {gushed} raw frames: {gushed_s:.1f} s")
    assert took_s < 20 and gushed_s < 20


async def test_a_member_that_takes_work_and_says_nothing_is_dropped_and_its_work_done_elsewhere(mesh3, ids, member):
    one = ids["node1"]

    def submit():
        with mesh3.client("node2") as client:
            job = client.submit({"run": {"args": ["sleep", "1"]}, "needs": {"cpu": 2}, "array": {"range": "1-8"}})
            rogues = lambda: [task for task in client.tasks(job) if task.node == member.key.node_id]  # noqa: E731
            eventually(rogues, within_s=20)
            return job

    async with running(member, answers=False) as rogue:
        opened = await rogue.propose(one, OpenSession(2, (), 4, PROCESS))
        assert isinstance(opened, SessionOpened)
        await rogue.propose(one, commands.Claim(2, 1, 4, PROCESS))
        job = await trio.to_thread.run_sync(submit)
    # A new start that connects to everybody, begins to speak, and then neither reads nor answers.
    async with running(member, answers=False) as rogue:
        began = trio.current_time()
        for node in ids.values():
            stream = await rogue.stream(node, RPC_PROTOCOL)
            await stream.write(framed_greeting(member))
        await rogue.transport.connect(one, member.doors[one], timeout_s=5)
        with trio.fail_after(20):
            while set(rogue.lost) < set(ids.values()):
                await trio.sleep(0.05)
        assert max(rogue.lost.values()) - began < 16, rogue.lost
    for name in NAMES:
        assert said(mesh3, name, "peer.silent")
    with mesh3.client("node3") as client:
        eventually(
            lambda: next(it.health for it in client.cluster().nodes if it.name == "rogue") == "dead", within_s=20
        )
        assert client.wait(job, timeout_s=40).state.value == "done"
        assert {task.state.value for task in client.tasks(job)} == {"done"}
        assert all(task.node != member.key.node_id for task in client.tasks(job))


async def test_a_worker_that_lies_about_its_results_harms_nobody_elses(mesh3, ids, member):
    one = ids["node1"]
    lie = Outcome(
        EndReason.EXIT,
        exit_code=0,
        message="\x1b[31mdone",
        stdout=BlobRef(hash=NOBODYS, size=1 << 40),
        holders=(member.key.node_id,),
    )
    offer = replace(PROCESS, labels=(("rogue", "yes"),))

    def submit():
        with mesh3.client("node2") as client:
            job = client.submit({"run": {"args": ["true"]}, "needs": {"labels": "rogue=yes"}})
            eventually(lambda: client.task(job).node == member.key.node_id, within_s=20)
            return client.task(job)

    async with running(member) as rogue:
        await rogue.propose(one, OpenSession(3, (), 4, offer))
        await rogue.propose(one, commands.Claim(3, 1, 4, offer))
        task = await trio.to_thread.run_sync(submit)
        key = AttemptKey(task.job, task.task, task.attempt, task.fence)
        assert await rogue.propose(one, Report(3, 2, ended=(Ended(key, lie),))) == Reported()
        assert isinstance(await rogue.propose(one, commands.Claim(3, 3, 0, offer)), object)
    shown = mesh3.cli("node3", "job", "show", task.job)
    assert shown.returncode == 0
    assert b"\x1b" not in shown.stdout and b"\\x1b[31mdone" in shown.stdout
    done = mesh3.cli("node3", "job", "logs", task.job, timeout_s=100)
    assert done.returncode != 0 and b"Traceback" not in done.stderr and NOBODYS[:12].encode() in done.stderr
