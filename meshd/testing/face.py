"""A node without a mesh: the real state machine applied on the spot, blobs in a dict, and commands that pretend to run.

What the pretended worker knows: `echo WORDS`, `fail CODE [WORDS]`, `cat` (its stdin), `files` (one output file
per task), `hang` (until cancelled). Any other command is not found.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

import trio
from blake3 import blake3
from msgspec import Raw

from meshd import codec
from meshd.api.face import LogStream
from meshd.errors import InvalidRequest, NotFound, Unavailable, from_code
from meshd.model import (
    AttemptKey,
    BackendOffer,
    BlobRef,
    Content,
    EndReason,
    Inline,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
    Tree,
    TreeEntry,
)
from meshd.raft.state.commands import (
    AnyAnswer,
    AnyCommand,
    Batch,
    CreateInvite,
    Ended,
    Found,
    JobChanged,
    Leased,
    OpenSession,
    Rejected,
    RemoveMember,
    Report,
    SetDraining,
    Stamped,
    StopWanted,
)
from meshd.raft.state.machine import Machine
from meshd.views import (
    AnyQuery,
    BlobList,
    BlobView,
    ClusterStatus,
    DrainView,
    EventView,
    GetJob,
    JobView,
    ListTasks,
    LogView,
    NodeStatus,
    TaskPage,
)

V = TypeVar("V")
ME = NodeId("12D3KooWFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFake")
EPOCH = 1
SLOTS = 64
EVENTS_MAX = 10_000


class FakeFace:
    def __init__(self, ca_pem: bytes = b"") -> None:
        self.me = ME
        self.name = "fake"
        self.mesh = "f" * 20
        self.version = "0.0.0"
        self.ca_pem = ca_pem
        self.blobs: dict[str, bytes] = {}
        self.is_down = False
        """Unavailable, as a node that reaches no voter."""
        self.proposals = 0
        self._machine = Machine()
        self._index = 0
        self._seq = 0
        self._events: list[EventView] = []
        self._changed = trio.Event()
        self._hanging: dict[int, AttemptKey] = {}
        member = Member(ME, self.name, (Role.SERVER, Role.WORKER), ("/ip4/127.0.0.1/tcp/7373",))
        self._apply(Found(self.mesh, member))
        offer = Offer(
            (BackendOffer("process", "1"), BackendOffer("wasm", "1")),
            Resources(cpu_milli=4_000_000, memory=1 << 40, disk=1 << 40),
            (("arch", "x86_64"), ("name", self.name), ("os", "linux")),
            self.version,
            (("docker", "no engine answers"),),
        )
        self._apply(OpenSession(EPOCH, (), SLOTS, offer))

    # --- the log

    async def propose(self, command: AnyCommand, *, timeout_s: float) -> AnyAnswer:
        await trio.lowlevel.checkpoint()
        self._check_up()
        self.proposals += 1
        answer = self._apply(command)
        if isinstance(answer, Rejected):
            raise from_code(answer.reason, answer.message, answer.hint)
        return answer

    async def query(self, query: AnyQuery, kind: type[V], *, timeout_s: float, is_stale_ok: bool = False) -> V:
        await trio.lowlevel.checkpoint()
        if not is_stale_ok:
            self._check_up()
        return codec.decode(codec.encode(self._machine.answer(query)), kind)

    async def wait_job(self, job: JobId, after_version: int, *, timeout_s: float) -> JobView:
        view = await self.query(GetJob(job), JobView, timeout_s=timeout_s)
        with trio.move_on_after(timeout_s):
            while view.version <= after_version and not view.is_final:
                await self._changed.wait()
                view = await self.query(GetJob(job), JobView, timeout_s=timeout_s)
        return view

    async def events(self, after: int | None) -> AsyncGenerator[EventView, None]:
        seen = self._events[-1].position if after is None and self._events else after or 0
        while True:
            for event in [event for event in self._events if event.position > seen]:
                seen = event.position
                yield event
            await self._changed.wait()

    # --- logs and bytes

    async def follow_log(
        self, job: JobId, task: int, stream: LogStream, *, offset: int, follow: bool, is_stale_ok: bool = False
    ) -> AsyncGenerator[LogView, None]:
        while True:
            changed = self._changed
            query = ListTasks(job, (), task, task + 1, 1)
            page = await self.query(query, TaskPage, timeout_s=1, is_stale_ok=is_stale_ok)
            if not page.tasks:
                raise NotFound(f"job {job} has no task {task}")
            outcome = page.tasks[0].outcome
            if outcome is not None:
                data = self._bytes_of(outcome.stdout if stream == "stdout" else outcome.stderr)
                if data[offset:]:
                    yield LogView(page.tasks[0].fence, offset, data[offset:])
                    offset = len(data)
            if page.tasks[0].state.is_final or not follow:
                return
            await changed.wait()

    async def put_blob(self, chunks: AsyncIterator[bytes], *, replicas: int) -> BlobView:
        parts = [chunk async for chunk in chunks]
        return self.put(b"".join(parts))

    async def put_many(self, datas: Sequence[bytes], *, replicas: int) -> Sequence[BlobRef]:
        await trio.lowlevel.checkpoint()
        views = [self.put(data) for data in datas]
        return [BlobRef(view.hash, view.size) for view in views]

    async def ensure_blobs(self, refs: Sequence[BlobRef], *, replicas: int) -> None:
        await trio.lowlevel.checkpoint()
        for ref in refs:
            if ref.hash not in self.blobs:
                raise NotFound(f"no node that can be reached has blob {ref.hash}")
            if len(self.blobs[ref.hash]) != ref.size:
                raise InvalidRequest(f"blob {ref.hash} has {len(self.blobs[ref.hash])} bytes, not {ref.size}")

    async def get_blob(self, blob: str) -> AsyncGenerator[bytes, None]:
        data = self.blobs[(await self.blob_where(blob)).hash]
        for start in range(0, len(data), 1 << 20):
            yield data[start : start + (1 << 20)]

    async def blob_where(self, blob: str) -> BlobView:
        await trio.lowlevel.checkpoint()
        if blob not in self.blobs:
            raise NotFound(f"no node that can be reached has blob {blob}")
        return BlobView(blob, len(self.blobs[blob]), (self.me,))

    async def list_blobs(self, *, prefix: str, after: str, limit: int) -> BlobList:
        await trio.lowlevel.checkpoint()
        names = sorted(name for name in self.blobs if name.startswith(prefix) and name > after)
        views = tuple(BlobView(name, len(self.blobs[name]), (self.me,)) for name in names[:limit])
        return BlobList(self.me, views, names[limit - 1] if len(names) > limit else None)

    async def remove_blob(self, blob: str) -> None:
        await self.blob_where(blob)
        del self.blobs[blob]

    def put(self, data: bytes) -> BlobView:
        name = blake3(data).hexdigest()
        self.blobs[name] = data
        return BlobView(name, len(data), (self.me,))

    # --- nodes

    async def create_invite(self, roles: Sequence[Role], uses: int, lifetime_ms: int) -> str:
        secret = f"{len(self._events)}"
        command = CreateInvite(blake3(secret.encode()).hexdigest(), tuple(roles), uses, lifetime_ms)
        await self.propose(command, timeout_s=1)
        return f"meshd1-fake-{secret}"

    async def drain(self, node: NodeId, *, deadline_ms: int | None) -> AsyncGenerator[DrainView, None]:
        await self.propose(SetDraining(node, True), timeout_s=1)
        yield DrainView(node, "draining", len(self._hanging), "waiting for running work", False)
        yield DrainView(node, "safe", 0, "safe to stop", True)

    async def remove(self, node: NodeId) -> None:
        await self.propose(RemoveMember(node), timeout_s=1)

    async def cluster_status(self) -> ClusterStatus:
        await trio.lowlevel.checkpoint()
        addresses = ("/ip4/127.0.0.1/tcp/7373",)
        roles = (Role.SERVER, Role.WORKER)
        me = NodeStatus(
            self.me, self.name, "alive", roles, True, True, False, self.version, addresses, "", 0, 0
        )  # fmt: skip
        return ClusterStatus(
            self.mesh, self.me, self._index, 1, self.me, (self.me,), 0, "one disk: add a third server", (me,)
        )

    # --- the pretended mesh

    def _check_up(self) -> None:
        if self.is_down:
            raise Unavailable("no voter answers", hint="mesh cluster status")

    def _apply(self, *commands: AnyCommand) -> AnyAnswer:
        """The last command's answer; then the worker does what was leased, until nothing is."""
        self._index += 1
        stamped = tuple(Stamped(self.me, Raw(codec.encode(command))) for command in commands)
        answers = self._machine.apply(self._index, codec.encode(Batch(1, time.time_ns() // 1_000_000, stamped)))
        ended: list[Ended] = []
        running: list[AttemptKey] = []
        for event in self._machine.take_events():
            match event:
                case Leased(_, _, run):
                    spec = self._machine.spec_of(run.job)
                    assert spec is not None
                    for key in run.each():
                        running.append(key)
                        outcome = self._pretend(spec, key)
                        if outcome is not None:
                            ended.append(Ended(key, outcome))
                case StopWanted(_, _, key) if key.fence in self._hanging:
                    ended.append(Ended(self._hanging.pop(key.fence), Outcome(EndReason.CANCELLED)))
                case JobChanged(job, is_final):
                    self._note("job.ended" if is_final else "job.changed", job)
                case _:
                    pass
        if ended or running:
            self._seq += 1
            self._apply(Report(EPOCH, self._seq, tuple(ended), tuple(running)))
        self._changed.set()
        self._changed = trio.Event()
        answer: AnyAnswer = codec.decode(answers[-1], AnyAnswer)
        return answer

    def _pretend(self, spec: JobSpec, key: AttemptKey) -> Outcome | None:
        args = spec.run.args
        match args[:1]:
            case ("echo",):
                return self._ended(0, " ".join(args[1:]).encode() + b"\n")
            case ("fail",):
                return self._ended(int(args[1]), b"", " ".join(args[2:]).encode())
            case ("cat",):
                return self._ended(0, self._bytes_of(spec.run.stdin))
            case ("files",):
                tree = Tree((TreeEntry("out.txt", Inline(f"task {key.task}\n".encode())),))
                return Outcome(EndReason.EXIT, 0, outputs=Inline(codec.encode(tree)))
            case ("hang",):
                self._hanging[key.fence] = key
                return None
        if spec.run.module is not None:
            is_wasm = self.blobs[spec.run.module.hash].startswith(b"\0asm")
            return self._ended(0, b"ran\n") if is_wasm else Outcome(EndReason.INVALID, message="not a wasm module")
        return Outcome(EndReason.INVALID, message=f"command not found: {args[0]}")

    def _ended(self, code: int, stdout: bytes, stderr: bytes = b"") -> Outcome:
        return Outcome(EndReason.EXIT, code, stdout=self._content(stdout), stderr=self._content(stderr))

    def _content(self, data: bytes) -> Content:
        if len(data) <= 4096:
            return Inline(data)
        view = self.put(data)
        return BlobRef(view.hash, view.size)

    def _bytes_of(self, content: Content | None) -> bytes:
        if content is None:
            return b""
        return content.data if isinstance(content, Inline) else self.blobs[content.hash]

    def _note(self, kind: str, job: JobId) -> None:
        position = self._events[-1].position + 1 if self._events else 1
        self._events.append(EventView(position, kind, time.time_ns() // 1_000_000, job))
        del self._events[:-EVENTS_MAX]
