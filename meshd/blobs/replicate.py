"""Sees to it that blobs lie on enough disks before anyone is told that they exist (protocol.md 6).

One call asks a peer for all blobs of an attempt and carries the small ones; what is
larger the peer fetches from here, at its own pace. Which peers: those that are said to
have most of the bytes, then an order made from the blobs' own names, so that equal
blobs meet on the same nodes and different ones spread over all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog
import trio
from blake3 import blake3

from meshd import codec
from meshd.blobs.fetch import LOOKED_UP_AT_ONCE, Fetcher, Lane, batches
from meshd.blobs.messages import SMALL_BYTES_MAX, Presence, Pull
from meshd.blobs.store import Store, unique
from meshd.errors import Busy, InvalidRequest, MeshError, PeerFault, Unavailable
from meshd.model import BlobRef, NodeId
from meshd.ports import Rpc

PAUSE_S = 0.5
"""Before everyone is asked again; who is alive is known within seconds."""

PULL_SPARE_S = 1.0
"""The peer gives up so much earlier than the caller, so that its reason arrives."""

PULL_S = 60.0
"""For one pull, whatever the peer says: as long as any replicator waits. The next pull goes on with what has arrived."""

PULLS_MAX = 64
"""Pulls served at a time: each may hold 1 MiB."""

PULLS_PER_PEER_MAX = 8
"""Of these. A replicator asks a peer for half as many at a time of small blobs, and of large ones, which take longer."""

Held = Mapping[NodeId, Mapping[str, int]]
"""Which of some blobs a node is said to have, each with its size."""


class Replicator:
    """`peers` are the other nodes that may take copies now."""

    def __init__(self, rpc: Rpc, store: Store, fetcher: Fetcher, peers: Callable[[], Sequence[NodeId]]) -> None:
        self._rpc = rpc
        self._store = store
        self._fetcher = fetcher
        self._peers = peers
        # By peer, and whether the blobs are small: these do not wait for large ones.
        self._asking = defaultdict[tuple[NodeId, bool], trio.CapacityLimiter](
            lambda: trio.CapacityLimiter(PULLS_PER_PEER_MAX // 2)
        )
        self._serving = trio.CapacityLimiter(PULLS_MAX)
        self._pulls: Counter[NodeId] = Counter()
        self._lanes: dict[NodeId, Lane] = {}
        self._log = structlog.get_logger()
        rpc.register("blob.pull", self._pull)

    async def ensure(self, refs: Sequence[BlobRef], copies: int, *, timeout_s: float) -> tuple[NodeId, ...]:
        """Each blob is durable on this node and min(copies, nodes alive) - 1 others; returns those, this one first.

        What is not here yet is fetched first. Raises Unavailable when too few peers took them in time; a peer
        that had taken them keeps them.
        """
        wanted = unique(refs)
        done: dict[NodeId, None] = {}
        why: dict[NodeId, str] = {}
        with trio.move_on_after(timeout_s):
            await self._fetcher.fetch_many(wanted, timeout_s=timeout_s)
            held = await self._held(wanted) if self._others(copies) else {}
            while wanted and not self._is_enough(done, copies):
                await self._ask_peers(wanted, held, copies, done, why, timeout_s)
                if not self._is_enough(done, copies):
                    await trio.sleep(PAUSE_S)
        if wanted and not self._is_enough(done, copies):
            reasons = "; ".join(f"{node}: {reason}" for node, reason in why.items() if node not in done)
            raise Unavailable(
                f"{len(wanted)} blobs lie on {1 + len(done)} nodes and not on {1 + self._others(copies)}: "
                f"{reasons or f'no answer within {timeout_s:g} s'}",
                hint="see `mesh node ls`; the other nodes need room on their disks",
            )
        return (self._fetcher.me, *done)

    def _others(self, copies: int) -> int:
        return min(copies - 1, len(self._peers()))

    def _is_enough(self, done: dict[NodeId, None], copies: int) -> bool:
        return len(done) >= self._others(copies)

    async def _ask_peers(
        self,
        refs: Sequence[BlobRef],
        held: Held,
        copies: int,
        done: dict[NodeId, None],
        why: dict[NodeId, str],
        timeout_s: float,
    ) -> None:
        """As many at a time as copies are missing; whoever fails is followed by the next in line."""
        line = iter([peer for peer in self._in_order(refs, held) if peer not in done])
        deadline = trio.current_time() + timeout_s

        async def work() -> None:
            for peer in line:
                try:
                    await self._push(peer, refs, held.get(peer, {}), deadline)
                except MeshError as error:
                    why[peer] = error.message
                    self._log.info("blob.not_replicated", peer=peer, blobs=len(refs), error=error.message)
                else:
                    done[peer] = None
                    return

        async with trio.open_nursery() as workers:
            for _ in range(self._others(copies) - len(done)):
                workers.start_soon(work)

    async def _held(self, refs: Sequence[BlobRef]) -> Held:
        """Asked once, in slices: gossip looks through all nodes for each, and an attempt may leave 100,000."""
        held: dict[NodeId, dict[str, int]] = {}
        for number, ref in enumerate(refs, 1):
            for node in self._fetcher.holders(ref.hash):
                held.setdefault(node, {})[ref.hash] = ref.size
            if number % LOOKED_UP_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return held

    def _in_order(self, refs: Sequence[BlobRef], held: Held) -> list[NodeId]:
        bytes_held = {peer: sum(held.get(peer, {}).values()) for peer in self._peers()}
        key = min(ref.hash for ref in refs)
        return sorted(bytes_held, key=lambda peer: (-bytes_held[peer], blake3(f"{key}{peer}".encode()).digest()))

    async def _push(self, peer: NodeId, refs: Sequence[BlobRef], known: Mapping[str, int], deadline: float) -> None:
        for batch in batches([ref for ref in refs if ref.size <= SMALL_BYTES_MAX]):
            sent = [ref for ref in batch if ref.hash not in known]
            datas = dict(zip(sent, await self._store.get_many(sent, bytes_max=SMALL_BYTES_MAX), strict=True))
            async with self._asking[peer, True]:
                await self._ask_to_pull(peer, batch, tuple(datas.get(ref) for ref in batch), deadline)
        for large in batches([ref for ref in refs if ref.size > SMALL_BYTES_MAX], bytes_max=None):
            async with self._asking[peer, False]:
                await self._ask_to_pull(peer, large, (None,) * len(large), deadline)

    async def _ask_to_pull(
        self, peer: NodeId, refs: Sequence[BlobRef], datas: tuple[bytes | None, ...], deadline: float
    ) -> None:
        timeout_s = deadline - trio.current_time()
        pull = Pull(tuple(refs), datas, timeout_ms=max(0, int((timeout_s - PULL_SPARE_S) * 1000)))
        answer = await self._rpc.call(peer, "blob.pull", codec.encode(pull), timeout_s=timeout_s)
        try:
            presence = codec.decode(answer, Presence)
        except InvalidRequest as error:
            raise PeerFault(f"answered nonsense: {error.message}") from error
        if presence.here != (True,) * len(refs):
            raise Unavailable(presence.why or "did not take all of them")

    # --- what others ask of this node --------------------------------------------------------------------------------

    async def _pull(self, peer: NodeId, body: bytes) -> bytes:
        why = ""
        async with self._served(peer) as lane:
            pull = codec.decode(body, Pull)  # not sooner: while it waits it holds its bytes once
            if len(pull.datas) != len(pull.refs):
                raise InvalidRequest(f"{len(pull.refs)} blobs with {len(pull.datas)} contents")
            try:
                carried = [(ref, data) for ref, data in zip(pull.refs, pull.datas, strict=True) if data is not None]
                await self._keep(carried)
                timeout_s = min(pull.timeout_ms / 1000, PULL_S)
                await self._fetcher.fetch_many(pull.refs, hints=(peer,), timeout_s=timeout_s, lane=lane)
            except MeshError as error:
                why = error.message[:1024]
                # Frames that it passed keep it, and its traceback this one: all the bytes would wait for the garbage collector.
                error.__traceback__ = None
        return codec.encode(Presence(tuple(self._store.has(ref.hash) for ref in pull.refs), why))

    @asynccontextmanager
    async def _served(self, peer: NodeId) -> AsyncIterator[Lane]:
        """A place among the pulls served, and the lane of those of this peer. Raises Busy."""
        if self._pulls[peer] >= PULLS_PER_PEER_MAX:
            raise Busy(f"already fetching blobs for {PULLS_PER_PEER_MAX} calls of {peer}", hint="try again soon")
        self._pulls[peer] += 1
        lane = self._lanes.setdefault(peer, self._fetcher.lane_for_peer())
        try:
            async with self._serving:
                yield lane
        finally:
            self._pulls[peer] -= 1
            if not self._pulls[peer]:
                del self._pulls[peer], self._lanes[peer]

    async def _keep(self, carried: Sequence[tuple[BlobRef, bytes]]) -> None:
        for ref, data in carried:
            if len(data) != ref.size or blake3(data).hexdigest() != ref.hash:
                raise InvalidRequest(f"these {len(data)} bytes are not blob {ref.hash} of {ref.size}")
        await self._store.put_many([data for _, data in carried])
