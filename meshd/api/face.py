"""What the API asks of the node that it is the face of. The daemon implements it; `meshd.testing.face` is the fake.

Everything here answers the same at every node. What streams is a generator, so that the API can close it. Selectors (prefix, name, `last`) are
resolved by `GetJob` before anything else is asked, so ids in these calls are whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal, Protocol, TypeVar

from meshd.model import BlobRef, JobId, NodeId, Role
from meshd.raft.state.commands import AnyAnswer, AnyCommand
from meshd.views import AnyQuery, BlobList, BlobView, ClusterStatus, DrainView, EventView, JobView, LogView

V = TypeVar("V")
LogStream = Literal["stdout", "stderr"]


class Face(Protocol):
    """Calls may wait; each raises only MeshErrors (Unavailable when no voter answers in time)."""

    @property
    def me(self) -> NodeId: ...

    @property
    def name(self) -> str:
        """This node's human name."""
        ...

    @property
    def mesh(self) -> str:
        """The mesh's id."""
        ...

    @property
    def version(self) -> str: ...

    @property
    def ca_pem(self) -> bytes:
        """The mesh's CA certificate, PEM: what signs the API certificates of all its nodes. Empty without TLS."""
        ...

    # --- the log ---

    async def propose(self, command: AnyCommand, *, timeout_s: float) -> AnyAnswer:
        """Never answers `Rejected`: raises its MeshError. Resends where that is safe (the command carries an id, or is
        idempotent). Raises UnknownOutcome when it may have been done, Unavailable when certainly not."""
        ...

    async def query(self, query: AnyQuery, kind: type[V], *, timeout_s: float, is_stale_ok: bool = False) -> V:
        """Answer of type `kind`, after the read barrier unless `is_stale_ok`. Raises the query's error, or Unavailable."""
        ...

    async def wait_job(self, job: JobId, after_version: int, *, timeout_s: float) -> JobView:
        """As soon as the job's version is above `after_version` or it is final; at the timeout as it is then. NotFound."""
        ...

    def events(self, after: int | None) -> AsyncGenerator[EventView, None]:
        """Live events, with positions that rise; first those later than `after` that are still remembered.

        Endless. A reader that falls far behind ends with Busy and reconnects with its last position.
        """
        ...

    # --- logs and bytes ---

    def follow_log(
        self, job: JobId, task: int, stream: LogStream, *, offset: int, follow: bool, is_stale_ok: bool = False
    ) -> AsyncGenerator[LogView, None]:
        """What the task wrote, from `offset` of its present attempt, wherever it runs or is kept.

        With `follow` it goes on as the task writes, also over to its next attempt (from 0), until the task
        is final; without, it ends where the output ends now. NotFound: no such job or task.
        """
        ...

    async def put_blob(self, chunks: AsyncIterator[bytes], *, replicas: int) -> BlobView:
        """On `min(replicas, nodes)` disks, fsynced, when it returns; `holders` says which. Raises Busy (disk full)."""
        ...

    async def put_many(self, datas: Sequence[bytes], *, replicas: int) -> Sequence[BlobRef]:
        """As `put_blob`, for many small ones together, in their order."""
        ...

    async def ensure_blobs(self, refs: Sequence[BlobRef], *, replicas: int) -> None:
        """Each of these is on `min(replicas, nodes)` disks, fsynced, when this returns (protocol.md 6).

        Asked before a submission names them; those that are there already cost nothing. NotFound: nobody
        has it; InvalidRequest: it has another size.
        """
        ...

    def get_blob(self, blob: str) -> AsyncGenerator[bytes, None]:
        """Verified, from this disk or any peer's. NotFound before the first chunk; Corrupt or Unavailable later."""
        ...

    async def blob_where(self, blob: str) -> BlobView:
        """Its size and who has it, as far as this node knows. NotFound."""
        ...

    async def list_blobs(self, *, prefix: str, after: str, limit: int) -> BlobList:
        """A page of those on this node's disk whose names begin with `prefix`, in order."""
        ...

    async def remove_blob(self, blob: str) -> None:
        """From every node that can be reached. NotFound; Conflict while unfinished work names it."""
        ...

    # --- nodes ---

    async def create_invite(self, roles: Sequence[Role], uses: int, lifetime_ms: int) -> str:
        """The whole invite string; its secret is shown only here."""
        ...

    def drain(self, node: NodeId, *, deadline_ms: int | None) -> AsyncGenerator[DrainView, None]:
        """Progress until the node is empty and it is safe to stop. Leaving the iterator leaves the node draining."""
        ...

    async def remove(self, node: NodeId) -> None:
        """The member is gone for good. Idempotent. Conflict when this would break the quorum, or it is still alive."""
        ...

    async def cluster_status(self) -> ClusterStatus: ...
