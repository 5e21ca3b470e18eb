"""Blobs in a directory. Plain blocking code: `store` runs it in threads.

    root/            0700, files 0600
      whole/<hash>   a blob
      tmp/           being written; swept at start
      partial/       being fetched, ranges in any order; swept at start
      corrupt/       no longer what its name says; kept for people, never served

All blobs lie in one directory: a batch of small ones then costs one directory sync and
not one each, which on a busy disk was half of its time. File systems of today index
directories; ext4 takes some ten million names in one.

A blob is written beside, hashed on the way, fsynced, renamed, and its directory
fsynced; only then does `index` know it. So a crash between any two steps leaves
either the whole blob or nothing that anybody can see.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from meshd.durable import make_directory, sync_directory
from meshd.errors import Busy, Corrupt, InvalidRequest, MeshError, NotFound, StartRefused, TooLarge, Unavailable
from meshd.model import BlobRef
from meshd.room import soft_mark

CHUNK_BYTES = 1 << 20
"""One read, write or hash step: large enough that Python's share of the work is small, small enough to stop between."""

FREE_BYTES_MIN = 64 << 20
"""What all blobs leave free, so that a flood of them does not take the last bytes from the log on the same disk."""

SYNCS_MAX = 8
"""At a time: concurrent ones share the disk's own commits, which is what they cost."""

OPEN_MAX = 128
"""Small blobs written in one go; each is an open file until all of them are synced."""

VERIFIED_MAX = 65_536
"""Names remembered as checked by this process; about 10 MB. Past it the oldest is checked again when it is served."""

_FICLONE = 0x40049409
_NAME_LENGTH = 64
_DIGITS = frozenset("0123456789abcdef")

Checkpoint = Callable[[], None]
"""Called between chunks; raises when whoever waits for the work has given up."""


def is_blob_name(name: str) -> bool:
    return len(name) == _NAME_LENGTH and _DIGITS.issuperset(name)


class Disk:
    def __init__(
        self, root: Path, *, free_bytes_min: int = FREE_BYTES_MIN, new_leaves_free: int = 0, checkpoint: Checkpoint
    ) -> None:
        self.root = root
        self.index: dict[str, int] = {}
        """Size of every blob by its hash. Written in threads under the lock, read anywhere.

        A name goes from the directory and from here under one hold of the lock, so that neither is left with it alone.
        """
        self._free_bytes_min = free_bytes_min
        self._new_leaves_free = new_leaves_free
        self._checkpoint = checkpoint
        self.changes: deque[tuple[str, bool]] = deque()
        """(blob, is here now), in order, for whoever tells others; taken by the store after each piece of work."""
        self._lock = threading.Lock()
        self._verified: dict[str, None] = {}
        self._temporaries = itertools.count(1)
        self._syncs = ThreadPoolExecutor(SYNCS_MAX, "blob-sync")

    # --- opening -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the directory, sweep what a crash left, read what is there. Raises StartRefused."""
        try:
            make_directory(self.root)
            os.chmod(self.root, 0o700)
            for name in ("tmp", "partial"):
                shutil.rmtree(self.root / name, ignore_errors=True)
            for name in ("whole", "tmp", "partial", "corrupt"):
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
            sync_directory(self.root)
            self.index = dict(_blobs_in(self.root / "whole"))
            os.close(self._create_temporary())
            self._remove_temporaries()
        except (OSError, Busy) as error:
            raise StartRefused(
                f"blob directory {self.root} cannot be used: {error}", hint="check its owner, mode and disk"
            ) from error

    # --- writing -----------------------------------------------------------------------------------------------------

    def put_many(self, datas: Sequence[bytes]) -> list[BlobRef]:
        """Make all of them durable; of a batch that fails, those that came before may be there."""
        refs = [BlobRef(hash=blake3(data).hexdigest(), size=len(data)) for data in datas]
        fresh = [(ref, data) for ref, data in dict(zip(refs, datas, strict=True)).items() if not self.is_whole(ref)]
        self.check_room(sum(len(data) for _, data in fresh))
        for start in range(0, len(fresh), OPEN_MAX):
            self._put_open(fresh[start : start + OPEN_MAX])
        return refs

    def _put_open(self, fresh: Sequence[tuple[BlobRef, bytes]]) -> None:
        written: list[tuple[Path, BlobRef]] = []
        descriptors: list[int] = []
        with disk_errors("write blobs"):
            try:
                for ref, data in fresh:
                    path = self.temporary_path()
                    descriptors.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                    written.append((path, ref))
                    write_all(descriptors[-1], data)
                if len(descriptors) == 1:
                    os.fsync(descriptors[0])
                else:
                    syncs = [self._syncs.submit(os.fsync, descriptor) for descriptor in descriptors]
                    wait(syncs)  # all of them, before any descriptor is closed
                    for sync in syncs:
                        sync.result()
                self.adopt(written)
            except BaseException:
                _unlink_all(path for path, _ in written)
                raise
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def put_descriptor(self, source: int) -> BlobRef:
        """Copy an open regular file. Raises InvalidRequest for anything else, Busy when it does not fit."""
        with disk_errors("copy a file into the blob store"):
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequest("only regular files can be kept as blobs")
            self.check_room(status.st_size)
            path = self.temporary_path()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                hasher, size = blake3(), 0
                while chunk := os.read(source, CHUNK_BYTES):
                    size += len(chunk)
                    hasher.update(chunk)
                    write_all(descriptor, chunk)
                    self._checkpoint()
                ref = BlobRef(hash=hasher.hexdigest(), size=size)
                os.fsync(descriptor)
                self.adopt([(path, ref)])
            except BaseException:
                _unlink_all([path])
                raise
            finally:
                os.close(descriptor)
            return ref

    def adopt(self, written: Sequence[tuple[Path, BlobRef]]) -> None:
        """Give synced files their names and sync those. Raises OSError, Unavailable; then `index` knows none of them."""
        for path, ref in written:
            os.rename(path, self.path_of(ref.hash))
        sync_directory(self.root / "whole")
        with self._lock:
            for _, ref in written:
                # The sync takes long and holds no lock; an older blob of that name may have been taken away meanwhile, and this with it.
                if not self.path_of(ref.hash).exists():
                    raise Unavailable(f"blob {ref.hash} was removed while it was put", hint="put it again")
            for _, ref in written:
                if ref.hash not in self.index:
                    self.changes.append((ref.hash, True))
                self.index[ref.hash] = ref.size
                self._remember_verified(ref.hash)

    def is_whole(self, ref: BlobRef) -> bool:
        """Known, seen to be right by this process, and its file is still there with that size.

        Anything less is written anew: with the right bytes in hand nobody should find out later that the disk's are wrong.
        """
        if ref.hash not in self._verified or self.index.get(ref.hash) != ref.size:
            return False
        try:
            return os.stat(self.path_of(ref.hash)).st_size == ref.size
        except OSError:
            return False

    def check_room(self, bytes_wanted: int) -> None:
        """Raises Busy when writing so much would leave less than the reserve."""
        with disk_errors("look for room"):
            status = os.statvfs(self.root)
        free = status.f_bavail * status.f_frsize
        if free - bytes_wanted < self._free_bytes_min:
            raise Busy(
                f"blob store {self.root} has no room for {bytes_wanted} bytes: {free} free, "
                f"{self._free_bytes_min} of them kept for the log",
                hint="remove blobs with `mesh blob rm`, or give the node a larger disk",
            )

    def check_room_for_new(self) -> None:
        """For what can wait. Raises Busy below the soft mark, above which outputs and copies still find room."""
        if not self._new_leaves_free:
            return
        with disk_errors("look for room"):
            status = os.statvfs(self.root)
        free, mark = (
            status.f_bavail * status.f_frsize,
            soft_mark(status.f_blocks * status.f_frsize, self._new_leaves_free),
        )
        if free < mark:
            raise Busy(
                f"busy: disk full: {free} bytes are free at {self.root}, and {mark} are kept for what ends work",
                hint="remove blobs with `mesh blob rm`, give the node a larger disk, or ask another node",
            )

    def temporary_path(self) -> Path:
        return self.root / "tmp" / str(next(self._temporaries))

    def _create_temporary(self) -> int:
        return os.open(self.temporary_path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _remove_temporaries(self) -> None:
        _unlink_all((self.root / "tmp").iterdir())

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, blob: str, offset: int, length: int) -> bytes:
        """At most `length` bytes, fewer at the end. Not verified: see `verify`."""
        descriptor = self.open_blob(blob)
        try:
            with disk_errors(f"read blob {blob}"):
                return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def get(self, ref: BlobRef, *, bytes_max: int) -> bytes:
        if ref.size > bytes_max:
            raise TooLarge(f"blob {ref.hash} of {ref.size} bytes is over the limit of {bytes_max}")
        descriptor = self.open_blob(ref.hash)
        try:
            with disk_errors(f"read blob {ref.hash}"):
                # One byte more than promised: a file that grew is found out by its hash.
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    data = file.read(ref.size + 1)
                if len(data) != ref.size or blake3(data).hexdigest() != ref.hash:
                    self.refuse(ref, descriptor)
                return data
        finally:
            os.close(descriptor)

    def verify(self, blob: str) -> None:
        """Check the whole blob once per process. Raises NotFound, or Corrupt after putting it aside."""
        if blob in self._verified:
            return
        descriptor = self.open_blob(blob)
        try:
            with disk_errors(f"verify blob {blob}"):
                digest, size = self.hash_descriptor(descriptor)
        finally:
            os.close(descriptor)
        if digest != blob:
            raise self.put_aside(blob)
        with self._lock:
            if blob in self.index:
                self.index[blob] = size
                self._remember_verified(blob)

    def export(self, ref: BlobRef, target: Path, *, executable: bool) -> None:
        """A private, verified copy that may be written to. `target` must not exist."""
        source = self.open_blob(ref.hash)
        try:
            with disk_errors(f"copy blob {ref.hash} to {target}"):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                copy = os.open(target, flags, 0o700 if executable else 0o600)
                try:
                    digest, size = self._copy(source, copy)
                    if (digest, size) != (ref.hash, ref.size):
                        self.refuse(ref, source)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(target)
                    raise
                finally:
                    os.close(copy)
        finally:
            os.close(source)

    def _copy(self, source: int, copy: int) -> tuple[str, int]:
        """Digest and size of what was copied: the clone's own bytes where the file system can share them."""
        try:
            fcntl.ioctl(copy, _FICLONE, source)
        except OSError:
            hasher, size = blake3(), 0
            while chunk := os.read(source, CHUNK_BYTES):
                hasher.update(chunk)
                write_all(copy, chunk)
                size += len(chunk)
                self._checkpoint()
            return hasher.hexdigest(), size
        return self.hash_descriptor(copy)

    def hash_descriptor(self, descriptor: int) -> tuple[str, int]:
        """Digest and size of a whole file, wherever its position is."""
        hasher, size = blake3(), 0
        while chunk := os.pread(descriptor, CHUNK_BYTES, size):
            hasher.update(chunk)
            size += len(chunk)
            self._checkpoint()
        return hasher.hexdigest(), size

    def open_blob(self, blob: str) -> int:
        """A descriptor to read it. Raises NotFound."""
        if blob not in self.index:
            raise NotFound(f"blob {blob} is not on this node")
        try:
            return os.open(self.path_of(blob), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._lock:
                if not self.path_of(blob).exists():
                    self._forget(blob)
            raise NotFound(f"blob {blob} is not on this node: its file was removed") from None
        except OSError as error:
            raise _named(error, f"open blob {blob}") from error

    def refuse(self, ref: BlobRef, descriptor: int) -> None:
        """The bytes are not what was asked for: is the disk wrong, or the one who asks? Always raises."""
        digest, size = self.hash_descriptor(descriptor)
        if digest != ref.hash:
            raise self.put_aside(ref.hash)
        raise InvalidRequest(f"blob {ref.hash} has {size} bytes, not {ref.size}")

    # --- taking away -------------------------------------------------------------------------------------------------

    def put_aside(self, blob: str) -> Corrupt:
        """Rename it to where nothing is served from; returns the error to raise."""
        aside = self.root / "corrupt" / blob
        with self._lock:
            with suppress(OSError):
                os.rename(self.path_of(blob), aside)
            self._forget(blob)
        return Corrupt(f"blob {blob} on this disk is not what was written; put aside as {aside}", hint="fetch it again")

    def remove(self, blob: str) -> bool:
        if blob not in self.index:
            return False
        with self._lock:
            with disk_errors(f"remove blob {blob}"), suppress(FileNotFoundError):
                os.unlink(self.path_of(blob))
            return self._forget(blob)

    def _forget(self, blob: str) -> bool:
        """Under the lock."""
        self._verified.pop(blob, None)
        was_here = self.index.pop(blob, None) is not None
        if was_here:
            self.changes.append((blob, False))
        return was_here

    def _remember_verified(self, blob: str) -> None:
        self._verified[blob] = None
        if len(self._verified) > VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]

    def path_of(self, blob: str) -> Path:
        # A name from a peer reaches the file system only here.
        assert is_blob_name(blob), f"not a blob's name: {blob!r}"
        return self.root / "whole" / blob


@contextmanager
def disk_errors(doing: str) -> Generator[None, None, None]:
    """Whatever the operating system refuses becomes an error that says whose turn it is."""
    try:
        yield
    except OSError as error:
        raise _named(error, doing) from error


def _named(error: OSError, doing: str) -> MeshError:
    why = f"cannot {doing}: {error.strerror or error}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return Busy(why, hint="the disk is full: remove blobs with `mesh blob rm`, or give the node a larger one")
        case errno.EMFILE | errno.ENFILE:
            return Busy(why, hint="raise the limit of open files of the agent")
        case errno.EEXIST | errno.ELOOP | errno.ENOTDIR | errno.ENAMETOOLONG | errno.EISDIR:
            return InvalidRequest(why)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Unavailable(why, hint="check owner and mode of the directory, and that its disk is writable")
        case _:
            return Unavailable(why)


def _blobs_in(directory: Path) -> Generator[tuple[str, int], None, None]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_blob_name(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.name, entry.stat(follow_symlinks=False).st_size


def write_all(descriptor: int, data: bytes, offset: int | None = None) -> None:
    """All of it, at the file's position or at `offset`: one call may write less than it was given."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest) if offset is None else os.pwrite(descriptor, rest, offset)
        rest = rest[written:]
        offset = None if offset is None else offset + written


def _unlink_all(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
