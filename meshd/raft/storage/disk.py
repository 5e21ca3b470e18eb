"""The few things the journal and the snapshots need of a disk, so that tests can lose power.

All of it may block and belongs in a thread. A name is one file of one private directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshd.durable import make_directory, sync_directory
from meshd.errors import StartRefused


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of the disk that a directory is on."""

    free: int
    total: int


class OpenFile(Protocol):
    def write_at(self, offset: int, data: bytes) -> None: ...
    def reserve(self, size: int) -> None:
        """Its first `size` bytes are this file's own from now on, whoever fills the disk; unwritten ones read as zeros."""
        ...

    def sync(self) -> None: ...
    def close(self) -> None: ...


class Disk(Protocol):
    def names(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> OpenFile:
        """For writing, made if there is none; what is in it stays."""
        ...

    def rename(self, name: str, to: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def shorten(self, name: str, size: int) -> None:
        """Give back what lies behind."""
        ...

    def room(self) -> Room: ...
    def sync_directory(self) -> None:
        """After it, renames and removals outlive a loss of power."""
        ...


class DirectoryDisk:
    """A directory of the file system, private to this process."""

    def __init__(self, directory: Path) -> None:
        """Raises StartRefused when another process holds the directory."""
        make_directory(directory)
        self._directory = directory
        # Two processes appending to one journal would destroy it; the lock dies with its process.
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StartRefused(
                f"{directory} is in use by another agent", hint="stop it first, or start this one in another directory"
            ) from error

    def close(self) -> None:
        os.close(self._lock)

    def names(self) -> list[str]:
        return sorted(os.listdir(self._directory))

    def read(self, name: str) -> bytes:
        return (self._directory / name).read_bytes()

    def open(self, name: str) -> OpenFile:
        return _File(self._directory / name)

    def rename(self, name: str, to: str) -> None:
        os.rename(self._directory / name, self._directory / to)

    def remove(self, name: str) -> None:
        os.unlink(self._directory / name)

    def shorten(self, name: str, size: int) -> None:
        os.truncate(self._directory / name, size)

    def room(self) -> Room:
        status = os.statvfs(self._directory)
        return Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)

    def sync_directory(self) -> None:
        sync_directory(self._directory)


class _File:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write_at(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            # A file system that cannot: then a full disk is found out by the write, a little later.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def sync(self) -> None:
        # fdatasync also writes the file's size when it grew, which is all that reading it again needs.
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
