"""How a data directory comes to belong to a mesh: by founding one, or by knocking at a member's door.

mesh.json is the last file that either writes: a start that was cut short begins again from the same keys.
"""

from __future__ import annotations

import structlog
import trio

from meshd import certificates, tls
from meshd.epochs import EpochFile, check_epoch
from meshd.errors import NotAllowed, StartRefused
from meshd.greetings import CLOCK_OFF_MS
from meshd.home import Home, MeshFile
from meshd.invites import Invite
from meshd.join import JoinRequest, knock
from meshd.keyring import KeyRing
from meshd.model import Role
from meshd.net.identity_key import KeyPair, verify
from meshd.ports import Transport

JOIN_S = 20.0

log = structlog.get_logger()


def found_mesh(home: Home, key: KeyPair, name: str, roles: tuple[Role, ...]) -> MeshFile:
    """A new mesh with a key of its own. Raises StartRefused."""
    if Role.SERVER not in roles:
        raise StartRefused("the founder of a mesh is a server", hint="add --role server")
    mesh_key = KeyPair.load_or_create(home.mesh_key)
    mesh = certificates.mesh_id(mesh_key.public_bytes)
    mesh_file = MeshFile(
        mesh=mesh,
        public_key=mesh_key.public_bytes.hex(),
        ca_pem=tls.make_authority(mesh_key.private, mesh),
        certificate=certificates.certify(mesh_key.sign, mesh, key.node_id, roles, 1),
        name=name,
        is_founder=True,
    )
    home.write_mesh(mesh_file)
    return mesh_file


async def join_mesh(home: Home, key: KeyPair, invite: Invite, request: JoinRequest, transport: Transport) -> MeshFile:
    """Become a member through a `transport` that serves. Raises what `knock` raises; NotAllowed for a wrong mesh."""
    welcome = await knock(transport, invite, request, timeout_s=JOIN_S)
    if certificates.mesh_id(welcome.public_key) != invite.mesh:
        raise NotAllowed("who answered is not of the mesh that the invite names")
    keys = KeyRing(invite.mesh, welcome.public_key, verify, welcome.links)
    keys.check(welcome.certificate, key.node_id)
    if abs(offset_ms := welcome.wall_ms - request.wall_ms) > CLOCK_OFF_MS + JOIN_S * 1000:
        log.warning("clock.off", seconds=round(offset_ms / 1000, 1), against="the member that let us in")
    mesh_file = MeshFile(
        mesh=invite.mesh,
        public_key=welcome.public_key.hex(),
        ca_pem=welcome.ca_pem,
        certificate=welcome.certificate,
        name=request.name,
        key_links=keys.links,
    )
    check_epoch(welcome.epoch, invite.mesh, welcome.public_key, verify)
    known = {peer.node: peer for peer in welcome.members}
    await trio.to_thread.run_sync(home.write_peers, tuple(known[node] for node in sorted(known) if node != key.node_id))
    await trio.to_thread.run_sync(home.write_epochs, EpochFile(welcome.epoch))
    await trio.to_thread.run_sync(home.write_mesh, mesh_file)
    return mesh_file
