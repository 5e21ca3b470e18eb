"""The order of one turn: what must be on the disk before what may be said, and what is given up only after what.

    take up what threads finished ─▶ begin ─▶ (early frames) ─▶ sync ─▶ finish ─▶ flush ─▶ give disk back

A turn yields what is to be done with the disk and goes on when that is done. `log.py` does it
in threads, the simulators on virtual time: the order stands here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from meshd.errors import Busy, Corrupt, MeshError, PeerFault
from meshd.raft.agreement import Diverged
from meshd.raft.arrival import Arrived
from meshd.raft.server import Capture, Server
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.snapshot import (
    Image,
    Packed,
    load,
    pack_image,
    save,
    set_all_aside,
    set_newest_aside,
    unpack_image,
)
from meshd.raft.surroundings import Restore, StateMachine

FULL_PAUSE_S = 10.0
"""Between tries to write a snapshot to a disk without room."""

Work = Callable[[], None]
"""Blocks, for the disk; raises a MeshError when this server must stop."""


class Turns:
    def __init__(
        self, server: Server, journal: Journal, disk: Disk, mesh: str, machine: StateMachine, flush: Callable[[], None]
    ) -> None:
        """`flush` lets the frames leave that were staged."""
        self._server = server
        self._journal = journal
        self._disk = disk
        self._mesh = mesh
        self._machine = machine
        self._flush = flush
        # What beside a turn was finished is taken up by the next one: nothing else may touch the journal.
        self._finished: Callable[[], None] | None = None
        self._is_writing = False
        self._release_to: int | None = None
        self._packed: Packed | None = None
        self._is_packed_wanted = False
        self._replaced: Work | None = None
        self._full_until_s = float("-inf")
        self._is_damaged = False
        """The newest snapshot on the disk, until another is written."""

    def turn(self) -> Iterator[Work]:
        """One turn. Do each work that it yields before it goes on; nothing else may use the journal meanwhile."""
        try:
            yield from self._turn()
        except Diverged:
            # Its snapshots may hold the same wrong state, and the next start shall not begin with one.
            yield partial(set_all_aside, self._disk)
            raise

    def _turn(self) -> Iterator[Work]:
        server, journal = self._server, self._journal
        if (finished := self._finished) is not None:
            self._finished = None
            finished()
        if server.wants_look_at_disk:
            yield self._look_at_disk
        server.begin()
        if server.may_send_early:
            self._flush()
        if server.wants_sync:
            yield journal.commit
            server.synced()
        server.finish()
        self._flush()
        if not server.engine.is_sending_snapshot:
            self._packed = None  # up to a gigabyte, for nobody
        if self._release_to is not None and not journal.is_dirty:
            index, self._release_to = self._release_to, None
            yield partial(journal.release, index)

    def _look_at_disk(self) -> None:
        try:
            self._server.looked_at_disk(self._disk.room())
        except OSError as error:
            raise Corrupt(
                f"the disk does not tell its room: {error}", hint="check the disk, then start again"
            ) from error
        if not self._journal.is_reserve_whole:
            self._journal.refill_reserve()

    @property
    def has_finished(self) -> bool:
        """Something was finished beside: a turn is due."""
        return self._finished is not None

    # --- beside the turns, one at a time ------------------------------------------------------------------------------

    def beside(self) -> Work | None:
        """Snapshots to be received, sent or saved: ask after each turn, and do it in a thread while turns go on.

        Whoever is silent for as long as a large state takes would lose its vote.
        """
        if self._is_writing or self._finished is not None:
            return None
        work: Work
        is_full = self._server.now_s() < self._full_until_s
        if not is_full and (arrived := self._server.engine.arrived) is not None:
            work = partial(self._receive, arrived)
        elif self._replaced is not None:
            work, self._replaced = self._replaced, None
        elif self._is_packed_wanted and not self._is_damaged:
            work = self._load
        elif not is_full and (capture := self._server.capture()) is not None:
            work = partial(self._save, capture)
        else:
            return None
        self._is_writing = True
        return partial(self._write, work)

    def packed(self) -> Packed | None:
        """The newest snapshot as bytes, to be sent; None while it is fetched from the disk."""
        self._is_packed_wanted = self._packed is None
        return self._packed

    def _write(self, work: Work) -> None:
        try:
            work()
        finally:
            self._is_writing = False

    def _receive(self, arrived: Arrived) -> None:
        """Only a snapshot that is verified, unpacked and durable may replace anything."""
        try:
            data = bytes(arrived.data)
            image = unpack_image(data, digest=arrived.digest, mesh=self._mesh)
            restore = self._machine.unpack(image.state)
        except (PeerFault, Corrupt) as error:  # nothing of it was written: the sender's fault, not this disk's
            self._finished = partial(self._refused, arrived, error)
        else:
            packed = Packed(image.index, image.term, data, arrived.digest)
            if (older := self._saved_on_disk(packed)) is not None:
                self._finished = partial(self._received, image, restore, older)

    def _saved_on_disk(self, packed: Packed) -> int | None:
        """The index of the snapshot before it; None when the disk is full, which is tried again."""
        try:
            return save(self._disk, packed, self._journal.header)
        except Busy as error:
            self._finished = partial(self._found_no_room, error)
            return None

    def _found_no_room(self, error: Busy) -> None:
        self._server.report("raft.snapshot_found_no_room", {"why": str(error)})
        self._full_until_s = self._server.now_s() + FULL_PAUSE_S

    def _refused(self, arrived: Arrived, error: MeshError) -> None:
        self._server.report("raft.snapshot_refused", {"peer": arrived.peer, "why": str(error)})
        self._server.engine.discard_arrived()

    def _received(self, image: Image, restore: Restore, older: int) -> None:
        self._server.report("raft.snapshot_received", {"index": image.index})
        self._packed = None

        def replace() -> None:
            self._replaced = restore()

        self._server.install(image, replace)
        self._release_to = older

    def _save(self, capture: Capture) -> None:
        """Write the state down; the log behind it goes only then."""
        image = Image(self._mesh, capture.index, capture.term, capture.voters, capture.pack())
        packed = pack_image(image)
        if (older := self._saved_on_disk(packed)) is not None:
            self._finished = partial(self._saved, capture.index, older, len(packed.data))

    def _saved(self, index: int, older: int, size: int) -> None:
        self._server.report("raft.snapshot_saved", {"index": index})
        self._packed = None
        self._is_damaged = False
        self._server.saved(index, size)
        self._release_to = older

    def _load(self) -> None:
        try:
            self._finished = partial(self._loaded, load(self._disk, mesh=self._mesh))
        except Corrupt as error:
            # The state is in memory as well: nothing is lost, unless this server starts before it is written again.
            set_newest_aside(self._disk)
            self._finished = partial(self._found_damaged, error)

    def _found_damaged(self, error: Corrupt) -> None:
        self._server.report("raft.snapshot_damaged", {"why": str(error)})
        self._server.write_down_again()
        self._is_damaged = True

    def _loaded(self, packed: Packed | None) -> None:
        self._packed, self._is_packed_wanted = packed, False
