"""The journal's files: each begun complete beside, its room taken before it is written, some kept in reserve for a full disk.

    journal-N      a segment              journal-N.new  one being begun
    reserve-K      room for the next      *.bad-K        set aside, for people to look at

A full disk is found out by taking room, never by a write or a sync that may have done half
its work: then a reserved file becomes the next segment by its name, and nobody else can have
had its room. What a closed segment did not need goes back to the disk.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from meshd.raft.storage.disk import Disk, OpenFile
from meshd.raft.storage.frames import PREFIX, aligned, numbers, segment_name

RESERVE = "reserve-"
NEW = ".new"
BAD = ".bad-"


@dataclass(frozen=True, slots=True)
class JournalSizes:
    """Bytes."""

    segment: int = 64 << 20
    """A new segment begins beyond this: what one unlink gives back, and what one read at start holds in memory."""
    step: int = 4 << 20
    """Taken from the disk at a time: seldom enough to cost nothing, little enough for an idle node."""
    reserve: int = 4 << 20
    """Of one reserved file; several, because each start on a full disk needs one …"""
    reserves: int = 4
    """… and together they hold thousands of completions."""
    release: int = 4 << 20
    """A snapshot begins a new segment only when the present one is worth giving back."""


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Segments:
    """One is written at a time; `begin` the next, `name` it once it is synced. All of it blocks and may raise OSError."""

    def __init__(self, disk: Disk, sizes: JournalSizes) -> None:
        self.disk = disk
        self.sizes = sizes
        names = disk.names()
        self.number = max(_numbers_ever(names), default=-1)
        self._file: OpenFile | None = None
        self._has_bytes = 0
        self._reserves = [name for name in names if name.startswith(RESERVE) and name[len(RESERVE) :].isdigit()]

    @property
    def file(self) -> OpenFile:
        assert self._file is not None
        return self._file

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def bytes_left(self, offset: int) -> int:
        """What can be written for sure, on a disk however full, where the present segment has come to `offset`."""
        return max(0, self._has_bytes - offset) + len(self._reserves) * self.sizes.reserve

    def has_room_for_next(self) -> bool:
        """Without its reserve: else the present one can as well go on."""
        return self.disk.room().free > self.sizes.step

    def take(self, end: int) -> None:
        """Room for the present segment up to here."""
        if end > self._has_bytes:
            self._has_bytes = _taken(self.file, end, self.sizes.step)

    def begin(self, size: int) -> int:
        """A new file for at least so many bytes, under a name that no start looks at; its number."""
        self.close()
        self.number += 1
        beside = segment_name(self.number) + NEW
        try:
            self._file = self.disk.open(beside)
            self._has_bytes = _taken(self._file, size, self.sizes.step)
        except OSError as error:
            if not is_full(error) or not self._reserves or size > self.sizes.reserve:
                raise
            self.close()
            self.disk.rename(self._reserves.pop(), beside)
            self._file, self._has_bytes = self.disk.open(beside), self.sizes.reserve
        return self.number

    def name(self) -> None:
        """What was begun is complete and synced: it counts from now on, also after a loss of power."""
        self.disk.rename(segment_name(self.number) + NEW, segment_name(self.number))
        self.disk.sync_directory()

    def refill(self) -> None:
        """Put into reserve what is missing, as far as there is room."""
        missing = [name for name in (f"{RESERVE}{k}" for k in range(self.sizes.reserves)) if name not in self._reserves]
        try:
            for name in missing:
                file = self.disk.open(name + NEW)
                try:
                    file.reserve(self.sizes.reserve)
                    file.sync()
                finally:
                    file.close()
                self.disk.rename(name + NEW, name)
                self._reserves.append(name)
            if missing:
                self.disk.sync_directory()
        except OSError as error:
            if not is_full(error):
                raise
            if name + NEW in self.disk.names():  # a disk may be full of files as well: then it was not even made
                self.disk.remove(name + NEW)

    @property
    def is_reserve_whole(self) -> bool:
        return len(self._reserves) >= self.sizes.reserves

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def readable(disk: Disk, name: str) -> bytes:
    try:
        return disk.read(name)
    except OSError:
        return b""  # a disk that cannot give it back has damaged it


def set_aside(disk: Disk, name: str) -> str:
    """Out of the way of every start, and kept; its new name. Durable with the next sync of the directory."""
    taken = set(disk.names())
    aside = next(to for k in range(1, len(taken) + 2) if (to := f"{name}{BAD}{k}") not in taken)
    disk.rename(name, aside)
    return aside


def forget_unfinished(disk: Disk) -> None:
    """What a start before this one began and did not name."""
    for name in disk.names():
        if name.endswith(NEW) and name.startswith((PREFIX, RESERVE)):
            disk.remove(name)


def _taken(file: OpenFile, end: int, step: int) -> int:
    """A whole step where there is room for it, else what is needed now."""
    whole = -(-end // step) * step
    try:
        file.reserve(whole)
    except OSError as error:
        if not is_full(error) or (exact := aligned(end)) >= whole:
            raise
        file.reserve(exact)
        return exact
    return whole


def _numbers_ever(names: list[str]) -> list[int]:
    return numbers([name.partition(BAD)[0].removesuffix(NEW) for name in names])
