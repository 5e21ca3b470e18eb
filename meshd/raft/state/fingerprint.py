"""What of the state itself goes into the hash that replicas compare, beside the chain of what each entry did.

The chain shows a replica that acted differently; this shows one whose memory differs and
has not acted on it yet: all sums and sessions, and a few jobs whole, others each time, so
that one after the other is looked at. It is taken at checkpoints only, in about a millisecond.

What is hashed, here and in the chain, is a part of what `apply` does: servers of two versions
that hash differently would take one another for diverged. So a change of it, like any other
change of `apply`, has to begin with an entry of the log and not with a start of a new version.
"""

from __future__ import annotations

from itertools import islice

from meshd import codec
from meshd.model import JobId
from meshd.raft.state.history import History
from meshd.raft.state.jobs import Job
from meshd.raft.state.matching import Matching
from meshd.raft.state.members import Members
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue

JOBS_LOOKED_AT = 32
ROWS_MAX = 64
"""Of a larger job its sums stand for its rows."""
STRIDE = 256
"""Entries after which the next jobs are looked at: the distance of checkpoints."""


def fingerprint(moment: Moment, members: Members, matching: Matching, queue: Queue, history: History) -> bytes:
    """Depends on the state alone: a replica restored from a snapshot says the same as the others."""
    return codec.encode(
        (
            (queue.jobs_made, queue.outcome_bytes, queue.finished_rows, len(queue.finished), len(queue.seen)),
            (moment.moves, queue.seen.forgotten_ms, queue.lineage, queue.recovered_wall_ms),
            list(queue.totals.values()),
            queue.next_timer_ms(), matching.unsettled(),
            list(members.records.values()),
            list(members.revoked),
            members.key_links,
            list(members.invites.values()),
            list(members.tokens.values()),
            [
                (
                    node.id, node.may_work, node.epoch, node.is_live, node.seq, node.answer, node.slots,
                    len(node.leases), len(node.held), node.last_fence, node.held_in_all, node.taken, node.ahead,
                    node.boot, node.ended_ms,
                )
                for node in matching.nodes.values()
            ],
            [_whole(queue.jobs[job]) for job in _looked_at(moment.position, queue)],
            *_of_history(history),
        )
    )  # fmt: skip


def _looked_at(position: int, queue: Queue) -> list[JobId]:
    if not queue.ordered:
        return []
    start = position // STRIDE * JOBS_LOOKED_AT % len(queue.ordered)
    return list(islice(queue.ordered, start, start + JOBS_LOOKED_AT))


def _of_history(history: History) -> list[object]:
    """Nothing before the first Seal, so that a mesh whose servers get this version one by one goes on agreeing."""
    if not history.last:
        return []
    newest = history.segments.get(history.last)
    return [(history.last, history.dropped, history.oldest, history.size, list(history.held.items()), newest)]


def _whole(job: Job) -> object:
    """As it is, not as a snapshot would find it already written down."""
    has_many = len(job.rows) + len(job.results) > ROWS_MAX
    return (
        job.id, job.number, job.spec, job.owner, job.version, job.ended_wall_ms, job.hold, job.ready.packed(),
        [(state, tasks.packed()) for state, tasks in job.ended.items()], job.runs.packed(),
        (len(job.rows), job.stopping, len(job.results)) if has_many else (job.rows, job.results),
    )  # fmt: skip
