"""This node's blobs: `ports.BlobStore` on a directory.

What is decided where: `disk` knows the files and their order of syncs, this module
which thread does it, who is told of changes, and how something large is written
piece by piece. A small blob costs one thread call in all.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import TypeVar

import trio
from blake3 import blake3

from meshd.blobs.disk import CHUNK_BYTES, FREE_BYTES_MIN, Disk, disk_errors, write_all
from meshd.errors import Conflict, NotFound, PeerFault
from meshd.model import BlobRef

DISK_THREADS_MAX = 8
"""More threads do not make one disk faster, and the rest of the agent needs its share of trio's 40."""

T = TypeVar("T")
OnChange = Callable[[str, bool], None]
"""(blob, is it here now). Called from the loop, must not wait."""


class Store:
    """Open it with `Store.open`. One process per directory: the agent's lock on its home sees to that."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._threads = trio.CapacityLimiter(DISK_THREADS_MAX)
        self._listeners: list[OnChange] = []
        self.keeps: Callable[[str], bool] = lambda blob: False
        """Names of blobs that nobody may remove."""

    @classmethod
    async def open(cls, directory: Path, *, free_bytes_min: int = FREE_BYTES_MIN, new_leaves_free: int = 0) -> Store:
        """Sweep what a crash left and read what is there. Raises StartRefused when the directory cannot be used.

        `new_leaves_free`: see `check_room_for_new`; 0 checks nothing.
        """
        disk = Disk(
            directory,
            free_bytes_min=free_bytes_min,
            new_leaves_free=new_leaves_free,
            checkpoint=trio.from_thread.check_cancelled,
        )
        store = cls(disk)
        await store._run(store._disk.open)
        return store

    @property
    def directory(self) -> Path:
        return self._disk.root

    def on_change(self, listener: OnChange) -> None:
        """Hear of every blob that comes or goes from now on."""
        self._listeners.append(listener)

    def has(self, blob: str) -> bool:
        return blob in self._disk.index

    def size(self, blob: str) -> int:
        try:
            return self._disk.index[blob]
        except KeyError:
            raise NotFound(f"blob {blob} is not on this node") from None

    # --- writing -----------------------------------------------------------------------------------------------------

    def path(self, blob: str) -> Path:
        """See ports.BlobStore. Raises NotFound."""
        self.size(blob)
        return self._disk.path_of(blob)

    async def check_room_for_new(self) -> None:
        """Ask before bytes are taken that can wait. Raises Busy."""
        await self._run(self._disk.check_room_for_new)

    async def create(self) -> Writer:
        await self._run(self._disk.check_room, 0)
        return Writer(self)

    async def put_bytes(self, data: bytes) -> BlobRef:
        return (await self.put_many([data]))[0]

    async def put_many(self, datas: Sequence[bytes]) -> list[BlobRef]:
        """Many small ones in one thread call, durable when it returns. Raises Busy when the disk is full."""
        if not datas:
            return []
        return await self._run(self._disk.put_many, datas)

    async def put_file(self, path: Path) -> BlobRef:
        """A copy of a regular file. Raises InvalidRequest for anything else, Busy when the disk is full."""

        def put() -> BlobRef:
            with disk_errors(f"read {path}"):
                # Non-blocking: opening a FIFO nobody writes to would hold the thread for ever.
                source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return self._disk.put_descriptor(source)
            finally:
                os.close(source)

        return await self._run(put)

    async def resume(self, ref: BlobRef) -> PartialBlob:
        """A file to put ranges of `ref` into, in any order; goes on where an earlier one of this process stopped."""
        await self._run(self._disk.check_room, ref.size)
        return PartialBlob(self, ref)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, blob: str, offset: int, length: int) -> bytes:
        """At most `length` bytes; whoever serves them to others calls `verify` before."""
        return await self._run(self._disk.read, blob, offset, length)

    async def verify(self, blob: str) -> None:
        """The whole blob is what its name says, checked once per process. Raises NotFound, Corrupt."""
        await self._run(self._disk.verify, blob)

    async def get_bytes(self, ref: BlobRef, *, bytes_max: int) -> bytes:
        return await self._run(partial(self._disk.get, ref, bytes_max=bytes_max))

    async def get_many(self, refs: Sequence[BlobRef], *, bytes_max: int) -> list[bytes]:
        """Many small ones in one thread call, each verified; `bytes_max` is for each."""
        if not refs:
            return []
        return await self._run(lambda: [self._disk.get(ref, bytes_max=bytes_max) for ref in refs])

    async def open_verified(self, ref: BlobRef) -> AsyncGenerator[bytes, None]:
        descriptor = await self._run(self._disk.open_blob, ref.hash)
        try:
            hasher, offset, held_back = blake3(), 0, b""

            def step() -> bytes:
                with disk_errors(f"read blob {ref.hash}"):
                    chunk = os.pread(descriptor, CHUNK_BYTES, offset)
                hasher.update(chunk)
                return chunk

            while chunk := await self._run(step):
                offset += len(chunk)
                if held_back:
                    yield held_back
                held_back = chunk
            if (hasher.hexdigest(), offset) != (ref.hash, ref.size):
                await self._run(self._disk.refuse, ref, descriptor)
            if held_back:
                yield held_back
        finally:
            os.close(descriptor)

    async def export(self, ref: BlobRef, target: Path, *, executable: bool = False) -> None:
        await self._run(partial(self._disk.export, ref, target, executable=executable))

    async def export_many(self, copies: Generator[tuple[BlobRef, Path, bool], None, None]) -> None:
        """See ports.BlobStore."""

        def export() -> None:
            with closing(copies):
                for ref, target, executable in copies:
                    self._disk.export(ref, target, executable=executable)

        await self._run(export)

    async def remove(self, blob: str) -> bool:
        """Raises Conflict when it has to be kept."""
        if self.keeps(blob):
            raise Conflict(
                f"blob {blob} is part of the history of finished jobs", hint="it goes when these are too old"
            )
        return await self._run(self._disk.remove, blob)

    async def list(self) -> Sequence[BlobRef]:
        index = self._disk.index.copy()
        return await self._run(lambda: [BlobRef(hash=blob, size=index[blob]) for blob in sorted(index)])

    async def page(self, *, prefix: str, after: str, limit: int) -> Sequence[BlobRef]:
        index = self._disk.index.copy()

        def find() -> Sequence[BlobRef]:
            # Not sorted whole: that is one call, in which no other thread gets the interpreter.
            names = nsmallest(limit, (blob for blob in index if blob > after and blob.startswith(prefix)))
            return [BlobRef(hash=blob, size=index[blob]) for blob in names]

        return await self._run(find)

    # --- in threads --------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await trio.to_thread.run_sync(work, *arguments, limiter=self._threads)
        finally:
            self._tell_changes()

    def _tell_changes(self) -> None:
        changes = self._disk.changes
        while changes:
            blob, is_here = changes.popleft()
            for listener in self._listeners:
                listener(blob, is_here)


class Writer:
    """A blob of unknown length, written in order."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._disk = store._disk
        self._path = self._disk.temporary_path()
        self._descriptor: int | None = None
        self._hasher = blake3()
        self._size = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_over = False

    async def write(self, data: bytes) -> None:
        assert not self._is_over
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= CHUNK_BYTES:
            await self._store._run(self._flush)

    async def commit(self, *, expected: BlobRef | None = None) -> BlobRef:
        assert not self._is_over
        return await self._store._run(partial(self._finish, expected))

    async def abort(self) -> None:
        """Nothing is left behind, also when the caller is being cancelled. Harmless after `commit`."""
        with trio.CancelScope(shield=True):
            await self._store._run(self._discard)

    def _flush(self) -> None:
        # With each piece, not only at the end: the reserve is what the journal on the same disk lives on.
        self._disk.check_room(self._waiting_bytes)
        with disk_errors("write a blob"):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            for chunk in self._waiting:
                self._hasher.update(chunk)
                write_all(self._descriptor, chunk)
                self._size += len(chunk)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _finish(self, expected: BlobRef | None) -> BlobRef:
        try:
            self._flush()
            ref = BlobRef(hash=self._hasher.hexdigest(), size=self._size)
            if expected is not None and ref != expected:
                raise PeerFault(f"these {ref.size} bytes are blob {ref.hash}, not {expected.hash} of {expected.size}")
            assert self._descriptor is not None
            with disk_errors(f"write blob {ref.hash}"):
                os.fsync(self._descriptor)
                self._disk.adopt([(self._path, ref)])
            return ref
        finally:
            self._discard()  # after `adopt` only the descriptor is left to close

    def _discard(self) -> None:
        if not self._is_over:
            self._is_over = True
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            with suppress(OSError):
                self._path.unlink()


class PartialBlob:
    """A blob that arrives as ranges in any order. What has arrived stays until `commit` or `discard`."""

    def __init__(self, store: Store, ref: BlobRef) -> None:
        self.ref = ref
        self._store = store
        self._disk = store._disk
        self._path = store.directory / "partial" / f"{ref.hash}-{ref.size}"

    async def write_at(self, offset: int, data: bytes) -> str:
        """Keep a range; returns its BLAKE3, by which a liar is found when the whole turns out wrong. Raises Busy."""

        def write() -> str:
            # With each range: others may have taken the room that there was at first.
            self._disk.check_room(len(data))
            with disk_errors(f"write a range of blob {self.ref.hash}"):
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    write_all(descriptor, data, offset)
                finally:
                    os.close(descriptor)
            return blake3(data).hexdigest()

        return await self._store._run(write)

    async def commit(self) -> bool:
        """Make it durable if it is `ref`. False when it is not; then the ranges are kept to be replaced."""

        def finish() -> bool:
            with disk_errors(f"write blob {self.ref.hash}"):
                descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if self._disk.hash_descriptor(descriptor) != (self.ref.hash, self.ref.size):
                        return False
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self._disk.adopt([(self._path, self.ref)])
            return True

        return await self._store._run(finish)

    async def discard(self) -> None:
        def unlink() -> None:
            with suppress(OSError):
                self._path.unlink()

        with trio.CancelScope(shield=True):
            await self._store._run(unlink)


def unique(refs: Iterable[BlobRef]) -> tuple[BlobRef, ...]:
    """Each once, in order of first mention."""
    return tuple(dict.fromkeys(refs))
