"""Nothing acknowledged rests on one disk while there are two (protocol.md 6)."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from meshd import codec
from meshd.blobs import fetch, replicate
from meshd.blobs.messages import PROTOCOL, Presence, Pull
from meshd.errors import Busy, MeshError, Unavailable
from meshd.model import BlobRef, NodeId
from meshd.net.rpc import StreamRpc
from meshd.ports import Stream
from tests.blob_mesh import BlobMesh, blob_mesh, random_bytes

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[BlobMesh]:
    async with blob_mesh(tmp_path, "a", "b", "c") as mesh:
        yield mesh


def watch_calls(mesh: BlobMesh, node: NodeId, monkeypatch: pytest.MonkeyPatch) -> list[tuple[NodeId, str]]:
    calls: list[tuple[NodeId, str]] = []
    real = mesh.nodes[node].rpc.call

    async def call(peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        calls.append((peer, method))
        return await real(peer, method, body, timeout_s=timeout_s)

    monkeypatch.setattr(mesh.nodes[node].rpc, "call", call)
    return calls


async def put(mesh: BlobMesh, *sizes: int) -> list[BlobRef]:
    return [await mesh.nodes[A].store.put_bytes(random_bytes(size)) for size in sizes]


@pytest.mark.parametrize("copies", [1, 2, 3, 16])
async def test_blobs_lie_on_as_many_nodes_as_asked_for_or_as_there_are(mesh: BlobMesh, copies: int) -> None:
    refs = await put(mesh, 0, 10, 65_536, 65_537, 3_000_000)
    holders = await mesh.nodes[A].replicator.ensure(refs, copies, timeout_s=10)
    assert holders[0] == A and len(set(holders)) == len(holders) == min(copies, 3)
    for node in holders:
        assert all(mesh.nodes[node].store.has(ref.hash) for ref in refs)


async def test_many_tiny_blobs_cost_one_round_trip(mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = await put(mesh, *[100] * 50)
    calls, back = (
        watch_calls(mesh, A, monkeypatch),
        watch_calls(mesh, B, monkeypatch) + watch_calls(mesh, C, monkeypatch),
    )
    await mesh.nodes[A].replicator.ensure(refs, 2, timeout_s=10)
    assert [method for _, method in calls] == ["blob.pull"] and back == []


async def test_nothing_to_replicate_or_nobody_to_ask_is_done_at_once(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_calls(mesh, A, monkeypatch)
    assert await mesh.nodes[A].replicator.ensure([], 2, timeout_s=1) == (A,)
    mesh.live = {A: None}
    assert await mesh.nodes[A].replicator.ensure(await put(mesh, 10), 2, timeout_s=1) == (A,)
    assert calls == []


async def test_a_peer_that_is_said_to_have_most_is_asked_first_and_sent_nothing(mesh: BlobMesh) -> None:
    for favourite in (B, C):
        refs = await put(mesh, 1000, 100_000)
        for ref in refs:
            data = await mesh.nodes[A].store.get_bytes(ref, bytes_max=ref.size)
            await mesh.nodes[favourite].store.put_bytes(data)
            mesh.holders[ref.hash] = [favourite]
        assert await mesh.nodes[A].replicator.ensure(refs, 2, timeout_s=10) == (A, favourite)


async def test_holders_of_many_blobs_are_looked_up_once_each_while_others_get_their_turns(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate, "LOOKED_UP_AT_ONCE", 2)
    refs = await mesh.nodes[A].store.put_many([bytes([number]) for number in range(50)])
    turn, asked = 0, list[tuple[str, int]]()

    def holders(blob: str) -> list[NodeId]:
        asked.append((blob, turn))
        return [B]

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await trio.lowlevel.checkpoint()
            turn += 1

    monkeypatch.setattr(mesh.nodes[A].fetcher, "holders", holders)
    async with trio.open_nursery() as others:
        others.start_soon(count_turns)
        await mesh.nodes[A].replicator.ensure(refs, 3, timeout_s=10)
        others.cancel_scope.cancel()
    assert [blob for blob, _ in asked] == [ref.hash for ref in refs]
    assert len({turn for _, turn in asked}) > 5


async def test_a_rumour_that_a_peer_has_it_is_checked(mesh: BlobMesh) -> None:
    refs = await put(mesh, 1000, 100_000)
    for ref in refs:
        mesh.holders[ref.hash] = [B]
    assert await mesh.nodes[A].replicator.ensure(refs, 2, timeout_s=10) == (A, B)
    assert all(mesh.nodes[B].store.has(ref.hash) for ref in refs)


async def test_different_blobs_spread_over_the_peers(mesh: BlobMesh) -> None:
    chosen = {(await mesh.nodes[A].replicator.ensure(await put(mesh, 20), 2, timeout_s=10))[1] for _ in range(20)}
    assert chosen == {B, C}


async def test_what_is_not_here_yet_is_fetched_first(mesh: BlobMesh) -> None:
    ref = await mesh.nodes[C].store.put_bytes(random_bytes(200_000))
    mesh.holders[ref.hash] = [C]
    assert await mesh.nodes[A].replicator.ensure([ref], 2, timeout_s=10) == (A, C)
    assert mesh.nodes[A].store.has(ref.hash)


async def test_a_peer_that_cannot_is_followed_by_the_next(mesh: BlobMesh) -> None:
    mesh.nodes[B].store._disk._free_bytes_min = 2**62
    for _ in range(5):
        refs = await put(mesh, 10, 70_000)
        assert await mesh.nodes[A].replicator.ensure(refs, 2, timeout_s=10) == (A, C)


async def test_too_few_copies_are_an_error_that_says_why(mesh: BlobMesh) -> None:
    mesh.nodes[B].store._disk._free_bytes_min = 2**62
    with trio.fail_after(10), pytest.raises(Unavailable, match=r"on 2 nodes and not on 3: b: .*no room"):
        await mesh.nodes[A].replicator.ensure(await put(mesh, 10), 3, timeout_s=1)


async def test_a_node_that_dies_meanwhile_no_longer_counts(mesh: BlobMesh) -> None:
    mesh.network.refuse(B)
    mesh.network.lose(B)
    refs = await put(mesh, 10)

    async def notice() -> None:
        await trio.sleep(0.3)
        del mesh.live[B]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(notice)
        with trio.fail_after(5):
            assert await mesh.nodes[A].replicator.ensure(refs, 3, timeout_s=20) == (A, C)


async def test_a_silent_peer_ends_in_an_error_not_in_a_hang(mesh: BlobMesh) -> None:
    mesh.live = {A: None, B: None}
    mesh.network.cut(A, B)
    with trio.fail_after(10), pytest.raises(Unavailable, match="on 1 nodes and not on 2"):
        await mesh.nodes[A].replicator.ensure(await put(mesh, 10), 2, timeout_s=1)


@pytest.mark.parametrize("answer", [b"\xc1", codec.encode(Presence(())), codec.encode(Presence((False,), "no"))])
async def test_an_answer_that_is_not_yes_for_all_is_no(mesh: BlobMesh, answer: bytes) -> None:
    transport, rpc = await mesh.add_bare("odd")

    async def pull(_peer: NodeId, _body: bytes) -> bytes:
        return answer

    rpc.register("blob.pull", pull)
    await transport.connect(A, ["/memory/a"], timeout_s=1)
    mesh.live = {A: None, transport.me: None}
    with pytest.raises(Unavailable):
        await mesh.nodes[A].replicator.ensure(await put(mesh, 10), 2, timeout_s=0.5)


async def test_carried_bytes_are_checked_before_they_are_kept(mesh: BlobMesh) -> None:
    pull = Pull((BlobRef("0" * 64, 5),), (b"wrong",), timeout_ms=100)
    answer = codec.decode(await mesh.nodes[A].rpc.call(B, "blob.pull", codec.encode(pull), timeout_s=5), Presence)
    assert answer.here == (False,) and "are not blob" in answer.why
    assert await mesh.nodes[B].store.list() == []


async def test_who_asks_for_copies_with_a_wrong_size_harms_no_other_node(mesh: BlobMesh) -> None:
    (ref,) = await put(mesh, 100)
    mesh.holders[ref.hash] = [A]
    pull = Pull((BlobRef(ref.hash, 99),), (None,), timeout_ms=5000)
    answer = codec.decode(await mesh.nodes[C].rpc.call(B, "blob.pull", codec.encode(pull), timeout_s=8), Presence)
    assert answer == Presence((False,), f"blob {ref.hash} has 100 bytes, not 99")
    assert mesh.nodes[B].fetcher._banned() == frozenset()


async def add_silent(mesh: BlobMesh, name: str) -> tuple[NodeId, StreamRpc]:
    """A member that gives nothing of what it asks others to fetch."""

    async def hold(_stream: Stream) -> None:
        await trio.sleep_forever()

    transport, rpc = await mesh.add_bare(name)
    transport.handle(PROTOCOL, hold)
    await transport.connect(A, ["/memory/a"], timeout_s=1)
    return transport.me, rpc


async def test_pulls_of_one_member_keep_nobody_else_from_blobs(mesh: BlobMesh) -> None:
    _, rpc = await add_silent(mesh, "evil")
    refused: list[MeshError] = []

    async def pull(number: int) -> None:
        asked = Pull(tuple(BlobRef(f"{number * 8 + each:064x}", 1 << 30) for each in range(8)), (None,) * 8, 86_400_000)
        try:
            await rpc.call(A, "blob.pull", codec.encode(asked), timeout_s=86_400)
        except Busy as error:
            refused.append(error)

    async with trio.open_nursery() as evil:
        for number in range(64):
            evil.start_soon(pull, number)
        with trio.fail_after(10):
            while len(refused) < 56:
                await trio.sleep(0.01)
        large = await mesh.nodes[B].store.put_bytes(random_bytes(1 << 20))
        mesh.holders[large.hash] = [B]
        mesh.live = {A: None, B: None}
        with trio.fail_after(10):
            await mesh.nodes[A].fetcher.fetch(large, timeout_s=10)
            for size in (10, 1 << 20):
                ref = await mesh.nodes[B].store.put_bytes(random_bytes(size))
                assert await mesh.nodes[B].replicator.ensure([ref], 2, timeout_s=10) == (B, A)
        evil.cancel_scope.cancel()


async def test_a_pull_that_fails_leaves_none_of_its_bytes_to_the_garbage_collector(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ROUND_PAUSES_S", (0.0,))
    carried = bytes(60 << 10)
    known, unknown = BlobRef(blake3(carried).hexdigest(), len(carried)), BlobRef("f" * 64, 1 << 20)
    body = codec.encode(Pull((*[known] * 17, unknown), (*[carried] * 17, None), timeout_ms=60_000))
    pulls = 5

    async def pull() -> None:
        answer = codec.decode(await mesh.nodes[A].rpc.call(B, "blob.pull", body, timeout_s=5), Presence)
        assert "cannot be fetched" in answer.why

    await pull()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(pulls):
            await pull()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < pulls * len(body) / 2


async def test_a_pull_takes_no_longer_than_any_replicator_waits(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate, "PULL_S", 0.3)
    _, rpc = await add_silent(mesh, "evil")
    asked = Pull((BlobRef("0" * 64, 1 << 30),), (None,), timeout_ms=86_400_000)
    answer = codec.decode(await rpc.call(A, "blob.pull", codec.encode(asked), timeout_s=5), Presence)
    assert answer.here == (False,) and "within 0.3 s" in answer.why


async def test_a_blob_that_a_peer_has_pulled_in_vain_still_comes_for_this_node(
    mesh: BlobMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate, "PULL_S", 0.5)
    me, rpc = await add_silent(mesh, "evil")
    ref = await mesh.nodes[B].store.put_bytes(random_bytes(3 << 20))
    mesh.holders[ref.hash] = [me]
    asked = Pull((ref,), (None,), timeout_ms=86_400_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rpc.call(A, "blob.pull", codec.encode(asked), timeout_s=20))
        with trio.fail_after(10):
            while ref not in mesh.nodes[A].fetcher._begun:
                await trio.sleep(0.01)
        mesh.holders[ref.hash] = [B]
        await mesh.nodes[A].fetcher.fetch(ref, timeout_s=10)
    assert mesh.nodes[A].store.size(ref.hash) == ref.size


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_node_with_much_to_copy_asks_no_peer_for_more_than_it_serves(mesh: BlobMesh, size: int) -> None:
    transport, rpc = await mesh.add_bare("taker")
    in_flight, most = 0, 0

    async def pull(_peer: NodeId, body: bytes) -> bytes:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await trio.sleep(0.01)
        in_flight -= 1
        return codec.encode(Presence((True,) * len(codec.decode(body, Pull).refs)))

    rpc.register("blob.pull", pull)
    await transport.connect(A, ["/memory/a"], timeout_s=1)
    mesh.live = {A: None, transport.me: None}
    refs = await put(mesh, *[size] * 40)
    async with trio.open_nursery() as attempts:
        for ref in refs:
            attempts.start_soon(lambda ref=ref: mesh.nodes[A].replicator.ensure([ref], 2, timeout_s=10))
    assert 1 < most <= replicate.PULLS_PER_PEER_MAX
