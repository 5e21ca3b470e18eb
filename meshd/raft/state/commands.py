"""What can be written into the log, and how the state machine answers. The vocabulary of `machine.apply`.

A log entry is one `Batch`: the leader's time and what arrived while the last batch
was being committed. Each command in it carries its origin, stamped by the voter that
received it from an authenticated peer; nobody hands over a ready-made entry
(protocol.md 1). `apply` answers each command with a value and never raises.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Raw, Struct

from meshd import codec
from meshd.errors import MeshError
from meshd.model import (
    AttemptKey,
    AttemptRun,
    Count,
    JobId,
    JobSpec,
    KeyLink,
    Member,
    NodeId,
    Offer,
    Outcome,
    Role,
    ShortText,
)

BATCH_COMMANDS_MAX = 1000
"""Commands in one entry."""

KEY_LINKS_MAX = 4096
"""Servers removed from one mesh; 110 bytes each, and one command names all of them."""
WALL_MS_MIN = 1_577_836_800_000
"""The year 2020: whoever sets a clock to an earlier time has made a mistake."""
WALL_MS_MAX = (1 << 48) - 1
"""What fits the date of a UUIDv7."""

RETRY_RANGES_MAX = 10_000
"""200 KB; applying so many takes 8 ms."""
RUNS_MAX = 10_000
"""Runs in one report: as many as a node has attempts."""
AHEAD_JOBS_MAX = 16
"""Jobs that a node takes attempts ahead of at a time."""

Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Command(Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all commands; each is encoded as [tag, fields…], so fields may be appended with a default."""


# --- members ---------------------------------------------------------------------------------------------------------


class Found(Command, frozen=True, array_like=True, tag=True):
    """The first command of a mesh, proposed by its founder: who it is."""

    mesh: ShortText
    member: Member


class CreateInvite(Command, frozen=True, array_like=True, tag=True):
    """`secret_hash` is the BLAKE3 of the secret; the secret itself is never in the log. `lifetime_ms` from now."""

    secret_hash: Hash
    roles: tuple[Role, ...]
    uses: Annotated[int, Meta(ge=1, le=1_000_000)]
    lifetime_ms: Annotated[int, Meta(ge=1, le=366 * 86_400_000)]


class RevokeInvite(Command, frozen=True, array_like=True, tag=True):
    secret_hash: Hash


class Join(Command, frozen=True, array_like=True, tag=True):
    """Proposed for a stranger by the member that it knocked at, who proved its peer id. Joining again is an answer, not a use."""

    secret_hash: Hash
    member: Member


class UpdateMember(Command, frozen=True, array_like=True, tag=True):
    """A member tells its own name, addresses and zone; roles cannot change this way."""

    name: ShortText
    addresses: tuple[str, ...]
    api_address: ShortText = ""
    zone: ShortText = ""


class SetDraining(Command, frozen=True, array_like=True, tag=True):
    node: NodeId
    is_draining: bool


class RemoveMember(Command, frozen=True, array_like=True, tag=True):
    """The member is gone for good: its certificate is revoked, its session ended; whoever removes it promises that it is dead."""

    node: NodeId
    links: Annotated[tuple[KeyLink, ...], Meta(max_length=KEY_LINKS_MAX)] = ()
    """With a server goes its copy of the mesh's key: all changes of that until now, and the next one."""


class CreateToken(Command, frozen=True, array_like=True, tag=True):
    secret_hash: Hash
    name: ShortText
    role: ShortText
    """viewer | operator | admin"""


class RevokeToken(Command, frozen=True, array_like=True, tag=True):
    name: ShortText


class Recovered(Command, frozen=True, array_like=True, tag=True):
    """The first command of a recovery epoch, written by `meshd recover` (protocol.md 10). What came after it was lost may come again."""

    lineage: tuple[ShortText, ...]
    wall_ms: Count
    """Ids dated before this may have been submitted to the log that is lost."""


class RaiseFences(Command, frozen=True, gc=False, array_like=True, tag=True):
    """A sole voter goes on although its last frame, and the leases in it, may be lost: new fences are above all of those."""

    above: Count


class ClockSet(Command, frozen=True, gc=False, array_like=True, tag=True):
    """An operator says what time it is, forward or back. `id`: a resend changes nothing."""

    id: Hash
    wall_ms: Annotated[int, Meta(ge=WALL_MS_MIN, le=WALL_MS_MAX)]


# --- jobs ------------------------------------------------------------------------------------------------------------


class Submit(Command, frozen=True, array_like=True, tag=True):
    id: JobId
    spec: JobSpec
    owner: ShortText = ""


class Cancel(Command, frozen=True, array_like=True, tag=True):
    """Idempotent; tasks None is all of them, else half-open ranges."""

    job: JobId
    tasks: tuple[tuple[Count, Count], ...] | None = None


class RetryJob(Command, frozen=True, array_like=True, tag=True):
    """Failed, cancelled and timed-out tasks run again, as a new job `new` that copies the spec (finished never moves).

    `new` is a UUIDv7 under the rules of submissions. What comes after it is told of a job that only the history has,
    by the node that found it there; the core goes by what it has itself.
    """

    job: JobId
    new: JobId
    spec: JobSpec | None = None
    owner: ShortText = ""
    again: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=RETRY_RANGES_MAX)] = ()
    """The tasks to run again, half-open."""


class ReleaseJob(Command, frozen=True, array_like=True, tag=True):
    """An operator lets a job go on that a recovery holds, and thereby promises that nothing of it runs any more. Idempotent."""

    job: JobId


# --- sessions (protocol.md 4, 5); the origin is the node itself --------------------------------------------------------


class OpenSession(Command, frozen=True, array_like=True, tag=True):
    """protocol.md calls it SessionOpened. `held`: every attempt the node holds, also ended ones not yet answered."""

    epoch: Count
    held: tuple[AttemptKey, ...]
    slots: Count
    offer: Offer
    boot: ShortText = ""
    """Which start of the node's kernel this is: what ran before another one is dead, or runs on another machine."""


class EndSession(Command, frozen=True, array_like=True, tag=True):
    """By the leader only: the node was not granted a renewal for 12 s, or is agreed to be dead."""

    node: NodeId
    epoch: Count


class Claim(Command, frozen=True, array_like=True, tag=True):
    """How many attempts the node will hold in all, until the next Claim or the end of the session. 0 is the drain."""

    epoch: Count
    seq: Count
    slots: Count
    offer: Offer


class Ended(Struct, frozen=True, gc=False, array_like=True):
    """An attempt that came to its end, with the outcome."""

    key: AttemptKey
    outcome: Outcome


class Report(Command, frozen=True, array_like=True, tag=True):
    """Completions (protocol.md's Complete, batched) and what has started running since the last report."""

    epoch: Count
    seq: Count
    ended: tuple[Ended, ...] = ()
    running: tuple[AttemptKey, ...] = ()
    done: Annotated[tuple[AttemptRun, ...], Meta(max_length=RUNS_MAX)] = ()
    """Completions too: these ended well and left nothing to tell."""
    returned: Annotated[tuple[AttemptRun, ...], Meta(max_length=RUNS_MAX)] = ()
    """Never started, and never to be: others may have them."""
    ahead: Annotated[tuple[tuple[JobId, Count], ...], Meta(max_length=AHEAD_JOBS_MAX)] | None = None
    """Of these jobs the node takes so many beyond its room: their tasks end before the log could bring the next one.
    None: as before."""


class Reconcile(Command, frozen=True, array_like=True, tag=True):
    """The full list of what the node holds, as of the newest fence that the leader had applied when it asked."""

    epoch: Count
    fence: Count
    held: tuple[AttemptKey, ...]


# --- history (protocol.md 8); the origin is a server -------------------------------------------------------------------

HISTORY_VOTERS_MAX = 16
"""More than ever vote."""


class Seal(Command, frozen=True, gc=False, array_like=True, tag=True):
    """The next `jobs` finished ones, in the order in which they ended and up to `last`, are a segment of history from now on."""

    segment: Count
    hash: Hash
    """Of its canonical, uncompressed bytes."""
    size: Count
    jobs: Count
    last: JobId


class Stored(Command, frozen=True, gc=False, array_like=True, tag=True):
    """This life of the server has every kept segment up to `upto` on its disk, synced."""

    incarnation: ShortText
    upto: Count


class Drop(Command, frozen=True, gc=False, array_like=True, tag=True):
    """The jobs of a segment leave the core: a quorum of these voters, all that vote as it is proposed, has it."""

    segment: Count
    voters: Annotated[tuple[ShortText, ...], Meta(min_length=1, max_length=HISTORY_VOTERS_MAX)]


AnyCommand = (
    Found
    | CreateInvite
    | RevokeInvite
    | Join
    | UpdateMember
    | SetDraining
    | RemoveMember
    | CreateToken
    | RevokeToken
    | Submit
    | Cancel
    | RetryJob
    | OpenSession
    | EndSession
    | Claim
    | Report
    | Reconcile
    | ReleaseJob
    | Recovered
    | RaiseFences
    | ClockSet
    | Seal
    | Stored
    | Drop
)


def adds_work(command: bytes) -> bool:
    """Whether it can wait until there is room on a disk; asked only where there is none."""
    try:
        return isinstance(codec.decode(command, AnyCommand, bytes_max=codec.COMMAND_BYTES_MAX), Submit | RetryJob)
    except MeshError:
        return False


class Stamped(Struct, frozen=True, gc=False, array_like=True):
    """A command and the authenticated node that proposed it. The body is an encoded `AnyCommand`."""

    origin: NodeId
    body: Raw


class Batch(Struct, frozen=True, gc=False, array_like=True):
    """One log entry. Milliseconds since the leader's previous batch, and its wall time; an empty batch is a tick."""

    elapsed_ms: Count
    wall_ms: Count
    commands: tuple[Stamped, ...] = ()


# --- answers -----------------------------------------------------------------------------------------------------------


class Reason(StrEnum):
    """Why a command changed nothing. The first group maps to `meshd.errors` codes by value."""

    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    NOT_ALLOWED = "not_allowed"
    BUSY = "busy"
    # sessions: the node's own protocol, never shown to people
    WRONG_EPOCH = "wrong_epoch"
    """Another epoch is or was this node's: take a larger one."""
    GAP = "gap"
    """seq is beyond last + 1: resend from the first unanswered."""
    OLD = "old"
    """seq is below the last answered one."""


class Answer(Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all answers."""


class Accepted(Answer, frozen=True, array_like=True, tag=True):
    """Done, or done before by the same id."""


class Rejected(Answer, frozen=True, array_like=True, tag=True):
    reason: Reason
    message: str
    hint: str = ""


class Submitted(Answer, frozen=True, array_like=True, tag=True):
    """The job stands under this id; `is_new` is False when this was a resend."""

    job: JobId
    is_new: bool


class Joined(Answer, frozen=True, array_like=True, tag=True):
    member: Member
    certificate_version: Count


class SessionOpened(Answer, frozen=True, array_like=True, tag=True):
    """These attempts are leased to this epoch; the node drops all others and sees them dead before it starts anything."""

    epoch: Count
    leased: tuple[AttemptKey, ...]


class Reported(Answer, frozen=True, array_like=True, tag=True):
    """Every attempt named in the report may leave the node's books. `stale`: those that were no longer its own."""

    stale: tuple[AttemptKey, ...] = ()
    stale_runs: tuple[AttemptRun, ...] = ()


class Reconciled(Answer, frozen=True, array_like=True, tag=True):
    """The node stops these: held by it but not leased to it."""

    stop: tuple[AttemptKey, ...] = ()


AnyAnswer = Accepted | Rejected | Submitted | Joined | SessionOpened | Reported | Reconciled


# --- events: what apply did, for those who wait or must be told -------------------------------------------------------


class Leased(Struct, frozen=True, gc=False):
    """The node is to be told; idempotent, by fence."""

    node: NodeId
    epoch: int
    run: AttemptRun


class StopWanted(Struct, frozen=True, gc=False):
    """The attempt is no longer wanted (cancelled, timed out): its node is told; its lease stands until it reports."""

    node: NodeId
    epoch: int
    key: AttemptKey


class JobChanged(Struct, frozen=True, gc=False):
    """Something about the job changed; `is_final` when its last task ended."""

    job: JobId
    is_final: bool


class MembersChanged(Struct, frozen=True, gc=False):
    """A member joined, changed, drains or is gone."""


class SessionChanged(Struct, frozen=True, gc=False):
    node: NodeId
    epoch: int
    is_live: bool


class Restored(Struct, frozen=True, gc=False):
    """A snapshot took the state's place: anything may have changed, and nothing else tells of it."""


Event = Leased | StopWanted | JobChanged | MembersChanged | SessionChanged | Restored
