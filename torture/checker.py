"""What a round's history, the mesh afterwards and the jobs' own traces say together: lost, doubled, stuck. Pure.

    lost      acknowledged and not there, at any node; or a read, begun after the acknowledgement, that did not
              find it; or done, although no attempt ran to its end
    doubled   made twice by one id; finished in two ways; one attempt begun twice; an `on_lost: fail` task begun
              twice; two attempts of an `on_lost: wait` task at a time; a later attempt with a lower fence; two
              leaders in one term
    stuck     a job that did not finish, and a node that did not come back, once the faults had stopped

Traces are lines that attempts append to one file, so that their order needs no clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from torture.history import Op


class Listed(Struct, frozen=True):
    """A job as a node lists it afterwards."""

    id: str
    state: str
    is_final: bool


class Task(Struct, frozen=True):
    """A task as the mesh has it afterwards."""

    job: str
    task: int
    state: str
    attempt: int
    fence: int

    @property
    def seen(self) -> str:
        return f"{self.state}/{self.attempt}/{self.fence}"


class Trace(Struct, frozen=True):
    job: str
    task: int
    attempt: int
    fence: int
    word: str
    """`begin` or `end`."""


@dataclass(slots=True)
class Verdict:
    acknowledged: int = 0
    refused: list[str] = field(default_factory=list)
    """Valid submissions that were turned down for good: nothing is lost by that, and yet it is a fault."""
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.stuck)

    def add(self, other: Verdict) -> None:
        self.acknowledged += other.acknowledged
        for name in ("refused", "lost", "doubled", "stuck"):
            getattr(self, name).extend(getattr(other, name))


def judge(
    ops: Iterable[Op],
    *,
    listed: Mapping[str, Iterable[Listed]],
    tasks: Iterable[Task],
    traces: Iterable[Trace],
    kinds: Mapping[str, str],
    absent: Iterable[str] = (),
    reigns: Mapping[int, Collection[str]] | None = None,
) -> Verdict:
    """`listed` by the node that was asked; `kinds` by job what its `on_lost` is ("" leaves no trace); nodes that are
    `absent`, with the reason; `reigns` by term who was said to lead."""
    ops = list(ops)
    verdict = Verdict()
    acknowledged: dict[str, float] = {}
    for op in ops:
        if op.kind == "submit" and op.result == "ok":
            acknowledged[op.job] = min(op.ended_s, acknowledged.get(op.job, op.ended_s))
    verdict.acknowledged = len(acknowledged)
    verdict.refused = [f"{op.job} at {op.node}: {op.error}" for op in ops if op.result == "refused"]
    verdict.stuck = list(absent)
    verdict.doubled = [
        f"term {term} had {len(leaders)} leaders: {', '.join(sorted(leaders))}"
        for term, leaders in sorted((reigns or {}).items())
        if len(leaders) > 1
    ]
    _judge_listings(verdict, acknowledged, {node: list(jobs) for node, jobs in listed.items()})
    _judge_answers(verdict, acknowledged, ops)
    tasks = list(tasks)
    _judge_ends(verdict, ops, tasks)
    _judge_traces(verdict, tasks, list(traces), kinds)
    return verdict


def _judge_listings(verdict: Verdict, acknowledged: Mapping[str, float], listed: Mapping[str, list[Listed]]) -> None:
    unfinished: set[str] = set()
    missing: dict[str, list[str]] = {}
    for node, jobs in listed.items():
        ids = [job.id for job in jobs]
        there = set(ids)
        for job in acknowledged.keys() - there:
            missing.setdefault(job, []).append(node)
        if len(there) < len(ids):
            verdict.doubled += [f"{job} is listed twice at {node}" for job in there if ids.count(job) > 1]
        unfinished |= {f"{job.id} is still {job.state}" for job in jobs if not job.is_final}
    verdict.lost += [f"{job} is not at {', '.join(nodes)}" for job, nodes in sorted(missing.items())]
    verdict.stuck += sorted(unfinished)


def _judge_answers(verdict: Verdict, acknowledged: Mapping[str, float], ops: list[Op]) -> None:
    made: dict[str, Op] = {}
    for op in ops:
        if op.is_new and op.job in made:
            verdict.doubled.append(f"{op.job} was made at {made[op.job].node} and again at {op.node}")
        if op.is_new:
            made[op.job] = op
        if op.kind == "read" and op.result == "missing" and op.invoked_s > acknowledged.get(op.job, float("inf")):
            verdict.lost.append(f"{op.job} was acknowledged, then not found at {op.node} at {op.invoked_s:.3f}")


def _judge_ends(verdict: Verdict, ops: list[Op], tasks: list[Task]) -> None:
    """A finished task never moves: whatever was seen of its end, at any time, is the same."""
    ends: dict[str, str] = {task.job: task.seen for task in tasks if task.task == 0}
    for op in ops:
        if op.kind != "read" or op.seen.partition("/")[0] not in FINAL:
            continue
        if (end := ends.setdefault(op.job, op.seen)) != op.seen:
            verdict.doubled.append(f"{op.job} ended as {op.seen} at {op.node}, and as {end}")


def _judge_traces(verdict: Verdict, tasks: list[Task], traces: list[Trace], kinds: Mapping[str, str]) -> None:
    begun: dict[tuple[str, int], list[int]] = {}
    ended: set[tuple[str, int, int]] = set()
    fences: dict[tuple[str, int], dict[int, int]] = {}
    for trace in traces:
        key = (trace.job, trace.task)
        attempts = begun.setdefault(key, [])
        kind = kinds.get(trace.job, "")
        name = f"{trace.job} task {trace.task} attempt {trace.attempt}"
        fences.setdefault(key, {})[trace.attempt] = trace.fence
        if trace.word == "begin":
            if trace.attempt in attempts:
                verdict.doubled.append(f"{name} began twice")
            elif attempts and kind == "fail":
                verdict.doubled.append(f"{name} began, although on_lost: fail and {attempts} had begun")
            attempts.append(trace.attempt)
        else:
            ended.add((*key, trace.attempt))
        if kind == "wait" and trace.attempt < max(attempts, default=0):
            verdict.doubled.append(f"{name} ({trace.word}) was alive beside attempt {max(attempts)}, on_lost: wait")
    for (job, task_number), known in fences.items():
        ordered = [known[attempt] for attempt in sorted(known)]
        if any(later <= earlier for earlier, later in itertools.pairwise(ordered)):
            verdict.doubled.append(f"{job} task {task_number}: the fences of its attempts are {ordered}")
    for task in tasks:
        if task.state == "done" and kinds.get(task.job) and (task.job, task.task, task.attempt) not in ended:
            verdict.lost.append(f"{task.job} task {task.task} is done by attempt {task.attempt}, which did not end")


FINAL = frozenset({"done", "failed", "cancelled", "timed_out", "skipped"})
