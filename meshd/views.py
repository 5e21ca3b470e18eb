"""What can be asked of the mesh, and what is answered: the read side, the same at every node.

A query goes to a voter, which passes the read barrier (protocol.md 2) and answers from
its core by a pure function (`meshd.raft.state.queries`). Views are also the JSON of the API,
so their field names are stable: fields are only ever added.
"""

from __future__ import annotations

from msgspec import Struct

from meshd.model import (
    AttemptKey,
    BackendOffer,
    Count,
    JobId,
    JobSpec,
    KeyLink,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
    ShortText,
    TaskState,
)

PAGE_MAX = 1000
"""Rows in one answer. Fewer where these are large, or far apart: as long as there is a `next`, there may be more."""


class Query(Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all queries."""


class GetJob(Query, frozen=True, array_like=True, tag=True):
    """By id, unique prefix of it (at least 4 characters), name, or `last`. NotFound; Conflict when several match."""

    selector: ShortText


class ListJobs(Query, frozen=True, array_like=True, tag=True):
    """Newest first. `states`: any task state that the job's own derived state is in; `labels` all match."""

    states: tuple[TaskState, ...] = ()
    name: ShortText = ""
    labels: tuple[tuple[ShortText, ShortText], ...] = ()
    limit: Count = 50
    before: JobId | None = None
    """Page on from this job."""


class ListTasks(Query, frozen=True, array_like=True, tag=True):
    """Tasks [start, stop) of a job, in order, only those in `states` when given; at most `limit`."""

    job: JobId
    states: tuple[TaskState, ...] = ()
    start: Count = 0
    stop: Count | None = None
    limit: Count = 100


class GetMembers(Query, frozen=True, array_like=True, tag=True):
    """All members, with their sessions."""


class GetTokens(Query, frozen=True, array_like=True, tag=True):
    """Tokens without secrets."""


class CheckToken(Query, frozen=True, array_like=True, tag=True):
    """Whose token is this? By the BLAKE3 of its secret."""

    secret_hash: ShortText


class GetInvites(Query, frozen=True, array_like=True, tag=True):
    """Open invites, without secrets."""


class Explain(Query, frozen=True, array_like=True, tag=True):
    """Why is this task where it is, and what does each node lack?"""

    job: JobId
    task: Count = 0


class GetSummary(Query, frozen=True, array_like=True, tag=True):
    """Counts over the whole queue."""


AnyQuery = GetJob | ListJobs | ListTasks | GetMembers | GetTokens | CheckToken | GetInvites | Explain | GetSummary


class Counts(Struct, frozen=True, gc=False):
    """Tasks by state."""

    waiting: int = 0
    ready: int = 0
    leased: int = 0
    running: int = 0
    held: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    skipped: int = 0


class JobView(Struct, frozen=True, gc=False):
    id: JobId
    name: str
    state: TaskState
    """Derived: running while any task is leased, running or held; failed when it ended with a failed task; …"""
    is_final: bool
    tasks: int
    counts: Counts
    spec: JobSpec
    submitted_wall_ms: int
    ended_wall_ms: int | None
    version: int
    """The log position of its last change; waits ask for something newer than this."""
    position: int
    """The log position of this answer."""
    owner: str = ""
    retry_of: JobId | None = None
    reason: str = ""
    """For people: why the whole job is held."""


class TaskView(Struct, frozen=True, gc=False):
    job: JobId
    task: int
    state: TaskState
    attempt: int
    tries: int
    losses: int
    fence: int
    node: NodeId | None
    outcome: Outcome | None
    reason: str = ""
    """For people: why it waits, is held, was timed out …"""


class LogView(Struct, frozen=True, gc=False):
    """What a task wrote, and where: `offset` counts in the output of the attempt with this fence."""

    fence: int
    offset: int
    data: bytes


class JobPage(Struct, frozen=True, gc=False):
    jobs: tuple[JobView, ...]
    next: JobId | None
    position: int


class TaskPage(Struct, frozen=True, gc=False):
    tasks: tuple[TaskView, ...]
    next: int | None
    """Start of the next page."""
    position: int


class MemberView(Struct, frozen=True, gc=False):
    member: Member
    session: str
    """live | ended | none"""
    epoch: int
    slots: int
    offer: Offer | None
    used: Resources
    leased: tuple[AttemptKey, ...]
    """The first of them: at most PAGE_MAX, and fewer where there are many nodes."""
    leases: int = 0
    """How many it holds."""


class ClockMove(Struct, frozen=True, gc=False):
    """The mesh's time jumped: because its clocks agreed on a later one, or by an operator at the node `by`."""

    position: int
    from_ms: int
    to_ms: int
    by: NodeId = NodeId("")
    id: str = ""


class MembersView(Struct, frozen=True, gc=False):
    mesh: str
    members: tuple[MemberView, ...]
    revoked: tuple[NodeId, ...]
    position: int
    wall_ms: int
    clock_moves: tuple[ClockMove, ...] = ()
    """The last few jumps of over a minute."""
    key_links: tuple[KeyLink, ...] = ()
    """Every change of the mesh's key."""


class TokenView(Struct, frozen=True, gc=False):
    name: str
    role: str
    created_wall_ms: int


class TokensView(Struct, frozen=True, gc=False):
    tokens: tuple[TokenView, ...]


class InviteView(Struct, frozen=True, gc=False):
    secret_hash: str
    roles: tuple[Role, ...]
    uses_left: int
    expires_wall_ms: int


class InvitesView(Struct, frozen=True, gc=False):
    invites: tuple[InviteView, ...]


class Lack(Struct, frozen=True, gc=False):
    """Why one node does not take the task now. `is_permanent`: waiting will not help."""

    node: NodeId
    name: str
    lacks: tuple[str, ...]
    is_permanent: bool


class Explanation(Struct, frozen=True, gc=False):
    job: JobId
    task: int
    state: TaskState
    summary: str
    nodes: tuple[Lack, ...]
    can_ever_run: bool
    """Some member could run it as it is now, once it is free."""


class Summary(Struct, frozen=True, gc=False):
    jobs: int
    live_jobs: int
    counts: Counts
    backends: tuple[BackendOffer, ...]
    position: int
    wall_ms: int
    state_digest: str


# --- what nodes know beyond the log: blobs, health, events ---


class BlobView(Struct, frozen=True, gc=False):
    hash: str
    size: int
    holders: tuple[NodeId, ...] = ()
    """Who has it, as far as the node asked knows; sorted."""


class BlobList(Struct, frozen=True, gc=False):
    node: NodeId
    blobs: tuple[BlobView, ...]
    next: str | None = None
    """The next page begins after it."""


class EventView(Struct, frozen=True, gc=False, omit_defaults=True):
    """Something that happened. `kind`: job.submitted, job.changed, job.ended, node.joined, node.changed, node.left,
    node.alive, node.suspect, node.dead, session.opened, session.ended."""

    position: int
    """Rises; resume after it."""
    kind: str
    wall_ms: int
    job: JobId | None = None
    state: TaskState | None = None
    """The job's own, after the change."""
    node: NodeId | None = None
    message: str = ""


class DrainView(Struct, frozen=True, gc=False):
    """How far a drain has come. `phase`: draining | handing_over | moving_blobs | safe."""

    node: NodeId
    phase: str
    running: int
    """Attempts that still run there."""
    message: str
    is_safe: bool
    """Nothing is lost if the node stops now."""


class NodeStatus(Struct, frozen=True, gc=False):
    node: NodeId
    name: str
    health: str
    """alive | suspect | dead | unknown, as gossip at the node asked sees it."""
    roles: tuple[Role, ...]
    is_leader: bool
    is_voter: bool
    is_draining: bool
    version: str
    addresses: tuple[str, ...]
    api_address: str
    clock_offset_ms: int | None
    """Its clock less the asked node's."""
    last_heard_ms: int | None
    """Milliseconds ago."""


class ClusterStatus(Struct, frozen=True, gc=False):
    mesh: str
    me: NodeId
    position: int
    """The last log position that the node asked knows to be applied."""
    term: int
    leader: NodeId | None
    voters: tuple[NodeId, ...]
    failures_survived: int
    """How many voters may be lost now, with the ones that are down already counted."""
    advice: str
    """What to do about it, for people; empty when nothing is needed."""
    nodes: tuple[NodeStatus, ...]
    warnings: tuple[str, ...] = ()
    clock_moves: tuple[ClockMove, ...] = ()
    """The last times that the mesh's time jumped by over a minute, and by whom."""
    recovery: str = ""
    """The recovery epoch of the node asked; empty when the mesh was never recovered."""
