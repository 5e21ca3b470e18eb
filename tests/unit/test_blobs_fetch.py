"""Blobs from other nodes: from whoever has them, and whatever bad peers do."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from blake3 import blake3

from meshd import codec
from meshd.blobs import fetch, serve
from meshd.blobs.messages import PROTOCOL, Coming, Contents, Name, Names, Refusal, Sizes, Want, Wire
from meshd.blobs.plan import RANGE_BYTES
from meshd.blobs.store import Store
from meshd.errors import Busy, InvalidRequest, MeshError, NotAllowed, Unavailable
from meshd.model import BlobRef, NodeId
from meshd.ports import Stream
from tests.blob_mesh import BlobMesh, blob_mesh, random_bytes

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
LARGE = 5 * RANGE_BYTES + 123


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[BlobMesh]:
    async with blob_mesh(tmp_path, "a", "b", "c") as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stalls here stalls for ever; a loaded test machine does not stall for a second."""
    monkeypatch.setattr(fetch, "SILENCE_S", 1.0)
    monkeypatch.setattr(fetch, "CALL_S", 1.0)
    monkeypatch.setattr(fetch, "ASK_S", 1.0)
    monkeypatch.setattr(fetch, "ROUND_PAUSES_S", (0.0, 0.02, 0.1))


def count_ranges(mesh: BlobMesh, node: NodeId, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets that this node is asked for, as they come."""
    store, offsets = mesh.nodes[node].store, list[int]()
    real = store.read

    async def read(blob: str, offset: int, length: int) -> bytes:
        offsets.append(offset)
        return await real(blob, offset, length)

    monkeypatch.setattr(store, "read", read)
    return offsets


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, LARGE])
async def test_a_blob_of_any_size_arrives_whole_from_its_holder(mesh: BlobMesh, size: int) -> None:
    data = random_bytes(size)
    ref = await mesh.nodes[B].store.put_bytes(data)
    mesh.holders[ref.hash] = [B]
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    assert await mesh.nodes[A].store.get_bytes(ref, bytes_max=size) == data


@pytest.mark.parametrize("size", [100, LARGE])
async def test_a_blob_nobody_is_said_to_have_is_found_by_asking(mesh: BlobMesh, size: int) -> None:
    ref = await mesh.nodes[C].store.put_bytes(random_bytes(size))
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    assert mesh.nodes[A].store.has(ref.hash)
    assert set(await mesh.nodes[B].fetcher.who_has(ref.hash)) == {A, C}
    assert await mesh.nodes[B].fetcher.size_of(ref.hash) == size
    assert await mesh.nodes[B].fetcher.size_of("0" * 64) is None


@pytest.mark.parametrize("size", [100, LARGE])
async def test_a_blob_nobody_has_is_unavailable_soon(mesh: BlobMesh, size: int) -> None:
    mesh.holders["0" * 64] = [B, C]
    with trio.fail_after(10), pytest.raises(Unavailable, match="0000"):
        await mesh.nodes[A].fetcher.fetch(BlobRef("0" * 64, size), timeout_s=60)


async def test_ranges_come_from_several_nodes_at_once(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(16 * RANGE_BYTES)
    ref = await mesh.nodes[B].store.put_bytes(data)
    await mesh.nodes[C].store.put_bytes(data)
    mesh.holders[ref.hash] = [B, C]
    from_b, from_c = count_ranges(mesh, B, monkeypatch), count_ranges(mesh, C, monkeypatch)
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    assert from_b and from_c and sorted(from_b + from_c) == list(range(0, len(data), RANGE_BYTES))
    assert await mesh.nodes[A].store.get_bytes(ref, bytes_max=len(data)) == data


async def test_many_fetches_of_one_blob_are_one(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    offsets = count_ranges(mesh, B, monkeypatch)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(
                lambda hint=[B] * (number % 2): mesh.nodes[A].fetcher.fetch(ref, hints=hint, timeout_s=10)
            )
    assert len(offsets) == 6


async def test_when_the_first_of_many_gives_up_another_goes_on(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    fetcher = mesh.nodes[A].fetcher
    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def give_up() -> None:
            with first:
                await fetcher.fetch(ref, hints=[B], timeout_s=10)

        nursery.start_soon(give_up)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: fetcher.fetch(ref, hints=[B], timeout_s=10))
        first.cancel()
    assert mesh.nodes[A].store.has(ref.hash)


async def test_many_small_blobs_cost_one_call_to_their_holder(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = await mesh.nodes[B].store.put_many([random_bytes(500) for _ in range(100)])
    calls: list[str] = []
    real = mesh.nodes[A].rpc.call

    async def call(peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        calls.append(method)
        return await real(peer, method, body, timeout_s=timeout_s)

    monkeypatch.setattr(mesh.nodes[A].rpc, "call", call)
    await mesh.nodes[A].fetcher.fetch_many(refs, hints=[B], timeout_s=10)
    assert calls == ["blob.get"] and all(mesh.nodes[A].store.has(ref.hash) for ref in refs)


async def test_a_mixed_lot_comes_from_wherever_it_is(mesh: BlobMesh) -> None:
    sizes = [10, 60_000, 70_000, 1_500_000]
    refs = [await mesh.nodes[B].store.put_bytes(random_bytes(size)) for size in sizes]
    refs += [await mesh.nodes[C].store.put_bytes(random_bytes(size)) for size in sizes]
    await mesh.nodes[A].fetcher.fetch_many(refs, hints=[B], timeout_s=20)
    assert all(mesh.nodes[A].store.has(ref.hash) for ref in refs)
    with pytest.raises(Unavailable):
        await mesh.nodes[A].fetcher.fetch_many([*refs, BlobRef("1" * 64, 9)], timeout_s=20)


async def test_a_wrong_size_is_refused_and_the_blob_kept(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    with pytest.raises(InvalidRequest, match="bytes, not 7"):
        await mesh.nodes[A].fetcher.fetch(BlobRef(ref.hash, 7), timeout_s=10)
    with pytest.raises(Unavailable):
        await mesh.nodes[C].fetcher.fetch(BlobRef(ref.hash, LARGE + 1), timeout_s=10)


async def fetch_one(fetcher: fetch.Fetcher, ref: BlobRef) -> None:
    await fetcher.fetch(ref, timeout_s=10)


async def fetch_with_others(fetcher: fetch.Fetcher, ref: BlobRef) -> None:
    await fetcher.fetch_many([ref], timeout_s=10)


@pytest.mark.parametrize("ask", [fetch_one, fetch_with_others])
@pytest.mark.parametrize("said", [99, 101, LARGE])
async def test_a_reference_with_a_wrong_size_is_the_askers_fault_and_bans_nobody(
    mesh: BlobMesh, said: int, ask: Callable[[fetch.Fetcher, BlobRef], Awaitable[None]]
) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(100))
    mesh.holders[ref.hash] = [B]
    with pytest.raises(MeshError, match=rf"100 bytes( of that name)?, not {said}") as raised:
        await ask(mesh.nodes[A].fetcher, BlobRef(ref.hash, said))
    assert isinstance(raised.value, InvalidRequest if said < LARGE else Unavailable)
    assert mesh.nodes[A].fetcher._banned() == frozenset()
    await ask(mesh.nodes[A].fetcher, ref)


async def test_a_copy_that_went_bad_is_fetched_again(mesh: BlobMesh) -> None:
    data = random_bytes(2000)
    ref = await mesh.nodes[B].store.put_bytes(data)
    fetcher, store = mesh.nodes[A].fetcher, mesh.nodes[A].store
    await fetcher.fetch(ref, timeout_s=10)
    (store.directory / "whole" / ref.hash).write_bytes(b"rot" * 900)
    assert await fetcher.get_bytes(ref, bytes_max=3000, timeout_s=10) == data


@pytest.mark.parametrize("size", [2000, LARGE])
async def test_a_holder_with_a_bad_disk_serves_nothing_and_another_does(
    mesh: BlobMesh, tmp_path: Path, size: int
) -> None:
    data = random_bytes(size)
    ref = await mesh.nodes[B].store.put_bytes(data)
    file = mesh.nodes[B].store.directory / "whole" / ref.hash
    await mesh.nodes[B].store.remove(ref.hash)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reopened = await Store.open(tmp_path / "b")  # it no longer remembers having checked it
    mesh.nodes[B].store._disk = reopened._disk
    await mesh.nodes[C].store.put_bytes(data)
    mesh.holders[ref.hash] = [B, C]
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    assert mesh.nodes[A].store.has(ref.hash) and not mesh.nodes[B].store.has(ref.hash)
    again = await mesh.nodes[B].store.put_bytes(b"B is not banned for it")
    await mesh.nodes[A].fetcher.fetch(again, hints=[B], timeout_s=10)


# --- bad peers -------------------------------------------------------------------------------------------------------

Serve = Callable[[Stream, bytes], Awaitable[None]]


async def wrong_bytes(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    while (want := await wire.receive(Want)) is not None:
        await wire.send(
            Coming(len(data), min(want.length, len(data) - want.offset)),
            b"\0" * min(want.length, len(data) - want.offset),
        )


async def short(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    want = await wire.receive(Want)
    await wire.send(Coming(len(data), want.length), data[: want.length // 2])
    await stream.close_write()


async def short_range(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    await wire.receive(Want)
    await wire.send(Coming(len(data), 10), data[:10])
    await trio.sleep_forever()


async def stall(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    want = await wire.receive(Want)
    await wire.send(Coming(len(data), want.length), data[: want.length // 2])
    await trio.sleep_forever()


async def silent(stream: Stream, data: bytes) -> None:
    await trio.sleep_forever()


async def vanish_after_two(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    for _ in range(2):
        want = await wire.receive(Want)
        part = data[want.offset : want.offset + want.length]
        await wire.send(Coming(len(data), len(part)), part)
    await stream.aclose()


async def oversize_message(stream: Stream, data: bytes) -> None:
    await stream.write(b"\xff\xff\xff\xff" + b"x" * 1000)
    await trio.sleep_forever()


async def nonsense(stream: Stream, data: bytes) -> None:
    await stream.write(b"\0\0\0\x04oops")
    await trio.sleep_forever()


async def other_size(stream: Stream, data: bytes) -> None:
    wire = Wire(stream, silence_s=5)
    await wire.receive(Want)
    await wire.send(Coming(1 << 50, RANGE_BYTES), data[:RANGE_BYTES])
    await trio.sleep_forever()


async def refuse(stream: Stream, data: bytes) -> None:
    await Wire(stream, silence_s=5).send(Refusal("busy", "go away"))
    await stream.close_write()


async def crash(stream: Stream, data: bytes) -> None:
    raise RuntimeError("a bug")


LIARS = [wrong_bytes, short_range, oversize_message, nonsense]
BAD = [*LIARS, short, stall, silent, vanish_after_two, other_size, refuse, crash]


async def add_bad(mesh: BlobMesh, name: str, behave: Serve, data: bytes) -> NodeId:
    transport, rpc = await mesh.add_bare(name)

    async def have(_peer: NodeId, body: bytes) -> bytes:
        return codec.encode(Sizes((len(data),) * len(codec.decode(body, Names).blobs)))

    rpc.register("blob.have", have)
    transport.handle(PROTOCOL, lambda stream: behave(stream, data))
    for node in mesh.nodes:
        await transport.connect(node, [f"/memory/{node}"], timeout_s=1)
    return NodeId(name)


@pytest.mark.parametrize("behave", BAD)
async def test_a_bad_source_does_not_keep_a_good_one_from_giving_all(mesh: BlobMesh, behave: Serve) -> None:
    data = random_bytes(LARGE)
    ref = await mesh.nodes[B].store.put_bytes(data)
    bad = await add_bad(mesh, "bad", behave, data)
    mesh.holders[ref.hash] = [bad, B]
    fetcher = mesh.nodes[A].fetcher
    await fetcher.fetch(ref, timeout_s=20)
    assert await mesh.nodes[A].store.get_bytes(ref, bytes_max=LARGE) == data
    assert (bad in fetcher._banned()) == (behave in LIARS) and B not in fetcher._banned()


@pytest.mark.parametrize("behave", [behave for behave in BAD if behave is not vanish_after_two])
async def test_with_only_a_bad_source_a_fetch_fails_in_time_and_keeps_nothing_wrong(
    mesh: BlobMesh, behave: Serve
) -> None:
    data = random_bytes(LARGE)
    bad = await add_bad(mesh, "bad", behave, data)
    ref = BlobRef(blake3(data).hexdigest(), LARGE)
    with trio.fail_after(15), pytest.raises(Unavailable) as failed:
        await mesh.nodes[A].fetcher.fetch(ref, hints=[bad], timeout_s=3)
    assert ref.hash in str(failed.value) and not mesh.nodes[A].store.has(ref.hash)
    await mesh.nodes[B].store.put_bytes(data)
    await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=20)


async def test_no_size_that_a_peer_names_buys_it_hours_of_silence(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "VERIFY_S_MAX", 0.1)
    monkeypatch.setattr(fetch, "ROUND_PAUSES_S", (0.0,))
    bad = await add_bad(mesh, "bad", silent, b"")
    with trio.fail_after(10), pytest.raises(Unavailable, match=r"silent .* for 1\.1 s"):
        await mesh.nodes[A].fetcher.fetch(BlobRef("0" * 64, 1 << 30), hints=[bad], timeout_s=60)


async def test_a_crowd_of_liars_is_seen_through(mesh: BlobMesh) -> None:
    data = random_bytes(LARGE)
    ref = await mesh.nodes[C].store.put_bytes(data)
    liars = [await add_bad(mesh, f"liar{number}", wrong_bytes, data) for number in range(3)]
    mesh.holders[ref.hash] = [*liars, C]
    await mesh.nodes[A].fetcher.fetch(ref, timeout_s=20)
    assert await mesh.nodes[A].store.get_bytes(ref, bytes_max=LARGE) == data
    assert set(mesh.nodes[A].fetcher._banned()) <= set(liars)


@pytest.mark.parametrize("answer", [b"\xc1nonsense", codec.encode(Contents((b"wrong",))), codec.encode(Contents(()))])
async def test_wrong_small_bytes_ban_their_source_and_another_gives_them(mesh: BlobMesh, answer: bytes) -> None:
    ref = await mesh.nodes[C].store.put_bytes(b"right")
    transport, rpc = await mesh.add_bare("liar")

    async def get(_peer: NodeId, _body: bytes) -> bytes:
        return answer

    rpc.register("blob.get", get)
    await transport.connect(A, ["/memory/a"], timeout_s=1)
    await mesh.nodes[A].fetcher.fetch_many([ref], hints=[transport.me, C], timeout_s=10)
    assert mesh.nodes[A].store.has(ref.hash) and transport.me in mesh.nodes[A].fetcher._banned()


async def test_a_fetch_goes_on_where_the_last_one_stopped(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(LARGE)
    bad = await add_bad(mesh, "bad", vanish_after_two, data)
    ref = BlobRef(blake3(data).hexdigest(), LARGE)
    monkeypatch.setattr(fetch, "ROUND_PAUSES_S", (0.0,))
    with pytest.raises(Unavailable):
        await mesh.nodes[A].fetcher.fetch(ref, hints=[bad], timeout_s=10)
    await mesh.nodes[B].store.put_bytes(data)
    offsets = count_ranges(mesh, B, monkeypatch)
    await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=10)
    assert offsets == [2 * RANGE_BYTES, 3 * RANGE_BYTES, 4 * RANGE_BYTES, 5 * RANGE_BYTES]


async def test_unfinished_blobs_do_not_pile_up(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ROUND_PAUSES_S", (0.0,))
    data = random_bytes(LARGE)
    bad = await add_bad(mesh, "bad", vanish_after_two, data)
    monkeypatch.setattr(fetch, "PARTIALS_MAX", 2)
    for number in range(5):
        with pytest.raises(Unavailable):
            await mesh.nodes[A].fetcher.fetch(BlobRef(f"{number:064x}", LARGE), hints=[bad], timeout_s=10)
    assert len(list((mesh.nodes[A].store.directory / "partial").iterdir())) == 2


async def test_what_no_disk_has_room_for_takes_no_memory_either(mesh: BlobMesh) -> None:
    mesh.nodes[A].store._disk._free_bytes_min = 2**62
    tracemalloc.start()
    try:
        with trio.fail_after(5), pytest.raises(Busy, match="no room"):
            await mesh.nodes[A].fetcher.fetch(BlobRef("0" * 64, 1 << 42), hints=[B], timeout_s=30)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


async def test_a_full_disk_here_is_said_at_once_and_blames_nobody(mesh: BlobMesh) -> None:
    refs = [await mesh.nodes[B].store.put_bytes(random_bytes(size)) for size in (100, LARGE)]
    mesh.nodes[A].store._disk._free_bytes_min = 2**62
    for ref in refs:
        with trio.fail_after(5), pytest.raises(Busy, match="no room"):
            await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=30)
    assert not mesh.nodes[A].fetcher._banned()


async def test_a_disk_that_fills_up_meanwhile_gets_back_what_had_arrived(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    store = mesh.nodes[A].store
    check_room, ranges_left = store._disk.check_room, 2

    def fill_up(bytes_wanted: int) -> None:
        nonlocal ranges_left
        ranges_left -= bytes_wanted == RANGE_BYTES
        if ranges_left < 0:
            raise Busy("no room")
        check_room(bytes_wanted)

    monkeypatch.setattr(store._disk, "check_room", fill_up)
    with trio.fail_after(5), pytest.raises(Busy, match="no room"):
        await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=30)
    assert list((store.directory / "partial").iterdir()) == [] and not mesh.nodes[A].fetcher._banned()

    monkeypatch.setattr(store._disk, "check_room", check_room)
    await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=10)
    assert store.size(ref.hash) == LARGE


# --- what a node answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x03abc",
        b"\0\0",
        codec.encode(("../../etc/passwd", 0, 10)),
        codec.encode(("0" * 64, 0, 1 << 30)),
    ],
)
async def test_nonsense_on_a_blob_stream_ends_only_that_stream(mesh: BlobMesh, sent: bytes) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    stream = await mesh.nodes[A].transport.open_stream(B, PROTOCOL, timeout_s=1)
    if len(sent) > 10:
        sent = len(sent).to_bytes(4, "big") + sent
    await stream.write(sent)
    await stream.close_write()
    with trio.fail_after(5):
        with suppress(Unavailable):
            while await stream.read(100):
                pass
    await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=10)


async def test_streams_over_the_bound_are_told_that_it_is_busy(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    wires = []
    for _ in range(serve.STREAMS_PER_PEER_MAX + 1):
        stream = await mesh.nodes[A].transport.open_stream(B, PROTOCOL, timeout_s=1)
        wires.append(Wire(stream, silence_s=5))
        await trio.testing.wait_all_tasks_blocked()
    answer = await wires[-1].receive(Refusal)
    assert answer.code == "busy"
    await wires[0].send(Want(ref.hash, 0, 10))
    assert await wires[0].receive(Coming) == Coming(LARGE, 10)
    await mesh.nodes[C].fetcher.fetch(ref, hints=[B], timeout_s=10)


async def test_only_who_may_can_remove(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[C].store.put_bytes(b"kept")
    body = codec.encode(Name(ref.hash))
    with pytest.raises(NotAllowed):
        await mesh.nodes[B].rpc.call(C, "blob.remove", body, timeout_s=5)
    assert mesh.nodes[C].store.has(ref.hash)
    await mesh.nodes[A].rpc.call(C, "blob.remove", body, timeout_s=5)
    assert not mesh.nodes[C].store.has(ref.hash)


@pytest.mark.parametrize("method", ["blob.get", "blob.have", "blob.list", "blob.remove", "blob.pull"])
async def test_nonsense_in_a_call_is_refused_as_the_callers_fault(mesh: BlobMesh, method: str) -> None:
    for body in (b"", b"\xc1", codec.encode({"blobs": ["../x"], "blob": "../x", "after": 3})):
        with pytest.raises(InvalidRequest):
            await mesh.nodes[A].rpc.call(B, method, body, timeout_s=5)


async def test_a_list_comes_in_pages(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PAGE_MAX", 3)
    refs = sorted(await mesh.nodes[B].store.put_many([bytes([n]) for n in range(8)]), key=lambda ref: ref.hash)
    got: list[BlobRef] = []
    is_last = False
    while not is_last:
        body = codec.encode(serve.ListFrom(got[-1].hash if got else ""))
        page = codec.decode(await mesh.nodes[A].rpc.call(B, "blob.list", body, timeout_s=5), serve.Page)
        assert len(page.blobs) <= 3
        got += page.blobs
        is_last = page.is_last
    assert got == refs


async def test_no_error_of_a_peer_escapes_as_anything_but_a_mesh_error(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(LARGE))
    async with trio.open_nursery() as nursery:

        async def fetch_it() -> None:
            with suppress(MeshError):
                await mesh.nodes[A].fetcher.fetch(ref, hints=[B], timeout_s=3)

        nursery.start_soon(fetch_it)
        await trio.testing.wait_all_tasks_blocked()
        mesh.network.lose(B)
