"""What a server finds on its disk as it starts: its newest snapshot, and the journal that goes on behind it.

Without either it begins a new incarnation, which votes only where it founds a mesh (protocol.md 1).
A snapshot that cannot be read is set aside: the one before it serves where the log joins it, else
the voter is in doubt and gets another from a peer.
"""

from __future__ import annotations

from meshd.errors import Corrupt, StartRefused
from meshd.model import NodeId
from meshd.raft.messages import voter_id
from meshd.raft.state.lineage import Lineage
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import Journal, create_journal, journal_names
from meshd.raft.storage.reopening import Found, open_journal
from meshd.raft.storage.segments import JournalSizes, is_full, set_aside
from meshd.raft.storage.snapshot import Image, newest_readable


def open_log(
    disk: Disk,
    *,
    mesh: str,
    lineage: Lineage,
    me: NodeId,
    is_founding: bool,
    random: str,
    incarnation: str,
    sizes: JournalSizes | None = None,
    is_recovery: bool = False,
) -> tuple[Journal, Image | None]:
    """Blocks. `is_recovery`: go on with what is left, whatever is lost. `random` is this start's, `incarnation` counts where there is no journal yet. Raises Corrupt, StartRefused."""
    try:
        image, damaged = newest_readable(disk, mesh=mesh)
        if not journal_names(disk):
            if image is not None or damaged:
                raise Corrupt(
                    "there is a snapshot here and no journal", hint="move the directory aside and start again"
                )
            founding = (voter_id(me, incarnation),) if is_founding else ()
            header = LocalHeader(mesh, incarnation, 1, random, founding=founding, lineage=lineage)
            return create_journal(disk, header, sizes), None
        if is_founding:
            raise StartRefused("a mesh is founded in an empty directory, and this one holds a journal")
        found = Found(
            None if image is None else (image.index, image.term), () if image is None else image.voters, damaged
        )
        journal = open_journal(
            disk, mesh=mesh, lineage=lineage, random=random, found=found, sizes=sizes, is_recovery=is_recovery
        )
        for name in damaged:
            set_aside(disk, name)
        if damaged:
            disk.sync_directory()
        return journal, image
    except OSError as error:
        hint = "make room on it, then start again" if is_full(error) else "check the disk, then start again"
        raise StartRefused(f"the log cannot be opened: {error}", hint=hint) from error
