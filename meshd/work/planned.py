"""Attempts that read no files and leave none: what they share is prepared once for their job, and they run in batches.

    Start ── prepared? ──no──▶ fetch module and items ──▶ plan ──▶ backend.start ── many at a time ──▶ ended
                └──yes────────────────────────────────────────────────▲

Such an attempt costs the agent no task, scope, thread, directory or file of its own; its small
output comes inside its end. Output that is too large to travel is made a blob first, on as many
disks as the job asks for (protocol.md 6). Everything else runs one by one (executor.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog
import trio

from meshd.errors import InvalidRequest, MeshError
from meshd.items import LISTS_BYTES_KEPT, Lines, Strings, item_of
from meshd.model import (
    INLINE_STREAM_BYTES_MAX,
    AttemptKey,
    BlobRef,
    EndReason,
    ItemsBlob,
    ItemsFiles,
    JobId,
    JobSpec,
    NodeId,
    Outcome,
)
from meshd.ports import Backend, BatchBackend, BlobStore, Finished, Leash, Limits, Plan, Planned

JOBS_KEPT = 64
"""Plans in memory: a node works for a few jobs at a time."""

BEGINNING = ("MESHD_TASK", "MESHD_ATTEMPT", "MESHD_FENCE", "MESHD_ITEM")
"""Variables that differ between the attempts of a plan: whoever runs them adds these."""

log = structlog.get_logger()

Ends = Sequence[tuple[AttemptKey, Outcome]]


class Supplies(Protocol):
    """What the executor does for attempts of both kinds."""

    def choose(self, spec: JobSpec) -> Backend:
        """Raises Unavailable."""
        ...

    async def fetch(self, ref: BlobRef) -> None: ...
    async def lines(self, ref: BlobRef) -> Lines: ...

    async def keep(self, outcome: Outcome, stdout: Path | None, stderr: Path | None, spec: JobSpec) -> Outcome:
        """With these files as blobs, on as many disks as the job asks for; they are removed."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    spec: JobSpec
    backend: BatchBackend
    plan: Plan
    lines: Lines
    strings: Strings


@dataclass(slots=True)
class Preparing:
    leash: Leash
    starts: list[tuple[int, Sequence[AttemptKey], Callable[[Ends], None]]] = field(default_factory=list)
    """Lane, attempts, and whom to tell."""


class PlannedRuns:
    """`directory` is private and takes output that is too large to travel."""

    def __init__(self, *, directory: Path, me: NodeId, store: BlobStore, supplies: Supplies) -> None:
        self._directory = directory
        self._me = me
        self._store = store
        self._supplies = supplies
        self._prepared: OrderedDict[JobId, Prepared] = OrderedDict()
        self._running: dict[int, BatchBackend] = {}
        """Whose attempt it is, by fence."""
        self._preparing: dict[JobId, Preparing] = {}
        self._keeping: dict[int, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def takes(self, spec: JobSpec) -> bool:
        if spec.inputs or spec.outputs or spec.run.stdin is not None or isinstance(spec.array.items, ItemsFiles):
            return False
        try:
            return isinstance(self._supplies.choose(spec), BatchBackend)
        except MeshError:
            return False

    def start(
        self,
        lane: int,
        keys: Sequence[AttemptKey],
        spec: JobSpec,
        leash_s: float | None,
        ended: Callable[[Ends], None],
    ) -> None:
        """One after the other; see `BatchBackend.start`. All of one job."""
        assert self._nursery is not None, "serve() must be running"
        job = keys[0].job
        prepared = self._prepared.get(job)
        if prepared is not None and self._is_there(prepared):
            self._prepared.move_to_end(job)
            prepared.plan.leash.move(leash_s)
            self._begin(prepared, lane, keys, ended)
            return
        preparing = self._preparing.get(job)
        if preparing is None:
            preparing = self._preparing[job] = Preparing(Leash(leash_s))
            self._nursery.start_soon(self._prepare, job, spec, preparing)
        preparing.starts.append((lane, keys, ended))

    def stop(self, key: AttemptKey) -> None:
        """It ends as cancelled, unless it has ended otherwise."""
        if key.fence in self._keeping:
            self._keeping[key.fence].cancel()
        elif key.fence in self._running:
            self._running[key.fence].stop(key.fence)
        else:
            for ended in self._withdraw(key):
                ended([(key, Outcome(EndReason.CANCELLED, message="stopped before it started"))])

    async def recall(self, keys: Sequence[AttemptKey]) -> list[AttemptKey]:
        """Those of them that had not begun, and never will."""
        back = [key for key in keys if self._withdraw(key)]
        by_fence = {key.fence: key for key in keys}
        asked: dict[int, tuple[BatchBackend, list[int]]] = {}
        for fence in by_fence:
            if (backend := self._running.get(fence)) is not None:
                asked.setdefault(id(backend), (backend, []))[1].append(fence)
        for backend, fences in asked.values():
            for fence in await backend.recall(fences):
                self._running.pop(fence, None)
                back.append(by_fence[fence])
        return back

    def move_leash(self, key: AttemptKey, deadline_s: float) -> None:
        if (prepared := self._prepared.get(key.job)) is not None:
            prepared.plan.leash.move(deadline_s)
        if (preparing := self._preparing.get(key.job)) is not None:
            preparing.leash.move(deadline_s)

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        backend = self._running.get(fence)
        return None if backend is None else await backend.read_output(fence, stream, offset, bytes_max)

    # --- before ------------------------------------------------------------------------------------------------------

    def _is_there(self, prepared: Prepared) -> bool:
        """Its module may have been removed meanwhile."""
        return prepared.spec.run.module is None or self._store.has(prepared.spec.run.module.hash)

    async def _prepare(self, job: JobId, spec: JobSpec, preparing: Preparing) -> None:
        refusal: Outcome | None = None
        try:
            prepared = await self._plan(job, spec, preparing.leash)
        except InvalidRequest as error:
            refusal = Outcome(EndReason.INVALID, message=str(error)[:2000])
        except (MeshError, OSError) as error:
            log.warning("job.not_prepared", job=job, error=str(error))
            refusal = Outcome(EndReason.BACKEND, message=str(error)[:2000])
        del self._preparing[job]
        if refusal is None:
            self._prepared[job] = prepared
            self._forget()
        for lane, keys, ended in preparing.starts:
            if refusal is not None:
                ended([(key, refusal) for key in keys])
            elif keys:
                self._begin(prepared, lane, keys, ended)

    async def _plan(self, job: JobId, spec: JobSpec, leash: Leash) -> Prepared:
        run = spec.run
        backend = self._supplies.choose(spec)
        assert isinstance(backend, BatchBackend), "takes() said so"
        lines = (
            await self._supplies.lines(spec.array.items.blob) if isinstance(spec.array.items, ItemsBlob) else Lines()
        )
        module = None
        if run.module is not None:
            await self._supplies.fetch(run.module)
            module = self._store.path(run.module.hash)
        env = {name: value for name, value in run.env if name not in BEGINNING}
        env |= {"MESHD_JOB": job, "MESHD_NODE": self._me}
        plan = Plan(
            job=job,
            args=run.args,
            env=tuple(env.items()),
            spill=self._directory,
            module=module,
            module_hash=run.module.hash if run.module is not None else "",
            limits=limits_of(spec),
            needs=spec.needs.resources,
            leash=leash,
        )
        return Prepared(spec, backend, plan, lines, Strings(run))

    def _forget(self) -> None:
        """The oldest that nothing runs of: a lane keeps its own plan, but its leash moves through here."""
        for job in list(self._prepared)[:-1]:
            size = sum(prepared.lines.size for prepared in self._prepared.values())
            if len(self._prepared) <= JOBS_KEPT and size <= LISTS_BYTES_KEPT:
                return
            if not self._prepared[job].plan.leash.watchers:
                del self._prepared[job]

    def _begin(self, prepared: Prepared, lane: int, keys: Sequence[AttemptKey], ended: Callable[[Ends], None]) -> None:
        assert self._nursery is not None
        attempts: list[Planned] = []
        refused: list[tuple[AttemptKey, Outcome]] = []
        for key in keys:
            try:
                item = item_of(key.task, prepared.spec, prepared.lines)
                prepared.strings.check(item)
                attempts.append(Planned(key, item))
            except InvalidRequest as error:
                refused.append((key, Outcome(EndReason.INVALID, message=str(error)[:2000])))
        if refused:
            self._nursery.start_soon(_tell, ended, refused)
        if attempts:
            for each in attempts:
                self._running[each.key.fence] = prepared.backend
            prepared.backend.start(
                prepared.plan, lane, attempts, lambda finished: self._ended(prepared.spec, finished, ended)
            )

    def _withdraw(self, key: AttemptKey) -> list[Callable[[Ends], None]]:
        """Whom to tell, if it waits for its job to be prepared; then it does not any more."""
        preparing = self._preparing.get(key.job)
        for position, (lane, keys, ended) in enumerate(preparing.starts if preparing is not None else ()):
            if key in keys:
                assert preparing is not None
                preparing.starts[position] = lane, [each for each in keys if each != key], ended
                return [ended]
        return []

    # --- after -------------------------------------------------------------------------------------------------------

    def _ended(self, spec: JobSpec, finished: Sequence[Finished], ended: Callable[[Ends], None]) -> None:
        ends: list[tuple[AttemptKey, Outcome]] = []
        for key, outcome, stdout, stderr in finished:
            if self._running.pop(key.fence, None) is None:
                # Told already, or given back. A backend may be a plug-in, whose mistake must not take the node down.
                log.warning("attempt.ended_again", job=key.job, task=key.task, fence=key.fence)
                continue
            if stdout is None and stderr is None:
                ends.append((key, outcome))
            elif self._nursery is not None:
                self._keeping[key.fence] = trio.CancelScope()
                self._nursery.start_soon(self._keep, spec, Finished(key, outcome, stdout, stderr), ended)
        if ends:
            ended(ends)

    async def _keep(self, spec: JobSpec, finished: Finished, ended: Callable[[Ends], None]) -> None:
        key, outcome, stdout, stderr = finished
        kept = Outcome(EndReason.CANCELLED, message="stopped while its output was kept")
        try:
            with self._keeping[key.fence]:
                kept = await self._supplies.keep(outcome, stdout, stderr, spec)
        except (MeshError, OSError) as error:
            log.warning("attempt.failed", job=key.job, task=key.task, fence=key.fence, error=str(error))
            kept = Outcome(EndReason.BACKEND, message=str(error)[:2000])
        finally:
            del self._keeping[key.fence]
        ended([(key, kept)])


def limits_of(spec: JobSpec) -> Limits:
    return Limits(
        run_s=spec.timeout.run_ms / 1000 if spec.timeout.run_ms else None,
        memory=spec.needs.resources.memory or None,
        fuel=spec.run.fuel,
        cpu_milli=spec.needs.resources.cpu_milli or None,
        output_bytes_max=spec.output_bytes_max,
        inline_bytes_max=min(INLINE_STREAM_BYTES_MAX, spec.inline_bytes_max),
    )


async def _tell(ended: Callable[[Ends], None], ends: Ends) -> None:
    ended(ends)
