"""Bytes on a blob stream: from a fetcher to who serves, and from a holder to who fetches.

May be raised: MeshError (PeerFault bans the holder for a while). Wrong bytes are never kept.
The first frame's first byte says which side is attacked; the frames are pieces of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import trio

from fuzz import world
from fuzz.inputs import join, split
from fuzz.targets import machine as commands
from fuzz.targets.methods import SMALL, SMALL_REF, _Blobs
from fuzz.world import GivenStream, GivenTransport, Handlers
from meshd import codec
from meshd.blobs.fetch import _receive_range
from meshd.blobs.messages import CALL_BYTES_MAX, PROTOCOL, Coming, Refusal, Want, Wire
from meshd.blobs.plan import Plan
from meshd.blobs.serve import BlobServer
from meshd.errors import MeshError
from meshd.model import BlobRef

FRAMED = True


def fuzz(data: bytes) -> None:
    frames = split(data)
    if frames and frames[0]:
        side = _serve if frames[0][0] % 2 else _fetch
        world.run(lambda: side([frames[0][1:], *frames[1:]]))


async def _serve(pieces: list[bytes]) -> None:
    transport = GivenTransport(commands.A)
    BlobServer(transport, Handlers(), _Blobs(), may_remove=lambda peer: False)  # type: ignore[arg-type]
    with suppress(MeshError), trio.move_on_after(200):
        await transport.handlers[PROTOCOL](GivenStream(pieces))


async def _fetch(pieces: list[bytes]) -> None:
    wire = Wire(GivenStream(pieces), silence_s=5)
    ref = BlobRef("b" * 64, 3 << 20)
    plan = Plan(ref.size)
    plan.begin([world.PEER])
    with suppress(MeshError):
        while (wanted := plan.take(world.PEER)) is not None:
            data = await _receive_range(wire, ref, wanted)
            assert len(data) == wanted.length
            plan.arrived(world.PEER, wanted.index, "d" * 64)
    plan.lost(world.PEER)


def framed(message: object) -> bytes:
    body = codec.encode(message)
    return len(body).to_bytes(4, "big") + body


def seeds() -> Iterator[bytes]:
    want = framed(Want(SMALL_REF.hash, 0, 100))
    yield join([b"\1" + want, framed(Want(SMALL_REF.hash, 5, CALL_BYTES_MAX)) + want[:3], want[3:]])
    yield join([b"\1" + framed(Want("c" * 64, 2**53, 1)), framed(Want(SMALL_REF.hash, 2**53, 1))])
    yield join([b"\1\xff\xff\xff\xff", b"\0\0\0\0"])
    for size in (1 << 20, 256 << 10, 64 << 10):
        yield join([b"\0" + framed(Coming(3 << 20, size)), SMALL * 100])
    yield join([b"\0" + framed(Coming(5, 5)), SMALL])
    yield join([b"\0" + framed(Refusal("not_found", "it is gone")), b""])
    yield join([b"\0" + framed(Refusal("busy", "m" * 1024))[:9]])
