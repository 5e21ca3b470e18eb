"""What must hold after any commands whatever, in any order: hypothesis looks for a counterexample."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshd import codec
from meshd.errors import MeshError
from meshd.model import (
    Array,
    AttemptKey,
    AttemptRun,
    BackendOffer,
    EndReason,
    Inline,
    JobId,
    Offer,
    OnLost,
    Outcome,
    Retry,
    TaskState,
    Timeout,
    runs_of,
)
from meshd.raft.state import jobs, leases
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.commands import (
    Accepted,
    AnyAnswer,
    Batch,
    Cancel,
    Recovered,
    ReleaseJob,
    RemoveMember,
    Restored,
    RetryJob,
    SetDraining,
    Stamped,
    Submit,
)
from meshd.raft.state.lineage import RECOVERIES_MAX
from meshd.raft.state.machine import Machine
from meshd.raft.state.ranges import Ranges
from meshd.views import PAGE_MAX, Explain, GetMembers, GetSummary, ListJobs, ListTasks
from tests.scene import BAD, GOOD, OFFER, WALL_MS, A, B, C, Scene, job_id, spec

NODES = (A, B, C)
numbers = st.integers(0, 30)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), numbers, numbers)))
def test_ranges_are_a_set(changes: list[tuple[bool, int, int]]) -> None:
    ranges, model = Ranges(), set()
    for adds, start, stop in changes:
        (ranges.add if adds else ranges.remove)(start, stop)
        (model.update if adds else model.difference_update)(range(start, stop))
        assert len(ranges) == len(model)
        assert {task for low, high in ranges for task in range(low, high)} == model
        assert [task in ranges for task in range(31)] == [task in model for task in range(31)]
        assert {t for low, high in ranges.within(5, 20) for t in range(low, high)} == model & set(range(5, 20))
        assert Ranges.unpacked(ranges.packed()) == ranges
        assert all(low < high for low, high in ranges)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "drop", "take"]), numbers, numbers)))
def test_an_agenda_gives_the_smallest_rank_first(changes: list[tuple[str, int, int]]) -> None:
    agenda, model = Agenda[int](), dict[int, int]()
    for change, key, rank in changes:
        if change == "put":
            agenda.put(key, rank)
            model[key] = rank
        elif change == "drop":
            agenda.drop(key)
            model.pop(key, None)
        else:
            due = min(((r, k) for k, r in model.items() if r <= rank), default=None)
            assert agenda.take_until(rank) == (None if due is None else due[1])
            if due is not None:
                del model[due[1]]
        assert agenda.first() == min(((r, k) for k, r in model.items()), default=None)


commands = st.one_of(
    st.binary(max_size=60),
    st.builds(
        codec.encode,
        st.tuples(
            st.sampled_from(
                ["Submit", "Cancel", "OpenSession", "Report", "Claim", "Reconcile", "Found", "Join", "EndSession"]
            ),
            st.one_of(st.integers(0, 3), st.text(max_size=5), st.sampled_from([A, B, job_id(1)])),
            st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3), st.none()),
            st.one_of(st.integers(0, 3), st.just(())),
        ),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*NODES, ""]), commands), max_size=8))
def test_random_bytes_are_answered_and_never_raise(bodies: list[tuple[str, bytes]]) -> None:
    scene = Scene(A, B)
    before = scene.machine.fence
    for origin, body in bodies:
        entry = codec.encode([0, WALL_MS, [[origin, None]]]).replace(b"\xc0", body or b"\xc0")
        for answer in scene.machine.apply(scene.index, entry):
            codec.decode(answer, AnyAnswer)
    assert scene.machine.faults == 0
    assert scene.machine.fence >= before


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_an_entry_that_is_none_changes_nothing(data: bytes) -> None:
    scene = Scene(A)
    was = scene.machine.capture()()
    try:
        codec.decode(data, Batch)
    except MeshError:
        assert scene.machine.apply(9, data) == []
        assert scene.machine.capture()() == was


backends = st.sampled_from([("wasm", "process"), ("process", "wasm"), ("wasm",), ("process",)])
specs = st.builds(
    lambda backend, count, at_once, max_fails, attempts, on_lost, lost_after, queue_ms, total_ms, priority, backoff: (
        spec(
            backend=backend,
            array=Array(count=count, at_once=at_once, max_fails=max_fails),
            retry=Retry(attempts=attempts, backoff_min_ms=backoff, crash_limit=4),
            on_lost=on_lost,
            lost_after_ms=lost_after,
            timeout=Timeout(queue_ms=queue_ms, total_ms=total_ms),
            priority=priority,
        )
    ),
    backend=backends,
    count=st.integers(1, 5),
    at_once=st.integers(0, 2),
    max_fails=st.integers(0, 2),
    attempts=st.integers(1, 3),
    on_lost=st.sampled_from(OnLost),
    lost_after=st.sampled_from([None, 0, 500, 30_000]),
    queue_ms=st.sampled_from([0, 2000]),
    total_ms=st.sampled_from([0, 5000]),
    priority=st.integers(0, 100),
    backoff=st.sampled_from([0, 100]),
)
both = Offer((BackendOffer("wasm"), BackendOffer("process")), OFFER.resources)
offers = st.sampled_from([OFFER, Offer((BackendOffer("process"),), OFFER.resources), both])
outcomes = st.sampled_from(
    [
        Outcome(reason=EndReason.EXIT, exit_code=0),
        Outcome(reason=EndReason.EXIT, exit_code=0, stdout=Inline(b"out")),
        Outcome(reason=EndReason.EXIT, exit_code=1),
        *(Outcome(reason=reason) for reason in EndReason if reason is not EndReason.EXIT),
    ]
)
nodes = st.sampled_from(NODES)
index = st.integers(0, 7)


class MachineLaws(RuleBasedStateMachine):
    """Three replicas: one applies, one applies the same bytes, one is restored from a snapshot now and then.

    And for each entry a fourth, restored just before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene(*NODES, slots=2, offer=both)
        self.twin, self.restored = Machine(), Machine()
        self.replayed = 0
        self.ids: list[JobId] = []
        self.keys: list[AttemptKey] = []
        self.epochs = dict.fromkeys(NODES, 1)
        self.ended: dict[tuple[JobId, int], TaskState] = {}
        self.fences: list[int] = []
        self.replay()

    def replay(self) -> None:
        """The other replicas catch up, and must have become the same."""
        machine = self.scene.machine
        for entry in self.scene.entries[self.replayed :]:
            self.replayed += 1
            fresh = Machine()
            fresh.restore(self.twin.capture()())
            answers = self.twin.apply(self.replayed, entry)
            assert self.restored.apply(self.replayed, entry) == fresh.apply(self.replayed, entry) == answers
            assert fresh.digest() == self.twin.digest()
            assert self.twin.take_events() == self.restored.take_events()
        assert machine.digest() == self.twin.digest() == self.restored.digest()
        new = [key.fence for key in self.scene.notices()]
        assert new == sorted(new) and (not new or not self.fences or new[0] > self.fences[-1]), "fences only rise"
        self.fences += new
        self.keys += [key for node, epoch in machine.sessions_live() for key in self.scene.leases(node, epoch)]
        del self.keys[:-50]

    @rule(job_spec=specs, node=nodes)
    def submit(self, job_spec, node):
        self.ids.append(job_id(len(self.ids) + 1))
        self.scene.do(node, Submit(self.ids[-1], job_spec))

    @rule(node=nodes, at=index, outcome=outcomes, runs=st.booleans())
    def report(self, node, at, outcome, runs):
        """Mostly of its own; sometimes of any attempt there ever was."""
        mine = self.scene.leases(node, self.epochs[node]) if at < 6 else self.keys
        if mine:
            key = mine[at % len(mine)]
            self.scene.report(
                node, *(() if runs else ((key, outcome),)), epoch=self.epochs[node], running=(key,) if runs else ()
            )

    @rule(node=nodes, at=index, count=st.integers(1, 4), is_done=st.booleans(), ahead=st.integers(-1, 4))
    def report_runs(self, node, at, count, is_done, ahead):
        """Ends without anything to tell, and what never started; of its own or of any; some have ended before."""
        mine = self.scene.leases(node, self.epochs[node]) if at < 6 else self.keys
        runs = runs_of(mine[at % len(mine) :][:count]) if mine else ()
        runs += (AttemptRun(*_values(mine[0]), count=count),) if mine and at == 3 else ()
        self.scene.report_runs(
            node,
            done=runs if is_done else (),
            returned=() if is_done else runs,
            ahead=None if ahead < 0 else tuple((job, ahead) for job in self.ids[-2:]),
            epoch=self.epochs[node],
        )

    @rule(node=nodes, slots=st.integers(0, 3), offer=offers)
    def claim(self, node, slots, offer):
        self.scene.claim(node, slots, epoch=self.epochs[node], offer=offer)

    @rule(node=nodes, step=st.integers(0, 2), keep=st.integers(0, 3), slots=st.integers(1, 2), offer=offers)
    def open(self, node, step, keep, slots, offer):
        epoch = self.epochs[node] + step
        if step:
            self.epochs[node] = epoch
        self.scene.open(node, epoch, tuple(self.keys[-keep:] if keep else ()), slots=slots, offer=offer)

    @rule(node=nodes)
    def end(self, node):
        self.scene.end(node, self.epochs[node])

    @rule(node=nodes, keep=st.integers(0, 2), back=st.integers(0, 2))
    def reconcile(self, node, keep, back):
        held = self.scene.leases(node, self.epochs[node])[:keep]
        self.scene.reconcile(node, *held, fence=max(self.scene.machine.fence - back, 0), epoch=self.epochs[node])

    @rule(at=index, some=st.booleans())
    def cancel(self, at, some):
        if self.ids:
            self.scene.do(A, Cancel(self.ids[at % len(self.ids)], ((0, 1),) if some else None))

    @rule(at=index)
    def retry(self, at):
        if self.ids:
            new = job_id(len(self.ids) + 1)
            if getattr(self.scene.do(A, RetryJob(self.ids[at % len(self.ids)], new)), "is_new", False):
                self.ids.append(new)

    @rule(is_dated_ahead=st.booleans())
    def recover(self, is_dated_ahead):
        machine = self.scene.machine
        lineage = (*machine.lineage, f"r{len(machine.lineage)}")
        if len(lineage) <= RECOVERIES_MAX:
            assert self.scene.do(A, Recovered(lineage, machine.wall_ms + 1000 * is_dated_ahead)) == Accepted()
            assert not machine.sessions_live()

    @rule(at=index)
    def release(self, at):
        if self.ids:
            self.scene.do(A, ReleaseJob(self.ids[at % len(self.ids)]))

    @rule(node=nodes, is_draining=st.booleans())
    def drain(self, node, is_draining):
        self.scene.do(A, SetDraining(node, is_draining))

    @rule()
    def remove(self):
        self.scene.do(A, RemoveMember(C))

    @rule(elapsed_ms=st.sampled_from([0, 1, 100, 700, 3000, 70_000]))
    def tick(self, elapsed_ms):
        self.scene.tick(elapsed_ms)

    @rule()
    def restore(self):
        data = self.scene.machine.capture()()
        self.replay()
        self.restored = Machine()
        self.restored.restore(data)
        assert self.restored.take_events() == [Restored()]
        assert self.restored.capture()() == data
        assert self.twin.capture()() == data, "equal replicas have equal snapshots"

    @invariant()
    def replicas_agree(self):
        self.replay()

    @invariant()
    def counts_add_up(self):
        machine = self.scene.machine
        total = dict.fromkeys(TaskState, 0)
        for view in machine.answer(ListJobs(limit=PAGE_MAX)).jobs:
            counts = {state: getattr(view.counts, state.value) for state in TaskState}
            assert sum(counts.values()) == view.tasks
            seen = dict.fromkeys(TaskState, 0)
            for task in machine.answer(ListTasks(view.id, limit=PAGE_MAX)).tasks:
                seen[task.state] += 1
                before = self.ended.get((view.id, task.task), task.state)
                assert before is task.state, "a finished task never moves"
                if task.state.is_final:
                    self.ended[view.id, task.task] = task.state
                machine.answer(Explain(view.id, task.task))
            assert seen == counts
            job = machine.find(view.id)
            assert job.stopping == sum(row.stop is not None for row in job.rows.values())
            assert view.is_final == all(state.is_final for state, count in counts.items() if count)
            for state in TaskState:
                total[state] += counts[state]
        summary = machine.answer(GetSummary())
        assert {state: getattr(summary.counts, state.value) for state in TaskState} == total
        leased = sum(len(view.leased) for view in machine.answer(GetMembers()).members)
        assert leased == total[TaskState.LEASED] + total[TaskState.RUNNING]

    @invariant()
    def what_waits_fits_nowhere(self):
        """No slot stays free while a task that fits is ready, nor is less held ahead than was asked for.

        Of a job with several backends less may be ahead once the better one has gone: until its node asks anew for another number.
        """
        machine = self.scene.machine
        if machine._matching.has_more:
            return  # the next entry goes on, at once
        for job in machine._queue.jobs.values():
            if job.kind is not None and job.may_lease:
                for node in machine._matching.nodes.values():
                    assert not (node.has_room and machine._matching.fits_now(node, job.kind)), (job.id, node.id)
                    may_feed = node.is_live and node.may_work and node.slots and job.first_ahead() is not None
                    may_feed = may_feed and len(job.spec.backend) == 1
                    if may_feed and machine._matching.suits(node, job.kind):
                        assert node.ahead_held.get(job.id, 0) >= node.ahead.get(job.id, 0)

    @invariant()
    def nothing_of_a_held_job_runs_or_can_be_spoken_for(self):
        queue = self.scene.machine._queue
        for job in queue.jobs.values():
            assert (job.id in queue.on_hold) == (bool(job.hold) and not job.is_final)
            if job.hold and not job.is_final:
                assert job.spec.on_lost is not OnLost.RERUN and not job.leased and not job.running
                assert all(row.node is None for row in job.rows.values() if row.state is TaskState.HELD)

    @invariant()
    def at_once_is_kept(self):
        for job in self.scene.machine._queue.jobs.values():
            at_once = job.spec.array.at_once
            assert not at_once or job.active <= at_once

    @invariant()
    def leases_stay_within_the_slots(self):
        """But for a session that came back, or claimed, with fewer slots than it held."""
        for node in self.scene.machine._matching.nodes.values():
            most = max(node.slots, 3)
            assert node.taken <= most
            assert node.held_in_all == node.taken + sum(node.ahead_held.values())


def _values(key: AttemptKey) -> tuple[JobId, int, int, int]:
    return key.job, key.task, key.attempt, key.fence


class SmallEntries(MachineLaws):
    """The same where an entry may lease one run at most, so that what is left goes on with the next one, here and elsewhere.

    And where a task is soon one that was lost often.
    """

    def __init__(self) -> None:
        self.were = leases.LEASES_PER_ENTRY_MAX, jobs.AHEAD_LOSSES_MAX
        leases.LEASES_PER_ENTRY_MAX, jobs.AHEAD_LOSSES_MAX = 1, 1
        super().__init__()

    def teardown(self) -> None:
        leases.LEASES_PER_ENTRY_MAX, jobs.AHEAD_LOSSES_MAX = self.were

    @initialize(backends=st.lists(backends, min_size=6, max_size=12))
    def begin_with_lines(self, backends):
        """More than there are slots for, so that several kinds wait, and the first job of one may end before others."""
        for backend in backends:
            self.submit(spec(backend=backend), A)

    @rule()
    def go_on(self):
        """As long as the leader's ticks would."""
        for _ in range(100):
            if self.scene.machine.next_timer_ms() != 0:
                return
            self.scene.batch()
        raise AssertionError("it never comes to an end")


TestSmallEntries = SmallEntries.TestCase
# The same examples each time: what entries of one lease meet is rare, and a change should fail by what it does, not by chance.
TestSmallEntries.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)

TestMachineLaws = MachineLaws.TestCase
TestMachineLaws.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 12),
    slots=st.integers(1, 12),
    at_once=st.integers(0, 3),
    steps=st.lists(
        st.tuples(st.sampled_from(["done", "returned", "running", "failed"]), index, st.integers(1, 5)), max_size=12
    ),
)
def test_a_run_behaves_as_the_sum_of_its_single_leases(count, slots, at_once, steps) -> None:
    """One replica hears of runs, the other of each attempt by itself, in one command: they are the same afterwards."""
    runs, singles = (Scene(A, B, slots=slots) for _ in range(2))
    job_spec = spec(array=Array(count=count, at_once=at_once), retry=Retry(attempts=2, backoff_min_ms=0))
    job = runs.submit(job_spec)
    assert singles.submit(job_spec) == job
    for what, at, most in steps:
        keys = runs.leases(A)
        assert keys == singles.leases(A)
        if not keys:
            break
        chosen = keys[at % len(keys) :][:most]
        if what == "done":
            runs.report_runs(A, done=runs_of(chosen))
            singles.report(A, *((key, GOOD) for key in chosen))
        elif what == "returned":
            runs.report_runs(A, returned=runs_of(chosen))
            singles.report_runs(A, returned=tuple(AttemptRun(*_values(key)) for key in chosen))
        else:
            for scene in (runs, singles):
                scene.report(A, *(() if what == "running" else ((chosen[0], BAD),)), running=chosen[:1])
        assert runs.machine.digest() == singles.machine.digest()
        assert runs.machine.answer(ListTasks(job, limit=100)) == singles.machine.answer(ListTasks(job, limit=100))
        assert runs.machine.capture()() == singles.machine.capture()()


def test_stamped_bodies_are_what_was_proposed() -> None:
    """`Raw` keeps the proposer's bytes as they are, so the limit on a command is checked on what was sent."""
    body = codec.encode(RemoveMember(C))
    batch = codec.decode(codec.encode(Batch(0, 0, (Stamped(A, msgspec.Raw(body)),))), Batch)
    assert bytes(batch.commands[0].body) == body
