"""ports.Stream on one yamux stream: what has come and is not read yet, the windows of both sides, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_FIN,
    HEADER_SIZE,
    MAX_WINDOW_SIZE,
    TYPE_DATA,
    TYPE_WINDOW_UPDATE,
)

from meshd.errors import Unavailable
from meshd.model import NodeId

if TYPE_CHECKING:
    from meshd.net.libp2p.muxer import Muxer

WRITE_DEADLINE_S = 30.0
"""For the socket to take anything, and for a stream's reader to make room. Frames are 64 KiB: 2 kB/s is too slow."""

WINDOW_GROWS_S = 0.5
"""Half a window that is used up sooner was too small, on a link with a round trip of up to so long."""

FRAME_PAYLOAD_MAX = 65535 - 16 - HEADER_SIZE
"""One yamux frame in exactly one Noise message: less the tag and the header."""


class MuxedStream:
    def __init__(self, muxer: Muxer, stream_id: int, *, is_ours: bool) -> None:
        self.id = stream_id
        self.is_ours = is_ours
        self.send_window = DEFAULT_WINDOW_SIZE
        self._muxer = muxer
        self._received = bytearray()
        self._recv_window = self._window = DEFAULT_WINDOW_SIZE
        """What the peer may still send, and what it may when all is read."""
        self._credited_s = float("-inf")
        self._is_finished = False
        """We say nothing more …"""
        self._is_finished_by_peer = False
        """… and neither does the peer."""
        self._is_broken = False
        self._is_closed = False
        self._turn = trio.Lock()
        self._readable = trio.Event()
        self._writable = trio.Event()

    @property
    def peer(self) -> NodeId:
        return self._muxer.peer

    async def read(self, n: int) -> bytes:
        """See ports.Stream. No byte is taken that is not returned, also when cancelled."""
        if self._received:
            await trio.lowlevel.checkpoint()
        while not self._is_closed:
            if self._received:
                data = bytes(self._received[:n])
                del self._received[:n]
                self._muxer.bytes_unread -= len(data)
                self._give_credit()
                return data
            if self._is_finished_by_peer:
                await trio.lowlevel.checkpoint()
                return b""
            if self._is_broken:
                break
            if self._readable.is_set():
                self._readable = trio.Event()
            await self._readable.wait()
        raise await self._broken_off()

    def write_now(self, data: bytes) -> bool:
        """All of it, if nobody has to wait for that; else nothing of it."""
        muxer, size = self._muxer, len(data)
        if self._turn.locked() or not self._may_write() or size > min(self.send_window, FRAME_PAYLOAD_MAX):
            return False
        if not muxer.has_room or not size:
            return not size
        try:
            muxer.put(TYPE_DATA, 0, self.id, size, data)
        except ConnectionClosedError:
            return False
        self.send_window -= size
        return True

    async def write(self, data: bytes) -> None:
        """See ports.Stream. Cancelled in the middle it resets this stream, since nobody could make sense of the rest."""
        if self.write_now(data):
            await trio.lowlevel.checkpoint()
            return
        rest = memoryview(data)
        async with self._turn:
            try:
                while rest:
                    size = min(await self._wait_window(), FRAME_PAYLOAD_MAX, len(rest))
                    await self._muxer.wait_room()
                    self._muxer.put(TYPE_DATA, 0, self.id, size, rest[:size])
                    self.send_window -= size
                    rest = rest[size:]
                    await trio.lowlevel.checkpoint()
            except ConnectionClosedError as error:
                raise await self._broken_off() from error
            except BaseException:
                if len(rest) < len(data):
                    self.reset()
                raise

    async def close_write(self) -> None:
        self.finish()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if not self._is_closed:
            self._muxer.let_go(self, is_read=self._close())

    def reset(self) -> None:
        if not self._is_closed:
            self._close()
            self._muxer.reset(self)

    def _close(self) -> bool:
        """Whether everything that had come was read."""
        self._is_closed = True
        unread = len(self._received)
        self._muxer.bytes_unread -= unread
        self._received.clear()
        self._wake()  # another task may be reading
        return not unread

    # --- what the muxer tells -----------------------------------------------------------------------------------------

    def came(self, data: bytes) -> None:
        if self._is_closed:
            self._muxer.reset(self)  # it goes on writing: nobody will read that
            return
        self._recv_window = max(0, self._recv_window - len(data))
        self._received += data
        self._muxer.bytes_unread += len(data)
        self._readable.set()

    def may_send(self, more: int) -> None:
        self.send_window += more
        self._writable.set()

    def finish(self) -> None:
        """Nothing more comes from here."""
        if not self._is_finished and not self._is_broken:
            self._is_finished = True
            self._muxer.say(TYPE_WINDOW_UPDATE, FLAG_FIN, self.id)
        self._leave_when_both_finished()

    def finished_by_peer(self) -> None:
        self._is_finished_by_peer = True
        self._readable.set()
        self._leave_when_both_finished()

    def _leave_when_both_finished(self) -> None:
        if self._is_finished and self._is_finished_by_peer:
            self._muxer.forget(self)

    def broke(self) -> None:
        """It was reset, or the connection is lost."""
        self._is_broken = True
        self._wake()

    # --- windows ------------------------------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        return not (self._is_finished or self._is_broken or self._is_closed)

    async def _wait_window(self) -> int:
        with trio.move_on_after(WRITE_DEADLINE_S):
            while self._may_write():
                if self.send_window > 0:
                    return self.send_window
                if self._writable.is_set():
                    self._writable = trio.Event()
                await self._writable.wait()
            raise await self._broken_off()
        self.reset()
        raise Unavailable(f"{self.peer} did not read for {WRITE_DEADLINE_S:g} s")

    def _give_credit(self) -> None:
        """As soon as half the window is free, not with every read: each update costs the peer a frame."""
        free = self._window - self._recv_window - len(self._received)
        if free < self._window // 2 or self._is_finished_by_peer or self._is_broken:
            return
        now = trio.current_time()
        if now - self._credited_s < WINDOW_GROWS_S and self._window < MAX_WINDOW_SIZE:
            free += self._window
            self._window *= 2
        self._credited_s = now
        self._recv_window += free
        self._muxer.say(TYPE_WINDOW_UPDATE, 0, self.id, free)

    def _wake(self) -> None:
        self._readable.set()
        self._writable.set()

    async def _broken_off(self) -> Unavailable:
        await trio.lowlevel.checkpoint_if_cancelled()  # a task that is being stopped shall not take it for a loss
        return Unavailable(f"the stream to {self.peer} broke off")
