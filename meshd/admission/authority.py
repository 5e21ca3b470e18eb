"""The mesh's keys, held by servers: the newest certifies members, the first signs the certificates of their APIs.

A server gets them from another server over their authenticated stream, after the replicated
state says that it is a server; they are never in the state, the log or a snapshot (protocol.md 1).
With a server that is removed goes a copy, so the key that certifies is changed then: the next one
is on most of the servers that stay before the log names it (keyring.py). The authority of the
APIs stays as it is, since tokens name it.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog
import trio
from msgspec import Struct

from meshd import codec
from meshd.admission import certificates, tls
from meshd.admission.home import Home
from meshd.admission.keyring import KeyRing, make_link
from meshd.durable import replace_file
from meshd.errors import MeshError, NotAllowed, StartRefused, Unavailable
from meshd.model import Certificate, Count, KeyLink, Member, NodeId, Role
from meshd.net.identity_key import KeyPair
from meshd.ports import Rpc

CALL_S = 5.0

log = structlog.get_logger()


class CertifyCall(Struct, frozen=True, array_like=True):
    node: NodeId
    version: Count


class NextKeyCall(Struct, frozen=True, array_like=True):
    """For servers only; kept, and used once the log names it."""

    link: KeyLink
    secret: bytes


class Authority:
    """`members` answers from the replicated state, after the read barrier."""

    def __init__(
        self,
        *,
        home: Home,
        me: NodeId,
        mesh: str,
        keys: KeyRing,
        ca_pem: str,
        rpc: Rpc,
        servers: Callable[[], Sequence[NodeId]],
        members: Callable[[], Awaitable[Sequence[Member]]],
    ) -> None:
        self._home = home
        self._me = me
        self._mesh = mesh
        self._ring = keys
        self._ca_pem = ca_pem
        self._rpc = rpc
        self._servers = servers
        self._members = members
        self._keys: dict[bytes, KeyPair] = {}
        """By their public keys: the first and the newest, and what may become the newest."""
        for public_key in (keys.first, keys.newest):
            self._load(public_key)
        rpc.register("mesh.certify", self._on_certify)
        rpc.register("mesh.key", self._on_key)
        rpc.register("mesh.next_key", self._on_next_key)
        rpc.register("mesh.api_certificate", self._on_api_certificate)

    @property
    def holds_keys(self) -> bool:
        return {self._ring.first, self._ring.newest} <= self._keys.keys()

    async def certify(self, node: NodeId, version: int) -> Certificate:
        """The certificate of a member, with the roles that the state gives it. Raises NotAllowed, Unavailable."""
        if (key := self._keys.get(self._ring.newest)) is not None:
            return await self._certify(key, node, version)
        body = await self._ask_servers("mesh.certify", codec.encode(CertifyCall(node, version)))
        return codec.decode(body, Certificate)

    async def api_context(self, hosts: tuple[str, ...]) -> ssl.SSLContext:
        """For this node's API under these names; its certificate is got once, and kept. Raises what a call does, StartRefused."""
        key_file, certificate_file = self._home.path / "api.key", self._home.path / "api.pem"
        request = await trio.to_thread.run_sync(tls.make_request, key_file, self._me, hosts)
        context = await trio.to_thread.run_sync(tls.server_context, certificate_file, key_file)
        if context is None:
            try:
                pem = await self.api_certificate(request)
            except NotAllowed as error:
                # A worker beside a server, perhaps. `mesh` asks for the name that every node has.
                log.warning("api.certificate_without_hosts", error=str(error))
                pem = await self.api_certificate(
                    await trio.to_thread.run_sync(tls.make_request, key_file, self._me, ())
                )
            await trio.to_thread.run_sync(replace_file, certificate_file, pem.encode())
            context = await trio.to_thread.run_sync(tls.server_context, certificate_file, key_file)
        if context is None:
            raise StartRefused(f"{certificate_file} is not of the key {key_file}", hint="remove both, then start again")
        return context

    async def api_certificate(self, request_pem: str) -> str:
        """This node's API certificate, PEM, for its signing request."""
        if (key := self._keys.get(self._ring.first)) is not None:
            return tls.issue_leaf(key.private, self._ca_pem, self._me, tls.read_request(request_pem))
        return codec.decode(await self._ask_servers("mesh.api_certificate", codec.encode(request_pem)), str)

    async def obtain_keys(self) -> None:
        """What this server does not have it gets from another one, and keeps. Raises NotAllowed, Unavailable."""
        for public_key in dict.fromkeys((self._ring.first, self._ring.newest)):
            if not self._load(public_key):
                secret = codec.decode(await self._ask_servers("mesh.key", codec.encode(public_key)), bytes)
                await self._keep(KeyPair.from_secret(secret), public_key)

    async def prepare_change(self, without: NodeId) -> tuple[KeyLink, ...]:
        """All changes of the key, and one for the mesh without this server; the next key is on most of those that stay.

        Raises Unavailable, NotAllowed.
        """
        until_now = self._ring.links
        signer = self._own_key(self._ring.newest)
        successor = KeyPair.generate()
        public_key = successor.public_bytes
        link = make_link(signer.sign, self._mesh, len(until_now) + 1, public_key)
        await self._keep(successor, public_key)
        call = codec.encode(NextKeyCall(link, successor.secret))
        others = [server for server in self._servers() if server != without]
        kept = [self._me]

        async def hand_over(server: NodeId) -> None:
            try:
                await self._rpc.call(server, "mesh.next_key", call, timeout_s=CALL_S)
                kept.append(server)
            except MeshError as error:
                log.warning("mesh.next_key_not_kept", server=server, error=str(error))

        async with trio.open_nursery() as nursery:
            for server in others:
                nursery.start_soon(hand_over, server)
        if len(kept) * 2 <= len(others) + 1:
            raise Unavailable(
                f"the mesh's next key is on {len(kept)} of the {len(others) + 1} servers that stay: most must have it",
                hint="bring servers back first: `mesh cluster status`",
            )
        return (*until_now, link)

    async def _certify(self, key: KeyPair, node: NodeId, version: int) -> Certificate:
        member = await self._find_member(node)
        if member is None:
            raise NotAllowed(f"{node} is not a member of this mesh")
        return certificates.certify(key.sign, self._mesh, node, member.roles, version)

    async def _ask_servers(self, method: str, body: bytes) -> bytes:
        failure: MeshError = Unavailable("no server of this mesh is known here")
        for server in self._servers():
            try:
                return await self._rpc.call(server, method, body, timeout_s=CALL_S)
            except Unavailable as error:
                failure = error
        raise failure

    # --- asked by other members --------------------------------------------------------------------------------------

    async def _on_certify(self, peer: NodeId, body: bytes) -> bytes:
        call = codec.decode(body, CertifyCall)
        return codec.encode(await self._certify(self._own_key(self._ring.newest), call.node, call.version))

    async def _on_key(self, peer: NodeId, body: bytes) -> bytes:
        await self._check_server(peer)
        public_key = codec.decode(body, bytes)
        if public_key not in (self._ring.first, self._ring.newest):
            raise Unavailable("this node knows another key as the mesh's")
        return codec.encode(self._own_key(public_key).secret)

    async def _on_next_key(self, peer: NodeId, body: bytes) -> bytes:
        await self._check_server(peer)
        call = codec.decode(body, NextKeyCall)
        self._ring.check_next(call.link)
        await self._keep(KeyPair.from_secret(call.secret), call.link.public_key)
        return b""

    async def _on_api_certificate(self, peer: NodeId, body: bytes) -> bytes:
        key = self._own_key(self._ring.first)
        request_pem = codec.decode(body, str, bytes_max=16 << 10)
        request = tls.read_request(request_pem)
        check_hosts(peer, request.hosts, await self._members())
        return codec.encode(tls.issue_leaf(key.private, self._ca_pem, peer, request))

    async def _find_member(self, node: NodeId) -> Member | None:
        return next((member for member in await self._members() if member.node == node), None)

    async def _check_server(self, peer: NodeId) -> None:
        member = await self._find_member(peer)
        if member is None or Role.SERVER not in member.roles:
            raise NotAllowed(f"{peer} is not a server of this mesh")

    # --- on this disk ------------------------------------------------------------------------------------------------

    def _own_key(self, public_key: bytes) -> KeyPair:
        if not self._load(public_key):
            raise Unavailable("this node does not hold the mesh's key")
        return self._keys[public_key]

    def _load(self, public_key: bytes) -> bool:
        """From its file, unless it is here already. Raises StartRefused for a file that is damaged."""
        if public_key not in self._keys and (path := self._path(public_key)).exists():
            self._keys[public_key] = _checked(KeyPair.load(path), public_key)
        return public_key in self._keys

    async def _keep(self, key: KeyPair, public_key: bytes) -> None:
        _checked(key, public_key)
        if not self._load(public_key):
            await trio.to_thread.run_sync(key.save, self._path(public_key))
            self._keys[public_key] = key

    def _path(self, public_key: bytes) -> Path:
        return self._home.mesh_key if public_key == self._ring.first else self._home.later_key(public_key)


def check_hosts(asking: NodeId, hosts: Sequence[str], members: Sequence[Member]) -> None:
    """Raises NotAllowed for a worker that would be taken for a server, to which clients show what may do everything."""
    if not any(member.node == asking for member in members):
        raise NotAllowed(f"{asking} is not a member of this mesh")
    servers = [member for member in members if member.is_server]
    if any(server.node == asking for server in servers):
        return  # it holds the key and could sign for itself
    owners = {host: server.name for server in servers for host in _hosts_of(server)}
    for host in hosts:
        if host in owners and not _is_any_machine(host):
            raise NotAllowed(f"{host} belongs to the server {owners[host]} and not to {asking}")


def _hosts_of(member: Member) -> set[str]:
    """Also its name: unless told otherwise that is its machine's."""
    api_host = member.api_address.rpartition(":")[0].strip("[]")
    peer_hosts = [address.split("/")[2] for address in member.addresses if address.count("/") > 2]
    return {tls.canonical_host(host) for host in (member.name, api_host, *peer_hosts)}


def _is_any_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", "meshd")
    return address.is_loopback or address.is_unspecified


def _checked(key: KeyPair, public_key: bytes) -> KeyPair:
    if key.public_bytes != public_key:
        raise NotAllowed("this is not the key that it is said to be")
    return key
