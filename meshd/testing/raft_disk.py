"""A disk that remembers what was synced, and forgets the rest when the power goes."""

from __future__ import annotations

from random import Random

BLOCK = 4096


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
    """meshd.raft.disk.Disk. `cut_in` loses power in the middle of the n-th operation from now."""

    def __init__(self) -> None:
        self._files: dict[str, _Content] = {}
        self._durable_files: dict[str, _Content] = {}
        self._contents: dict[str, _Content] = {}
        self._changes: list[tuple[str, str, str]] = []
        self._cut_in: int | None = None
        self.syncs = 0

    def cut_in(self, operations: int | None) -> None:
        self._cut_in = operations

    def _step(self) -> None:
        if self._cut_in is not None:
            self._cut_in -= 1
            if self._cut_in < 0:
                raise PowerCut

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
                        _put(content.durable, offset + start, data[start : start + BLOCK])
            content.unsynced = []
            content.seen = bytearray(content.durable)

    def be_killed(self) -> None:
        """Only the process dies: the kernel still has every byte."""
        self._cut_in = None

    # --- the port

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return bytes(self._files[name].seen)

    def open(self, name: str) -> _File:
        self._step()
        if name not in self._files:
            self._files[name] = self._contents[name] = _Content()
            self._changes.append(("add", name, name))
        return _File(self, self._files[name])

    def rename(self, name: str, to: str) -> None:
        self._step()
        self._do(self._files, "rename", name, to)
        self._changes.append(("rename", name, to))

    def remove(self, name: str) -> None:
        self._step()
        self._do(self._files, "remove", name, name)
        self._changes.append(("remove", name, name))

    def sync_directory(self) -> None:
        self._step()
        self.syncs += 1
        for change, name, to in self._changes:
            self._do(self._durable_files, change, name, to)
        self._changes = []

    # --- names

    def _do(self, files: dict[str, _Content], change: str, name: str, to: str) -> None:
        match change:
            case "add":
                files[name] = self._contents[name]
            case "rename":
                files[to] = files.pop(name)
            case "remove":
                files.pop(name, None)

    def step(self) -> None:
        self._step()


class _File:
    def __init__(self, disk: MemoryDisk, content: _Content) -> None:
        self._disk = disk
        self._content = content

    def write_at(self, offset: int, data: bytes) -> None:
        _put(self._content.seen, offset, data)
        self._content.unsynced.append((offset, data))
        self._disk.step()

    def sync(self) -> None:
        self._disk.step()
        self._disk.syncs += 1
        for offset, data in self._content.unsynced:
            _put(self._content.durable, offset, data)
        self._content.unsynced = []

    def close(self) -> None:
        pass
