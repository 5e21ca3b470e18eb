"""Who is a member, as the mesh's own key vouches for it (protocol.md 1).

A server that was away for a week recognises a leader that it has never heard of by its
certificate, and workers new voters. A certificate admits frames; what counts in an
election is the configuration in the log.
"""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from meshd import codec
from meshd.errors import NotAllowed
from meshd.model import Certificate, EpochCertificate, KeyLink, NodeId, Role

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, data, signature) -> genuine?"""


class Greeting(Struct, frozen=True, array_like=True):
    """What a member says first on every stream of calls."""

    certificate: Certificate
    start_counter: int
    start_random: bytes
    wall_ms: int
    name: str
    addresses: tuple[str, ...]
    api_address: str
    version: str
    epoch: EpochCertificate = EpochCertificate()
    """The recovery epoch that it belongs to."""
    links: tuple[KeyLink, ...] = ()
    """The last changes of the mesh's key that it knows of."""


def mesh_id(public_key: bytes) -> str:
    """A mesh is named after its key, so nobody can claim another's name."""
    return blake3(b"meshd mesh\0" + public_key).hexdigest()[:20]


def certify(sign: Sign, mesh: str, node: NodeId, roles: tuple[Role, ...], version: int) -> Certificate:
    bare = Certificate(mesh, node, roles, version)
    return replace(bare, signature=sign(_signed_bytes(bare)))


def check(certificate: Certificate, mesh: str, public_key: bytes, node: NodeId, verify: Verify) -> None:
    """Raises NotAllowed unless the mesh's key vouches for this very node."""
    if certificate.mesh != mesh:
        raise NotAllowed(f"peer {node} belongs to mesh {certificate.mesh[:20]!r}, not to {mesh}")
    if certificate.node != node:
        raise NotAllowed(f"peer {node} showed the certificate of {certificate.node}")
    if not is_signed_by(public_key, certificate, verify):
        raise NotAllowed(f"the certificate of peer {node} is not signed by this mesh")


def is_signed_by(public_key: bytes, certificate: Certificate, verify: Verify) -> bool:
    return verify(public_key, _signed_bytes(certificate), certificate.signature)


def _signed_bytes(certificate: Certificate) -> bytes:
    roles = tuple(role.value for role in certificate.roles)
    return codec.pack(("meshd certificate", certificate.mesh, certificate.node, roles, certificate.version))
