"""A runner: one process that runs WASI guests, one at a time, until its agent goes away.

    main thread     read tasks → load module → run the guest → answer, and the next
    watch thread    the socket for orders, the clock, the leash, the size of the output

    to stop a guest:  raise the engine's epoch         a guest that computes traps at once
                      └─ after GRACE_S answer and exit  it is inside a host call: sleep(30) cannot be interrupted

Tasks wait in the socket, many at a time, so that the runner never waits for the agent; each is
answered as it ends, so that the agent knows which one was running when a runner dies, and that
those behind it were not. It is the runner, not the agent, that keeps the deadlines: a stopped
agent keeps nothing alive. When a socket closes, everything ends. The messages: wasm_messages.py.
Imports wasmtime and msgpack only: starting takes 0.1 s, nearly all of it wasmtime.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import wasmtime
from wasmtime import _ffi as ffi

from meshd.backends.output import CHECK_S, Capture, Output
from meshd.backends.wasm_guest import Guests
from meshd.backends.wasm_messages import (
    BACK,
    ENDED,
    ORDER_BYTES_MAX,
    OUTPUT,
    PLAN,
    Ended,
    Files,
    Plan,
    Task,
)
from meshd.backends.wasm_modules import Modules, Refused
from meshd.backends.wasm_verdict import judge

GRACE_S = 0.25
"""From the interruption to the end of the process. Computing guests need under a millisecond."""

COMPILE_S_MAX = 120.0
"""Large modules take seconds; what takes longer is an attack or a machine in trouble."""

MESSAGE_CHARS_MAX = 1500
"""An outcome's message has 2048."""

OOM_SCORE_ADJUST = "500"
"""When the machine runs out of memory the kernel should take a guest, not the agent."""

_length = struct.Struct("<I")


class Stop(NamedTuple):
    reason: str
    message: str
    force_at: float


class Attempt:
    """What both threads know of the running guest; guarded by `Runner._lock`."""

    __slots__ = ("deadline_s", "engine", "is_cancelled", "output", "plan", "started_s", "stop", "task")

    def __init__(self, task: Task, plan: Plan, output: Output, now: float) -> None:
        self.task = task
        self.plan = plan
        self.output = output
        self.deadline_s = now + COMPILE_S_MAX
        self.engine: wasmtime.Engine | None = None
        self.started_s = now
        self.stop: Stop | None = None
        self.is_cancelled = False

    def begin(self, engine: wasmtime.Engine, now: float) -> None:
        """The module is ready: from here on it is the job's time."""
        self.engine = engine
        self.started_s = now
        self.deadline_s = float("inf") if self.plan.run_s is None else now + self.plan.run_s

    def run_ms(self, now: float) -> int:
        return int((now - self.started_s) * 1000) if self.engine is not None else 0


class Runner:
    def __init__(self, tasks: socket.socket, orders: socket.socket, modules: Modules, scratch: str) -> None:
        self._tasks = tasks
        self._orders = orders
        self._modules = modules
        self._scratch = scratch
        self._capture: Capture | None = None
        self._plan: Plan | None = None
        self._guests: Guests | None = None
        self._output: Output | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        # Guarded by it:
        self._watch_at_s = float("-inf")
        """When the watch thread looks again by itself."""
        self._attempt: Attempt | None = None
        self._last_id = 0
        """Of the task that began last: those with larger ones have not begun."""
        self._dropped: set[int] = set()
        self._leash: tuple[int, float | None] = (0, None)
        """Of which plan, and until when. Orders come on another socket: perhaps before their plan."""

    def serve(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        reader = self._tasks.makefile("rb")
        while True:
            head = reader.read(_length.size)
            if len(head) < _length.size:
                return
            (size,) = _length.unpack(head)
            kind, *rest = msgpack.unpackb(reader.read(size), use_list=False)
            if kind == PLAN:
                files = rest[5]
                self._begin_plan(Plan(*rest)._replace(files=None if files is None else Files(*files)))
                continue
            for fields in rest[0]:
                if (ended := self._run(Task(*fields))) is not None:
                    self._answer(ended)

    # --- main thread -------------------------------------------------------------------------------------------------

    def _begin_plan(self, plan: Plan) -> None:
        self._plan = plan
        self._guests = self._output = None
        with self._lock:
            if self._leash[0] < plan.id:
                self._leash = (plan.id, plan.leash_s)

    def _run(self, task: Task) -> Ended | None:
        plan = self._plan
        assert plan is not None, "a plan comes before its tasks"
        try:
            attempt = Attempt(task, plan, self._output or self._open_output(plan), time.monotonic())
            if not self._take(attempt):
                return None
            if self._guests is None:
                self._guests = self._load(plan)
            return self._run_guest(attempt, self._guests)
        except Refused as error:
            return self._end(task, plan, "invalid", None, str(error))
        except OSError as error:
            return self._end(task, plan, "backend", None, f"the runner cannot prepare the attempt: {error}")

    def _open_output(self, plan: Plan) -> Output:
        if plan.files is not None:
            self._output = Output(plan.files.stdout, plan.files.stderr, plan.output_bytes_max)
        else:
            if self._capture is None:
                os.makedirs(self._scratch, mode=0o700, exist_ok=True)
                self._capture = Capture(plan.spill)
            self._output = Output(self._capture.stdout, self._capture.stderr, plan.output_bytes_max)
        return self._output

    def _load(self, plan: Plan) -> Guests:
        linked = self._modules.get(plan.module, plan.module_hash, with_fuel=plan.fuel is not None)
        if plan.files is not None:
            workdir, stdin, stdout, stderr = plan.files
        else:
            workdir, stdin = self._scratch, None
            stdout, stderr = self._capture_paths()
        return Guests(linked, plan, workdir=workdir, stdin=stdin, stdout=stdout, stderr=stderr)

    def _run_guest(self, attempt: Attempt, guests: Guests) -> Ended:
        plan, task = attempt.plan, attempt.task

        def begin(context: Any) -> bool:
            if plan.files is None and self._capture is not None:
                self._capture.settle()
            with self._lock:
                # Relative to the epoch now: one rise interrupts this guest, and no earlier one does.
                ffi.wasmtime_context_set_epoch_deadline(context, 1)
                now = time.monotonic()
                attempt.begin(guests.engine, now)
                if attempt.stop is None and self._is_leash_over():
                    attempt.stop = _lost(now)
                self._arm(attempt)
                return attempt.stop is None

        if plan.file_bytes_max is not None:
            _limit_files(plan.file_bytes_max)
        try:
            ended = guests.run(task, begin)
        finally:
            if plan.file_bytes_max is not None:
                _limit_files(None)
        if ended is None:
            return self._end(task, plan, "backend", None, "stopped before it began")
        failure, code, memory = ended
        return self._end(task, plan, *judge(plan, failure, code, memory))

    def _take(self, attempt: Attempt) -> bool:
        """False when it was given back or cancelled before."""
        with self._lock:
            self._last_id = attempt.task.id
            if self._dropped:
                was_dropped = attempt.task.id in self._dropped
                self._dropped = {each for each in self._dropped if each > attempt.task.id}
                if was_dropped:
                    return False
            self._attempt = attempt
            self._arm(attempt)
            return True

    def _arm(self, attempt: Attempt) -> None:
        """See that the watch thread looks in time."""
        if self._due_s(attempt) < self._watch_at_s:
            self._watch_at_s = float("-inf")
            os.eventfd_write(self._wake, 1)

    def _end(self, task: Task, plan: Plan, reason: str, code: int | None, message: str) -> Ended:
        with self._lock:
            attempt, self._attempt = self._attempt, None
            self._last_id = task.id
            run_ms = 0
            if attempt is not None:
                if attempt.stop is not None and reason != "exit":
                    reason, code, message = attempt.stop.reason, None, attempt.stop.message
                run_ms = attempt.run_ms(time.monotonic())
        # Also of a guest that was quicker than the watch: past the limit is past the limit.
        if self._output is not None and (flooded := self._output.flooded()) is not None:
            self._output.cut()
            if reason not in ("timeout", "lost", "cancelled"):
                reason, code, message = "output_limit", None, flooded
        stdout: bytes | None = None
        stderr: bytes | None = None
        if plan.files is None:
            try:
                stdout, stderr = self._tidy(task, plan)
            except OSError as error:
                reason, code, message = "backend", None, f"its output cannot be kept: {error}"
                stdout = stderr = b""
        return Ended(task.id, reason, code, message[:MESSAGE_CHARS_MAX], run_ms, stdout, stderr)

    def _tidy(self, task: Task, plan: Plan) -> tuple[bytes | None, bytes | None]:
        """What it wrote; and nothing of it is left for the next."""
        if os.listdir(self._scratch):
            _empty(self._scratch)
        assert self._capture is not None
        taken = self._capture.take(f"{task.fence:x}", plan.inline_bytes_max)
        if self._capture.renew():
            self._output = None  # it names the files
            if self._guests is not None:
                self._guests.write_to(*self._capture_paths())
        return taken

    def _capture_paths(self) -> tuple[str, str]:
        assert self._capture is not None, "it is opened with its plan's output"
        return f"/proc/self/fd/{self._capture.stdout}", f"/proc/self/fd/{self._capture.stderr}"

    def _answer(self, ended: Ended) -> None:
        payload = msgpack.packb((ENDED, *ended))
        self._tasks.sendall(_length.pack(len(payload)) + payload)

    # --- watch thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._orders, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll(self._wait_ms()):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                order = self._orders.recv(ORDER_BYTES_MAX)
                if not order:
                    os._exit(0)  # the agent is gone; a guest may be computing in the main thread
                with self._lock:
                    self._obey(msgpack.unpackb(order, use_list=False))
            self._enforce()

    def _wait_ms(self) -> float | None:
        with self._lock:
            if self._attempt is None:
                self._watch_at_s = float("inf")
                return None
            self._watch_at_s = self._due_s(self._attempt)
            return max(0.0, self._watch_at_s - time.monotonic()) * 1000 + 1

    def _due_s(self, attempt: Attempt) -> float:
        if attempt.stop is not None:
            return attempt.stop.force_at
        now = time.monotonic()
        due_s = min(now + CHECK_S, attempt.deadline_s)
        if (leash_s := self._leash[1]) is not None:
            due_s = min(due_s, now + leash_s - time.clock_gettime(time.CLOCK_BOOTTIME))
        return due_s

    def _obey(self, order: tuple[Any, ...]) -> None:
        match order:
            case ("leash", plan_id, deadline_s) if plan_id >= self._leash[0]:
                self._leash = (plan_id, deadline_s)
            case ("cancel", task_id):
                if self._attempt is not None and self._attempt.task.id == task_id:
                    self._attempt.is_cancelled = True
                elif task_id > self._last_id and task_id not in self._dropped:
                    never = Ended(task_id, "cancelled", None, "stopped before it started", 0, b"", b"")
                    if self._reply(ENDED, *never):
                        self._dropped.add(task_id)
            case ("back", call, first, last):
                back = [each for each in range(max(first, self._last_id + 1), last + 1) if each not in self._dropped]
                if self._reply(BACK, call, back):
                    self._dropped.update(back)
            case ("output", call, task_id, stream, offset, bytes_max):
                self._reply(OUTPUT, call, self._read_output(task_id, stream, offset, bytes_max))

    def _read_output(self, task_id: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        attempt = self._attempt
        if attempt is None or attempt.task.id != task_id or attempt.plan.files is not None or self._capture is None:
            return None
        return os.pread(self._capture.stdout if stream == "stdout" else self._capture.stderr, bytes_max, offset)

    def _reply(self, *message: object) -> bool:
        """Never waits: an agent that is stopped must not keep this thread from its clock. The agent asks again."""
        try:
            self._orders.send(msgpack.packb(message), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def _enforce(self) -> None:
        with self._lock:
            attempt = self._attempt
            if attempt is None:
                return
            now = time.monotonic()
            if attempt.stop is None:
                attempt.stop = self._reason_to_stop(attempt, now)
                if attempt.stop is not None and attempt.engine is not None:
                    attempt.engine.increment_epoch()
            elif now >= attempt.stop.force_at:
                self._exit_with(attempt, attempt.stop, now)

    def _exit_with(self, attempt: Attempt, stop: Stop, now: float) -> None:
        """With the lock held, so that the main thread cannot answer as well."""
        attempt.output.cut()
        stdout: bytes | None = None
        stderr: bytes | None = None
        if attempt.plan.files is None and self._capture is not None:
            stdout, stderr = self._capture.take(f"{attempt.task.fence:x}", attempt.plan.inline_bytes_max)
        run_ms = attempt.run_ms(now)
        self._reply(ENDED, *Ended(attempt.task.id, stop.reason, None, stop.message, run_ms, stdout, stderr, True))
        os._exit(0)

    def _is_leash_over(self) -> bool:
        leash_s = self._leash[1]
        return leash_s is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= leash_s

    def _reason_to_stop(self, attempt: Attempt, now: float) -> Stop | None:
        plan = attempt.plan
        force_at = now + GRACE_S
        if attempt.is_cancelled:
            return Stop("cancelled", "cancelled", force_at)
        if self._is_leash_over():
            return _lost(now)
        if now >= attempt.deadline_s:
            if attempt.engine is None:
                return Stop("timeout", f"compiling the module took over {COMPILE_S_MAX:.0f} s", force_at)
            return Stop("timeout", f"still running after {plan.run_s:g} s, its limit", force_at)
        if (flooded := attempt.output.flooded()) is not None:
            return Stop("output_limit", flooded, force_at)
        return None


def _lost(now: float) -> Stop:
    return Stop("lost", "stopped by its own node, which was cut off from the mesh for too long", now + GRACE_S)


def _empty(directory: str) -> None:
    """Guests of WASI can take no rights away, so nothing here can resist."""
    for path, directories, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(os.path.join(path, name))
        for name in directories:
            each = os.path.join(path, name)
            os.unlink(each) if os.path.islink(each) else os.rmdir(each)


def _limit_files(bytes_max: int | None) -> None:
    # The soft limit only, so that it can be lifted again. Python ignores SIGXFSZ: the guest sees EFBIG.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = hard if bytes_max is None or (hard != resource.RLIM_INFINITY and bytes_max > hard) else bytes_max
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main() -> None:
    tasks, orders = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    cache, version, scratch = sys.argv[3:6]
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Never RLIMIT_AS: each live store reserves over 4 GiB of addresses and uses 10 KiB.
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is only a preference
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJUST)
    Runner(tasks, orders, Modules(Path(cache), wasmtime_version=version), scratch).serve()


if __name__ == "__main__":
    main()
