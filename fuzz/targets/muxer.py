"""Bytes of a connection: of a stranger before the handshake, and yamux frames of a peer behind it.

May be raised: nothing; what is wrong ends this connection. Streams, buffers and answers stay within their bounds.
The first frame's first byte: 0 raw bytes of a stranger, 1 frames of a peer; the frames are pieces of what is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
)

from fuzz import world
from fuzz.inputs import join, split
from fuzz.world import PEER
from meshd.errors import MeshError
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p.muxer import BUFFERED_BYTES_MAX, LEAVING_BYTES_MAX, Muxer
from meshd.net.libp2p.stream import FRAME_PAYLOAD_MAX, MuxedStream
from meshd.net.libp2p.transport import Libp2pTransport, _Connection
from meshd.net.libp2p.wire import Wire

FRAMED = True
ECHO = "/meshd/rpc/1"
_KEY = KeyPair.from_secret(b"k" * 32)


def fuzz(data: bytes) -> None:
    frames = split(data)
    if frames and frames[0]:
        is_peer = frames[0][0] % 2 == 1
        world.run(lambda: _connect([frames[0][1:], *frames[1:]], is_peer=is_peer))


class _Given(Wire):
    """A connection whose other end says these pieces and then falls silent. It takes every other write, and half of a large one."""

    def __init__(self, pieces: list[bytes], *, ends: bool) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self._ends = ends
        self._is_closed = trio.Event()
        self._writes = 0
        super().__init__(cast("trio.SocketStream", self), is_initiator=False)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._bytes:
            data, self._bytes = self._bytes, b""
            return data
        if not self._is_closed.is_set() and self._pieces:
            return self._pieces.pop(0)
        if not self._ends:
            with trio.move_on_after(60):
                await self._is_closed.wait()
        raise ConnectionClosedError("the peer closed the connection")

    async def write(self, data: bytes) -> None:
        await self.wait_sendable()

    def send_now(self, data: bytes) -> int:
        if self._is_closed.is_set():
            raise ConnectionClosedError("closed")
        self._writes += 1
        return (self._writes % 2) * min(len(data), 1 + len(data) // 2)

    async def wait_sendable(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_closed.is_set():
            raise ConnectionClosedError("closed")

    def abort(self) -> None:
        self._is_closed.set()


class _Plain:
    """In place of Noise: what a peer says comes through as it is."""

    def seal(self, data: bytes) -> bytes:
        return data

    def open(self, received: bytes) -> bytes:
        return received


async def _connect(pieces: list[bytes], *, is_peer: bool) -> None:
    ups: list[str] = []
    events = SimpleNamespace(peer_up=ups.append, peer_down=ups.append)
    transport = Libp2pTransport(_KEY, [], gate=lambda peer, protocol: True, book=lambda peer: (), events=events)
    transport.handle(ECHO, _echo)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        muxer = None
        wire = _Given(pieces, ends=not len(pieces) % 2)
        if is_peer:
            muxer = Muxer(PEER, wire, _Plain())
            connection = _Connection(PEER, muxer, is_inbound=True)
            nursery.start_soon(_watch, muxer)
            await transport._keep(connection)
        else:
            await transport._welcome(wire)
        await trio.sleep(20)  # closed streams linger 10 s
        assert muxer is None or (muxer.bytes_unread, len(muxer.streams)) == (0, 0)
        assert not transport.connected()
        nursery.cancel_scope.cancel()


async def _watch(muxer: Muxer) -> None:
    while True:
        assert 0 <= sum(len(it._received) for it in muxer.streams.values()) <= muxer.bytes_unread <= BUFFERED_BYTES_MAX
        assert muxer._bytes_leaving <= LEAVING_BYTES_MAX + FRAME_PAYLOAD_MAX
        await trio.sleep(1)


async def _echo(stream: MuxedStream) -> None:
    with suppress(MeshError):
        while data := await stream.read(1 << 16):
            await stream.write(data)
        await stream.close_write()


def seeds() -> Iterator[bytes]:
    def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
        return (
            struct.pack(YAMUX_HEADER_FORMAT, 0, kind, flags, stream, len(payload) if length is None else length)
            + payload
        )

    def line(text: str) -> bytes:
        return bytes([len(text) + 1]) + text.encode() + b"\n"

    hello = line("/multistream/1.0.0") + line(ECHO)
    opened = frame(TYPE_WINDOW_UPDATE, FLAG_SYN, 1) + frame(TYPE_DATA, 0, 1, hello)
    yield join([b"\1" + opened, frame(TYPE_DATA, 0, 1, b"hello"), frame(TYPE_DATA, FLAG_FIN, 1)])
    yield join([b"\1" + opened + frame(TYPE_DATA, FLAG_RST, 1, b"x")])
    yield join(
        [
            b"\1" + frame(TYPE_DATA, FLAG_SYN, 1, hello) + frame(TYPE_WINDOW_UPDATE, 0, 1, length=2**32 - 1),
            frame(TYPE_DATA, 0, 1, b"y" * 200),
        ]
    )
    yield join(
        [
            b"\1" + frame(TYPE_WINDOW_UPDATE, FLAG_SYN | FLAG_FIN | FLAG_RST, 3),
            frame(TYPE_WINDOW_UPDATE, FLAG_SYN, 3),
            frame(TYPE_WINDOW_UPDATE, FLAG_ACK, 5, length=9),
            frame(TYPE_DATA, FLAG_ACK, 3, b"z"),
        ]
    )
    yield join(
        [
            b"\1" + frame(TYPE_PING, FLAG_SYN, 0, length=7),
            frame(TYPE_PING, FLAG_ACK, 0, length=7),
            frame(TYPE_GO_AWAY, 0, 0, length=1),
        ]
    )
    yield join([b"\1" + frame(TYPE_DATA, 0, 9, length=2**32 - 1), frame(9, 0xFFFF, 2**32 - 1)])
    yield join([b"\1" + b"".join(frame(TYPE_WINDOW_UPDATE, FLAG_SYN, stream) for stream in range(1, 120, 2))])
    yield join(
        [
            b"\1"
            + frame(
                TYPE_DATA, FLAG_SYN, 1, line("/multistream/1.0.0") + line("ls") + line("/no/such") + b"\xff\xff\xff\x7f"
            )
        ]
    )
    yield join([b"\1" + frame(TYPE_DATA, FLAG_SYN, 0, hello), frame(TYPE_DATA, FLAG_SYN, 2, hello)])
    yield join([b"\0" + line("/multistream/1.0.0") + line("/noise"), b"\x00\x20" + b"e" * 32])
    yield join([b"\0" + line("/multistream/1.0.0") + line("/tls/1.0.0"), b"\xff" * 20])
    yield join([b"\0GET / HTTP/1.1\r\n\r\n"])
