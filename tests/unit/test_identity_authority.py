"""Servers hand the mesh's keys to each other: only to servers, only the right ones, and the next one before it counts.

And they sign the API certificates of all nodes: each as itself, none as a server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from meshd import codec
from meshd.admission import tls
from meshd.admission.authority import Authority, NextKeyCall
from meshd.admission.certificates import mesh_id
from meshd.admission.home import Home
from meshd.admission.keyring import KeyRing, make_link
from meshd.errors import InvalidRequest, MeshError, NotAllowed, Unavailable
from meshd.model import Member, NodeId, Role
from meshd.net.identity_key import KeyPair, verify

FIRST = KeyPair.generate()
MESH = mesh_id(FIRST.public_bytes)
CA = tls.make_authority(FIRST.private, MESH)
WORKER = NodeId("worker")
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
        if node in self.servers and not self.homes[node].mesh_key.exists():
            FIRST.save(self.homes[node].mesh_key)
        return Authority(
            home=self.homes[node], me=node, mesh=MESH, keys=self.rings[node], ca_pem=CA, rpc=_Line(self, node),
            servers=lambda: [other for other in self.servers if other != node], members=self.members,
        )  # type: ignore[arg-type]  # fmt: skip

    async def members(self) -> list[Member]:
        await trio.lowlevel.checkpoint()
        servers = [
            Member(
                node,
                f"{node}-name",
                (Role.SERVER,),
                (f"/dns/{node}.lan/tcp/1", f"/ip6/fd00::{node}/tcp/1"),
                f"{node}.example.com:2",
            )
            for node in self.servers
        ]
        return [*servers, Member(WORKER, "w", (Role.WORKER,), ("/ip4/10.0.0.9/tcp/1",), "10.0.0.9:2")]

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


def request(directory: Path, *hosts: str, name: str = "worker") -> bytes:
    directory.mkdir(exist_ok=True)
    return codec.encode(tls.make_request(directory / "api.key", name, hosts))


async def test_a_worker_gets_an_api_certificate_for_its_own_hosts_by_the_name_that_its_connection_proves(
    tmp_path: Path,
) -> None:
    mesh = Mesh(tmp_path, "a", "b")
    asked = request(tmp_path / "api", "0.0.0.0", "10.0.0.9", "w.lan", name="a")
    pem = codec.decode(await mesh.call("worker", mesh.servers[0], "mesh.api_certificate", asked), str)
    leaf = x509.load_pem_x509_certificate(pem.encode())
    assert leaf.subject.rfc4514_string() == "CN=worker"
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["meshd", "localhost", "w.lan"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
        "0.0.0.0", "10.0.0.9", "127.0.0.1", "::1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "host", ["b.example.com", "B.EXAMPLE.com.", "b.lan", "b-name", "fd00::b", "fd00:0:0::b", "FD00::B"]
)
async def test_no_worker_gets_a_certificate_by_which_a_client_knows_a_server(tmp_path: Path, host: str) -> None:
    mesh = Mesh(tmp_path, "a", "b")
    with pytest.raises(NotAllowed, match="belongs to the server b-name"):
        await mesh.call("worker", mesh.servers[0], "mesh.api_certificate", request(tmp_path / "api", "10.0.0.9", host))
    with pytest.raises(NotAllowed, match="not a member"):
        await mesh.call("stranger", mesh.servers[0], "mesh.api_certificate", request(tmp_path / "api", "10.0.0.9"))
    # A server holds the key, and could sign for itself.
    await mesh.call("b", mesh.servers[0], "mesh.api_certificate", request(tmp_path / "api", host))


async def test_a_worker_that_shares_a_servers_machine_gets_one_for_the_names_that_every_node_has(
    tmp_path: Path,
) -> None:
    mesh = Mesh(tmp_path, "a", "b")
    mesh.homes[WORKER], mesh.rings[WORKER] = Home(tmp_path / "worker"), KeyRing(MESH, FIRST.public_bytes, verify)
    await mesh.start(WORKER).api_context(("0.0.0.0", "b.lan"))
    leaf = x509.load_pem_x509_certificate((tmp_path / "worker" / "api.pem").read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["meshd", "localhost"]


async def test_a_request_by_another_key_or_for_more_than_hosts_is_refused(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, "a")
    pem = codec.decode(request(tmp_path / "api", "10.0.0.9"), str)
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER))
    der[der.index(b"meshd")] ^= 1  # one of the names, after it was signed
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()

    def naming(*names: x509.GeneralName) -> str:
        key = generate_private_key(SECP256R1())
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    for bad in (
        forged,
        naming(x509.DNSName("*.example.com")),
        naming(x509.DNSName("a b")),
        naming(x509.UniformResourceIdentifier("https://b.example.com")),
        "-----BEGIN",
    ):
        with pytest.raises(InvalidRequest):
            await mesh.call("worker", mesh.servers[0], "mesh.api_certificate", codec.encode(bad))
