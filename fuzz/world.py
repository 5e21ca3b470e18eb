"""What targets need around a decoder: silence, a stream that says given bytes, a trio run whose waits take no time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from math import inf

import structlog
import trio
from trio.testing import MockClock

from meshd.errors import Unavailable
from meshd.model import NodeId

PEER = NodeId("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
"""Who sends the bytes, where a real node id is needed."""


def be_quiet() -> None:
    """A hostile peer makes the agent say much; here it would be most of the work."""
    structlog.configure(processors=[_drop])
    logging.disable(logging.CRITICAL)


def be_heard() -> None:
    """As before: for tests that share their process with others."""
    structlog.reset_defaults()
    logging.disable(logging.NOTSET)


def _drop(logger: object, method: str, event: MutableMapping[str, object]) -> str:
    raise structlog.DropEvent


def run(work: Callable[[], Awaitable[None]]) -> None:
    """To the end, on a clock that jumps to the next deadline when nothing else is left to do."""
    trio.run(work, clock=MockClock(autojump_threshold=0))


class GivenStream:
    """ports.Stream whose peer says these pieces, then ends its side; what is written to it is counted."""

    def __init__(self, pieces: list[bytes], peer: NodeId = PEER, *, ends: bool = True) -> None:
        self._pieces = list(pieces)
        self._rest = b""
        self._peer = peer
        self._ends = ends
        self.written = bytearray()

    @property
    def peer(self) -> NodeId:
        return self._peer

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._rest:
            if not self._pieces:
                if not self._ends:
                    await trio.sleep(inf)
                return b""
            self._rest = self._pieces.pop(0)
        data, self._rest = self._rest[:n], self._rest[n:]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written += data

    def write_now(self, data: bytes) -> bool:
        return False

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self._pieces = []


class GivenTransport:
    """ports.Transport that keeps the handlers it is given, and opens streams that were given to it."""

    def __init__(self, me: NodeId, streams: list[GivenStream] | None = None) -> None:
        self.me = me
        self.addresses: tuple[str, ...] = ()
        self.handlers: dict[str, Callable[[GivenStream], Awaitable[None]]] = {}
        self._streams = streams or []

    def handle(self, protocol: str, handler: Callable[[GivenStream], Awaitable[None]]) -> None:
        self.handlers[protocol] = handler

    def connected(self) -> frozenset[NodeId]:
        return frozenset({PEER})

    async def connect(self, peer: NodeId, addresses: object, *, timeout_s: float) -> None:
        await trio.lowlevel.checkpoint()

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> GivenStream:
        await trio.lowlevel.checkpoint()
        if not self._streams:
            raise Unavailable(f"{peer} is not there")
        return self._streams.pop(0)

    async def drop(self, peer: NodeId, *, age_s: float = 0.0) -> None:
        await trio.lowlevel.checkpoint()


class Handlers:
    """ports.Rpc that keeps the handlers it is given, and answers calls with given bodies."""

    def __init__(self, answers: list[bytes] | None = None) -> None:
        self.methods: dict[str, Callable[[NodeId, bytes], Awaitable[bytes]]] = {}
        self._answers = answers or []

    def register(self, method: str, handler: Callable[[NodeId, bytes], Awaitable[bytes]]) -> None:
        self.methods[method] = handler

    async def call(self, peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        await trio.sleep(0.01)
        if not self._answers:
            raise Unavailable(f"{peer} does not answer")
        return self._answers.pop(0)
