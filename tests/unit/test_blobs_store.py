"""A node's blobs on disk: whole or not there, and never wrong."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from blake3 import blake3

from meshd.blobs import disk
from meshd.blobs.store import Store
from meshd.errors import (
    Busy,
    Corrupt,
    InvalidRequest,
    MeshError,
    NotFound,
    PeerFault,
    StartRefused,
    TooLarge,
    Unavailable,
)
from meshd.model import BlobRef

MIB = 1 << 20


def ref_of(data: bytes) -> BlobRef:
    return BlobRef(blake3(data).hexdigest(), len(data))


def file_of(store: Store, ref: BlobRef) -> Path:
    return store.directory / "whole" / ref.hash


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


async def read_all(store: Store, ref: BlobRef) -> bytes:
    return b"".join([chunk async for chunk in store.open_verified(ref)])


async def test_what_is_put_can_be_read_in_every_way(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    data = os.urandom(3 * MIB + 17)
    ref = await store.put_bytes(data)
    assert ref == ref_of(data) and store.has(ref.hash) and store.size(ref.hash) == len(data)
    assert await store.get_bytes(ref, bytes_max=len(data)) == data
    assert await read_all(store, ref) == data
    assert await store.read(ref.hash, MIB, 10) == data[MIB : MIB + 10]
    assert await store.list() == [ref]
    await store.export(ref, tmp_path / "copy", executable=True)
    assert (tmp_path / "copy").read_bytes() == data


async def test_blobs_are_listed_in_order_page_by_page(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    refs = sorted([await store.put_bytes(bytes([n])) for n in range(40)], key=lambda ref: ref.hash)
    assert await store.page(prefix="", after="", limit=3) == refs[:3]
    assert await store.page(prefix="", after=refs[2].hash, limit=100) == refs[3:]
    alike = [ref for ref in refs if ref.hash[0] == refs[20].hash[0]]
    assert await store.page(prefix=alike[0].hash[0], after=alike[0].hash, limit=100) == alike[1:]


async def test_a_name_is_what_b3sum_prints(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    # The test vector of BLAKE3 for no input, and b3sum itself where it is installed.
    assert (await store.put_bytes(b"")).hash == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    ref = await store.put_bytes(b"mesh" * 5000)
    if b3sum := shutil.which("b3sum"):
        assert subprocess.check_output([b3sum, file_of(store, ref)], text=True).split()[0] == ref.hash


async def test_an_empty_blob_is_a_blob(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"")
    assert await read_all(store, ref) == b"" == await store.get_bytes(ref, bytes_max=0)


async def test_a_blob_written_in_pieces_is_invisible_until_it_is_committed(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    writer = await store.create()
    pieces = [os.urandom(700_000) for _ in range(5)]
    for piece in pieces:
        await writer.write(piece)
    assert await store.list() == []
    ref = await writer.commit(expected=ref_of(b"".join(pieces)))
    assert await store.get_bytes(ref, bytes_max=ref.size) == b"".join(pieces)
    await writer.abort()
    assert store.has(ref.hash)


async def test_an_aborted_or_wrong_blob_leaves_nothing(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    writer = await store.create()
    await writer.write(b"x" * 2 * MIB)
    await writer.abort()
    writer = await store.create()
    await writer.write(b"y")
    with pytest.raises(PeerFault):
        await writer.commit(expected=ref_of(b"z"))
    assert files_in(store.directory) == set() and await store.list() == []


async def test_blobs_are_private_and_exports_may_be_written_to(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"secret")
    file = file_of(store, ref)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (store.directory, file.parent, file)] == [0o700, 0o700, 0o600]
    await store.export(ref, tmp_path / "copy")
    (tmp_path / "copy").write_bytes(b"changed")
    assert await store.get_bytes(ref, bytes_max=100) == b"secret"


async def test_an_export_never_follows_or_replaces_what_is_there(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"data")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for target in ("victim", "link"):
        with pytest.raises(InvalidRequest):
            await store.export(ref, tmp_path / target)
    assert (tmp_path / "victim").read_text() == "mine"


async def test_a_restart_finds_whole_blobs_and_sweeps_the_rest(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"kept")
    (store.directory / "tmp" / "7").write_bytes(b"torn")
    (store.directory / "partial" / "x").write_bytes(b"torn")
    (store.directory / "whole" / "stray").write_bytes(b"not a blob")
    again = await Store.open(tmp_path / "blobs")
    assert await again.list() == [ref]
    assert files_in(again.directory) == {f"whole/{ref.hash}", "whole/stray"}


@pytest.mark.parametrize("count", [1, 3])
async def test_a_name_appears_after_its_bytes_are_synced_and_counts_after_its_directory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    store = await Store.open(tmp_path / "blobs")
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        steps.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        assert not store._disk.index

    def note_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", note_fsync)
        patch.setattr(disk.os, "rename", note_rename)
        await store.put_many([bytes([number]) * 100 for number in range(count)])
    assert steps == ["sync file"] * count + ["rename"] * count + ["sync directory"]
    assert len(await store.list()) == count


class PowerCut(BaseException):
    """The process is gone: nothing after this runs."""


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_crash_at_any_step_leaves_a_whole_blob_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    store = await Store.open(tmp_path / "blobs")
    datas = [os.urandom(5000), os.urandom(5000)]
    calls = 0
    real = getattr(os, step)

    def crash(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            if step == "write":
                real(arguments[0], bytes(arguments[1])[:100])
            raise PowerCut
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, step, crash)
        patch.setattr(disk, "_unlink_all", lambda _paths: None)  # a dead process does not clean up
        with suppress(PowerCut):
            await store.put_many(datas)
    again = await Store.open(tmp_path / "blobs")
    for ref in await again.list():
        assert await again.get_bytes(ref, bytes_max=5000) in datas
    assert not any((again.directory / "tmp").iterdir())
    assert calls >= min(nth, 2)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, Busy),
        (errno.EDQUOT, Busy),
        (errno.EROFS, Unavailable),
        (errno.EACCES, Unavailable),
        (errno.EIO, Unavailable),
    ],
)
async def test_a_refusing_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[MeshError]
) -> None:
    store = await Store.open(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(b"z" * 3 * MIB)

    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    writer = await store.create()
    await writer.write(b"w" * 10)
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", refuse)
        for put in (lambda: store.put_bytes(b"x"), lambda: store.put_file(source), lambda: writer.commit()):
            with pytest.raises(kind, match=os.strerror(number)):
                await put()
    assert files_in(store.directory) == set() and await store.list() == []
    assert store.has((await store.put_bytes(b"x")).hash)


async def test_blobs_leave_room_for_the_log(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs", free_bytes_min=2**62)
    (tmp_path / "file").write_bytes(b"x")
    puts: list[Callable[[], Any]] = [
        store.create, lambda: store.put_bytes(b"x"), lambda: store.put_file(tmp_path / "file"),
        lambda: store.resume(ref_of(b"x")),
    ]  # fmt: skip
    for put in puts:
        with pytest.raises(Busy, match="no room"):
            await put()


async def test_a_directory_that_cannot_be_used_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartRefused, match="file"):
        await Store.open(tmp_path / "file" / "blobs")


@pytest.mark.parametrize("damage", [b"wrong", b"righ", b"right and more", b""])
async def test_a_damaged_blob_is_put_aside_and_never_returned(tmp_path: Path, damage: bytes) -> None:
    ref = ref_of(b"right")

    async def damaged(name: str) -> Store:
        store = await Store.open(tmp_path / name)
        await store.put_bytes(b"right")
        file_of(store, ref).write_bytes(damage)
        return await Store.open(tmp_path / name)

    async def get(store: Store) -> None:
        await store.get_bytes(ref, bytes_max=100)

    async def read(store: Store) -> None:
        await read_all(store, ref)

    async def export(store: Store) -> None:
        await store.export(ref, tmp_path / "copy")

    async def verify(store: Store) -> None:
        await store.verify(ref.hash)

    for number, use in enumerate((get, read, export, verify)):
        store = await damaged(str(number))
        heard: list[tuple[str, bool]] = []
        store.on_change(lambda blob, is_here, heard=heard: heard.append((blob, is_here)))
        with pytest.raises(Corrupt, match=ref.hash):
            await use(store)
        assert heard == [(ref.hash, False)] and not store.has(ref.hash)
        assert (store.directory / "corrupt" / ref.hash).read_bytes() == damage
        assert not (tmp_path / "copy").exists()
        assert await store.put_bytes(b"right") == ref
        assert await store.get_bytes(ref, bytes_max=100) == b"right"


async def test_a_large_blob_that_goes_bad_is_never_yielded_to_its_end(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    data = os.urandom(3 * MIB)
    ref = await store.put_bytes(data)
    file_of(store, ref).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    seen = b""
    with suppress(Corrupt):
        async for chunk in store.open_verified(ref):
            seen += chunk
    assert data.startswith(seen) and len(seen) < len(data)


async def test_a_wrong_size_is_the_fault_of_who_asks(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"right")
    for size in (4, 6):
        with pytest.raises(InvalidRequest, match="5 bytes"):
            await store.get_bytes(BlobRef(ref.hash, size), bytes_max=100)
    assert store.has(ref.hash)


async def test_what_is_not_there_or_too_large_is_said(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    missing = ref_of(b"missing")
    for use in (
        lambda: store.get_bytes(missing, bytes_max=100),
        lambda: store.read(missing.hash, 0, 1),
        lambda: store.export(missing, tmp_path / "copy"),
        lambda: read_all(store, missing),
    ):
        with pytest.raises(NotFound):
            await use()
    with pytest.raises(TooLarge):
        await store.get_bytes(await store.put_bytes(b"x" * 100), bytes_max=99)


async def test_a_blob_whose_file_was_deleted_is_not_there_and_can_be_put_again(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    ref = await store.put_bytes(b"data")
    file_of(store, ref).unlink()
    assert await store.put_bytes(b"data") == ref
    assert await store.get_bytes(ref, bytes_max=10) == b"data"
    file_of(store, ref).unlink()
    with pytest.raises(NotFound):
        await store.read(ref.hash, 0, 1)
    assert not store.has(ref.hash)


async def test_a_copy_that_went_bad_unseen_is_replaced_by_good_bytes_that_are_put(tmp_path: Path) -> None:
    ref = await (await Store.open(tmp_path / "blobs")).put_bytes(b"right")
    (tmp_path / "blobs" / "whole" / ref.hash).write_bytes(b"wrong")
    store = await Store.open(tmp_path / "blobs")
    assert await store.put_bytes(b"right") == ref
    assert await store.get_bytes(ref, bytes_max=100) == b"right"


def opened(root: Path) -> disk.Disk:
    opened = disk.Disk(root, free_bytes_min=0, checkpoint=lambda: None)
    opened.open()
    return opened


def test_a_blob_removed_before_its_put_is_durable_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = opened(tmp_path / "blobs")
    (ref,) = blobs.put_many([b"data"])
    (tmp_path / "file").write_bytes(b"data")
    removed: list[bool] = []

    def removed_meanwhile(directory: Path) -> None:
        monkeypatch.undo()
        removed.append(blobs.remove(ref.hash))

    monkeypatch.setattr(disk, "sync_directory", removed_meanwhile)
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(Unavailable, match="removed while it was put"):
            blobs.put_descriptor(file.fileno())
        assert removed == [True] and ref.hash not in blobs.index
        file.seek(0)
        assert blobs.put_descriptor(file.fileno()) == ref
    assert blobs.get(ref, bytes_max=10) == b"data"


def test_a_blob_put_while_it_is_removed_is_known_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = opened(tmp_path / "blobs")
    (ref,) = blobs.put_many([b"data"])
    unlink = os.unlink

    def put_meanwhile(path: Path) -> None:
        monkeypatch.undo()
        unlink(path)
        putting.start()
        putting.join(0.2)  # it may have to wait for the end of this

    putting = threading.Thread(target=blobs.put_many, args=([b"data"],))
    monkeypatch.setattr(os, "unlink", put_meanwhile)
    assert blobs.remove(ref.hash)
    putting.join(10)
    assert ref.hash in blobs.index and blobs.path_of(ref.hash).exists()


async def test_every_coming_and_going_is_told_once(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    heard: list[tuple[str, bool]] = []
    store.on_change(lambda blob, is_here: heard.append((blob, is_here)))
    ref = await store.put_bytes(b"data")
    await store.put_many([b"data", b"data"])
    assert await store.remove(ref.hash) and not await store.remove(ref.hash)
    assert heard == [(ref.hash, True), (ref.hash, False)]


async def test_only_regular_files_become_blobs(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with trio.fail_after(5), pytest.raises(InvalidRequest):
            await store.put_file(path)


async def test_copying_a_large_file_stops_when_its_caller_gives_up(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "blobs")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(8 << 30)
    with trio.fail_after(10):
        with trio.move_on_after(0.05) as patience:
            await store.put_file(tmp_path / "sparse")
    assert patience.cancelled_caught and files_in(store.directory) == set()


async def test_a_long_upload_stops_at_the_reserve_and_leaves_nothing(tmp_path: Path) -> None:
    """What is kept for the log on the same disk is not eaten by a blob whose size nobody knew."""
    store = await Store.open(tmp_path / "blobs", free_bytes_min=0)
    writer = await store.create()
    store._disk._free_bytes_min = 2**62  # as when the disk fills up meanwhile
    with pytest.raises(Busy, match="no room"):
        await writer.write(b"x" * (4 << 20))
    await writer.abort()
    assert files_in(store.directory) == set()


async def test_several_blobs_that_each_fit_alone_leave_the_reserve_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        f_frsize, f_blocks, f_bavail = 1, 1 << 40, 200 << 20

    monkeypatch.setattr(disk.os, "statvfs", lambda _path: Disk)
    store = await Store.open(tmp_path / "blobs")
    arriving = [await store.resume(BlobRef(f"{number:064x}", 100 << 20)) for number in range(4)]

    async def arrive() -> None:
        for index in range(100):
            await arriving[index % 4].write_at(index << 20, b"x")
            Disk.f_bavail -= 4 << 20

    with pytest.raises(Busy, match="no room"):
        await arrive()

    assert Disk.f_bavail >= disk.FREE_BYTES_MIN - (4 << 20)
