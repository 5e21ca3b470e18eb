"""What a node does about the recovery epochs that it has heard of: it follows one, or stops, and its disk says so first.

A worker has nothing to lose but its session. A server's log may hold what the recovery has
given up; merging it would bring some of that back, so it goes no further than its disk.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio
from msgspec import structs

from meshd.admission.certificates import Sign
from meshd.admission.home import Home
from meshd.errors import Busy, StartRefused
from meshd.net.identity_key import KeyPair
from meshd.raft.state.lineage import Lineage, descends, name_of
from meshd.raft.storage.disk import DirectoryDisk
from meshd.raft.storage.journal import journal_lineage
from meshd.recovery.epochs import EpochFile, Epochs, Follow, Torn, certify_epoch, choose

REJOIN_HINT = "`meshd rejoin` puts the old log aside; then start it, and it joins again as the same node"

log = structlog.get_logger()


def open_epochs(home: Home, mesh: str) -> EpochFile:
    """Which epoch this directory is of (blocks). Raises StartRefused for a log that a recovery has left behind, Corrupt."""
    file = home.epochs()
    journal = kept_lineage(home)
    if file.own.lineage and home.mesh_key.exists():
        # The mesh's key may be another one than when this was signed.
        file = structs.replace(file, own=certify_epoch(mesh_key(home), mesh, file.own.lineage))
    if journal is None:
        return file
    if journal == file.own.lineage:
        match choose(journal, file.heard):
            case Torn() as torn:
                raise torn.refusal()
            case Follow(to):
                raise left_behind(journal, to.lineage)
            case None:
                return file
    if not descends(journal, file.own.lineage):
        raise left_behind(journal, file.own.lineage)
    # `meshd recover` began the epoch here and was cut short before it said so.
    file = EpochFile(certify_epoch(mesh_key(home), mesh, journal))
    home.write_epochs(file)
    return file


def kept_lineage(home: Home) -> Lineage | None:
    """Of the journal in this directory (blocks); None when there is none. Raises Corrupt, StartRefused."""
    if not home.has_journal():
        return None
    disk = DirectoryDisk(home.raft)
    try:
        return journal_lineage(disk)
    finally:
        disk.close()


def mesh_key(home: Home) -> Sign:
    if not home.mesh_key.exists():
        raise StartRefused(
            f"{home.path} does not hold the mesh's key", hint="recover from a server that does: see its mesh.key"
        )
    return KeyPair.load(home.mesh_key).sign


def left_behind(ours: Lineage, theirs: Lineage) -> StartRefused:
    return StartRefused(
        f"the mesh was recovered without this server: it is at recovery {name_of(theirs)}, and the log here, of "
        f"recovery {name_of(ours)}, is never merged",
        hint=REJOIN_HINT,
    )


class Allegiance:
    """`holds_log`: is there a journal here, which may not be taken to another epoch?"""

    def __init__(self, home: Home, epochs: Epochs, *, holds_log: Callable[[], bool]) -> None:
        self._home = home
        self._epochs = epochs
        self._holds_log = holds_log

    async def settle(self) -> bool:
        """Whether this node has followed to another epoch; durable then.

        Raises StartRefused when its log was left behind. After Busy (no room on the disk) the next call does what this one could not.
        """
        epochs, ours = self._epochs, self._epochs.lineage
        decision = epochs.decide()
        if isinstance(decision, Follow):
            epochs.belong(decision.to)
        try:
            # Also what is not followed: `meshd rejoin --recovery` chooses from it.
            kept = await trio.to_thread.run_sync(self._remember, epochs.file())
        except Busy:
            if isinstance(decision, Follow) and self._holds_log():
                # It cannot wait for room as a server of one epoch with the log of another; the next start hears of it again.
                raise left_behind(ours, decision.to.lineage) from None
            raise
        if isinstance(decision, Torn) and self._holds_log():
            raise decision.refusal()
        if kept != epochs.lineage:
            if self._holds_log():
                raise left_behind(kept, epochs.lineage)
            log.warning("recovery.followed", recovery=name_of(epochs.lineage))
            return True
        if (torn := epochs.torn()) is not None:
            log.error("recovery.torn", stays=name_of(ours), why=torn.message, hint=torn.hint)
        return False

    def _remember(self, file: EpochFile) -> Lineage:
        """The epoch that the disk named until now: what memory says may be what an earlier call had no room for."""
        before = self._home.epochs()
        if file != before:
            self._home.write_epochs(file)
        return before.own.lineage
