"""Bodies of calls that a member makes: of the log, sessions, notices, blobs, logs of tasks, drain, the mesh's key.

May be raised: MeshError, which the caller is told; nothing else, also not later by the tasks that a call started.
The first byte of a frame says which method (in alphabetical order), its highest bit whether the caller is a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import trio
from blake3 import blake3
from msgspec import Raw

from fuzz import world
from fuzz.inputs import join, split
from fuzz.targets import gossip as gossiping
from fuzz.targets import machine as commands
from fuzz.world import GivenTransport, Handlers
from meshd import codec
from meshd.admission import tls
from meshd.admission.authority import Authority, CertifyCall
from meshd.agent import Agent
from meshd.blobs.fetch import Fetcher
from meshd.blobs.messages import ListFrom, Name, Names, Pull
from meshd.blobs.replicate import Replicator
from meshd.blobs.serve import BlobServer
from meshd.directory import Directory
from meshd.errors import MeshError, NotFound
from meshd.gossip.service import GossipService
from meshd.model import AttemptKey, AttemptRun, BlobRef, EndReason, JobId, JobSpec, Member, NodeId, Outcome
from meshd.net.identity_key import KeyPair, verify
from meshd.ports import Committed, Leash, ProposeResult
from meshd.raft.log import Newest, RaftStatus
from meshd.raft.replica import EventsCall, ProposeCall, ReadCall, Replica, WaitCall
from meshd.raft.state.commands import Batch, OpenSession, Stamped
from meshd.raft.state.machine import Machine
from meshd.shell import RenewCall, Shell
from meshd.views import AnyQuery, Explain, GetJob, GetMembers, ListJobs, ListTasks
from meshd.work.drain import Drain
from meshd.work.keeper import Applied, Keeper
from meshd.work.logs import LogCall, LogDesk
from meshd.work.session_messages import DIGEST_BYTES, Notice, Renew
from meshd.work.worker import Offering, Worker

FRAMED = True
ME = commands.A
SERVER, WORKER = commands.C, commands.B
_KEY = KeyPair.from_secret(b"m" * 32)
_CA_PEM = tls.make_authority(_KEY.private, "mesh")
SMALL = b"small blob"
SMALL_REF = BlobRef(blake3(SMALL).hexdigest(), len(SMALL))


def fuzz(data: bytes) -> None:
    world.run(lambda: _call(split(data)))


async def _call(frames: list[bytes]) -> None:
    node = _Node()
    async with trio.open_nursery() as nursery:
        await node.start(nursery)
        names = sorted(node.rpc.methods)
        for frame in frames:
            if frame:
                peer = SERVER if frame[0] & 0x80 else WORKER
                with suppress(MeshError), trio.move_on_after(6):
                    await node.rpc.methods[names[(frame[0] & 0x7F) % len(names)]](peer, frame[1:])
        await trio.sleep(3)  # what was started ends, is resent, times out
        nursery.cancel_scope.cancel()
    assert node.machine.faults == 0


class _NoBatches:
    """Every attempt runs by itself."""

    def takes(self, spec: JobSpec) -> bool:
        return False


class _Node:
    """Everything of a node that answers calls, around a log that commits at once."""

    def __init__(self) -> None:
        self.rpc = Handlers()
        self.machine = Machine()
        self.index = 0
        self.is_voter = True
        transport = GivenTransport(ME)
        directory = Directory(ME, "mesh", _KEY.public_bytes, verify, [])
        self.replica = Replica(self, self.machine, self._on_events)  # type: ignore[arg-type]
        for frame in commands._prologue():
            self._commit(commands.ORIGINS[frame[0] & 15], frame[1:])
        self.replica.register(self.rpc)
        agent = Agent(Worker(epoch=1), Keeper(self.machine))
        self.planned: Any = _NoBatches()
        self.shell = Shell(
            me=ME, agent=agent, rpc=self.rpc, world=self, runs=self, propose=self._propose_mine, save_epoch=_save_epoch
        )
        store: Any = _Blobs()
        mesh_log: Any = self
        home: Any = _Home()
        fetcher = Fetcher(transport, self.rpc, store, lambda blob: ())
        BlobServer(transport, self.rpc, store, may_remove=self.is_server)
        replicator = Replicator(self.rpc, store, fetcher, lambda: ())
        LogDesk(_NoLogs(), self.rpc)  # type: ignore[arg-type]
        Drain(
            me=ME, rpc=self.rpc, mesh_log=mesh_log, directory=directory, store=store, replicator=replicator,
            attempts_running=lambda: 0, is_voter=lambda: True, hand_over=lambda: None, leave_lead=lambda: None,
        )  # fmt: skip
        authority = Authority(
            home=home, me=ME, mesh="mesh", keys=directory.keys, ca_pem=_CA_PEM, rpc=self.rpc,
            servers=lambda: (), members=self._list_members,
        )  # fmt: skip
        authority._keys[_KEY.public_bytes] = _KEY
        self.gossip = GossipService(
            ME, self.rpc, lambda data: b"s" * 64, lambda *_: True, Random(1), lambda: self.now_ms(), incarnation=5  # noqa: S311
        )  # fmt: skip

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.shell.serve)
        await nursery.start(self.gossip.serve)
        self.gossip.set_members([ME, SERVER, WORKER])
        self.shell.feed(Offering(2, commands.OFFER))
        await trio.sleep(0.1)

    # --- the log

    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult:
        await trio.lowlevel.checkpoint()
        return Committed(self._commit(origin, command), self.index)

    async def _propose_mine(self, command: bytes) -> ProposeResult:
        return await self.propose(ME, command, timeout_s=1)

    def _commit(self, origin: NodeId, command: bytes) -> bytes:
        self.index += 1
        batch = Batch(1, commands.WALL_MS + self.index, (Stamped(origin, Raw(command)),))
        (answer,) = self.machine.apply(self.index, codec.encode(batch))
        self.replica.applied(self.index)
        return answer

    def _on_events(self, events: object) -> None:
        if hasattr(self, "shell"):
            self.shell.feed(Applied(events, 1))  # type: ignore[arg-type]

    async def barrier(self, *, timeout_s: float) -> int:
        await trio.lowlevel.checkpoint()
        return self.index

    @property
    def position(self) -> int:
        return self.index

    def status(self) -> RaftStatus:
        return RaftStatus(ME, 1, ME, True, (), 0, self.index, self.index, 1, self.index, 0, False)

    def newest(self) -> Newest:
        return Newest(1, self.index, True, True)

    async def _list_members(self) -> list[Member]:
        await trio.lowlevel.checkpoint()
        return list(self.machine.members().values())

    # --- the shell's world

    def now_ms(self) -> int:
        return int(trio.current_time() * 1000) + 1_000_000

    def leading_term(self) -> int | None:
        return 1

    def leader(self) -> NodeId | None:
        return ME

    def voters(self) -> tuple[NodeId, ...]:
        return ()

    def is_server(self, node: NodeId) -> bool:
        return node in (ME, SERVER)

    async def run(self, key: AttemptKey, spec: JobSpec, leash: Leash) -> Outcome:
        await trio.sleep(0.5)
        return Outcome(EndReason.EXIT, 0)


async def _save_epoch(epoch: int) -> None:
    await trio.lowlevel.checkpoint()


class _Home:
    mesh_key = Path("/nonexistent/mesh.key")

    def later_key(self, public_key: bytes) -> Path:
        return Path("/nonexistent/mesh.key.1")


class _NoLogs:
    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        return None


class _Blobs:
    """blobs.store.Store in memory."""

    def __init__(self) -> None:
        self.blobs = {SMALL_REF.hash: SMALL}

    def has(self, blob: str) -> bool:
        return blob in self.blobs

    def size(self, blob: str) -> int:
        return len(self.blobs[blob])

    async def read(self, blob: str, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._get(blob)[offset : offset + length]

    async def verify(self, blob: str) -> None:
        await trio.lowlevel.checkpoint()
        self._get(blob)

    async def get_bytes(self, ref: BlobRef, *, bytes_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._get(ref.hash)

    async def get_many(self, refs: list[BlobRef], *, bytes_max: int) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [self._get(ref.hash) for ref in refs]

    async def put_many(self, datas: list[bytes]) -> list[BlobRef]:
        await trio.lowlevel.checkpoint()
        for data in datas:
            self.blobs[blake3(data).hexdigest()] = data
        return [BlobRef(blake3(data).hexdigest(), len(data)) for data in datas]

    async def list(self) -> list[BlobRef]:
        await trio.lowlevel.checkpoint()
        return sorted(BlobRef(name, len(data)) for name, data in self.blobs.items())

    async def remove(self, blob: str) -> bool:
        await trio.lowlevel.checkpoint()
        return self.blobs.pop(blob, None) is not None

    async def resume(self, ref: BlobRef) -> object:
        await trio.sleep(inf)
        raise AssertionError

    def _get(self, blob: str) -> bytes:
        if blob not in self.blobs:
            raise NotFound(f"no blob {blob}")
        return self.blobs[blob]


# --- seeds ------------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    names: list[str] = []

    async def look() -> None:
        await trio.lowlevel.checkpoint()
        names.extend(sorted(_Node().rpc.methods))

    world.run(look)
    return names


def seeds() -> Iterator[bytes]:
    names = _names()

    def frame(method: str, body: object, *, by_server: bool = False) -> bytes:
        data = body if isinstance(body, bytes) else codec.encode(body)
        return bytes([names.index(method) | (0x80 if by_server else 0)]) + data

    def read(query: AnyQuery, *, is_stale_ok: bool = False) -> bytes:
        return frame("log.read", ReadCall(Raw(codec.encode(query)), 1000, is_stale_ok))

    submit = [part[1:] for seed in commands.seeds() for part in split(seed) if part and part[0] < 0x80][:40]
    for start in range(0, 40, 8):
        yield join(
            [
                frame("log.propose", ProposeCall(Raw(command), 1000))
                for command in submit[start : start + 8]
                if len(command) < 600
            ]
        )
    job = commands.job_id(1)
    yield join(
        [
            frame("log.propose", ProposeCall(Raw(submit[0]), 1000)),
            read(GetJob("last")),
            read(GetMembers()),
            read(ListJobs()),
            read(ListTasks(job)),
            read(Explain(job), is_stale_ok=True),
        ]
    )
    yield join(
        [
            frame("log.wait", WaitCall(job, 0, 100)),
            frame("log.wait", WaitCall(JobId("x"), -5, 2**53)),
            frame("log.events", EventsCall(None, 100)),
            frame("log.events", EventsCall(-1, 2**53)),
            frame("log.status", b""),
        ]
    )
    key = AttemptKey(job, 0, 1, 1)
    run = AttemptRun(job, 0, 1, 1)
    notice = Notice(2, (run,), ((job, commands._spec()),), ())
    yield join(
        [
            frame("session.renew", RenewCall(Renew(1, b"d" * DIGEST_BYTES))),
            frame("session.renew", RenewCall(Renew(1, b"e" * DIGEST_BYTES), WORKER), by_server=True),
            frame("session.renew", RenewCall(Renew(1, b"e" * DIGEST_BYTES), WORKER)),
        ]
    )
    for by_server in (True, False):
        yield join(
            [
                frame("attempt.notice", notice, by_server=by_server),
                frame(
                    "attempt.notice",
                    Notice(2, (run, AttemptRun(job, 2**53, 2**53, 2**53, 10_000)), (), (key,)),
                    by_server=by_server,
                ),
            ]
        )
    yield join(
        [
            frame(
                "attempt.notice",
                Notice(2**53, tuple(AttemptRun(job, k, 1, k, k + 1) for k in range(8)), ((job, commands._spec()),), ()),
                by_server=True,
            )
        ]
    )
    yield join(
        [
            frame("attempt.log", LogCall(1, "stdout", 0, 100)),
            frame("attempt.log", LogCall(2**53, "../x", 2**53, 2**53)),
            frame("drain.state", b""),
            frame("drain.hand_over", b""),
        ]
    )
    yield join(
        [
            frame("blob.get", Names((SMALL_REF.hash, "a" * 64))),
            frame("blob.have", Names((SMALL_REF.hash,))),
            frame("blob.list", ListFrom()),
            frame("blob.remove", Name(SMALL_REF.hash)),
            frame("blob.remove", Name(SMALL_REF.hash), by_server=True),
        ]
    )
    yield join(
        [
            frame("blob.pull", Pull((SMALL_REF,), (SMALL,), 1000)),
            frame("blob.pull", Pull((SMALL_REF, BlobRef("b" * 64, 9)), (None, b"wrong"), 0)),
            frame("blob.pull", Pull((BlobRef("b" * 64, 2**53),), (None,), 100)),
        ]
    )
    yield join(
        [
            frame("mesh.certify", CertifyCall(WORKER, 1)),
            frame("mesh.certify", CertifyCall(NodeId("x"), 2**53)),
            frame("mesh.key", b""),
            frame("mesh.key", b"", by_server=True),
            frame("mesh.api_certificate", "-----BEGIN CERTIFICATE REQUEST-----"),
        ]
    )
    for seed in gossiping.seeds():
        methods = ("gossip.ping", "gossip.tell", "gossip.exchange", "gossip.indirect")
        yield join([frame(methods[part[0] & 3], part[1:]) for part in split(seed) if part and part[0] & 7 < 4])
    yield join(
        [
            frame(
                "log.propose",
                ProposeCall(Raw(codec.encode(OpenSession(2**53, (key,) * 3, 2**53, commands.OFFER))), 2**53),
            )
        ]
    )
