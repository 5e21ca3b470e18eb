"""Servers hand the mesh's keys to each other: only to servers, only the right ones, and the next one before it counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from meshd import codec
from meshd.admission.authority import Authority, NextKeyCall
from meshd.admission.certificates import mesh_id
from meshd.admission.home import Home
from meshd.admission.keyring import KeyRing, make_link
from meshd.errors import MeshError, NotAllowed, Unavailable
from meshd.model import Member, NodeId, Role
from meshd.net.identity_key import KeyPair, verify

FIRST = KeyPair.generate()
MESH = mesh_id(FIRST.public_bytes)
Handler = Callable[[NodeId, bytes], Awaitable[bytes]]


class Mesh:
    """Some servers and a worker, whose calls arrive at once."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.handlers: dict[tuple[NodeId, str], Handler] = {}
        self.down: set[NodeId] = set()
        self.servers = [NodeId(name) for name in names]
        self.rings = {node: KeyRing(MESH, FIRST.public_bytes, verify) for node in self.servers}
        self.homes = {node: Home(directory / node) for node in self.servers}
        self.at = {node: self.start(node) for node in self.servers}

    def start(self, node: NodeId) -> Authority:
        if not self.homes[node].mesh_key.exists():
            FIRST.save(self.homes[node].mesh_key)
        return Authority(
            home=self.homes[node], me=node, mesh=MESH, keys=self.rings[node], ca_pem="", rpc=_Line(self, node),
            servers=lambda: [other for other in self.servers if other != node], find_member=self.member,
        )  # type: ignore[arg-type]  # fmt: skip

    async def member(self, node: NodeId) -> Member | None:
        await trio.lowlevel.checkpoint()
        return Member(node, "m", (Role.SERVER,) if node in self.servers else (Role.WORKER,))

    async def call(self, caller: str, node: NodeId, method: str, body: bytes) -> bytes:
        return await self.handlers[node, method](NodeId(caller), body)


class _Line:
    """ports.Rpc of one node, as far as it is used here."""

    def __init__(self, mesh: Mesh, me: NodeId) -> None:
        self._mesh = mesh
        self._me = me

    def register(self, method: str, handler: Handler) -> None:
        self._mesh.handlers[self._me, method] = handler

    async def call(self, peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        if peer in self._mesh.down:
            raise Unavailable(f"{peer} is down")
        return await self._mesh.call(self._me, peer, method, body)


async def test_the_next_key_is_on_every_server_that_stays_and_on_no_other(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, "a", "b", "c")
    a, b, c = mesh.servers
    links = await mesh.at[a].prepare_change(c)
    assert not mesh.rings[b].serial, "it does not count before the log names it"
    for node, has in ((a, True), (b, True), (c, False)):
        assert mesh.homes[node].later_key(links[-1].public_key).exists() is has
    for ring in mesh.rings.values():
        assert ring.take(links)
    assert mesh.at[a].holds_keys or not await mesh.at[a].obtain_keys()
    certificate = await mesh.at[b].certify(a, 1)
    assert mesh.rings[a].check(certificate, a)
    # One that was away gets it from another server, and finds it on its disk at the next start.
    mesh.servers.append(c)
    await mesh.at[c].obtain_keys()
    assert mesh.start(c).holds_keys


async def test_a_key_that_most_do_not_have_is_not_taken(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, "a", "b", "c", "d")
    a, b, c, d = mesh.servers
    mesh.down = {b, d}
    with pytest.raises(Unavailable, match="on 1 of the 3 servers that stay"):
        await mesh.at[a].prepare_change(c)
    mesh.down = {d}
    assert len(await mesh.at[a].prepare_change(c)) == 1


async def test_no_worker_gets_a_key_or_leaves_one_and_no_wrong_one_is_kept(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, "a", "b")
    a, b = mesh.servers
    successor, other = KeyPair.generate(), KeyPair.generate()
    good = make_link(FIRST.sign, MESH, 1, successor.public_bytes)
    forged = make_link(other.sign, MESH, 1, other.public_bytes)
    later = make_link(FIRST.sign, MESH, 2, successor.public_bytes)

    async def refused(caller: str, method: str, body: bytes) -> MeshError:
        with pytest.raises(NotAllowed) as caught:
            await mesh.call(caller, b, method, body)
        return caught.value

    assert "not a server" in (await refused("worker", "mesh.key", codec.encode(FIRST.public_bytes))).message
    call = NextKeyCall(good, successor.secret)
    assert "not a server" in (await refused("worker", "mesh.next_key", codec.encode(call))).message
    await refused(a, "mesh.next_key", codec.encode(NextKeyCall(good, other.secret)))
    await refused(a, "mesh.next_key", codec.encode(NextKeyCall(forged, other.secret)))
    await refused(a, "mesh.next_key", codec.encode(NextKeyCall(later, successor.secret)))
    assert not list(mesh.homes[b].path.glob("mesh.key.*"))
    await mesh.call(a, b, "mesh.next_key", codec.encode(call))
    await mesh.call(a, b, "mesh.next_key", codec.encode(call))  # resent
    assert mesh.homes[b].later_key(successor.public_bytes).stat().st_mode & 0o77 == 0
