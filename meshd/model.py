"""The domain's words. Values only: no clock, no I/O, nothing of ours imported.

A job is a spec and 1 … 10⁷ tasks. A task is attempted on one node at a time; the
attempt number counts, the fence only ever rises. A blob is bytes named by their
BLAKE3. A node offers what it can run. Times are integer milliseconds, sizes bytes.

Everything here is an immutable msgspec struct: it is valid because it exists, and
it travels as msgpack (in the log, between nodes) and as JSON (in the API) unchanged.
What cannot change cannot become a part of a cycle, so the collector need not look at
it (`gc=False`): it would look at a million of them while the loop waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, NewType

from msgspec import Meta, Struct

NodeId = NewType("NodeId", str)
"""A node's name: its libp2p peer id, which is its Ed25519 public key."""

JobId = NewType("JobId", str)
"""A UUIDv7 in canonical text form, made by the client."""

INLINE_BYTES_MAX = 4096
"""What may travel inside a command; anything larger is a blob (protocol.md 6). Of results in large arrays less."""

INLINE_STREAM_BYTES_MAX = INLINE_BYTES_MAX // 4
"""… and of a task's stdout or stderr: hundreds of ends share one command."""

RESULTS_BYTES = 64 << 20
"""For what all tasks of one job have inline: their stdout, as much again of stderr, and of outputs."""

REFERENCE_BYTES = 96
"""Of a blob, as it stands in an outcome: what is not longer costs a replica less inline than as a blob."""

TASKS_MAX = 10_000_000
"""Tasks in one job."""

ShortText = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]


class Role(StrEnum):
    SERVER = "server"
    WORKER = "worker"


class TaskState(StrEnum):
    """waiting → ready → leased → running → done | failed | cancelled | timed_out | skipped, and held.

    Terminal states never change. `held` is a task whose node is lost and may come back.
    """

    WAITING = "waiting"
    READY = "ready"
    LEASED = "leased"
    RUNNING = "running"
    HELD = "held"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES = frozenset(
    {TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED, TaskState.TIMED_OUT, TaskState.SKIPPED}
)


class OnLost(StrEnum):
    """What becomes of an attempt whose node is lost: run again (fenced), wait for the node, or give up."""

    RERUN = "rerun"
    WAIT = "wait"
    FAIL = "fail"


class RetryOn(StrEnum):
    EXIT = "exit"
    TIMEOUT = "timeout"
    LIMIT = "limit"


class BlobRef(Struct, frozen=True, gc=False, order=True, tag="blob"):
    """Bytes named by their BLAKE3: 64 hex digits, as `b3sum` prints; size in bytes."""

    hash: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size: Count


class Inline(Struct, frozen=True, gc=False, order=True, tag="inline"):
    """Bytes small enough to travel in the command itself."""

    data: Annotated[bytes, Meta(max_length=INLINE_BYTES_MAX)]


Content = BlobRef | Inline


class TreeEntry(Struct, frozen=True, gc=False, order=True, array_like=True):
    """One file of a tree: a relative POSIX path without `..`, its content, and whether it is executable."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    content: Content
    executable: bool = False


class Tree(Struct, frozen=True, gc=False):
    """A directory: entries sorted by path. As a blob it is the msgpack of this struct."""

    entries: tuple[TreeEntry, ...]


class TreeRef(Struct, frozen=True, gc=False, order=True, tag="tree"):
    """A directory by the blob that lists it."""

    blob: BlobRef
    files: Count
    bytes_total: Count


class Input(Struct, frozen=True, gc=False, omit_defaults=True, order=True):
    """Where something is put in the working directory: a file, or a directory for a tree."""

    path: Annotated[str, Meta(max_length=4096)]
    source: BlobRef | Inline | TreeRef
    executable: bool = False


class Resources(Struct, frozen=True, gc=False, omit_defaults=True, order=True):
    """An amount of what a node has. cpu in thousandths of a core; memory and disk in bytes."""

    cpu_milli: Count = 0
    memory: Count = 0
    disk: Count = 0
    gpu: Count = 0
    custom: tuple[tuple[ShortText, Count], ...] = ()
    """Sorted by name."""


class Needs(Struct, frozen=True, gc=False, omit_defaults=True):
    """What a node must have free, and what must be true of its labels."""

    resources: Resources = Resources(cpu_milli=1000)
    labels: Annotated[str, Meta(max_length=1024)] = ""
    """`zone in (a,b), arch=x86_64, !spot`; meshd.placement defines the grammar."""


class Run(Struct, frozen=True, gc=False, omit_defaults=True):
    """What to run. `module` for wasm; `args[0]` is the command for process (for wasm, args follow the program name)."""

    args: Annotated[tuple[str, ...], Meta(max_length=4096)] = ()
    module: BlobRef | None = None
    env: tuple[tuple[str, str], ...] = ()
    stdin: Content | None = None
    fuel: Count | None = None
    """wasm only: units of deterministic fuel."""


class ItemsRange(Struct, frozen=True, gc=False, omit_defaults=True, tag="range"):
    """Task k's item is `start + k*step`, printed in decimal."""

    start: int
    step: int = 1


class ItemsInline(Struct, frozen=True, gc=False, tag="list"):
    """Task k's item is the k-th string."""

    items: tuple[str, ...]


class ItemsBlob(Struct, frozen=True, gc=False, tag="lines"):
    """Task k's item is the k-th line of this blob (UTF-8, `\\n`)."""

    blob: BlobRef


class ItemsFiles(Struct, frozen=True, gc=False, omit_defaults=True, tag="files"):
    """Task k gets files [k*per_task, (k+1)*per_task) of the tree, at their paths in its working directory.

    Its item is their paths, one a line.
    """

    tree: TreeRef
    per_task: Annotated[int, Meta(ge=1, le=100_000)] = 1


class Array(Struct, frozen=True, gc=False, omit_defaults=True):
    count: Annotated[int, Meta(ge=1, le=TASKS_MAX)] = 1
    items: ItemsRange | ItemsInline | ItemsBlob | ItemsFiles | None = None
    at_once: Count = 0
    """At most so many attempts at a time; 0 is no limit."""
    max_fails: Count = 0
    """Cancel the rest after more than so many failed tasks; 0 is never."""


class Retry(Struct, frozen=True, gc=False, omit_defaults=True):
    """`attempts` counts the job's own endings (exit, timeout, limits); `crash_limit` counts losses."""

    attempts: Annotated[int, Meta(ge=1, le=1000)] = 1
    backoff_min_ms: Count = 1000
    backoff_max_ms: Count = 60_000
    on: tuple[RetryOn, ...] = (RetryOn.EXIT, RetryOn.TIMEOUT, RetryOn.LIMIT)
    crash_limit: Annotated[int, Meta(ge=1, le=1000)] = 10


class Timeout(Struct, frozen=True, gc=False, omit_defaults=True):
    """0 is no limit. `run` is kept by the node; `queue` (submit to first lease) and `total` by the state."""

    run_ms: Count = 0
    queue_ms: Count = 0
    total_ms: Count = 0


class JobSpec(Struct, frozen=True, gc=False, omit_defaults=True):
    """A job as the mesh keeps it: normalised, everything larger than 4 KiB already a blob."""

    backend: Annotated[tuple[ShortText, ...], Meta(min_length=1, max_length=16)]
    """Ordered alternatives: the first that some node offers."""
    run: Run
    name: ShortText = ""
    inputs: Annotated[tuple[Input, ...], Meta(max_length=1024)] = ()
    outputs: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    """Relative paths or globs in the working directory; a trailing `/` means a directory."""
    array: Array = Array()
    needs: Needs = Needs()
    retry: Retry = Retry()
    timeout: Timeout = Timeout()
    on_lost: OnLost = OnLost.RERUN
    lost_after_ms: Count | None = None
    """None is `auto`: a tenth of the time the attempt has run, at most 2 min."""
    priority: Annotated[int, Meta(ge=0, le=100)] = 50
    replicas: Annotated[int, Meta(ge=1, le=16)] = 2
    """On how many nodes inputs, outputs and logs must lie before they are acknowledged."""
    output_bytes_max: Count = 64 << 20
    """Limit for stdout and stderr, each."""
    labels: tuple[tuple[ShortText, ShortText], ...] = ()
    """The job's own labels, for `-l key=value`."""

    @property
    def inline_bytes_max(self) -> int:
        """How much of a task's stdout, of its stderr and of its outputs stays in the log; what is longer is a blob.

        Every voter holds it in memory until the job has ended: of an array of 10⁶ tasks 4 KiB each would be gigabytes.
        """
        return max(REFERENCE_BYTES, min(INLINE_BYTES_MAX, RESULTS_BYTES // self.array.count))

    @property
    def promises_one_at_a_time(self) -> bool:
        """A given `lost_after` of 30 s or more: never two at a time (protocol.md 5)."""
        return self.on_lost is OnLost.RERUN and self.lost_after_ms is not None and self.lost_after_ms >= 30_000


class EndReason(StrEnum):
    """How an attempt ended."""

    EXIT = "exit"
    """It exited by itself; see the exit code."""
    SIGNAL = "signal"
    TRAP = "trap"
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    FUEL_LIMIT = "fuel_limit"
    OUTPUT_LIMIT = "output_limit"
    INVALID = "invalid"
    """It could never run: not a wasm module, command not found, a missing input. Not retried."""
    BACKEND = "backend"
    """The backend failed, not the job; counts as a loss."""
    LOST = "lost"
    """Its node stopped it when cut off, or the node was lost."""
    CANCELLED = "cancelled"


class Outcome(Struct, frozen=True, gc=False, omit_defaults=True):
    """How an attempt ended, as a value. `outputs` is a tree of what the spec named, None when it named nothing."""

    reason: EndReason
    exit_code: int | None = None
    message: Annotated[str, Meta(max_length=2048)] = ""
    stdout: Content | None = None
    stderr: Content | None = None
    outputs: Inline | TreeRef | None = None
    """Inline: the msgpack of a `Tree` whose contents are all inline, when all of it fits `JobSpec.inline_bytes_max`."""
    holders: tuple[NodeId, ...] = ()
    """Who has the blobs that this names."""
    run_ms: Count = 0

    @property
    def is_success(self) -> bool:
        return self.reason is EndReason.EXIT and self.exit_code == 0

    @property
    def is_bare(self) -> bool:
        """A success that left nothing to tell: one more number in a range."""
        return self.is_success and not (self.stdout or self.stderr or self.outputs or self.message)


class BackendOffer(Struct, frozen=True, gc=False, array_like=True):
    name: ShortText
    version: ShortText = ""


class BackendProbe(Struct, frozen=True, gc=False):
    """What a backend's probe at start found."""

    name: ShortText
    works: bool
    version: ShortText = ""
    reason: str = ""
    """Why not, for people."""


class Offer(Struct, frozen=True, gc=False):
    """What a node can run now: its totals. What is free follows from what is leased to it."""

    backends: tuple[BackendOffer, ...] = ()
    resources: Resources = Resources()
    labels: tuple[tuple[ShortText, ShortText], ...] = ()
    """Sorted by name; includes `arch`, `os`, `name`."""
    version: ShortText = ""
    missing: tuple[tuple[ShortText, str], ...] = ()
    """Backends that do not work here, each with its reason; read by `explain`."""


class AttemptKey(Struct, frozen=True, gc=False, order=True, array_like=True):
    """One attempt in all the mesh. The fence alone is unique; the rest is for people and checks."""

    job: JobId
    task: Count
    attempt: Count
    fence: Count


RUN_ATTEMPTS_MAX = 10_000
"""As many as one node holds."""


class AttemptRun(Struct, frozen=True, gc=False, order=True, array_like=True):
    """Attempts at neighbouring tasks of a job, with neighbouring fences: a thousand leases are five numbers."""

    job: JobId
    task: Count
    """Of the first, as are attempt and fence; all have the same attempt."""
    attempt: Count
    fence: Count
    count: Annotated[int, Meta(ge=1, le=RUN_ATTEMPTS_MAX)] = 1

    def key(self, at: int = 0) -> AttemptKey:
        return AttemptKey(self.job, self.task + at, self.attempt, self.fence + at)

    def each(self) -> list[AttemptKey]:
        job, task, attempt, fence = self.job, self.task, self.attempt, self.fence
        return [AttemptKey(job, task + at, attempt, fence + at) for at in range(self.count)]

    def part(self, start: int, stop: int) -> AttemptRun:
        """From its start-th to before its stop-th attempt."""
        return AttemptRun(self.job, self.task + start, self.attempt, self.fence + start, stop - start)


def runs_of(keys: Iterable[AttemptKey]) -> tuple[AttemptRun, ...]:
    """The same attempts, neighbours together; in the order of their fences."""
    runs: list[AttemptRun] = []
    first: AttemptKey | None = None
    count = 0
    for key in sorted(keys, key=lambda key: key.fence):
        if (
            first is not None
            and key.fence == first.fence + count
            and key.task == first.task + count
            and key.attempt == first.attempt
            and key.job == first.job
            and count < RUN_ATTEMPTS_MAX
        ):
            count += 1
            continue
        if first is not None:
            runs.append(AttemptRun(first.job, first.task, first.attempt, first.fence, count))
        first, count = key, 1
    if first is not None:
        runs.append(AttemptRun(first.job, first.task, first.attempt, first.fence, count))
    return tuple(runs)


class Member(Struct, frozen=True, gc=False):
    """A node of the mesh as the replicated state knows it."""

    node: NodeId
    name: ShortText
    roles: tuple[Role, ...]
    addresses: tuple[str, ...] = ()
    """Multiaddrs without the /p2p part, as told at join; gossip knows the present ones."""
    api_address: ShortText = ""
    """HOST:PORT of its TLS API, empty when it has none."""
    joined_wall_ms: Count = 0
    is_draining: bool = False
    zone: ShortText = ""
    """Its label `zone`: what fails together. Also of servers that offer nothing, for the choice of voters."""

    @property
    def is_server(self) -> bool:
        return Role.SERVER in self.roles

    @property
    def is_worker(self) -> bool:
        return Role.WORKER in self.roles


class Certificate(Struct, frozen=True, gc=False):
    """A member as the mesh's key vouches for it. The signature is over the msgpack of the other fields, as a tuple."""

    mesh: ShortText
    node: NodeId
    roles: tuple[Role, ...]
    version: Count
    """Rises when a node's roles change; the highest one counts."""
    signature: bytes = b""


class KeyLink(Struct, frozen=True, gc=False, array_like=True):
    """The mesh's key was changed: the next public key, signed by the one before."""

    serial: Count
    """1 is the first change."""
    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, Meta(max_length=64)]


class EpochCertificate(Struct, frozen=True, array_like=True):
    """A recovery epoch of the mesh, as its key vouches for it. The mesh as founded, lineage (), needs no signature."""

    lineage: tuple[ShortText, ...] = ()
    """The random of each recovery, oldest first."""
    signature: bytes = b""
