"""HTTP/1.1 bytes of an API client, before anybody knows who it is.

May be raised: nothing. Each connection ends, within its bounds; every answer is HTTP.
The frames are pieces of what the client sends.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from fuzz import world
from fuzz.inputs import join, split
from meshd.api.app import create_app
from meshd.api.http1 import Connection
from meshd.testing.face import FakeFace

FRAMED = True


class Client:
    """A socket whose client sends these pieces, then ends its side or falls silent."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self._ends = len(pieces) % 2 == 0
        self._is_closed = False
        self.answer = bytearray()

    async def receive_some(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._is_closed:
            raise trio.ClosedResourceError
        if self._pieces:
            piece = self._pieces[0]
            self._pieces[0] = piece[n:]
            if not self._pieces[0]:
                del self._pieces[0]
            return piece[:n]
        if not self._ends:
            await trio.sleep(1000)
        return b""

    async def send_all(self, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_closed:
            raise trio.BrokenResourceError
        self.answer += data

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._is_closed = True


async def serve(client: Client, *, user: str = "") -> None:
    """One connection, as api/server.py serves it."""
    scope = {
        "scheme": "http", "server": ("127.0.0.1", 7374), "client": ("127.0.0.1", 5), "extensions": {"meshd.user": user}, "state": {},
    }  # fmt: skip
    await Connection(create_app(FakeFace()), client, scope).serve()  # type: ignore[arg-type]


def fuzz(data: bytes) -> None:
    client = Client(split(data))
    world.run(lambda: serve(client))
    assert not client.answer or client.answer.startswith(b"HTTP/1.1 "), bytes(client.answer[:40])


def seeds() -> Iterator[bytes]:
    get = b"GET /v1/health HTTP/1.1\r\nhost: x\r\n\r\n"
    yield join([get])
    yield join([get + get, get[:9], get[9:]])
    yield join([b"GET /v1/%6Aobs/%00%ff?limit=5&%zz HTTP/1.1\r\nhost: x\r\nauthorization: Bearer mesh_a_b\r\n\r\n"])
    post = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n"
    yield join([post, b"{}"])
    yield join([post[:-4] + b"\r\ntransfer-encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n"])
    yield join([b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", b"fffffffffffffffff\r\n"])
    yield join([b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n"])
    yield join([b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n"])
    yield join([b"GET / HTTP/9.9\r\n\r\n"])
    yield join([b"\x16\x03\x01\x02\x00" + b"\xff" * 60])
    yield join([b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n"])
    yield join(
        [b"HEAD /openapi.json HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n"]
    )
    yield join([b"PUT /v1/blobs HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"])
