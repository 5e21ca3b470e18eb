"""A helper process of the agent, and the line to it.

Runners and the spawner are ordinary Python programs of this package, started without
`site` and with a clean environment. They end when their socket closes: that is how
jobs die with their agent, whatever killed it. A `Link` carries frames: four bytes of
length, little endian, then that many bytes.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import trio

from meshd.codec import FRAME_BYTES_MAX
from meshd.errors import TooLarge

LAST_WORDS_BYTES_MAX = 1000
"""How much of a dead helper's stderr goes into the message: enough for the end of a traceback."""

READ_BYTES = 64 << 10

HEARD_S = 0.2
"""After an answer was due: the agent itself may have stood still for as long, and what came meanwhile is not read yet."""

_length = struct.Struct("<I")


class Link:
    """Our end of a stream socket. Frames go out without waiting while the kernel takes them."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._out = bytearray()
        self._in = bytearray()
        self._flushing = trio.Lock()

    def post(self, payload: bytes) -> None:
        """Send at once as far as possible; `flush` sends the rest. A dead peer shows in `receive`, not here."""
        if len(payload) > FRAME_BYTES_MAX:
            raise TooLarge(f"message of {len(payload)} bytes is over the limit of {FRAME_BYTES_MAX}")
        frame = _length.pack(len(payload)) + payload
        if self._out:
            self._out += frame
            return
        sent = self._send(frame)
        if sent < len(frame):
            self._out += memoryview(frame)[sent:]

    @property
    def is_pending(self) -> bool:
        return bool(self._out)

    async def flush(self) -> None:
        """Wait until everything posted is with the kernel. Cancelling loses nothing: a later flush goes on."""
        if not self._out:
            return
        async with self._flushing:
            try:
                while self._out:
                    await trio.lowlevel.wait_writable(self._sock.fileno())
                    del self._out[: self._send(self._out)]
            except (trio.ClosedResourceError, OSError):
                self._out.clear()  # as with a dead peer: `receive` tells

    async def receive(self) -> bytes | None:
        """The next frame; None when the other end is gone, or sent nonsense. Cancelling loses nothing."""
        frames = await self.receive_some(1)
        return frames[0] if frames else None

    async def receive_some(self, frames_max: int) -> list[bytes]:
        """Frames that have come, at least one; none when the other end is gone, or sent nonsense. Cancelling loses nothing."""
        while True:
            frames, is_good = self._frames(frames_max)
            if frames or not is_good:
                return frames
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._sock.fileno())
                except trio.ClosedResourceError:
                    return []
                continue
            except OSError:
                return []
            if not data:
                return []
            self._in += data

    def receive_rest(self) -> list[bytes]:
        """What lies unread, of a peer that is gone, whoever waits in `receive`."""
        with suppress(OSError):
            while data := self._sock.recv(READ_BYTES):
                self._in += data
        frames, _ = self._frames(len(self._in))
        return frames

    def _frames(self, frames_max: int) -> tuple[list[bytes], bool]:
        """The whole frames at the beginning of what was read, and whether one may follow."""
        frames: list[bytes] = []
        read, at, end = self._in, 0, len(self._in)
        is_good = True
        while len(frames) < frames_max and end - at >= _length.size:
            (size,) = _length.unpack_from(read, at)
            if size > FRAME_BYTES_MAX:
                is_good = False
                break
            if end - at - _length.size < size:
                break
            at += _length.size
            frames.append(bytes(read[at : at + size]))
            at += size
        if at:
            del read[:at]
        return frames, is_good

    def finish(self) -> None:
        """The other end hears that nothing more will come. What it says can still be received."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Nothing is received any more, not even what was read already."""
        self._in.clear()
        if self._sock.fileno() != -1:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody reads it any more; the reader of this link learns of it


class Gathering:
    """How long to leave a helper alone, so that many of its answers are heard at once: waking up costs as much as ten.

    Not at all when they are few, and not until it has nothing left to do.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._heard_at_s = -math.inf

    def pause_s(self, heard: int, left: int, now_s: float) -> float:
        """After so many answers, when the one who is done first (in a runner, in a lane) has so much left to do.

        Half of that is done when the pause ends: then there is time to bring more.
        """
        each_s = (now_s - self._heard_at_s) / max(1, heard)
        self._heard_at_s = now_s
        return 0.0 if each_s * 2 > self._longest_s else min(self._longest_s, left * each_s / 2)


class Child:
    """A running helper. Its stdout and stderr go to a file in memory, read only when it dies."""

    def __init__(self, process: trio.Process, words: int) -> None:
        self._process = process
        self._words = words
        self.pid = process.pid

    @classmethod
    async def start(
        cls, module: str, arguments: Sequence[str], sockets: Sequence[socket.socket], lock: int | None = None
    ) -> Child:
        """Start `python -m module FD… arguments…`, with its ends of the sockets, which are closed here. Raises OSError.

        It inherits `lock`, and holds it for as long as it lives (leftovers.py).
        """
        words = os.memfd_create(module)
        try:
            with trio.CancelScope(shield=True):  # a started process without an owner would be a leak
                process = await trio.lowlevel.open_process(
                    # No site, no user packages, no current directory: only what the agent itself imports from.
                    [sys.executable, "-S", "-s", "-P", "-m", module, *(str(s.fileno()) for s in sockets), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    pass_fds=[*(s.fileno() for s in sockets), *([] if lock is None else [lock])],
                    env=_environment(),
                    # Ctrl-C at a terminal stops the agent, which then stops these in order.
                    start_new_session=True,
                )
        except BaseException:
            os.close(words)
            raise
        finally:
            for sock in sockets:
                sock.close()
        return cls(process, words)

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def has_exited_well(self) -> bool:
        return self._process.returncode == 0

    def kill(self) -> None:
        if self.is_running:
            self._process.send_signal(signal.SIGKILL)

    async def wait(self) -> None:
        await self._process.wait()

    def describe_end(self) -> str:
        """Why it is gone, for people."""
        code = self._process.poll()
        if code is None:
            return "closed its socket"
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
        words = self._last_words()
        return f"{how}: {words}" if words else how

    def close(self) -> None:
        if self._words != -1:
            os.close(self._words)
            self._words = -1

    def _last_words(self) -> str:
        if self._words == -1:
            return ""
        size = os.fstat(self._words).st_size
        tail = os.pread(self._words, LAST_WORDS_BYTES_MAX, max(0, size - LAST_WORDS_BYTES_MAX))
        return tail.decode(errors="replace").strip()


def _environment() -> dict[str, str]:
    """Nothing of the agent's own environment (it may hold secrets) but how to find our modules and libraries."""
    paths = (os.path.abspath(path) for path in sys.path)
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(paths)}
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = libraries
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
