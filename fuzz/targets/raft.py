"""Frames of an authenticated but hostile server, taken by a whole server's log: engine, journal, snapshots, machine.

May be raised: Corrupt, and only where Raft's own rules were broken in a way that no honest server can: a second leader
in a term, a contradiction of what is committed, another state than the majority's. Only servers can speak this
protocol (the transport's gate refuses workers and strangers), and servers are trusted to crash, not to lie
(protocol.md 1). Everything else that they send costs a message or a stream.
Besides: terms and commits never fall, one vote in a term, nothing is sent that a peer could not read.
A frame is who and what: a message, or time that passes, or a connection that comes or goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from random import Random

from msgspec import Raw

from fuzz.inputs import join, split
from fuzz.targets.machine import WALL_MS
from fuzz.targets.machine import A as NODE_A
from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.model import Member, NodeId, Role
from meshd.raft.agreement import Diverged
from meshd.raft.configurations import as_command
from meshd.raft.messages import (
    NO_OP,
    REPLICATED,
    TERM_MAX,
    AnyMessage,
    Append,
    Appended,
    Chunk,
    Propose,
    Proposed,
    Read,
    ReadAt,
    Received,
    TimeoutNow,
    Vote,
    Voted,
    VoterId,
    node_of,
)
from meshd.raft.server import Server
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Batch, Found, Stamped
from meshd.raft.state.machine import Machine
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import create_journal
from meshd.raft.storage.segments import JournalSizes
from meshd.raft.storage.snapshot import Image, pack_image
from meshd.raft.surroundings import Clocks, Down, Incident, Mail, Up
from meshd.raft.turn import Turns
from meshd.testing.raft_disk import MemoryDisk

FRAMED = True
MESH = "mesh"
ME, B, C, D = (VoterId(f"{name}/01") for name in (NODE_A, "node-b", "node-c", "node-d"))
PEERS = (B, C, D)
"""Two voters and a server that is none."""
SETTINGS = RaftSettings(checkpoint_entries=2, snapshot_entries=4, retain_entries=1)
SIZES = JournalSizes(segment=1 << 16, step=1 << 13, reserve=1 << 13, reserves=1, release=1 << 14)
BY_RULE = ("two leaders in term", "contradicts entry")

# The first byte of a frame: a peer's message, or one of these.
PASS, DUE, UP, DOWN = 0x10, 0x20, 0x30, 0x40


class Links:
    """What arrives is given; what leaves must be readable."""

    def __init__(self) -> None:
        self.inbox: deque[Incident] = deque()
        self.up: set[VoterId] = set()
        self.sent: list[AnyMessage] = []

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        body = codec.encode(message)
        if getattr(message, "term", 0) <= TERM_MAX:  # a liar may use up all terms; that stops elections, not agents
            codec.decode(body, AnyMessage)
        self.sent.append(message)
        return peer in self.up

    def take(self) -> Incident | None:
        return self.inbox.popleft() if self.inbox else None

    def connected(self) -> list[VoterId]:
        return sorted(self.up)

    def reach(self, peers: Collection[NodeId]) -> None:
        pass


class World:
    """One server, its disk and its clock."""

    def __init__(self, *, is_alone: bool) -> None:
        self.now_s = 100.0
        self.links = Links()
        self.machine = Machine()
        founding = (ME,) if is_alone else (ME, B, C)
        disk = MemoryDisk()
        journal = create_journal(disk, LocalHeader(MESH, "01", 1, "aa", founding=founding), SIZES)
        self.server = Server(
            node=NODE_A,
            journal=journal,
            image=None,
            machine=self.machine,
            links=self.links,
            servers=lambda: tuple(node_of(voter) for voter in (ME, *PEERS)),
            draining=lambda: (),
            zones=dict,
            settings=SETTINGS,
            clocks=Clocks(self.clock_s, lambda: WALL_MS + int(self.now_s * 1000), lambda: True),
            random=Random(1),  # noqa: S311
            packed=lambda: self.turns.packed(),
            report=lambda event, fields: None,
        )
        self.journal = journal
        self.turns = Turns(self.server, journal, disk, MESH, self.machine, lambda: None)
        for peer in PEERS:
            self.connect(peer)

    def clock_s(self) -> float:
        self.now_s += 2e-6
        return self.now_s

    def connect(self, peer: VoterId) -> None:
        self.links.up.add(peer)
        self.links.inbox.append(Up(peer))

    def obey(self, frame: bytes) -> None:
        match frame[0] & 0xF0:
            case 0x10:
                self.now_s += frame[0] % 16 / 8
            case 0x20:
                self.now_s = max(self.now_s, (self.server.next_due_s() or self.now_s) + 0.01)
            case 0x30:
                self.connect(PEERS[frame[0] % 3])
            case 0x40:
                self.links.up.discard(PEERS[frame[0] % 3])
                self.links.inbox.append(Down(PEERS[frame[0] % 3]))
            case _:
                try:
                    message = codec.decode(frame[1:], AnyMessage)
                except MeshError:
                    return  # the wire ends the stream
                self.links.inbox.append(Mail(PEERS[frame[0] % 3], message, len(frame)))

    def turn(self) -> None:
        for work in self.turns.turn():
            work()
        while (beside := self.turns.beside()) is not None:
            beside()
            for work in self.turns.turn():
                work()


def fuzz(data: bytes) -> None:
    world = World(is_alone=data[-1:] == b"1")
    engine = world.server.engine
    term, commit, votes = engine.term, engine.commit, dict[int, VoterId]()
    try:
        for frame in split(data):
            if frame:
                world.obey(frame)
                world.turn()
                assert engine.term >= term and engine.commit >= commit, "a term or a commit fell"
                assert engine.first <= engine.applied <= engine.commit <= engine.last
                term, commit = engine.term, engine.commit
                if engine.vote is not None:
                    assert votes.setdefault(term, engine.vote) == engine.vote, "two votes in one term"
    except Diverged:
        return
    except Corrupt as error:
        if not any(rule in error.message for rule in BY_RULE):
            raise
    assert not world.machine.faults
    world.server.stop()


# --- seeds ------------------------------------------------------------------------------------------------------------


def _says(peer: VoterId, message: AnyMessage) -> bytes:
    return bytes([PEERS.index(peer)]) + codec.encode(message)


def _pass(eighths: int) -> bytes:
    return bytes([PASS | eighths])


_DUE = bytes([DUE])


def _batch(number: int = 0) -> bytes:
    found = Found(MESH, Member(NODE_A, "a", (Role.SERVER,)))
    payload = codec.encode(Batch(1, WALL_MS + number, (Stamped(NODE_A, Raw(codec.encode(found))),)))
    return REPLICATED + codec.pack((0, (payload,)))


def _entries(*commands: bytes, after: int = 1, term: int = 1) -> tuple[tuple[bytes, int, int], ...]:
    return tuple((command, after + number, term) for number, command in enumerate(commands, 1))


def elected(term: int = 1) -> list[bytes]:
    return [_DUE, _says(B, Voted(term - 1, term, True, True)), _says(C, Voted(term, term, True, False))]


def seeds() -> Iterator[bytes]:
    wall = WALL_MS
    lead = [
        *elected(),
        _says(B, Appended(1, 1, 100_000, True, 3, wall)),
        _says(C, Appended(1, 2, 100_000, True, 3, wall, 2, b"x" * 16)),
    ]
    yield join(
        [
            *lead,
            _says(B, Propose(7, NODE_A, codec.encode(Found(MESH, Member(NODE_A, "a", (Role.SERVER,)))))),
            _says(C, Read(9)),
            _says(B, Appended(1, 3, 100_000, True, 4, wall)),
            _DUE,
        ]
    )
    yield join(
        [*lead, _says(B, Vote(2, 5, 1, True)), _says(C, Vote(5, 9, 1, False)), _says(D, Vote(9, 9, 9, True)), _pass(9)]
    )
    yield join(
        [*lead, _says(C, Append(2, 1, 100_000, 0, 0, 0)), _says(B, Append(1, 1, 100_000, 9, 1, 0, _entries(NO_OP)))]
    )
    yield join(
        [
            *lead,
            bytes([DOWN | 1]),
            _DUE,
            bytes([UP | 1]),
            _says(C, Appended(1, 9, 200_000, False, 1)),
            _says(D, Received(1, 3, 100_000, 2, 5)),
            _pass(12),
        ]
    )
    append = Append(1, 1, 100_000, 4, 1, 0, _entries(NO_OP, _batch(), _batch(1)), 2, b"y" * 16)
    yield join(
        [
            _says(B, append),
            _says(B, Append(1, 2, 100_100, 6, 4, 1, _entries(as_command((ME, B, C, D)), _batch(2), after=4))),
            _says(B, TimeoutNow(1)),
            _DUE,
        ]
    )
    yield join(
        [
            _says(B, append),
            _says(C, Append(3, 1, 100_100, 4, 3, 1, _entries(NO_OP, after=3, term=3))),
            _says(B, Append(1, 9, 1, 9, 9, 1)),
            _says(C, ReadAt(1, 4)),
            _says(C, Proposed(1, "committed", b"\xc0", 5)),
        ]
    )
    for index, voters, state in ((5, (ME, B, C), empty_state()), (9, (), b"\x90"), (2**53, (ME,), empty_state())):
        packed = pack_image(Image(MESH, index, 1, voters, state))
        size = len(packed.data)
        chunks = [
            Chunk(1, 1, 100_000, index, 1, size, packed.digest, at, packed.data[at : at + 200])
            for at in range(0, size, 200)
        ]
        yield join(
            [
                *(_says(B, chunk) for chunk in chunks),
                _says(B, Append(1, 2, 100_000, index + 1, index, 1, _entries(NO_OP, after=index))),
                _DUE,
                _DUE,
            ]
        )
    yield join([_DUE, _pass(3), _DUE, _says(D, Append(4, 1, 5, 3, 1, 0, _entries(NO_OP, term=4)))]) + b"\0\0" + b"1"
    # Configurations that are none.
    for nonsense in (
        b"\x02",
        b"\x02\x05",
        b"\x02\x90",
        b"\x02\x91\x01",
        b"\x02\xc1",
        as_command((ME, ME)),
        as_command((VoterId("x"),) * 20),
    ):
        yield join([_says(B, Append(1, 1, 100_000, 3, 1, 0, _entries(NO_OP, nonsense))), _DUE, _DUE])
    for nonsense in (
        b"",
        b"\x00",
        b"\x00\x90",
        b"\x00" + codec.pack((5, (b"x",))),
        b"\x00" + codec.pack((0, (b"x", 1))),
        b"\x07",
    ):
        yield join([_says(B, Append(1, 1, 100_000, 3, 1, 0, _entries(NO_OP, nonsense))), _DUE])


def empty_state() -> bytes:
    return Machine().capture()()
