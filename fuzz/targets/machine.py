"""Commands in the log, as any member may propose them: the state machine answers each, and stays the same everywhere.

May be raised: nothing. Besides, `faults` stays 0, two replicas that apply at different stack depths are equal, every
query's answer can be read by whoever asked, and the state comes back from a snapshot as it was.
A frame is an origin and a command; or, from 0x80 on, a whole entry, as only a leader could write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from msgspec import Raw

from fuzz.inputs import join, split
from meshd import codec
from meshd.errors import MeshError
from meshd.model import (
    Array,
    AttemptKey,
    AttemptRun,
    BackendOffer,
    BlobRef,
    EndReason,
    Inline,
    Input,
    ItemsInline,
    ItemsRange,
    JobId,
    JobSpec,
    Member,
    Needs,
    NodeId,
    Offer,
    OnLost,
    Outcome,
    Resources,
    Retry,
    Role,
    Run,
    Timeout,
    TreeRef,
)
from meshd.raft.proposals import is_readable
from meshd.raft.state.commands import (
    AnyAnswer,
    AnyCommand,
    Batch,
    Cancel,
    Claim,
    CreateInvite,
    CreateToken,
    Ended,
    EndSession,
    Found,
    Join,
    OpenSession,
    Reconcile,
    Recovered,
    ReleaseJob,
    RemoveMember,
    Report,
    RetryJob,
    RevokeInvite,
    RevokeToken,
    SetDraining,
    Stamped,
    Submit,
    UpdateMember,
)
from meshd.raft.state.machine import Machine
from meshd.views import (
    AnyQuery,
    CheckToken,
    Explain,
    Explanation,
    GetInvites,
    GetJob,
    GetMembers,
    GetSummary,
    GetTokens,
    InvitesView,
    JobPage,
    JobView,
    ListJobs,
    ListTasks,
    MembersView,
    Summary,
    TaskPage,
    TokensView,
    TokenView,
)

FRAMED = True
WALL_MS = 1_800_000_000_000
SECRET = "5" * 64
A, B, C = NodeId("node-a"), NodeId("node-b"), NodeId("node-c")
ORIGINS = (A, B, C, NodeId(""), NodeId("x" * 300))
OFFER = Offer(
    backends=(BackendOffer("wasm"), BackendOffer("process", "1")),
    resources=Resources(cpu_milli=8_000, memory=8 << 30, custom=(("licence", 3),)),
    labels=(("arch", "x86_64"), ("zone", "eu")),
)
DEPTH = 300
"""Calls between the two replicas' stacks: a voter applies in other places when it starts than when it runs."""


def fuzz(data: bytes) -> None:
    one, other = Machine(), Machine()
    index = 0
    has_whole_entries = False
    for frame in split(join(_prologue()) + data):
        if not frame:
            continue
        index += 1
        entry = frame[1:]
        if frame[0] & 0x80:
            has_whole_entries = True
        elif not is_readable(entry):
            continue  # no voter lets it in
        else:
            elapsed_ms = (0, 1, 1000, 60_000)[(frame[0] >> 4) & 3]
            wall_ms = WALL_MS + index
            stamped = Stamped(ORIGINS[(frame[0] & 15) % len(ORIGINS)], Raw(entry))
            # Between two honest ones, which must not suffer.
            entry = codec.encode(Batch(elapsed_ms, wall_ms, (_HONEST, stamped, _HONEST)))
        answers = one.apply(index, entry)
        assert has_whole_entries or len(answers) == 3, "a command spoiled the batch that it was in"
        for answer in answers:
            codec.decode(answer, AnyAnswer)
        _at_depth(DEPTH, partial(other.apply, index, entry))
        one.take_events()
    assert one.faults == 0
    _check_views(one)
    if not has_whole_entries:
        assert one.digest() == other.digest(), "two replicas differ"
        again = Machine()
        again.restore(one.capture()())
        assert again.capture()() == one.capture()(), "a snapshot forgets"


def _at_depth(depth: int, work: Callable[[], object]) -> None:
    if depth:
        _at_depth(depth - 1, work)
    else:
        work()


_HONEST = Stamped(A, Raw(codec.encode(RevokeToken("nobody"))))


def _check_views(machine: Machine) -> None:
    """What a voter answers, the asker can read."""
    queries: list[tuple[AnyQuery, object]] = [
        (GetMembers(), MembersView), (GetTokens(), TokensView), (GetInvites(), InvitesView), (GetSummary(), Summary),
        (CheckToken(SECRET), TokenView), (ListJobs(), JobPage), (GetJob("last"), JobView),
    ]  # fmt: skip
    page: JobPage = machine.answer(ListJobs(limit=8))
    for job in page.jobs:
        queries += [
            (GetJob(job.id), JobView),
            (ListTasks(job.id, limit=8), TaskPage),
            (Explain(job.id, 0), Explanation),
        ]
    for query, view in queries:
        with suppress(MeshError):
            answer = machine.answer(query)
            _read(answer, view)


def _read(answer: object, view: object) -> None:
    try:
        codec.decode(codec.encode(answer), view)
    except MeshError as error:
        raise AssertionError(f"an answer cannot be read: {error}") from error


# --- seeds ------------------------------------------------------------------------------------------------------------


def job_id(number: int) -> JobId:
    text = f"{(WALL_MS << 80) | (7 << 76) | (2 << 62) | number:032x}"
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def _frame(origin: int, command: AnyCommand, pace: int = 1) -> bytes:
    return bytes([origin | pace << 4]) + codec.encode(command)


def _prologue() -> list[bytes]:
    """A mesh of one server and worker, one worker, and a session of each."""
    worker = Member(B, "b", (Role.WORKER,))
    return [
        _frame(0, Found("mesh", Member(A, "a", (Role.SERVER, Role.WORKER)))),
        _frame(0, CreateInvite(SECRET, (Role.SERVER, Role.WORKER), 5, 3_600_000)),
        _frame(0, Join(SECRET, worker)),
        _frame(0, OpenSession(1, (), 2, OFFER)),
        _frame(1, OpenSession(1, (), 2, OFFER)),
    ]


def _spec(**fields: object) -> JobSpec:
    return JobSpec(**{"backend": ("wasm",), "run": Run(args=("x",)), **fields})  # type: ignore[arg-type]


def _key(number: int, fence: int, task: int = 0, attempt: int = 1) -> AttemptKey:
    return AttemptKey(job_id(number), task, attempt, fence)


def _run(fence: int, count: int) -> AttemptRun:
    return AttemptRun(job_id(1), 0, 1, fence, count)


def seeds() -> Iterator[bytes]:
    good, bad = Outcome(EndReason.EXIT, 0), Outcome(EndReason.EXIT, 3, "it broke", Inline(b"out"), Inline(b"err"))
    blob = BlobRef("a" * 64, 100)
    rich = _spec(
        backend=("wasm", "process"), name="rich", inputs=(Input("in", blob), Input("d", TreeRef(blob, 1, 9))), outputs=("o/",),
        array=Array(3, ItemsInline(("p", "q", "r")), 2, 1), needs=Needs(Resources(500, 1, 1, 0, (("licence", 1),)), "zone in (eu, us), !spot"),
        retry=Retry(3, 0, 0), timeout=Timeout(1000, 5000, 60_000), on_lost=OnLost.WAIT, priority=7, labels=(("k", "v"),),
    )  # fmt: skip
    yield join([_frame(0, Submit(job_id(1), _spec())), _frame(0, Report(1, 1, (Ended(_key(1, 1), good),), ()))])
    yield join(
        [
            _frame(1, Submit(job_id(1), rich, "me")),
            _frame(0, Report(1, 1, (), (_key(1, 1),))),
            _frame(0, Report(1, 1, done=(_run(1, 1),), ahead=((job_id(1), 100),))),
            _frame(0, Report(1, 2, done=(_run(2**53, 10_000),), returned=(_run(1, 3),), ahead=())),
            _frame(0, Report(1, 2, (Ended(_key(1, 1), bad),)), 2),
        ]
    )
    yield join(
        [
            _frame(0, Submit(job_id(1), rich)),
            _frame(0, EndSession(B, 1), 3),
            _frame(0, EndSession(A, 1), 3),
            _frame(0, OpenSession(2, (_key(1, 1), _key(1, 2)), 4, OFFER)),
        ]
    )
    for on_lost in OnLost:
        yield join([
            _frame(0, Submit(job_id(1), _spec(on_lost=on_lost, lost_after_ms=500, array=Array(4, ItemsRange(1, 2))))), _frame(0, EndSession(A, 1), 2),
            _frame(0, OpenSession(2, (_key(1, 1),), 4, OFFER), 2), _frame(1, RemoveMember(B)), _frame(0, Cancel(job_id(1), ((0, 2),))),
        ])  # fmt: skip
    yield join(
        [
            _frame(0, Submit(job_id(1), rich)),
            _frame(0, Cancel(job_id(1))),
            _frame(0, Reconcile(1, 9, ())),
            _frame(0, RetryJob(job_id(1), job_id(2))),
        ]
    )
    for on_lost in OnLost:
        yield join([
            _frame(0, Submit(job_id(1), _spec(on_lost=on_lost, array=Array(4, ItemsRange(1, 2))))), _frame(0, Recovered(("r1",), WALL_MS + 9000)),
            _frame(0, OpenSession(2, (_key(1, 1),), 4, OFFER)), _frame(0, Submit(job_id(2), _spec(on_lost=on_lost))),
            _frame(1, ReleaseJob(job_id(1))), _frame(0, ReleaseJob(job_id(2))), _frame(1, Recovered(("r1", "r2"), 0)),
        ])  # fmt: skip
    yield join(
        [
            _frame(0, Claim(1, 1, 0, OFFER)),
            _frame(0, Claim(1, 2, 3, OFFER)),
            _frame(0, Submit(job_id(3), rich), 3),
            _frame(1, Reconcile(1, 2, (_key(3, 1),))),
        ]
    )
    yield join(
        [
            _frame(0, CreateToken("6" * 64, "ann", "admin")),
            _frame(1, RevokeToken("ann")),
            _frame(0, RevokeToken("ann")),
            _frame(0, RevokeInvite(SECRET)),
        ]
    )
    yield join(
        [
            _frame(0, Join(SECRET, Member(C, "c", (Role.SERVER,), ("/ip4/1.2.3.4/tcp/1",)))),
            _frame(2, UpdateMember("cc", ("/dns/x/tcp/2",), "x:1")),
            _frame(0, SetDraining(C, True)),
            _frame(0, RemoveMember(C)),
            _frame(2, RemoveMember(A)),
        ]
    )
    yield join([b"\x80" + codec.encode(Batch(5, WALL_MS, (_HONEST,))), b"\x80" + codec.encode(Batch(2**53, 2**53, ()))])
    # Found by these targets: nesting that one replica can read and another cannot; amounts beyond what an answer may say.
    nested = codec.encode(RevokeToken("x"))
    yield join([b"\x00" + bytes([nested[0] + 1]) + nested[1:] + b"\x91" * 820 + b"\xc0"])
    huge = Resources(0, custom=(("x", 2**53),) * 2)
    yield join(
        [
            _frame(1, Claim(1, 1, 5, Offer((BackendOffer("wasm"),), huge))),
            _frame(1, Submit(job_id(1), _spec(needs=Needs(huge)))),
        ]
    )
