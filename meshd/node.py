"""A node as its API sees it: whatever is asked of the mesh, this node answers, by its own replica or through others.

Implements `meshd.api.face.Face`. Holds no rules: commands go to the log, questions to a
voter, bytes to the blob store and its peers, liveness is what gossip says here.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import structlog
import trio

from meshd import codec
from meshd.admission.authority import Authority
from meshd.admission.home import KnownPeer
from meshd.admission.invites import DOORS_MAX, SECRET_BYTES, Door, Invite, hash_secret
from meshd.api.face import LogStream
from meshd.blobs.fetch import Fetcher
from meshd.blobs.messages import Name
from meshd.blobs.replicate import Replicator
from meshd.directory import Directory
from meshd.errors import Busy, Conflict, MeshError, NotFound, Unavailable
from meshd.gossip.service import GossipService
from meshd.model import BlobRef, ItemsBlob, ItemsFiles, JobId, JobSpec, NodeId, Role, TaskState, TreeRef
from meshd.neighbours import Neighbours
from meshd.ports import BlobStore, Rpc
from meshd.raft.remote import MeshLog
from meshd.raft.state.commands import AnyAnswer, AnyCommand, CreateInvite, RemoveMember
from meshd.recovery.epochs import Epochs
from meshd.status import cluster_status
from meshd.views import (
    PAGE_MAX,
    AnyQuery,
    BlobList,
    BlobView,
    ClusterStatus,
    DrainView,
    EventView,
    GetMembers,
    JobPage,
    JobView,
    ListJobs,
    LogView,
    MembersView,
)
from meshd.work.drain import Drain
from meshd.work.logs import LogReader

EVENTS_STAND_S = 20.0
REPLICATE_S = 30.0
ASK_S = 5.0
LOOK_BYTES = 64 << 20
"""Of an upload, between looks at the room on the disk."""
LIVE_PAGES_MAX = 100
"""Pages of unfinished jobs looked through before a blob is removed."""

V = TypeVar("V")
log = structlog.get_logger()


class Node:
    def __init__(
        self,
        *,
        me: NodeId,
        name: str,
        roles: tuple[Role, ...],
        mesh: str,
        version: str,
        ca_pem: str,
        mesh_log: MeshLog,
        rpc: Rpc,
        directory: Directory,
        gossip: GossipService,
        neighbours: Neighbours,
        store: BlobStore,
        fetcher: Fetcher,
        replicator: Replicator,
        logs: LogReader,
        drains: Drain,
        authority: Authority,
        addresses: Callable[[], Sequence[str]],
        clock_offset_ms: Callable[[NodeId], int | None],
        epochs: Epochs,
    ) -> None:
        self._me = me
        self._name = name
        self._roles = roles
        self._mesh = mesh
        self._version = version
        self._ca_pem = ca_pem
        self._log = mesh_log
        self._rpc = rpc
        self._directory = directory
        self._gossip = gossip
        self._neighbours = neighbours
        self._store = store
        self._fetcher = fetcher
        self._replicator = replicator
        self._logs = logs
        self._drains = drains
        self._authority = authority
        self._addresses = addresses
        self._clock_offset_ms = clock_offset_ms
        self._epochs = epochs

    @property
    def me(self) -> NodeId:
        return self._me

    @property
    def name(self) -> str:
        return self._name

    @property
    def mesh(self) -> str:
        return self._mesh

    @property
    def version(self) -> str:
        return self._version

    @property
    def ca_pem(self) -> bytes:
        return self._ca_pem.encode()

    # --- the log -----------------------------------------------------------------------------------------------------

    async def propose(self, command: AnyCommand, *, timeout_s: float) -> AnyAnswer:
        return await self._log.propose(command, timeout_s=timeout_s)

    async def query(self, query: AnyQuery, kind: type[V], *, timeout_s: float, is_stale_ok: bool = False) -> V:
        return await self._log.query(query, kind, timeout_s=timeout_s, is_stale_ok=is_stale_ok)

    async def wait_job(self, job: JobId, after_version: int, *, timeout_s: float) -> JobView:
        return await self._log.wait_job(job, after_version, timeout_s=timeout_s)

    async def events(self, after: int | None) -> AsyncGenerator[EventView, None]:
        position = after
        while True:
            try:
                reply = await self._log.events(position, timeout_s=EVENTS_STAND_S)
            except Unavailable as error:
                log.info("events.interrupted", error=str(error))
                continue
            for event in reply.events:
                yield event
            position = reply.position

    # --- logs and bytes ----------------------------------------------------------------------------------------------

    def follow_log(
        self, job: JobId, task: int, stream: LogStream, *, offset: int, follow: bool, is_stale_ok: bool = False
    ) -> AsyncGenerator[LogView, None]:
        return self._logs.follow(job, task, stream, offset=offset, is_followed=follow, is_stale_ok=is_stale_ok)

    async def put_blob(self, chunks: AsyncIterator[bytes], *, replicas: int) -> BlobView:
        await self._store.check_room_for_new()
        writer = await self._store.create()
        size = 0
        try:
            async for chunk in chunks:
                await writer.write(chunk)
                size += len(chunk)
                if size >= LOOK_BYTES:
                    size = 0
                    await self._store.check_room_for_new()
            ref = await writer.commit()
        except BaseException:
            with trio.CancelScope(shield=True):
                await writer.abort()
            raise
        holders = await self._replicator.ensure([ref], replicas, timeout_s=REPLICATE_S)
        return BlobView(ref.hash, ref.size, tuple(sorted(holders)))

    async def put_many(self, datas: Sequence[bytes], *, replicas: int) -> Sequence[BlobRef]:
        await self._store.check_room_for_new()
        refs = await self._store.put_many(datas)
        await self.ensure_blobs(refs, replicas=replicas)
        return refs

    async def ensure_blobs(self, refs: Sequence[BlobRef], *, replicas: int) -> None:
        if refs:
            await self._replicator.ensure(refs, replicas, timeout_s=REPLICATE_S)

    async def get_blob(self, blob: str) -> AsyncGenerator[bytes, None]:
        ref = await self._ref(blob)
        await self._fetcher.fetch(ref, timeout_s=600)
        async for chunk in self._store.open_verified(ref):
            yield chunk

    async def blob_where(self, blob: str) -> BlobView:
        holders = await self._holders(blob)
        if not holders:
            raise NotFound(f"no node that can be reached has blob {blob}")
        size = self._store.size(blob) if self._store.has(blob) else (await self._ref(blob)).size
        return BlobView(blob, size, tuple(sorted(holders)))

    async def list_blobs(self, *, prefix: str, after: str, limit: int) -> BlobList:
        refs = await self._store.page(prefix=prefix, after=after, limit=limit + 1)
        views: list[BlobView] = []
        for ref in refs[:limit]:
            holders = {self._me, *self._gossip.holders(ref.hash)}
            views.append(BlobView(ref.hash, ref.size, tuple(sorted(holders))))
            await trio.lowlevel.checkpoint()  # gossip looks through all nodes for each
        return BlobList(self._me, tuple(views), views[-1].hash if len(refs) > limit else None)

    async def remove_blob(self, blob: str) -> None:
        holders = await self._holders(blob)
        if not holders:
            raise NotFound(f"no node that can be reached has blob {blob}")
        if (job := await self._live_job_naming(blob)) is not None:
            raise Conflict(f"unfinished job {job} needs blob {blob}", hint=f"`mesh job cancel {job}` first")
        failed: list[str] = []
        for holder in holders:
            try:
                if holder == self._me:
                    await self._store.remove(blob)
                else:
                    await self._rpc.call(holder, "blob.remove", codec.encode(Name(blob)), timeout_s=ASK_S)
            except MeshError as error:
                failed.append(f"{self._directory.name(holder) or holder}: {error.message}")
        if failed:
            raise Unavailable(f"blob {blob} is not removed everywhere: {'; '.join(failed)}", hint="try again later")

    async def _holders(self, blob: str) -> set[NodeId]:
        found = set(await self._fetcher.who_has(blob))
        if self._store.has(blob):
            found.add(self._me)
        return found

    async def _ref(self, blob: str) -> BlobRef:
        if self._store.has(blob):
            return BlobRef(blob, self._store.size(blob))
        size = await self._fetcher.size_of(blob)
        if size is None:
            raise NotFound(f"no node that can be reached has blob {blob}")
        return BlobRef(blob, size)

    async def _live_job_naming(self, blob: str) -> JobId | None:
        before: JobId | None = None
        live = tuple(state for state in TaskState if not state.is_final)
        for _ in range(LIVE_PAGES_MAX):
            page = await self._log.query(ListJobs(states=live, limit=PAGE_MAX, before=before), JobPage, timeout_s=10)
            for job in page.jobs:
                if blob in blobs_named(job.spec):
                    return job.id
            if page.next is None:
                return None
            before = page.next
        raise Busy(
            "too many unfinished jobs to be sure that none needs this blob", hint="try again when fewer are left"
        )

    # --- nodes -------------------------------------------------------------------------------------------------------

    async def create_invite(self, roles: Sequence[Role], uses: int, lifetime_ms: int) -> str:
        secret = secrets.token_bytes(SECRET_BYTES)
        await self._log.propose(CreateInvite(hash_secret(secret), tuple(roles), uses, lifetime_ms), timeout_s=15)
        others = [peer for peer in self._directory.peers() if self._is_door(peer, roles)]
        doors = [Door(self._me, tuple(self._addresses())[:4])]
        doors += [Door(peer.node, peer.addresses[:2]) for peer in others[: DOORS_MAX - 1]]
        return str(Invite(self._mesh, secret, tuple(roles), tuple(doors)))

    def _is_door(self, peer: KnownPeer, roles: Sequence[Role]) -> bool:
        may_let_in = Role.SERVER not in roles or self._directory.has_role(peer.node, Role.SERVER)
        return bool(peer.addresses) and may_let_in and not self._directory.is_revoked(peer.node)

    async def drain(self, node: NodeId, *, deadline_ms: int | None) -> AsyncGenerator[DrainView, None]:
        async with aclosing(self._drains.drain(node, await self.cluster_status(), deadline_ms=deadline_ms)) as progress:
            async for view in progress:
                yield view

    async def remove(self, node: NodeId) -> None:
        view = await self._log.query(GetMembers(), MembersView, timeout_s=10)
        if node in view.revoked:
            return
        if all(row.member.node != node for row in view.members):
            raise NotFound(f"this mesh has no node {node}")
        status = await self.cluster_status()
        await self._drains.check_removable(node, view, status)
        # With a server goes a copy of the mesh's key. A server that removes itself cannot change that.
        is_server = any(row.member.node == node and row.member.is_server for row in view.members)
        links = await self._authority.prepare_change(node) if is_server and node != self._me else ()
        await self._log.propose(RemoveMember(node, links), timeout_s=15)

    async def cluster_status(self) -> ClusterStatus:
        return await cluster_status(
            me=self._me,
            my_name=self._name,
            my_roles=self._roles,
            mesh=self._mesh,
            version=self._version,
            mesh_log=self._log,
            gossip=self._gossip,
            neighbours=self._neighbours,
            directory=self._directory,
            clock_offset_ms=self._clock_offset_ms,
            epochs=self._epochs,
        )


def blobs_named(spec: JobSpec) -> set[str]:
    """Every blob that a job needs before it can run, but for those inside its trees."""
    found = {each.source.hash for each in spec.inputs if isinstance(each.source, BlobRef)}
    found |= {each.source.blob.hash for each in spec.inputs if isinstance(each.source, TreeRef)}
    if spec.run.module is not None:
        found.add(spec.run.module.hash)
    if isinstance(spec.run.stdin, BlobRef):
        found.add(spec.run.stdin.hash)
    match spec.array.items:
        case ItemsBlob(blob):
            found.add(blob.hash)
        case ItemsFiles(tree):
            found.add(tree.blob.hash)
        case _:
            pass
    return found
