"""Bytes on a stream of calls, both ways: frames, greetings with certificates, requests and answers.

May be raised: MeshError, or a group of them, which ends the stream. A method that raises costs its own call only.
The first frame's first byte says whether a greeting that is right goes before; each frame is one piece of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import trio

from fuzz import world
from fuzz.inputs import join, split
from fuzz.world import PEER, GivenStream, GivenTransport
from meshd import codec
from meshd.admission import certificates
from meshd.admission.certificates import Greeting
from meshd.admission.greetings import Greetings
from meshd.directory import Directory
from meshd.errors import MeshError
from meshd.model import Certificate, NodeId, Role
from meshd.net.frames import Answer, Fault, Request, framed
from meshd.net.identity_key import KeyPair, verify
from meshd.net.rpc import PROTOCOL, StreamRpc
from meshd.recovery.epochs import EpochFile, Epochs

FRAMED = True
_KEY = KeyPair.from_secret(b"k" * 32)
_MESH_KEY = KeyPair.from_secret(b"m" * 32)
_MESH = certificates.mesh_id(_MESH_KEY.public_bytes)
ROLES = (Role.SERVER, Role.WORKER)


def _greeting(node: NodeId, **changed: object) -> Greeting:
    certificate = certificates.certify(_MESH_KEY.sign, _MESH, node, ROLES, 1)
    return Greeting(certificate, 1, b"r", 1_800_000_000_000, "name", ("/ip4/1.2.3.4/tcp/1",), "", "0")


_RIGHT = framed(Answer(0, True, codec.encode(_greeting(PEER))))


def fuzz(data: bytes) -> None:
    frames = split(data)
    if frames:
        is_greeted, frames[0] = bool(frames[0][:1] != b"\0"), frames[0][1:]
        world.run(lambda: _both_ways([_RIGHT, *frames] if is_greeted else frames))


async def _both_ways(pieces: list[bytes]) -> None:
    me = _KEY.node_id
    transport = GivenTransport(me, [GivenStream(pieces)])
    directory = Directory(me, _MESH, _MESH_KEY.public_bytes, verify, [])
    greetings = Greetings(
        directory=directory,
        greeting=lambda: _greeting(me),
        hears=lambda peer: False,
        wall_ms=lambda: 1_800_000_000_000,
        meet_epoch=Epochs(_MESH, _MESH_KEY.public_bytes, verify, EpochFile(), on_news=lambda: None).meet,
    )
    rpc = StreamRpc(transport, greeting=greetings.ours, admit=greetings.admit)

    async def echo(peer: NodeId, body: bytes) -> bytes:
        return body

    async def trip(peer: NodeId, body: bytes) -> bytes:
        raise KeyError(body)

    async def take_long(peer: NodeId, body: bytes) -> bytes:
        await trio.sleep(1000)
        return b""

    for name, handler in (("echo", echo), ("trip", trip), ("slow", take_long)):
        rpc.register(name, handler)
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.serve)
        try:
            await transport.handlers[PROTOCOL](GivenStream(pieces))
        except* MeshError:
            pass
        for _ in range(3):
            with suppress(MeshError):
                await rpc.call(PEER, "echo", b"x", timeout_s=5)
        nursery.cancel_scope.cancel()
    directory.peers()


def seeds() -> Iterator[bytes]:
    requests = [
        Request(1, "echo", 1000, b"hi"),
        Request(2, "trip", 0, b""),
        Request(3, "slow", 5, b""),
        Request(0, "", 0, b""),
        Request(4, "none", 2**40, b"x" * 100),
    ]
    answers = [
        Answer(1, True, b"hi"),
        Answer(2, False, codec.encode(Fault("busy", "m", "h"))),
        Answer(3, False, codec.encode(Fault("?", "m", "h"))),
        Answer(0, True, b""),
    ]
    for hello in (b"\0" + _RIGHT, b"\1"):
        yield join([hello, *(framed(request) for request in requests)])
        yield join([hello + b"".join(framed(answer) for answer in answers)])
        yield join([hello, framed(requests[0])[:5], framed(requests[0])[5:], b"\xff\xff\xff\xff"])
    wrong = Certificate(_MESH, PEER, ROLES, 1, b"x" * 64)
    for certificate in (wrong, Certificate("other", PEER, (), 0), Certificate(_MESH, NodeId("x"), ROLES, 2**53, b"")):
        greeting = Greeting(certificate, 2**60, b"", -(2**60), "n" * 300, ("a",) * 100, "", "")
        yield join([b"\0" + framed(Answer(0, True, codec.encode(greeting)))])
    yield join([b"\0" + framed(Answer(0, False, codec.encode(Fault("conflict", "twice", ""))))])
    yield join([b"\0" + framed(Answer(0, True, b"\x91" * 3000))])
