"""The three threads of a `MeshExecutor`, each with a connection of its own: they carry calls there and results back.

Courier    calls that came close together → one array job, its calls in one blob
Watcher    the mesh's events → which jobs have changed
Gatherer   changed jobs → their ended tasks, a page at a time → futures
"""

from __future__ import annotations

import base64
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshd.client import calls, pickles
from meshd.client.board import Board, MeshFuture, SentJob, SentTask
from meshd.client.client import Client, cannot_run
from meshd.client.files import INLINE_BYTES, upload_references
from meshd.client.grouping import BUDGET_S, group_size
from meshd.errors import InvalidRequest, JobFailed, MeshError, NotAllowed, NotFound, Unavailable
from meshd.model import FINAL_STATES, BlobRef, EndReason, Inline, TaskState
from meshd.spec import parse_job, write_blob
from meshd.views import TaskView

_log = logging.getLogger("meshd.client")

RUNNER = ("-m", "meshd.client.function_runner")
PACK_BYTES_MAX = 8 << 20
"""Calls of one job, pickled: each of its tasks reads a copy of the pack."""
TASKS_MAX = 1000
"""Of one job: one page of the API tells how they ended."""
RESULTS_MAX = "1Gi"
"""What the results of one task may take; they are read as a whole."""
GIVE_UP_S = 120.0
"""A mesh that takes no jobs, or has no results, for so long: then the futures say so."""
PAUSE_S = 0.25
UNPLACED_S = 3.0
"""A job of which nothing runs for so long is asked about, and so often."""
CORES_AGAIN_S = 10.0
"""How long the mesh's size is believed."""
STDERR_CHARS = 1000

_ALSO = frozenset({"name", "inputs", "needs", "retry", "timeout", "on_lost", "lost_after", "priority", "replicas", "labels", "run"})  # fmt: skip
_TOLD = (TaskState.RUNNING, *sorted(FINAL_STATES))
_OWN_DOING = frozenset(
    {EndReason.EXIT, EndReason.SIGNAL, EndReason.TIMEOUT, EndReason.MEMORY_LIMIT, EndReason.OUTPUT_LIMIT}
)


def check_job(job: Mapping[str, Any]) -> int:
    """Thousandths of a core that a task with these settings needs. Raises InvalidRequest."""
    run = job.get("run", {})
    for name in [key for key in job if key not in _ALSO] or [f"run.{key}" for key in run if key != "env"]:
        raise InvalidRequest(f"job: {name} cannot be chosen for functions", hint=f"there are: {', '.join(sorted(_ALSO))}; of run only env")  # fmt: skip
    # Files among its inputs are uploaded by the first job.
    return parse_job({**job, "inputs": {}, "run": {**run, "args": ["python"]}}).needs.resources.cpu_milli


class _Thread(threading.Thread):
    def __init__(self, board: Board, client: Client) -> None:
        # A daemon: a program that ends without `shutdown` does not wait for its calls.
        super().__init__(name=f"mesh-executor-{type(self).__name__.lower()}", daemon=True)
        self.client = client
        self._board = board

    def run(self) -> None:
        try:
            self.serve()
        except BaseException as error:  # nobody may wait for ever for a thread that is gone
            self._board.break_down(error)
            if not isinstance(error, MeshError):
                raise
        finally:
            self.client.close()

    def serve(self) -> None:
        raise NotImplementedError


class Courier(_Thread):
    def __init__(self, board: Board, client: Client, job: Mapping[str, Any], python: str) -> None:
        super().__init__(board, client)
        self._cpu_milli = check_job(job)
        self._job: Mapping[str, Any] = job
        self._is_uploaded = False
        self._python = python or sys.executable
        self._cores = 1
        self._cores_until_s = 0.0

    def serve(self) -> None:
        while taken := self._board.take():
            for tasks in _jobs_of(self._tasks(taken)):
                self._send(SentJob(self.client.new_id(), tasks))

    def _tasks(self, taken: list[MeshFuture[Any]]) -> Iterator[SentTask]:
        groups: dict[tuple[bytes, int], list[MeshFuture[Any]]] = {}
        for call in taken:
            groups.setdefault((call.function, call.group), []).append(call)
        for (function, group), members in groups.items():
            if group:
                yield SentTask(members, 0)
                continue
            size = group_size(len(members), self._board.pace(function).call_s, self._count_cores())
            for start in range(0, len(members), size):
                yield SentTask(members[start : start + size], BUDGET_S if size > 1 else 0)

    def _send(self, job: SentJob) -> None:
        self._board.sending(job)
        try:
            self._persist(job)
        except MeshError as error:
            for task in job.tasks:
                _fail_all(self._board, task, error)
                self._board.settled(task, [])
        else:
            self._board.agreed(job)

    def _persist(self, job: SentJob) -> None:
        gives_up_s = time.monotonic() + GIVE_UP_S
        while True:
            try:
                # The same id each time: the job is there once, whatever became of an answer.
                self.client.submit(self._document(job), job_id=job.id)
                return
            except Unavailable:
                if time.monotonic() > gives_up_s:
                    raise
                time.sleep(PAUSE_S)

    def _document(self, job: SentJob) -> dict[str, Any]:
        if not self._is_uploaded:
            self._job = upload_references(self._job, Path(), self.client)
            self._is_uploaded = True
        parts = [
            calls.Part(task.calls[0].function, [call.payload for call in task.calls], task.budget_s)
            for task in job.tasks
        ]
        pack = calls.pack(parts)
        if len(pack) <= INLINE_BYTES:
            stdin: object = {"base64": base64.b64encode(pack).decode()}
        else:
            stdin = write_blob(self.client.put_bytes(pack, replicas=self._job.get("replicas", 2)))
        document: dict[str, Any] = {"name": "functions", "output_max": RESULTS_MAX, **self._job, "backend": ["process"]}
        document["run"] = {**document.get("run", {}), "args": [self._python, *RUNNER], "stdin": stdin}
        if len(job.tasks) > 1:
            document["array"] = {"range": len(job.tasks)}
        return document

    def _count_cores(self) -> int:
        """How many of its tasks can run at a time, as far as offers say."""
        if time.monotonic() >= self._cores_until_s:
            try:
                offers = [row.offer for row in self.client.nodes().members if row.session == "live" and row.offer]
            except MeshError:
                return self._cores  # the submission that follows says so, or waits
            free = sum(offer.resources.cpu_milli // max(self._cpu_milli, 1) for offer in offers)
            self._cores = max(min(free, TASKS_MAX), 1)
            self._cores_until_s = time.monotonic() + CORES_AGAIN_S
        return self._cores


class Watcher(_Thread):
    """Without it the gatherer looks at every job now and then, so it may come and go."""

    def serve(self) -> None:
        while not self.client.is_closed:
            try:
                for event in self.client.events():
                    self._board.changed(event.job)
            except Unavailable:
                time.sleep(PAUSE_S)


class Gatherer(_Thread):
    def __init__(self, board: Board, client: Client, watcher: Watcher) -> None:
        super().__init__(board, client)
        self._watcher = watcher
        self._ask_at_s = 0.0

    def serve(self) -> None:
        try:
            while (news := self._board.wait_news()) is not None:
                changed, unwanted = news
                self._cancel(unwanted)
                for job in changed:
                    self.look(job)
        finally:
            self._watcher.client.close()

    def _cancel(self, unwanted: list[SentTask]) -> None:
        by_job: dict[SentJob, list[int]] = {}
        for task in unwanted:
            by_job.setdefault(task.job, []).append(task.number)
        for job, numbers in by_job.items():
            try:
                self.client.cancel(job.id, _ranges(sorted(numbers)))
            except (Unavailable, NotFound):
                continue  # it runs for nothing; nobody waits for it

    def look(self, job: SentJob) -> None:
        """Which of its tasks run, and how others have ended."""
        running: set[int] = set()
        try:
            for view in self.client.tasks(job.id, states=_TOLD, start=job.low):
                job.has_begun = True
                task = job.tasks[view.task]
                if view.state is TaskState.RUNNING:
                    running.add(view.task)
                elif not task.is_settled:
                    self._settle(task, view)
            job.running = running
            self._warn_unplaced(job)
            job.failing_since_s = None
        except NotAllowed:
            raise  # nor may it look at any other
        except MeshError as error:  # of this job, or for now: the others go on
            now_s = time.monotonic()
            job.failing_since_s = job.failing_since_s or now_s
            if now_s - job.failing_since_s > GIVE_UP_S:
                for task in job.tasks:
                    if not task.is_settled:
                        _fail_all(self._board, task, error)
                        self._board.settled(task, [])

    def _warn_unplaced(self, job: SentJob) -> None:
        """Once, as all jobs of an executor need the same. Its futures wait on: a node that fits may join."""
        now_s = time.monotonic()
        if job.has_begun or now_s < max(job.made_s + UNPLACED_S, self._ask_at_s):
            return
        self._ask_at_s = now_s + UNPLACED_S
        found = self.client.explain(job.id)
        if found.state is TaskState.READY and not found.can_ever_run:
            self._ask_at_s = float("inf")
            error = cannot_run(found)
            _log.warning("%s\n%s", error.message, error.hint)

    def _settle(self, task: SentTask, view: TaskView) -> None:
        """Raises MeshError when its results cannot be had now."""
        outcome = view.outcome
        records, seconds = calls.read_records(self._content(outcome.stdout if outcome is not None else None))
        has_begun = bool(records) and records.pop(0)[0] == calls.BEGIN
        for call, (kind, payload) in zip(task.calls, records, strict=False):
            self._resolve(call, kind, payload)
        rest = task.calls[len(records) :]
        handed_back: list[MeshFuture[Any]] = []
        if seconds is not None:
            self._board.pace(task.calls[0].function).learn(len(records), seconds)
            handed_back = rest
        elif view.state is TaskState.CANCELLED:
            for call in rest:
                call.cancel()
        elif has_begun and outcome is not None and outcome.reason in _OWN_DOING:
            # The one that took the process down with it, and those after it, which are not to blame.
            for call in rest[:1]:
                self._board.resolve(call, None, self._failure(view))
            handed_back = rest[1:]
        else:
            error = self._failure(view)
            for call in rest:
                self._board.resolve(call, None, error)
        self._board.settled(task, handed_back)

    def _resolve(self, call: MeshFuture[Any], kind: bytes, payload: bytes) -> None:
        try:
            if kind == calls.RESULT:
                self._board.resolve(call, pickles.load_result(payload), None)
            else:
                self._board.resolve(call, None, pickles.load_error(payload))
        except Exception as error:  # whatever unpickling runs into: it is the answer to this call alone
            self._board.resolve(call, None, error)

    def _failure(self, view: TaskView) -> JobFailed:
        outcome = view.outcome
        said = view.reason or view.state.value
        if outcome is not None:
            said = outcome.message or (f"exit code {outcome.exit_code}" if outcome.exit_code else said)
            if stderr := self._content(outcome.stderr).decode(errors="replace").strip():
                said = f"{said}; it wrote: {stderr[-STDERR_CHARS:]}"
        return JobFailed(
            f"the process of this call ended without its result: {said}", hint=f"mesh job logs {view.job}:{view.task}"
        )

    def _content(self, content: BlobRef | Inline | None) -> bytes:
        match content:
            case None:
                return b""
            case Inline(data):
                return data
            case BlobRef(hash=blob):
                file = io.BytesIO()
                self.client.get_blob(blob, file)
                return file.getvalue()


def _jobs_of(tasks: Iterator[SentTask]) -> Iterator[list[SentTask]]:
    """Split so that no job's pack is too large."""
    job: list[SentTask] = []
    size = 0
    for task in tasks:
        taken = sum(len(call.payload) for call in task.calls) + len(task.calls[0].function)
        if job and (size + taken > PACK_BYTES_MAX or len(job) == TASKS_MAX):
            yield job
            job, size = [], 0
        job.append(task)
        size += taken
    if job:
        yield job


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of these."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _fail_all(board: Board, task: SentTask, error: BaseException) -> None:
    for call in task.calls:
        board.resolve(call, None, error)
