"""A runner: one process that runs WASI guests, one at a time, until its agent goes away.

    main thread     read tasks → load module → run the guest → answer
    watch thread    the socket for orders, the clock, the leash, the size of the output

    to stop a guest:  raise the engine's epoch         a guest that computes traps at once
                      └─ after GRACE_S answer and exit  it is inside a host call: sleep(30) cannot be interrupted

It is the runner, not the agent, that keeps the deadlines: a stopped agent keeps
nothing alive. When a socket closes, everything ends. The messages: wasm_messages.py.
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

from meshd.backends.output import CHECK_S, Output
from meshd.backends.wasm_messages import ORDER_BYTES_MAX, Ended, Task
from meshd.backends.wasm_modules import Exited, Modules, Refused
from meshd.backends.wasm_verdict import judge

GRACE_S = 0.25
"""From the interruption to the end of the process. Computing guests need under a millisecond."""

COMPILE_S_MAX = 120.0
"""Large modules take seconds; what takes longer is an attack or a machine in trouble."""

MEMORY_BYTES_MAX = 4 << 30
"""When the job names no limit: all that wasm32 can address."""

TABLE_ELEMENTS_MAX = 1_000_000
"""8 bytes each, outside the memory limit."""

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
    """What both threads know of the running guest; guarded by `Runner.lock`."""

    def __init__(self, task: Task, now: float) -> None:
        self.task = task
        self.output = Output(task.stdout, task.stderr, task.output_bytes_max)
        self.leash_s = task.leash_s
        self.deadline_s = now + COMPILE_S_MAX
        self.engine: wasmtime.Engine | None = None
        self.started_s = now
        self.stop: Stop | None = None
        self.is_cancelled = False

    def begin(self, engine: wasmtime.Engine, now: float) -> None:
        """The module is ready: from here on it is the job's time."""
        self.engine = engine
        self.started_s = now
        self.deadline_s = float("inf") if self.task.run_s is None else now + self.task.run_s

    def run_ms(self, now: float) -> int:
        return int((now - self.started_s) * 1000) if self.engine is not None else 0


class Runner:
    def __init__(self, tasks: socket.socket, orders: socket.socket, modules: Modules) -> None:
        self._tasks = tasks
        self._orders = orders
        self._modules = modules
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_watcher_asleep = True
        self._attempt: Attempt | None = None
        self._early: dict[int, list[tuple[Any, ...]]] = {}
        """Orders about tasks that the main thread has not read yet: they come on another socket."""
        self._lock = threading.Lock()

    def serve(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        reader = self._tasks.makefile("rb")
        while True:
            head = reader.read(_length.size)
            if len(head) < _length.size:
                return
            (size,) = _length.unpack(head)
            ended = []
            for fields in msgpack.unpackb(reader.read(size), use_list=False):
                ended.append(self._run(Task(*fields)))
            self._answer(ended)

    # --- main thread -------------------------------------------------------------------------------------------------

    def _run(self, task: Task) -> Ended:
        attempt = Attempt(task, time.monotonic())
        self._take(attempt)
        try:
            linked = self._modules.get(task.module, task.module_hash, with_fuel=task.fuel is not None)
            return self._run_guest(attempt, linked.engine, linked.instance_pre)
        except Refused as error:
            return self._end(attempt, "invalid", None, str(error))
        except OSError as error:
            return self._end(attempt, "backend", None, f"the runner cannot prepare the attempt: {error}")

    def _run_guest(self, attempt: Attempt, engine: wasmtime.Engine, pre: wasmtime.InstancePre) -> Ended:
        task = attempt.task
        with wasmtime.Store(engine) as store:
            store.set_wasi(_wasi(task))
            store.set_limits(
                memory_size=MEMORY_BYTES_MAX if task.memory is None else task.memory,
                table_elements=TABLE_ELEMENTS_MAX,
            )
            if task.fuel is not None:
                store.set_fuel(task.fuel)
            with self._lock:
                # Relative to the epoch now: one rise interrupts this guest, and no earlier one does.
                store.set_epoch_deadline(1)
                attempt.begin(engine, time.monotonic())
                is_stopped = attempt.stop is not None
            if is_stopped:
                return self._end(attempt, "backend", None, "stopped before it began")
            if task.file_bytes_max is not None:
                _limit_files(task.file_bytes_max)
            instance = None
            trap: wasmtime.Trap | wasmtime.WasmtimeError | None = None
            code = 0
            try:
                instance = pre.instantiate(store)
                instance.exports(store)["_start"](store)  # type: ignore[operator]
            except Exited as exited:
                code = exited.code
            except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
                trap = error
            finally:
                if task.file_bytes_max is not None:
                    _limit_files(None)
            # Looked up only when it may matter: it is a tenth of what an empty guest costs.
            memory = _memory_bytes(store, instance) if trap is not None or code else 0
            return self._end(attempt, *judge(task, trap, code, memory))

    def _take(self, attempt: Attempt) -> None:
        with self._lock:
            for order in self._early.get(attempt.task.id, ()):
                _obey(attempt, order)
            self._early = {of: orders for of, orders in self._early.items() if of > attempt.task.id}
            self._attempt = attempt
            must_wake = self._is_watcher_asleep
        if must_wake:
            os.eventfd_write(self._wake, 1)

    def _end(self, attempt: Attempt, reason: str, code: int | None, message: str) -> Ended:
        with self._lock:
            self._attempt = None
            if attempt.stop is not None and reason != "exit":
                reason, code, message = attempt.stop.reason, None, attempt.stop.message
            run_ms = attempt.run_ms(time.monotonic())
        # Also of a guest that was quicker than the watch: past the limit is past the limit.
        if (flooded := attempt.output.flooded()) is not None:
            attempt.output.cut()
            if reason not in ("timeout", "lost", "cancelled"):
                reason, code, message = "output_limit", None, flooded
        return Ended(attempt.task.id, reason, code, message[:MESSAGE_CHARS_MAX], run_ms)

    def _answer(self, ended: list[Ended]) -> None:
        payload = msgpack.packb(ended)
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
                self._receive(msgpack.unpackb(order, use_list=False))
            self._enforce()

    def _wait_ms(self) -> float | None:
        with self._lock:
            attempt = self._attempt
            self._is_watcher_asleep = attempt is None
            if attempt is None:
                return None
            if attempt.stop is not None:
                wait_s = attempt.stop.force_at - time.monotonic()
            else:
                wait_s = min(CHECK_S, attempt.deadline_s - time.monotonic())
                if attempt.leash_s is not None:
                    wait_s = min(wait_s, attempt.leash_s - time.clock_gettime(time.CLOCK_BOOTTIME))
        return max(0.0, wait_s) * 1000 + 1

    def _receive(self, order: tuple[Any, ...]) -> None:
        task_id = order[1]
        with self._lock:
            if self._attempt is not None and self._attempt.task.id == task_id:
                _obey(self._attempt, order)
            else:
                # Not read yet, or ended already; `_take` sorts that out.
                self._early.setdefault(task_id, []).append(order)

    def _enforce(self) -> None:
        with self._lock:
            attempt = self._attempt
            if attempt is None:
                return
            now = time.monotonic()
            if attempt.stop is None:
                attempt.stop = _reason_to_stop(attempt, now)
                if attempt.stop is not None and attempt.engine is not None:
                    attempt.engine.increment_epoch()
            elif now >= attempt.stop.force_at:
                stop = attempt.stop
                attempt.output.cut()
                self._answer(
                    [Ended(attempt.task.id, stop.reason, None, stop.message, attempt.run_ms(now), is_last=True)]
                )
                os._exit(0)  # with the lock held: the main thread cannot answer as well


def _obey(attempt: Attempt, order: tuple[Any, ...]) -> None:
    match order:
        case ("leash", _, deadline_s):
            attempt.leash_s = deadline_s
        case ("cancel", _):
            attempt.is_cancelled = True


def _reason_to_stop(attempt: Attempt, now: float) -> Stop | None:
    task = attempt.task
    force_at = now + GRACE_S
    if attempt.is_cancelled:
        return Stop("cancelled", "cancelled", force_at)
    if attempt.leash_s is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= attempt.leash_s:
        return Stop("lost", "stopped by its own node, which was cut off from the mesh for too long", force_at)
    if now >= attempt.deadline_s:
        if attempt.engine is None:
            return Stop("timeout", f"compiling the module took over {COMPILE_S_MAX:.0f} s", force_at)
        return Stop("timeout", f"still running after {task.run_s:g} s, its limit", force_at)
    if (flooded := attempt.output.flooded()) is not None:
        return Stop("output_limit", flooded, force_at)
    return None


def _wasi(task: Task) -> wasmtime.WasiConfig:
    wasi = wasmtime.WasiConfig()
    wasi.argv = task.args
    wasi.env = task.env
    try:
        if task.stdin is not None:
            wasi.stdin_file = task.stdin
        wasi.stdout_file = task.stdout
        wasi.stderr_file = task.stderr
        wasi.preopen_dir(task.workdir, ".")
    except wasmtime.WasmtimeError as error:
        raise OSError(f"{error} ({task.workdir})") from error
    return wasi


def _memory_bytes(store: wasmtime.Store, instance: wasmtime.Instance | None) -> int:
    """The guest's memory at its end, which is its peak: wasm memory never shrinks. 0 when it is not exported."""
    if instance is None:
        return 0
    memory = instance.exports(store).get("memory")
    return memory.data_len(store) if isinstance(memory, wasmtime.Memory) else 0


def _limit_files(bytes_max: int | None) -> None:
    # The soft limit only, so that it can be lifted again. Python ignores SIGXFSZ: the guest sees EFBIG.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = hard if bytes_max is None or (hard != resource.RLIM_INFINITY and bytes_max > hard) else bytes_max
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main() -> None:
    tasks, orders = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Never RLIMIT_AS: each live store reserves over 4 GiB of addresses and uses 10 KiB.
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is only a preference
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJUST)
    Runner(tasks, orders, Modules(Path(sys.argv[3]), wasmtime_version=sys.argv[4])).serve()


if __name__ == "__main__":
    main()
