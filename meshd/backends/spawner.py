"""The spawner: starts commands for the agent, keeps their deadlines, and leaves nothing of them behind.

It lives apart from the agent, so a stopped agent keeps nothing alive. It is the subreaper
of all that it starts. When its socket closes it kills everything and exits; if it is killed
itself, the agent ends what it left, or else the next agent does as it starts (`kill_strays`).
Standard library only: it starts in 40 ms.

Frames: four bytes of length, then JSON. All paths are absolute. Requests:
    run      one command with files of its own, now
    start    commands of one plan for one lane (spawner_lanes.py)
    leash    a new deadline, of a command or a lane
    cancel   a command that runs or waits
    back     give back those of these commands that have not begun
    output   what a running command has written
Answers: `{"ended": [[id, reason, exit code, message, run_ms, stdout, stderr, what is to be removed], …]}`, output as
latin-1, null when it was left in its file; and `{"call": …, "ids": […]}` or `{"call": …, "data": …}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from meshd.backends.output import CHECK_S, Capture
from meshd.backends.spawned import MARK, ROOT, SWEEP_S_MAX, Refused, Spawned
from meshd.backends.spawner_lanes import Desks, Lane, Seat, request_of

READ_BYTES = 64 << 10

MESSAGE_CHARS_MAX = 1500
"""An outcome's message has 2048."""

SWEEP_AGAIN_S = 0.02
"""Between two looks for remains; most die within one."""

ENVIRONMENT_BYTES_MAX = 256 << 10
"""How far to look for the mark: more than the kernel passes in one string, less than an attack on our memory."""

_PR_SET_CHILD_SUBREAPER = 36
_length = struct.Struct("<I")


class Spawner:
    def __init__(self, agent: socket.socket, token: str, term_grace_s: float, scratch: str) -> None:
        agent.setblocking(False)
        self._desks = Desks(scratch)
        self._lanes: dict[int, Lane] = {}
        self._seats: dict[int, Seat] = {}
        """Of commands that were started for a lane, by id."""
        self._ends: list[tuple[Any, ...]] = []
        """Not yet in `_out`."""
        self._agent = agent
        self._token = token
        self._term_grace_s = term_grace_s
        self._in = bytearray()
        self._out = bytearray()
        self._running: dict[int, Spawned] = {}
        """By process id."""
        self._sweeping: list[Spawned] = []

    def serve(self) -> None:
        """Until the agent is gone; then nothing of what was started is left."""
        children, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(children, select.POLLIN)
        while True:
            poll.register(self._agent, select.POLLIN | (select.POLLOUT if self._out else 0))
            ready = [descriptor for descriptor, _ in poll.poll(self._wait_ms())]
            if children in ready:
                os.read(children, READ_BYTES)
            if not self._receive():
                self._kill_everything()
                return
            self._reap()
            now_s = time.monotonic()
            for spawned in self._running.values():
                spawned.enforce(now_s)
            self._sweep(now_s)
            self._tell_ends()
            # Only when the agent knows of every end: so of each lane at most one without an end has begun.
            while not self._out and self._start_next():
                self._tell_ends()

    # --- the agent ---------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Do what has arrived; False when nothing ever will again."""
        try:
            data = self._agent.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._in += data
        while len(self._in) >= _length.size:
            (size,) = _length.unpack_from(self._in)
            end = _length.size + size
            if len(self._in) < end:
                break
            request = json.loads(self._in[_length.size : end])
            del self._in[:end]
            self._obey(request)
        return bool(data)

    def _obey(self, request: dict[str, Any]) -> None:
        match request["do"]:
            case "run":
                self._spawn(request, None)
            case "start":
                lane = self._lanes.get(request["lane"])
                if lane is None:
                    lane = self._lanes[request["lane"]] = Lane(request["plan"], request["plan"]["leash_s"])
                lane.waiting.extend(request["tasks"])
            case "leash":
                self._move_leash(request)
            case "cancel":
                self._cancel(request["id"])
            case "back":
                ids = [number for lane in self._lanes.values() for number in lane.take_out(request["ids"])]
                self._answer({"call": request["call"], "ids": ids})
            case "output":
                self._answer({"call": request["call"], "data": self._read_output(request)})

    def _spawn(self, request: dict[str, Any], capture: Capture | None) -> bool:
        try:
            spawned = Spawned(request, self._token, self._term_grace_s, capture)
        except Refused as refused:
            self._end(request["id"], refused.reason, None, str(refused), 0)
            return False
        self._running[spawned.pid] = spawned
        return True

    def _move_leash(self, request: dict[str, Any]) -> None:
        leash_s, number = request["leash_s"], request.get("id")
        if (lane := self._lanes.get(request.get("lane", 0))) is not None:
            lane.leash_s, number = leash_s, lane.running
        for spawned in self._running.values():
            if spawned.id == number:
                spawned.leash_s = leash_s

    def _cancel(self, number: int) -> None:
        for lane in self._lanes.values():
            if lane.take_out([number]):
                self._end(number, "cancelled", None, "stopped before it started", 0)
                return
        for spawned in self._running.values():
            if spawned.id == number:
                spawned.stop("cancelled", "cancelled", time.monotonic())

    def _read_output(self, request: dict[str, Any]) -> str | None:
        seat = self._seats.get(request["id"])
        if seat is None:
            return None
        file = seat.capture.stdout if request["stream"] == "stdout" else seat.capture.stderr
        return os.pread(file, request["max"], request["offset"]).decode("latin-1")

    # --- lanes -------------------------------------------------------------------------------------------------------

    def _start_next(self) -> bool:
        """One of each lane in which none runs; whether any has ended by that."""
        for number, lane in list(self._lanes.items()):
            if lane.waiting and not lane.running:
                self._start(lane, lane.waiting.popleft())
            if not lane.waiting and not lane.running:
                del self._lanes[number]
        return bool(self._ends)

    def _start(self, lane: Lane, task: list[Any]) -> None:
        number, fence = task[0], task[3]
        if lane.leash_s is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= lane.leash_s:
            self._end(number, "lost", None, "not begun: its node was cut off from the mesh for too long", 0)
            return
        desk = ""
        try:
            desk = self._desks.take()
            capture = Capture(lane.plan["spill"])
        except OSError as error:
            if desk:
                self._desks.give_back(desk)
            self._end(number, "backend", None, f"its files cannot be made: {error}", 0)
            return
        if self._spawn(request_of(lane, task, desk), capture):
            lane.running = number
            self._seats[number] = Seat(lane, desk, f"{fence:x}", capture)
        else:
            capture.close()
            self._desks.give_back(desk)

    def _end_in_lane(self, spawned: Spawned, seat: Seat, *, is_clean: bool) -> None:
        reason, code, message, run_ms = spawned.describe_end(is_clean=is_clean)
        stdout: str | None = ""
        stderr: str | None = ""
        try:
            stdout, stderr = map(_text, seat.capture.take(seat.name, seat.lane.plan["inline_bytes_max"]))
        except OSError as error:
            reason, code, message = "backend", None, f"its output cannot be kept: {error}"
        seat.capture.close()
        seat.lane.running = 0
        # What survives may still work there.
        is_free = is_clean and self._desks.give_back(seat.desk)
        self._end(spawned.id, reason, code, message, run_ms, stdout, stderr, "" if is_free else seat.desk)

    def _end(
        self,
        number: int,
        reason: str,
        code: int | None,
        message: str,
        run_ms: int,
        stdout: str | None = "",
        stderr: str | None = "",
        left: str = "",
    ) -> None:
        self._ends.append((number, reason, code, message[:MESSAGE_CHARS_MAX], run_ms, stdout, stderr, left))

    def _tell_ends(self) -> None:
        if self._ends:
            self._answer({"ended": self._ends})
            self._ends = []
        self._send()

    def _answer(self, answer: dict[str, Any]) -> None:
        payload = json.dumps(answer).encode()
        self._out += _length.pack(len(payload)) + payload

    def _send(self) -> None:
        # What a stopped agent does not read waits here: one small answer for each attempt that it has open.
        with suppress(OSError):
            while self._out:
                del self._out[: self._agent.send(self._out)]

    def _wait_ms(self) -> float | None:
        if self._sweeping:
            return SWEEP_AGAIN_S * 1000
        if not self._running:
            return None
        now_s = time.monotonic()
        at_s = min(spawned.next_at_s(now_s) for spawned in self._running.values())
        return max(0.0, min(CHECK_S, at_s - now_s)) * 1000 + 1

    # --- ends --------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Everything that has died: main processes, and orphans that became ours."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                _go_on(pid, os.WSTOPSIG(status))
                continue
            spawned = self._running.pop(pid, None)
            if spawned is not None:
                spawned.main_ended(status, usage.ru_maxrss * 1024, time.monotonic())
                self._sweeping.append(spawned)

    def _sweep(self, now_s: float) -> None:
        """Kill what ended jobs left; report those of which nothing is left."""
        if not self._sweeping:
            return
        orphans = {pid: _environment(pid) for pid in _children() if pid not in self._running}
        is_alone = not self._running
        left: list[Spawned] = []
        for spawned in self._sweeping:
            has_remains = spawned.kill_remains()
            for pid, environment in orphans.items():
                # An orphan that wiped its environment belongs to any of those here: it goes when no job runs
                # that it might belong to.
                if _is_marked(environment, spawned.mark) or (is_alone and MARK.encode() not in environment):
                    has_remains = True
                    _kill(pid)
            if has_remains and not spawned.is_hopeless(now_s):
                left.append(spawned)
            else:
                if (seat := self._seats.pop(spawned.id, None)) is not None:
                    self._end_in_lane(spawned, seat, is_clean=not has_remains)
                else:
                    self._end(spawned.id, *spawned.describe_end(is_clean=not has_remains))
        self._sweeping = left

    def _kill_everything(self) -> None:
        for spawned in self._running.values():
            spawned.kill()
        give_up_at_s = time.monotonic() + SWEEP_S_MAX
        while (children := _children()) and time.monotonic() < give_up_at_s:
            # A child that dies hands its own children to us: the next round finds them.
            for pid in children:
                _kill(pid)
            self._reap()
            for spawned in self._sweeping:
                spawned.kill_remains()
            time.sleep(0.001)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("latin-1")


def kill_strays(token: str) -> None:
    """What an earlier spawner of this agent could not end because it was killed itself: until none is seen any more.

    Past the time limit they are stuck in the kernel, with SIGKILL pending: they execute nothing of their own again.
    """
    mark = f"{MARK}={token}:".encode()
    give_up_at_s = time.monotonic() + SWEEP_S_MAX
    while strays := [pid for pid in _processes() if pid != os.getpid() and _has_entry(_environment(pid), mark)]:
        for pid in strays:
            _kill(pid)
        if time.monotonic() >= give_up_at_s:
            return
        time.sleep(SWEEP_AGAIN_S)


def _has_entry(environment: bytes, beginning: bytes) -> bool:
    return any(entry.startswith(beginning) for entry in environment.split(b"\0"))


def _is_marked(environment: bytes, mark: bytes) -> bool:
    return mark in environment.split(b"\0")


def _environment(pid: int) -> bytes:
    """As it was when the program began; empty for a zombie, a stranger's process, or one that overwrote it."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(ENVIRONMENT_BYTES_MAX)
    except OSError:
        return b""


def _children() -> list[int]:
    """Our own children, orphans that became ours among them, zombies too."""
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return [pid for pid in _processes() if _parent(pid) == me]


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself contain spaces and parentheses.
            return int(file.read().rpartition(b") ")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _go_on(pid: int, stopped_by: int) -> None:
    """There is no terminal from which somebody could: the kernel ignores these stops where it knows that."""
    if stopped_by in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGCONT)


def main() -> None:
    number, token, term_grace_s, scratch = sys.argv[1:5]
    os.chdir(ROOT)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Among them is the lock that tells the next agent of us (leftovers.py): a command must not hold it.
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            os.set_inheritable(int(descriptor), int(descriptor) <= 2)
    # What all commands have in common they inherit.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, files_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of each command that runs in a lane two files are held here: for those together FILES_OPEN is too few.
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_hard, files_hard))
    kill_strays(token)
    Spawner(socket.socket(fileno=int(number)), token, float(term_grace_s), scratch).serve()


if __name__ == "__main__":
    main()
