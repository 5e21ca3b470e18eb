"""A stranger's request at the join desk, and what answers a stranger who knocks.

May be raised: MeshError. The desk answers and goes on; who knocks is told why not.
The first frame's first byte: 0 a request, 1 an answer; the frames are pieces of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from fuzz import world
from fuzz.inputs import join, split
from fuzz.world import PEER, GivenStream, GivenTransport
from meshd import codec
from meshd.admission import certificates, tls
from meshd.admission.founding import join_mesh
from meshd.admission.home import KnownPeer, MeshFile
from meshd.admission.invites import SECRET_BYTES, Door, Invite
from meshd.admission.join import JoinDesk, JoinRequest, Refusal, Welcome
from meshd.errors import MeshError, NotAllowed
from meshd.model import Certificate, EpochCertificate, Member, NodeId, Role
from meshd.net.identity_key import KeyPair
from meshd.raft.state.commands import AnyAnswer, Join, Joined

FRAMED = True
_KEY, _MESH_KEY = KeyPair.from_secret(b"k" * 32), KeyPair.from_secret(b"m" * 32)
_MESH = certificates.mesh_id(_MESH_KEY.public_bytes)
_CA_PEM = tls.make_authority(_MESH_KEY.private, _MESH)
_INVITE = Invite(_MESH, b"s" * SECRET_BYTES, (Role.WORKER,), (Door(PEER, ("/ip4/1.2.3.4/tcp/1",)),))
_REQUEST = JoinRequest(_MESH, b"s" * SECRET_BYTES, "name", ("/ip4/1.2.3.4/tcp/1",), "x:1", "0", 1_800_000_000_000)


def fuzz(data: bytes) -> None:
    frames = split(data)
    if frames and frames[0]:
        side = _knock if frames[0][0] % 2 else _answer
        world.run(lambda: side([frames[0][1:], *frames[1:]]))


async def _answer(pieces: list[bytes]) -> None:
    asked: list[Join] = []

    async def propose(command: Join) -> AnyAnswer:
        codec.decode(codec.encode(command), Join)  # what the log will carry
        asked.append(command)
        return Joined(Member(command.member.node, command.member.name, (Role.WORKER,)), 1)

    async def certify(node: NodeId, version: int) -> Certificate:
        return certificates.certify(_MESH_KEY.sign, _MESH, node, (Role.WORKER,), version)

    desk = JoinDesk(
        mesh=_MESH, public_key=_MESH_KEY.public_bytes, ca_pem=_CA_PEM, propose=propose, certify=certify,
        members=lambda: (KnownPeer(PEER, "p", ()),), wall_ms=lambda: 1_800_000_000_000, epoch=lambda: EpochCertificate(),
    )  # fmt: skip
    stream = GivenStream(pieces)
    await desk.answer(stream)
    assert stream.written, "a stranger was left without an answer"
    assert all(command.member.node == PEER for command in asked)


class _Home:
    """Where a node that has joined writes down what it was told; the agent reads it at the next start."""

    def write_peers(self, peers: tuple[KnownPeer, ...]) -> None:
        codec.encode(peers)

    def write_epochs(self, epochs: object) -> None:
        codec.encode(epochs)

    def write_mesh(self, mesh: MeshFile) -> None:
        codec.encode(mesh)


async def _knock(pieces: list[bytes]) -> None:
    transport = GivenTransport(_KEY.node_id, [GivenStream(pieces)])
    with suppress(MeshError):
        joined = await join_mesh(_Home(), _KEY, _INVITE, _REQUEST, transport)  # type: ignore[arg-type]
        with suppress(NotAllowed):
            assert joined.certificate.node == _KEY.node_id


def seeds() -> Iterator[bytes]:
    request = codec.encode(_REQUEST)
    yield join([b"\0" + request])
    yield join([b"\0" + request[:9], request[9:]])
    yield join([b"\0" + codec.encode(JoinRequest("other", b"", "n" * 300, ("a",) * 20, "", "", -5))])
    yield join([b"\0" + codec.encode(JoinRequest(_MESH, b"s", "n" * 300, ("a" * 400,) * 20, "x" * 300, "", 2**63))])
    yield join([b"\0" + b"\xc6\xff\xff\xff\xff", b"x" * 17_000])
    certificate = certificates.certify(_MESH_KEY.sign, _MESH, _KEY.node_id, (Role.WORKER,), 1)
    peers = (KnownPeer(PEER, "p", ("/ip4/1.2.3.4/tcp/1",)),)
    good = Welcome(_MESH_KEY.public_bytes, _CA_PEM, certificate, peers, 1_800_000_000_000)
    yield join([b"\1" + codec.encode(good)])
    yield join([b"\1" + codec.encode(Welcome(b"", "", certificate, (), 2**63))])
    yield join(
        [
            b"\1"
            + codec.encode(
                Welcome(_MESH_KEY.public_bytes, "no pem", Certificate(_MESH, PEER, (), 1), peers * 100, -(2**63))
            )
        ]
    )
    yield join([b"\1" + codec.encode(Refusal("not_allowed", "m", "h"))])
    yield join([b"\1" + codec.encode(Refusal("busy", "m", "h"))])
