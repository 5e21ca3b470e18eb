"""`meshd rejoin`: the same node joins its mesh again, with a new journal; the old one is put aside, never deleted.

For a server whose log may not go on: its directory is an older copy, or lost its journal, or the
mesh was recovered without it. Who may vote counts incarnations, so a new journal is a new voter.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from meshd.admission.home import Home
from meshd.errors import InvalidRequest, StartRefused
from meshd.model import Role
from meshd.raft.state.lineage import name_of
from meshd.recovery.epochs import EpochFile


def rejoin(home: Home, *, recovery: str = "") -> Path | None:
    """Where the old journal lies now; None when there was none. Blocks. Safe to repeat. Raises StartRefused, InvalidRequest."""
    mesh = home.mesh()
    if mesh is None:
        raise StartRefused(f"{home.path} belongs to no mesh yet", hint="join one: `meshd up --join INVITE`")
    if recovery:
        home.write_epochs(_chosen(home.epochs(), recovery))
    if Role.SERVER not in mesh.certificate.roles:
        if recovery:
            return None
        raise StartRefused(f"{home.path} is of a worker, which has no journal to give up", hint="start it: `meshd up`")
    others = [peer for peer in home.peers() if peer.certificate and Role.SERVER in peer.certificate.roles]
    if not others:
        raise StartRefused(
            "this directory knows of no other server: its journal may be all that there is of the mesh",
            hint="go on from it: `meshd recover`",
        )
    aside = home.put_journal_aside()
    home.write_mesh(replace(mesh, has_journal=False, is_founder=False, refused=""))
    return aside


def _chosen(file: EpochFile, recovery: str) -> EpochFile:
    """The directory belongs to the recovery of that name from now on."""
    known = {name_of(epoch.lineage): epoch for epoch in (file.own, *file.heard)}
    if recovery not in known:
        raise InvalidRequest(
            f"this directory has heard of no recovery {recovery}", hint=f"it knows {', '.join(sorted(known))}"
        )
    return EpochFile(known[recovery])
