"""How a data directory comes to belong to a mesh: by founding one, or by knocking at a member's door; or it does already.

mesh.json is the last file that either writes: a start that was cut short begins again from the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from meshd.admission import certificates, tls
from meshd.admission.greetings import CLOCK_OFF_MS
from meshd.admission.home import Home, MeshFile
from meshd.admission.invites import Invite
from meshd.admission.join import JoinRequest, knock
from meshd.admission.keyring import KeyRing
from meshd.errors import NotAllowed, StartRefused
from meshd.model import Role
from meshd.net.identity_key import KeyPair, verify
from meshd.ports import Transport
from meshd.recovery.allegiance import REJOIN_HINT
from meshd.recovery.epochs import EpochFile, check_epoch

JOIN_S = 20.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Founding: ...


@dataclass(frozen=True, slots=True)
class Joining:
    by: Invite


@dataclass(frozen=True, slots=True)
class Resuming:
    mesh_file: MeshFile


def how_to_begin(
    home: Path, mesh_file: MeshFile | None, invite: Invite | None, *, may_found: bool, has_journal: bool
) -> Founding | Joining | Resuming:
    """What a start does with its directory, by what is in it and what it was asked. Raises StartRefused."""
    if mesh_file is None:
        if invite is not None:
            return Joining(invite)
        if may_found:
            return Founding()
        raise StartRefused(
            f"{home} belongs to no mesh yet", hint="found one with `meshd up`, or join: `meshd up --join INVITE`"
        )
    if invite is not None and invite.mesh != mesh_file.mesh:
        raise StartRefused(
            f"{home} belongs to mesh {mesh_file.mesh}, the invite is for {invite.mesh}",
            hint="join with another --data-dir",
        )
    if mesh_file.has_journal and not has_journal:
        raise StartRefused(
            f"this identity has lost its journal: {home / 'raft'} is empty",
            hint="`meshd rejoin` lets it join again with a new one; or restore the directory",
        )
    if mesh_file.refused:
        raise StartRefused(mesh_file.refused, hint=REJOIN_HINT)
    return Resuming(mesh_file)


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
