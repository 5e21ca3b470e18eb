"""Directories as blobs, and back: what goes in is files only, what comes out stays in its directory.

    collect      files that patterns name in a job's working directory   -> Inline | TreeRef
    pack_tree    all files of a directory                                -> TreeRef
    materialise  a tree                                                  -> files in a directory

A job may leave anything behind: links that point out, FIFOs, a terabyte of nothing.
`match` finds files without following links, and sizes are judged before a byte is
read. A tree that comes from elsewhere is judged before anything is written.

In a tree, files up to 1 KiB are part of the list while that stays below 4 MiB: a
thousand small results are one blob on two disks, not a thousand. Empty directories
are not kept. Equal directories make equal trees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, TypeVar

import trio
from blake3 import blake3
from msgspec import Meta, Raw, Struct

from meshd import codec
from meshd.blobs.disk import disk_errors
from meshd.blobs.match import FILES_MAX, Found, check_path, find, open_directory, open_file
from meshd.errors import InvalidRequest
from meshd.model import INLINE_BYTES_MAX, BlobRef, Inline, Tree, TreeEntry, TreeRef
from meshd.ports import BlobStore

INLINE_FILE_BYTES_MAX = 1024
"""A file of this size in the list costs less than naming and syncing it as a blob."""

LIST_BYTES_MAX = 4 << 20
"""Of a list with files in it; one of names only may be larger, up to 100,000 files."""

ENTRIES_MAX = 3 << 20
"""The largest list that is read, 64 MiB, has room for no more; one that claims more is refused before memory is taken for them."""

ENTRY_BYTES = 96
"""An entry without its path and content, at most."""

SMALL_FILE_BYTES_MAX = 64 << 10
"""Read and written many at a time; larger ones are copied one by one."""

BATCH_BYTES = 4 << 20
"""Small files in memory at a time."""

OUTPUTS_BYTES_MAX = 16 << 30
"""Of one attempt. A sparse file counts with its full size: that is what it is for whoever fetches it."""

T = TypeVar("T")


async def collect(
    workdir: Path,
    patterns: Sequence[str],
    store: BlobStore,
    *,
    bytes_max: int = OUTPUTS_BYTES_MAX,
    inline_bytes_max: int = INLINE_BYTES_MAX,
) -> Inline | TreeRef | None:
    """What the patterns name (see `match`), in the store; in itself when it is that little. None for no patterns.

    Raises InvalidRequest (missing, a link, a FIFO, unreadable), TooLarge, Busy (disk full).
    """
    if not patterns:
        return None
    return await _pack(workdir, patterns, store, bytes_max, inline_bytes_max=inline_bytes_max)


async def pack_tree(directory: Path, store: BlobStore, *, bytes_max: int = OUTPUTS_BYTES_MAX) -> TreeRef:
    """All files of a directory. Raises as `collect` does."""
    packed = await _pack(directory, ["."], store, bytes_max, inline_bytes_max=0)
    assert isinstance(packed, TreeRef)
    return packed


@dataclass(frozen=True, slots=True)
class CheckedTree:
    """What `check_tree` let through: no path leads out, none is there twice."""

    entries: tuple[TreeEntry, ...]


async def materialise(tree: CheckedTree, target: Path, store: BlobStore) -> None:
    """Its files below `target`, which is made if it is not there. Everything it names must be in the store.

    Raises InvalidRequest (a path is taken), NotFound, Corrupt; what was written then stays.
    """
    await store.export_many(_lay_out(tree.entries, target))


class _Packed(Struct, frozen=True):
    """A `Tree` whose entries are still bytes."""

    entries: Annotated[tuple[Raw, ...], Meta(max_length=ENTRIES_MAX)]


def unpack_tree(data: bytes, *, bytes_max: int) -> Tree:
    """A tree from its list; for a thread. Raises InvalidRequest, TooLarge.

    Entry by entry: the decoder lets no other thread run before it is through, and of 100,000 files that is a quarter of a second.
    """
    packed = codec.decode(data, _Packed, bytes_max=bytes_max)
    return Tree(tuple(codec.decode(memoryview(entry), TreeEntry) for entry in packed.entries))


def check_tree(tree: Tree) -> CheckedTree:
    """Raises InvalidRequest for a tree that could not have come from a directory. A large one takes tenths of a second."""
    if len(tree.entries) > FILES_MAX:
        raise InvalidRequest(f"a tree of {len(tree.entries)} files is over the limit of {FILES_MAX}")
    directories: set[str] = set()
    files: set[str] = set()
    before = ""
    for entry in tree.entries:
        if check_path(entry.path) <= before:
            raise InvalidRequest(f"tree: {entry.path!r} is there twice or out of order")
        before = entry.path
        files.add(entry.path)
        above = entry.path.rpartition("/")[0]
        while above and above not in directories:
            directories.add(above)
            above = above.rpartition("/")[0]
    if both := files & directories:
        raise InvalidRequest(f"tree: {min(both)!r} is a file and a directory")
    return CheckedTree(tree.entries)


def refs_of(tree: Tree) -> list[BlobRef]:
    """The blobs that its files are, each once; not that of the list itself."""
    return list(dict.fromkeys(entry.content for entry in tree.entries if isinstance(entry.content, BlobRef)))


# --- packing ---------------------------------------------------------------------------------------------------------


async def _pack(
    directory: Path, patterns: Sequence[str], store: BlobStore, bytes_max: int, *, inline_bytes_max: int
) -> Inline | TreeRef:
    root = await _in_thread(lambda: _open_source(directory))
    try:
        found, small = await _in_thread(partial(_look, root, patterns, bytes_max, inline_bytes_max))
        bytes_total = sum(file.size for file in found)
        if isinstance(small, Inline):
            return small
        if small is not None:
            *_, blob = await store.put_many(small)
        else:
            entries = await _keep(root, found, store)
            blob = await store.put_bytes(codec.encode(Tree(entries)))
        return TreeRef(blob, files=len(found), bytes_total=bytes_total)
    finally:
        os.close(root)


def _look(
    root: int, patterns: Sequence[str], bytes_max: int, inline_bytes_max: int
) -> tuple[list[Found], Inline | list[bytes] | None]:
    """What there is; and, when it is little, all of it: one value, or the blobs to keep with the list as the last.

    So that few small files, which is what most attempts leave, are one trip to the disk and one sync.
    """
    found = find(root, patterns, bytes_max=bytes_max)
    bytes_total = sum(file.size for file in found)
    is_little = len(_batches(found)) <= 1 and all(file.size <= SMALL_FILE_BYTES_MAX for file in found)
    if not is_little:
        return found, None
    datas = _read_all(root, found)
    if bytes_total + sum(len(file.path) for file in found) <= inline_bytes_max:
        everything = [
            TreeEntry(file.path, Inline(data), file.executable) for file, data in zip(found, datas, strict=True)
        ]
        if len(encoded := codec.encode(Tree(tuple(everything)))) <= inline_bytes_max:
            return found, Inline(encoded)
    inline = _kept_in_list(found)
    blobs: list[bytes] = []
    entries: list[TreeEntry] = []
    for file, data in zip(found, datas, strict=True):
        content: BlobRef | Inline = Inline(data)
        if file.path not in inline:
            blobs.append(data)
            content = BlobRef(blake3(data).hexdigest(), len(data))
        entries.append(TreeEntry(file.path, content, file.executable))
    return found, [*blobs, codec.encode(Tree(tuple(entries)))]


def _kept_in_list(found: Sequence[Found]) -> set[str]:
    room = LIST_BYTES_MAX - sum(ENTRY_BYTES + len(file.path.encode()) for file in found)
    inline: set[str] = set()
    for file in found:
        if file.size <= INLINE_FILE_BYTES_MAX and file.size <= room:
            inline.add(file.path)
            room -= file.size
    return inline


async def _keep(root: int, found: Sequence[Found], store: BlobStore) -> tuple[TreeEntry, ...]:
    inline = _kept_in_list(found)
    contents: dict[str, BlobRef | Inline] = {}
    for batch in _batches([file for file in found if file.size <= SMALL_FILE_BYTES_MAX]):
        datas = await _in_thread(partial(_read_all, root, batch))
        kept = [(file, data) for file, data in zip(batch, datas, strict=True) if file.path not in inline]
        refs = await store.put_many([data for _, data in kept]) if kept else []
        contents |= {file.path: Inline(data) for file, data in zip(batch, datas, strict=True) if file.path in inline}
        contents |= {file.path: ref for (file, _), ref in zip(kept, refs, strict=True)}
    for file in found:
        if file.size > SMALL_FILE_BYTES_MAX:
            contents[file.path] = await _put_large(root, file, store)
    return tuple(TreeEntry(file.path, contents[file.path], file.executable) for file in found)


async def _put_large(root: int, file: Found, store: BlobStore) -> BlobRef:
    descriptor, status = await _in_thread(lambda: open_file(root, file.path))
    try:
        if status.st_size > file.size:
            raise InvalidRequest(f"{file.path!r} grew while it was collected")
        # The open file itself, by whatever name it has by now.
        return await store.put_file(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def _read_all(root: int, files: Sequence[Found]) -> list[bytes]:
    return [_read(root, file) for file in files]


def _read(root: int, file: Found) -> bytes:
    descriptor, _ = open_file(root, file.path)
    with os.fdopen(descriptor, "rb") as opened:
        data = opened.read(file.size + 1)
    if len(data) != file.size:
        raise InvalidRequest(f"{file.path!r} changed while it was collected")
    return data


def _batches(files: Sequence[Found]) -> list[list[Found]]:
    batches: list[list[Found]] = []
    room = 0
    for file in files:
        if not batches or file.size > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(file)
        room -= file.size + ENTRY_BYTES
    return batches


# --- laying out ------------------------------------------------------------------------------------------------------


def _lay_out(files: Sequence[TreeEntry], target: Path) -> Generator[tuple[BlobRef, Path, bool], None, None]:
    """Makes the directories and writes what is in the list itself; yields what is to be copied."""
    root = _open_target(target)
    try:
        for above, entries in groupby(files, key=lambda entry: entry.path.split("/")[:-1]):
            trio.from_thread.check_cancelled()
            with (
                disk_errors(f"lay out {'/'.join(above) or 'files'}"),
                open_directory(root, above, create=True) as directory,
            ):
                for entry in entries:
                    if isinstance(entry.content, Inline):
                        _write(directory, entry, entry.content.data)
                    else:
                        # Through the open directory: what its path leads to may have changed.
                        path = f"/proc/self/fd/{directory}/{entry.path.rpartition('/')[2]}"
                        yield entry.content, Path(path), entry.executable
    finally:
        os.close(root)


def _write(directory: int, entry: TreeEntry, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    name = entry.path.rpartition("/")[2]
    descriptor = os.open(name, flags, 0o700 if entry.executable else 0o600, dir_fd=directory)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _open_source(directory: Path) -> int:
    with disk_errors(f"read {directory}"):
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _open_target(target: Path) -> int:
    with disk_errors(f"make {target}"):
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
