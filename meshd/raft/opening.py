"""What a server finds on its disk as it starts: its newest snapshot, and the journal that goes on behind it.

Without either it begins a new incarnation, which votes only where it founds a mesh (protocol.md 1).
"""

from __future__ import annotations

from meshd.errors import Corrupt, StartRefused
from meshd.model import NodeId
from meshd.raft.disk import Disk
from meshd.raft.frames import LocalHeader
from meshd.raft.journal import Journal, create_journal, journal_names, open_journal
from meshd.raft.lineage import Lineage
from meshd.raft.messages import voter_id
from meshd.raft.snapshot import Image, load


def open_log(
    disk: Disk, *, mesh: str, lineage: Lineage, me: NodeId, is_founding: bool, random: str, incarnation: str
) -> tuple[Journal, Image | None]:
    """Blocks. `random` is this start's, `incarnation` counts where there is no journal yet. Raises Corrupt, StartRefused."""
    newest = load(disk, mesh=mesh)
    image = None if newest is None else newest[0]
    if journal_names(disk):
        if is_founding:
            raise StartRefused("a mesh is founded in an empty directory, and this one holds a journal")
        at = None if image is None else (image.index, image.term)
        return open_journal(disk, mesh=mesh, lineage=lineage, random=random, snapshot=at), image
    if image is not None:
        raise Corrupt("there is a snapshot here and no journal", hint="move the directory aside and start again")
    founding = (voter_id(me, incarnation),) if is_founding else ()
    header = LocalHeader(mesh, incarnation, 1, random, founding=founding, lineage=lineage)
    return create_journal(disk, header), None
