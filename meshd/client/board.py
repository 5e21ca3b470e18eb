"""What was submitted to a `MeshExecutor` and has no result yet: shared by the caller's threads and the couriers'.

    waiting ──take──▶ sent: tasks of a job ──settled──▶ resolved
       ▲                   │
       └── handed back ────┘  a group's budget was spent, or its process died of the call before

One lock for all of it; nothing that waits for the mesh happens under it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Set
from concurrent.futures import Future
from typing import Any, TypeVar

from meshd.client.grouping import Pace
from meshd.model import JobId

T = TypeVar("T")

LINGER_S = 0.001
"""Calls that come closer together than this share a job."""
LINGER_S_MAX = 0.02
TAKE_MAX = 100_000
"""Calls taken at a time."""
PACES_MAX = 1000
"""Functions whose length is remembered. A program that makes a new one for each call must not grow by it."""
SWEEP_S = 2.0
"""Every job is looked at so often, whatever was heard of it: news can be lost."""
SWEEP_YOUNG_S = 0.1
"""… until the first news has come: nothing was promised before."""


class Closed(RuntimeError):
    """As `concurrent.futures` has it: RuntimeError."""


class MeshFuture(Future[T]):
    """A `concurrent.futures.Future` whose call can also be cancelled after it has begun."""

    def __init__(self, board: Board, function: bytes, payload: bytes, group: int) -> None:
        super().__init__()
        self.board = board
        self.function = function
        self.payload = payload
        """Its arguments, pickled; nothing once it is over."""
        self.group = group
        """Calls with the same number share a task; 0 is left to how long they take."""
        self.task: SentTask | None = None
        self.is_over = False

    def cancel(self) -> bool:
        """True unless there is a result already. A call with a task of its own is stopped, also while it runs.

        One that shares a task with others is not waited for; whether it is run is open.
        """
        if not super().cancel():
            return False
        self.board.drop(self)
        return True

    def running(self) -> bool:
        """Whether the mesh says that its task runs, as far as was heard. For `concurrent.futures` it is pending until it
        is done: there one that runs can no longer be cancelled.
        """
        task = self.task
        return task is not None and task.number in task.job.running and not self.done()


class SentTask:
    """The calls that one task of a job carries."""

    __slots__ = ("budget_s", "calls", "is_settled", "job", "number", "wanted")

    def __init__(self, calls: list[MeshFuture[Any]], budget_s: float) -> None:
        self.calls = calls
        self.budget_s = budget_s
        self.is_settled = False
        self.wanted = 0
        """How many of its calls somebody waits for, since it was sent."""
        self.job: SentJob
        self.number = 0


class SentJob:
    def __init__(self, job_id: JobId, tasks: list[SentTask]) -> None:
        self.id = job_id
        self.tasks = tasks
        self.made_s = time.monotonic()
        self.is_agreed = False
        self.has_begun = False
        self.running: Set[int] = frozenset()
        """Numbers of its tasks, at the last look."""
        self.low = 0
        """All tasks before this one are settled."""
        self.failing_since_s: float | None = None
        """Its results cannot be had just now."""
        for number, task in enumerate(tasks):
            task.job, task.number = self, number
            for call in task.calls:
                call.task = task

    @property
    def is_settled(self) -> bool:
        while self.low < len(self.tasks) and self.tasks[self.low].is_settled:
            self.low += 1
        return self.low == len(self.tasks)


class Board:
    def __init__(self) -> None:
        # Entered again by a thread that holds it when the collector finds a map there whose calls are to be cancelled.
        self._lock = threading.RLock()
        self._calls_came = threading.Condition(self._lock)
        self._news_came = threading.Condition(self._lock)
        self._waiting: deque[MeshFuture[Any]] = deque()
        self._in_hand: list[MeshFuture[Any]] = []
        """Taken, and perhaps in no job yet."""
        self._jobs: dict[JobId, SentJob] = {}
        self._changed: dict[JobId, SentJob] = {}
        self._unwanted: list[SentTask] = []
        self._paces: dict[bytes, Pace] = {}
        self._sweep_s = SWEEP_YOUNG_S
        self._is_closed = False
        self._broken: BaseException | None = None

    # --- the caller's side -------------------------------------------------------------------------------------------

    def add(self, calls: Iterable[MeshFuture[Any]]) -> None:
        """Raises RuntimeError once it is closed or broken."""
        with self._lock:
            if (broken := self._broken) is not None:
                raise Closed(f"this executor is broken: {type(broken).__name__}: {broken}") from broken
            if self._is_closed:
                raise Closed("cannot schedule new futures after shutdown")
            was_empty = not self._waiting
            self._waiting.extend(calls)
            if was_empty:
                self._calls_came.notify()

    def drop(self, call: MeshFuture[Any]) -> None:
        """It was cancelled: nobody waits for it any more."""
        with self._lock:
            if call.is_over:
                return
            self._end(call)
            if (task := call.task) is not None and task.wanted:
                task.wanted -= 1
                if not task.wanted:
                    self._unwanted.append(task)
                    self._news_came.notify_all()
        call.set_running_or_notify_cancel()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._wake_if_over()

    def unresolved(self) -> list[MeshFuture[Any]]:
        with self._lock:
            sent = [call for job in self._jobs.values() for task in job.tasks for call in task.calls]
            return [call for call in [*self._waiting, *self._in_hand, *sent] if not call.is_over]

    # --- the couriers' side ------------------------------------------------------------------------------------------

    def take(self) -> list[MeshFuture[Any]]:
        """What waits, with all that comes close behind it; nothing when all is over."""
        taken: list[MeshFuture[Any]] = []
        while not taken:
            with self._lock:
                self._in_hand = []
                self._wake_if_over()
                while not self._waiting:
                    if self._is_over():
                        return []
                    self._calls_came.wait()
            ends_s, seen = time.monotonic() + LINGER_S_MAX, 0
            while seen < (seen := len(self._waiting)) < TAKE_MAX and time.monotonic() < ends_s:
                time.sleep(LINGER_S)
            with self._lock:
                found = [self._waiting.popleft() for _ in range(min(len(self._waiting), TAKE_MAX))]
                self._in_hand = taken = [call for call in found if not call.is_over]
        return taken

    def pace(self, function: bytes) -> Pace:
        with self._lock:
            found = self._paces.pop(function, None) or Pace()
            self._paces[function] = found  # at the end: the first is the one not asked for the longest
            if len(self._paces) > PACES_MAX:
                del self._paces[next(iter(self._paces))]
            return found

    def sending(self, job: SentJob) -> None:
        """Before it is submitted: its end may be heard of sooner than the answer."""
        with self._lock:
            self._jobs[job.id] = job
            for task in job.tasks:
                task.wanted = sum(not call.is_over for call in task.calls)
                if not task.wanted:
                    self._unwanted.append(task)

    def agreed(self, job: SentJob) -> None:
        with self._lock:
            job.is_agreed = True
            self._note(job)

    def changed(self, job_id: JobId | None) -> None:
        """News of a job, perhaps one of ours."""
        with self._lock:
            self._sweep_s = SWEEP_S
            if job_id is not None and (job := self._jobs.get(job_id)) is not None:
                self._note(job)

    def wait_news(self) -> tuple[list[SentJob], list[SentTask]] | None:
        """Jobs to look at, and tasks that nobody wants any more; None when all is over."""
        with self._lock:
            while not (self._changed or any(task.job.is_agreed for task in self._unwanted)):
                if self._is_over():
                    return None
                if not self._news_came.wait(self._sweep_s if self._jobs else None):
                    self._changed = {job.id: job for job in self._jobs.values() if job.is_agreed}
            changed = [job for job in self._changed.values() if job.is_agreed]
            self._changed = {}
            unwanted, self._unwanted = self._unwanted, []
            self._unwanted.extend(task for task in unwanted if not (task.job.is_agreed or task.is_settled))
            return changed, [task for task in unwanted if task.job.is_agreed]

    def settled(self, task: SentTask, handed_back: list[MeshFuture[Any]]) -> None:
        """The task is done with; these of its calls are to be sent again, before all others."""
        with self._lock:
            task.is_settled = True
            back = [call for call in handed_back if not call.is_over]
            for call in back:
                call.task = None
            task.calls = []
            if back:
                self._waiting.extendleft(reversed(back))
                self._calls_came.notify()
            if task.job.is_settled:
                self._jobs.pop(task.job.id, None)
                self._wake_if_over()

    def resolve(self, call: MeshFuture[Any], result: Any, error: BaseException | None) -> None:
        with self._lock:
            if call.is_over:
                return
            self._end(call)
            if call.task is not None and call.task.wanted:
                call.task.wanted -= 1
        if not call.set_running_or_notify_cancel():
            return
        if error is not None:
            call.set_exception(error)
        else:
            call.set_result(result)

    def break_down(self, error: BaseException) -> None:
        """A courier met what it was not made for: nobody may wait for ever."""
        with self._lock:
            self._broken = error
            self._is_closed = True
        for call in self.unresolved():
            self.resolve(call, None, error)
        with self._lock:
            self._waiting.clear()
            self._in_hand = []
            self._jobs.clear()
            self._changed.clear()
            self._unwanted.clear()
            self._wake_if_over()

    def _end(self, call: MeshFuture[Any]) -> None:
        call.is_over = True
        call.payload = b""

    def _note(self, job: SentJob) -> None:
        if not self._changed:
            self._news_came.notify_all()
        self._changed[job.id] = job

    def _is_over(self) -> bool:
        return self._is_closed and (self._broken is not None or not (self._waiting or self._in_hand or self._jobs))

    def _wake_if_over(self) -> None:
        if self._is_over():
            self._calls_came.notify_all()
            self._news_came.notify_all()
