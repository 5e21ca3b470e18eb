"""The spawner: starts commands for the agent, keeps their deadlines, and leaves nothing of them behind.

It lives apart from the agent, so a stopped agent keeps nothing alive. It is the subreaper
of all that it starts. When its socket closes it kills everything and exits; if it is killed
itself, the agent ends what it left, or else the next agent's probe does (`kill_strays`). Frames: four bytes of length, then
JSON; requests `run`, `leash`, `cancel`, answers as `spawned.describe` makes them.
Standard library only: it starts in 40 ms.
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

from meshd.backends.output import CHECK_S
from meshd.backends.spawned import MARK, SWEEP_S_MAX, Refused, Spawned, describe

READ_BYTES = 64 << 10

SWEEP_AGAIN_S = 0.02
"""Between two looks for remains; most die within one."""

ENVIRONMENT_BYTES_MAX = 256 << 10
"""How far to look for the mark: more than the kernel passes in one string, less than an attack on our memory."""

FILES_OPEN = 1024
"""Soft limit, whatever the agent has raised its own to: old programs use select(2)."""

_PR_SET_CHILD_SUBREAPER = 36
_length = struct.Struct("<I")


class Spawner:
    def __init__(self, agent: socket.socket, token: str, term_grace_s: float) -> None:
        agent.setblocking(False)
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
            self._send()

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
        if request["do"] == "run":
            try:
                spawned = Spawned(request, self._token, self._term_grace_s)
            except Refused as refused:
                self._answer(describe(request["id"], refused.reason, None, str(refused)))
                return
            self._running[spawned.pid] = spawned
            return
        for spawned in self._running.values():
            if spawned.id == request["id"]:
                if request["do"] == "leash":
                    spawned.leash_s = request["leash_s"]
                else:
                    spawned.stop("cancelled", "cancelled", time.monotonic())

    def _answer(self, answer: dict[str, object]) -> None:
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
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
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
                self._answer(spawned.describe_end(is_clean=not has_remains))
        self._sweeping = left

    def _kill_everything(self) -> None:
        for spawned in (*self._running.values(), *self._sweeping):
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


def main() -> None:
    number, token, term_grace_s = sys.argv[1:4]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # What all commands have in common they inherit.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, files_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES_OPEN, files_hard), files_hard))
    kill_strays(token)
    Spawner(socket.socket(fileno=int(number)), token, float(term_grace_s)).serve()


if __name__ == "__main__":
    main()
