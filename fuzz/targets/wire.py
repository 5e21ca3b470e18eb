"""Bytes on a stream of Raft frames, from a server of the mesh: greeting, lengths, messages.

May be raised: MeshError, which ends this stream and nothing else (the transport resets it).
The first frame is how the bytes are cut into pieces; the rest are those bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from random import Random

import trio

from fuzz import world
from fuzz.inputs import join, split
from fuzz.targets import raft
from fuzz.world import GivenStream, GivenTransport
from meshd import codec
from meshd.errors import MeshError
from meshd.model import NodeId
from meshd.raft.acquaintances import Acquaintances
from meshd.raft.surroundings import Mail
from meshd.raft.wire import INBOX_BYTES_MAX, PROTOCOL, Greeting, Refused, Wire

FRAMED = True
OURS = Greeting("mesh", (), "01", 1, "aa")


def fuzz(data: bytes) -> None:
    pieces = split(data)
    world.run(lambda: _both_ways(pieces))


async def _both_ways(pieces: list[bytes]) -> None:
    """As whoever is called, and as whoever calls."""
    outward = GivenStream(pieces)
    transport = GivenTransport(NodeId("me"), [outward])
    wire = Wire(
        transport,
        lambda: OURS,
        Random(1),  # noqa: S311
        lambda: None,
        acquaintances=Acquaintances(),
        on_refused=lambda node, why: None,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(wire.serve)
        with suppress(MeshError, trio.TooSlowError):
            await transport.handlers[PROTOCOL](GivenStream(pieces))
        size = 0
        while (incident := wire.take()) is not None:
            if isinstance(incident, Mail):
                size += incident.size
        assert size <= INBOX_BYTES_MAX + codec.FRAME_BYTES_MAX
        wire.reach([world.PEER])
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def seeds() -> Iterator[bytes]:
    hello = framed(codec.encode(OURS))
    messages = [frame[1:] for seed in raft.seeds() for frame in split(seed) if len(frame) > 1]
    yield join([hello, *(framed(message) for message in messages[:20])])
    yield join([hello + b"".join(framed(message) for message in messages[20:40])])
    yield join([hello[:3], hello[3:], *(framed(message) for message in messages[40:60])])
    yield join([framed(codec.encode(Greeting("another", ("ab",), "02", 5, "x")))])
    yield join([framed(codec.encode(Refused("you are older")))])
    yield join([hello, framed(codec.encode(Refused("you are older"))), framed(messages[0])])
    yield join([framed(codec.encode(Greeting("mesh", (), "02", 2**53, "x", 2**53, True))), framed(messages[0])])
    yield join([hello, b"\xff\xff\xff\xff", b"x"])
    yield join([hello, framed(b"\xc1"), framed(b"\x91" * 3000)])
    yield join([framed(b"\xa5" * 1025)])
