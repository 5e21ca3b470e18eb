"""A disk that can be read and written without changing it: what a start would do to it happens in memory.

`meshd recover` looks at a directory, damaged or not, before its operator has agreed to anything.
"""

from __future__ import annotations

from meshd.raft.storage.disk import Disk, OpenFile, Room


class Rehearsal:
    """meshd.raft.storage.disk.Disk over another one, which is only ever read."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._files: dict[str, bytearray | None] = dict.fromkeys(disk.names())
        """None: as it is on the disk."""

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        content = self._files[name]
        return self._disk.read(name) if content is None else bytes(content)

    def open(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = bytearray()
        return _File(self._content(name))

    def rename(self, name: str, to: str) -> None:
        content = self._content(name)
        del self._files[name]
        self._files[to] = content

    def remove(self, name: str) -> None:
        del self._files[name]

    def shorten(self, name: str, size: int) -> None:
        del self._content(name)[size:]

    def room(self) -> Room:
        return self._disk.room()

    def sync_directory(self) -> None: ...

    def _content(self, name: str) -> bytearray:
        content = self._files[name]
        if content is None:
            content = self._files[name] = bytearray(self._disk.read(name))
        return content


class _File:
    def __init__(self, content: bytearray) -> None:
        self._content = content

    def write_at(self, offset: int, data: bytes) -> None:
        if len(self._content) < offset:
            self._content.extend(bytes(offset - len(self._content)))
        self._content[offset : offset + len(data)] = data

    def reserve(self, size: int) -> None:
        if len(self._content) < size:
            self._content.extend(bytes(size - len(self._content)))

    def sync(self) -> None: ...

    def close(self) -> None: ...
