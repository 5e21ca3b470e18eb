"""The mesh's own key, held by servers: it certifies members and signs the certificates of their APIs.

A server gets the key from another server over their authenticated stream, after the replicated
state says that it is a server; the key is never in the state, the log or a snapshot (protocol.md 1).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from msgspec import Struct

from meshd import certificates, codec, tls
from meshd.errors import InvalidRequest, MeshError, NotAllowed, Unavailable
from meshd.home import Home
from meshd.model import Certificate, Count, Member, NodeId, Role
from meshd.net.identity_key import KeyPair
from meshd.ports import Rpc

CALL_S = 5.0


class CertifyCall(Struct, frozen=True, array_like=True):
    node: NodeId
    version: Count


class Authority:
    """`find_member` answers from the replicated state, after the read barrier; None when there is no such member."""

    def __init__(
        self,
        *,
        home: Home,
        me: NodeId,
        mesh: str,
        public_key: bytes,
        ca_pem: str,
        rpc: Rpc,
        servers: Callable[[], Sequence[NodeId]],
        find_member: Callable[[NodeId], Awaitable[Member | None]],
    ) -> None:
        self._home = home
        self._me = me
        self._mesh = mesh
        self._public_key = public_key
        self._ca_pem = ca_pem
        self._rpc = rpc
        self._servers = servers
        self._find_member = find_member
        self._key: KeyPair | None = KeyPair.load(home.mesh_key) if home.mesh_key.exists() else None
        rpc.register("mesh.certify", self._on_certify)
        rpc.register("mesh.key", self._on_key)
        rpc.register("mesh.api_certificate", self._on_api_certificate)

    @property
    def holds_key(self) -> bool:
        return self._key is not None

    async def certify(self, node: NodeId, version: int) -> Certificate:
        """The certificate of a member, with the roles that the state gives it. Raises NotAllowed, Unavailable."""
        if self._key is not None:
            return await self._certify(self._key, node, version)
        body = await self._ask_servers("mesh.certify", codec.encode(CertifyCall(node, version)))
        return codec.decode(body, Certificate)

    async def api_certificate(self, request_pem: str) -> str:
        """This node's API certificate, PEM, for its signing request."""
        if self._key is not None:
            return tls.issue_leaf(self._key.private, self._ca_pem, request_pem)
        return codec.decode(await self._ask_servers("mesh.api_certificate", codec.encode(request_pem)), str)

    async def obtain_key(self) -> None:
        """Get the mesh's key from another server and keep it. Raises NotAllowed, Unavailable."""
        if self._key is not None:
            return
        secret = codec.decode(await self._ask_servers("mesh.key", b""), bytes)
        key = KeyPair.from_secret(secret)
        if key.public_bytes != self._public_key:
            raise NotAllowed("a server handed over a key that is not this mesh's")
        await trio.to_thread.run_sync(key.save, self._home.mesh_key)
        self._key = key

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
        return codec.encode(await self._certify(self._own_key(), call.node, call.version))

    async def _on_key(self, peer: NodeId, body: bytes) -> bytes:
        key = self._own_key()
        member = await self._find_member(peer)
        if member is None or Role.SERVER not in member.roles:
            raise NotAllowed(f"{peer} is not a server of this mesh")
        return codec.encode(key.secret)

    async def _on_api_certificate(self, peer: NodeId, body: bytes) -> bytes:
        key = self._own_key()
        request_pem = codec.decode(body, str, bytes_max=16 << 10)
        try:
            return codec.encode(tls.issue_leaf(key.private, self._ca_pem, request_pem))
        except Exception as error:
            raise InvalidRequest(f"not a certificate signing request: {type(error).__name__}") from error

    def _own_key(self) -> KeyPair:
        if self._key is None:
            raise Unavailable("this node does not hold the mesh's key")
        return self._key
