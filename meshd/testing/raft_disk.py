"""A disk that remembers what was synced, and forgets the rest when the power goes; that rots, fails and fills up on demand.

Unsynced blocks reach the platter in any order, and the last sectors of one may not. What
else goes wrong is asked for: `flip` a durable bit, `fail_sync`, `fill`.
"""

from __future__ import annotations

import errno
from random import Random

from meshd.raft.storage.disk import Room

BLOCK = 4096
SECTOR = 512
BYTES_TOTAL = 1 << 40


class PowerCut(Exception):
    """The machine is off; whatever was being done is not."""


class _Content:
    def __init__(self) -> None:
        self.seen = bytearray()
        self.durable = bytearray()
        self.unsynced: list[tuple[int, bytes]] = []


def _put(target: bytearray, offset: int, data: bytes) -> None:
    if len(target) < offset + len(data):
        target.extend(bytes(offset + len(data) - len(target)))
    target[offset : offset + len(data)] = data


class MemoryDisk:
    """meshd.raft.storage.disk.Disk. `cut_in` loses power in the middle of the n-th operation from now."""

    def __init__(self, *, bytes_total: int = BYTES_TOTAL) -> None:
        self._files: dict[str, _Content] = {}
        self._durable_files: dict[str, _Content] = {}
        self._contents: dict[str, _Content] = {}
        self._changes: list[tuple[str, str, str]] = []
        self._cut_in: int | None = None
        self._fails_sync = False
        self._bytes_total = bytes_total
        self._bytes_of_others = 0
        self.syncs = 0

    # --- what goes wrong

    def cut_in(self, operations: int | None) -> None:
        self._cut_in = operations

    def lose_power(self, random: Random) -> None:
        """Each unsynced block, and some first of the unsynced renames, may or may not have reached the disk."""
        self._cut_in = None
        for change, name, to in self._changes[: random.randint(0, len(self._changes))]:
            self._do(self._durable_files, change, name, to)
        self._changes = []
        self._files = dict(self._durable_files)
        for content in self._files.values():
            for offset, data in content.unsynced:
                for start in range(0, len(data), BLOCK):
                    if random.random() < 0.5:
                        whole = data[start : start + BLOCK]
                        is_torn = random.random() < 0.2
                        written = whole[: random.randrange(0, len(whole) + 1, SECTOR)] if is_torn else whole
                        _put(content.durable, offset + start, written)
            content.unsynced = []
            content.seen = bytearray(content.durable)

    def be_killed(self) -> None:
        """Only the process dies: the kernel still has every byte."""
        self._cut_in = None

    def flip(self, name: str, bit: int) -> None:
        """A durable bit turns over; nobody is told."""
        content = self._files[name]
        for target in (content.durable, content.seen):
            if bit // 8 < len(target):
                target[bit // 8] ^= 1 << bit % 8

    def fail_sync(self) -> None:
        """The next sync reports an error, and what it should have written is gone with the power."""
        self._fails_sync = True

    def fill(self, *, leaving: int = 0) -> None:
        """Somebody else takes all that is free."""
        self._bytes_of_others = max(0, self._bytes_total - self._bytes_used() - leaving)

    def drain(self) -> None:
        """… and gives it back."""
        self._bytes_of_others = 0

    def is_durable(self, name: str) -> bool:
        """Name and bytes would outlive a loss of power now."""
        content = self._durable_files.get(name)
        return content is not None and not content.unsynced

    # --- the port

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return bytes(self._files[name].seen)

    def open(self, name: str) -> _File:
        self.step()
        if name not in self._files:
            self._files[name] = self._contents[name] = _Content()
            self._changes.append(("add", name, name))
        return _File(self, self._files[name])

    def rename(self, name: str, to: str) -> None:
        self.step()
        self._do(self._files, "rename", name, to)
        self._changes.append(("rename", name, to))

    def remove(self, name: str) -> None:
        self.step()
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
        self._do(self._files, "remove", name, name)
        self._changes.append(("remove", name, name))

    def shorten(self, name: str, size: int) -> None:
        """Durable at once: no caller may rest on its not being so."""
        self.step()
        content = self._files[name]
        del content.seen[size:], content.durable[size:]
        content.unsynced = [(offset, data[: size - offset]) for offset, data in content.unsynced if offset < size]

    def room(self) -> Room:
        return Room(self._bytes_total - self._bytes_used() - self._bytes_of_others, self._bytes_total)

    def sync_directory(self) -> None:
        self.step()
        self.syncs += 1
        for change, name, to in self._changes:
            self._do(self._durable_files, change, name, to)
        self._changes = []

    # --- names, room, power

    def _do(self, files: dict[str, _Content], change: str, name: str, to: str) -> None:
        match change:
            case "add":
                files[name] = self._contents[name]
            case "rename":
                files[to] = files.pop(name)
            case "remove":
                files.pop(name, None)

    def _bytes_used(self) -> int:
        return sum(-(-len(content.seen) // BLOCK) * BLOCK for content in self._files.values())

    def take_room(self, size: int) -> None:
        if size > self.room().free:
            raise OSError(errno.ENOSPC, "No space left on device")

    def take_sync_failure(self) -> bool:
        fails, self._fails_sync = self._fails_sync, False
        return fails

    def step(self) -> None:
        if self._cut_in is not None:
            self._cut_in -= 1
            if self._cut_in < 0:
                raise PowerCut


class _File:
    def __init__(self, disk: MemoryDisk, content: _Content) -> None:
        self._disk = disk
        self._content = content

    def write_at(self, offset: int, data: bytes) -> None:
        self._grow(offset + len(data))
        _put(self._content.seen, offset, data)
        self._content.unsynced.append((offset, data))
        self._disk.step()

    def reserve(self, size: int) -> None:
        self._disk.step()
        self._grow(size)
        if len(self._content.seen) < size:
            missing = size - len(self._content.seen)
            self._content.unsynced.append((len(self._content.seen), bytes(missing)))
            self._content.seen.extend(bytes(missing))

    def sync(self) -> None:
        self._disk.step()
        if self._disk.take_sync_failure():
            # The kernel marks the pages clean all the same: they are read back, and are gone with the power.
            self._content.unsynced = []
            raise OSError(errno.EIO, "Input/output error")
        self._disk.syncs += 1
        for offset, data in self._content.unsynced:
            _put(self._content.durable, offset, data)
        self._content.unsynced = []

    def close(self) -> None:
        pass

    def _grow(self, size: int) -> None:
        has = -(-len(self._content.seen) // BLOCK) * BLOCK
        if size > has:
            self._disk.take_room(size - has)
