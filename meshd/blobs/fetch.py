"""Gets blobs from whoever has them onto this disk.

A small blob is one call; a large one comes as ranges over streams from several nodes
at once, as `plan` says. Concurrent fetches of one blob are one fetch. A node that
gives wrong bytes is not asked again for a while; one that stalls or vanishes only
loses its turn. What has arrived is kept when a fetch gives up, and the next one goes on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import structlog
import trio
from blake3 import blake3

from meshd import codec
from meshd.blobs.messages import (
    CALL_BYTES_MAX,
    NAMES_MAX,
    PROTOCOL,
    SMALL_BYTES_MAX,
    Coming,
    Contents,
    Names,
    Refusal,
    Reply,
    Sizes,
    Want,
    Wire,
)
from meshd.blobs.plan import Plan, Range
from meshd.blobs.store import PartialBlob, Store, unique
from meshd.errors import Busy, Corrupt, InvalidRequest, MeshError, PeerFault, Unavailable, from_code
from meshd.model import BlobRef, NodeId
from meshd.ports import Rpc, Transport

LARGE_MAX = 4
"""Large blobs at a time: more would share the same line and arrive later each. As many again for all peers."""

SMALL_MAX = 32
"""Calls for small blobs at a time. As many again for all peers."""

PEER_LARGE_MAX = 2
PEER_SMALL_MAX = 8
"""Of these for one peer: what it names may never arrive, and others ask as well."""

SOURCES_MAX = 4
"""Nodes that give one blob at a time; a few fill the line, and each costs this node a stream."""

AHEAD_MAX = 4
"""Ranges asked of one node before the first has come: hides 40 ms of round trip at 100 MB/s."""

ROUND_PAUSES_S = (0.0, 0.2, 1.0)
"""Before each round of looking for sources. A holder that is just restarting is found by the last one."""

SILENCE_S = 10.0
"""A source that sends nothing for so long has stalled: a healthy one answers in milliseconds."""

VERIFY_BYTES_PER_S = 50e6
"""A source may read a whole blob from a slow disk before the first answer; it is given that much longer …"""

VERIFY_S_MAX = 120.0
"""… but no more: the size is somebody's word. A larger blob is verified by the time that it is asked for again."""

RANGE_S = 60.0
"""For one range, however it trickles: under 17 kB/s another source is better."""

CALL_S = 10.0
ASK_S = 3.0
"""For `blob.have`; a node that needs longer would be a bad source."""

LOOKED_UP_AT_ONCE = 1000
"""Blobs, of up to 100,000 that an attempt leaves, before others get their turn: 1 ms, or 3 where holders are looked up."""

ASKED_AT_ONCE_MAX = 16
"""Nodes asked who has a blob at a time."""

BAN_S = 600.0
"""Not asked again for so long after wrong bytes: liars do not get better in seconds, disks get repaired in days."""

PARTIALS_MAX = 16
"""Unfinished blobs kept for a next try; the oldest goes first."""

Holders = Callable[[str], Sequence[NodeId]]
"""Who is said to have a blob. Advice: it may be stale both ways."""


@dataclass(eq=False)
class _Flight:
    """One fetch that several callers may wait for."""

    hints: dict[NodeId, None]
    over: trio.Event = field(default_factory=trio.Event)
    failure: MeshError | None = None


class Lane:
    """Fetches that share slots: this node's own, or those that one peer asks for.

    Those of one blob are one fetch in a lane, but none waits for what only waits for a slot of another lane.
    """

    def __init__(self, large: Sequence[trio.CapacityLimiter], small: Sequence[trio.CapacityLimiter]) -> None:
        self._large = large
        self._small = small
        self.flights: dict[BlobRef, _Flight] = {}

    @asynccontextmanager
    async def slot(self, *, is_small: bool) -> AsyncIterator[None]:
        async with AsyncExitStack() as slots:
            for limiter in self._small if is_small else self._large:
                await slots.enter_async_context(limiter)
            yield


@dataclass(eq=False)
class _Begun:
    """What has arrived of a large blob; one fetch at a time goes on with it."""

    plan: Plan
    turn: trio.Lock = field(default_factory=trio.Lock)


class Fetcher:
    def __init__(self, transport: Transport, rpc: Rpc, store: Store, holders: Holders) -> None:
        self._transport = transport
        self._rpc = rpc
        self._store = store
        self.holders = holders
        self._begun: dict[BlobRef, _Begun] = {}
        self._banned_until: dict[NodeId, float] = {}
        self._own = Lane([trio.CapacityLimiter(LARGE_MAX)], [trio.CapacityLimiter(SMALL_MAX)])
        self._large_for_peers = trio.CapacityLimiter(LARGE_MAX)
        self._small_for_peers = trio.CapacityLimiter(SMALL_MAX)
        self._log = structlog.get_logger()

    @property
    def me(self) -> NodeId:
        return self._transport.me

    def lane_for_peer(self) -> Lane:
        """For what one peer asks this node to fetch: it takes no slot of this node's own, nor all of the other peers'."""
        return Lane(
            [trio.CapacityLimiter(PEER_LARGE_MAX), self._large_for_peers],
            [trio.CapacityLimiter(PEER_SMALL_MAX), self._small_for_peers],
        )

    async def fetch(
        self, ref: BlobRef, *, hints: Sequence[NodeId] = (), timeout_s: float, lane: Lane | None = None
    ) -> None:
        """The blob is on this disk, whole, verified and durable. `hints` are asked before anyone else.

        Raises Unavailable (nobody who can be reached has it, or it took too long), Busy (this disk is full),
        InvalidRequest (there is such a blob, of another size). Cancelling keeps what has arrived.
        """
        if await self._is_here(ref):
            return
        with trio.move_on_after(timeout_s) as patience:
            await self._join_or_fly(ref, hints, lane or self._own)
        if patience.cancelled_caught:
            arrived = self._begun[ref].plan.bytes_given if ref in self._begun else 0
            raise Unavailable(
                f"blob {ref.hash} did not arrive within {timeout_s:g} s: {arrived} of {ref.size} bytes did",
                hint="try again, it goes on from there",
            )

    async def fetch_many(
        self, refs: Iterable[BlobRef], *, hints: Sequence[NodeId] = (), timeout_s: float, lane: Lane | None = None
    ) -> None:
        """All of them, the small ones many to a call. Raises what `fetch` raises, for the first that fails."""
        lane = lane or self._own
        missing: list[BlobRef] = []
        for number, ref in enumerate(unique(refs), 1):
            if not await self._is_here(ref):
                missing.append(ref)
            if number % LOOKED_UP_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if not missing:
            return
        with trio.move_on_after(timeout_s) as patience:
            await self._fetch_small_together([ref for ref in missing if ref.size <= SMALL_BYTES_MAX], hints, lane)
            rest = [ref for ref in missing if not self._store.has(ref.hash)]
            await self._fetch_each(rest, hints, timeout_s, lane)
        if patience.cancelled_caught:
            raise Unavailable(f"{len(missing)} blobs did not all arrive within {timeout_s:g} s")

    async def get_bytes(self, ref: BlobRef, *, bytes_max: int, hints: Sequence[NodeId] = (), timeout_s: float) -> bytes:
        """The verified bytes, from here or elsewhere; a copy that went bad on this disk is replaced. Raises TooLarge."""
        await self.fetch(ref, hints=hints, timeout_s=timeout_s)
        try:
            return await self._store.get_bytes(ref, bytes_max=bytes_max)
        except Corrupt as error:
            self._log.error("blob.corrupt", blob=ref.hash, error=error.message)
            await self.fetch(ref, hints=hints, timeout_s=timeout_s)
            return await self._store.get_bytes(ref, bytes_max=bytes_max)

    async def who_has(
        self, blob: str, *, enough: int | None = None, but: Collection[NodeId] = ()
    ) -> tuple[NodeId, ...]:
        """Asks every connected member, except `but`; stops when `enough` said yes. This node is not among them."""
        return tuple(await self._sizes_at(blob, enough=enough, but=but))

    async def size_of(self, blob: str) -> int | None:
        """What most of the connected members that have it say; None when none of them does."""
        if self._store.has(blob):
            return self._store.size(blob)
        sizes = Counter((await self._sizes_at(blob, enough=None, but=())).values())
        return sizes.most_common(1)[0][0] if sizes else None

    async def _sizes_at(self, blob: str, *, enough: int | None, but: Collection[NodeId]) -> dict[NodeId, int]:
        found: dict[NodeId, int] = {}
        body = codec.encode(Names((blob,)))
        at_once = trio.CapacityLimiter(ASKED_AT_ONCE_MAX)

        async def ask(peer: NodeId) -> None:
            async with at_once:
                try:
                    answer = await self._rpc.call(peer, "blob.have", body, timeout_s=ASK_S)
                    sizes = codec.decode(answer, Sizes).sizes
                except MeshError:
                    return  # whoever cannot say does not have it for us
                if len(sizes) == 1 and sizes[0] is not None:
                    found[peer] = sizes[0]
                if enough is not None and len(found) >= enough:
                    asking.cancel_scope.cancel()

        async with trio.open_nursery() as asking:
            for peer in sorted(self._transport.connected()):
                if peer not in but and peer != self.me:
                    asking.start_soon(ask, peer)
        return found

    # --- one fetch ---------------------------------------------------------------------------------------------------

    async def _is_here(self, ref: BlobRef) -> bool:
        if not self._store.has(ref.hash):
            return False
        if self._store.size(ref.hash) == ref.size:
            return True
        # Either the file was cut short on this disk, or whoever made the reference is wrong.
        try:
            await self._store.verify(ref.hash)
        except Corrupt as error:
            self._log.error("blob.corrupt", blob=ref.hash, error=error.message)
            return False
        raise InvalidRequest(f"blob {ref.hash} has {self._store.size(ref.hash)} bytes, not {ref.size}")

    async def _join_or_fly(self, ref: BlobRef, hints: Sequence[NodeId], lane: Lane) -> None:
        while not await self._is_here(ref):
            flight = lane.flights.get(ref)
            if flight is None:
                await self._fly(ref, hints, lane)
                return
            flight.hints.update(dict.fromkeys(hints))
            await flight.over.wait()
            if flight.failure is not None:
                raise from_code(flight.failure.code, flight.failure.message, flight.failure.hint)
            # It is here now, or whoever flew gave up: then this caller flies on.

    async def _fly(self, ref: BlobRef, hints: Sequence[NodeId], lane: Lane) -> None:
        flight = lane.flights[ref] = _Flight(dict.fromkeys(hints))
        try:
            async with lane.slot(is_small=ref.size <= SMALL_BYTES_MAX):
                await self._fetch_in_rounds(ref, flight)
        except MeshError as error:
            flight.failure = error
            raise
        finally:
            del lane.flights[ref]
            flight.over.set()

    async def _fetch_in_rounds(self, ref: BlobRef, flight: _Flight) -> None:
        why: dict[NodeId, str] = {}
        for number, pause_s in enumerate(ROUND_PAUSES_S):
            await trio.sleep(pause_s)
            sources = self._known_sources(ref, flight.hints)
            if number or not sources:
                found = await self.who_has(ref.hash, enough=1, but={*self._banned(), *why, *sources})
                sources = unique_nodes([*found, *sources])
            if sources and await self._fetch_from(ref, sources, why):
                return
        reasons = "; ".join(f"{node}: {reason}" for node, reason in why.items())
        raise Unavailable(
            f"blob {ref.hash} cannot be fetched: {reasons or 'no node that can be reached has it'}",
            hint="see where it is with `mesh blob where`",
        )

    def _known_sources(self, ref: BlobRef, hints: Iterable[NodeId]) -> list[NodeId]:
        banned = {*self._banned(), self.me}
        connected = self._transport.connected()
        known = [node for node in unique_nodes([*hints, *self.holders(ref.hash)]) if node not in banned]
        return sorted(known, key=lambda node: node not in connected)

    async def _fetch_from(self, ref: BlobRef, sources: Sequence[NodeId], why: dict[NodeId, str]) -> bool:
        if ref.size > SMALL_BYTES_MAX:
            return await self._fetch_large(ref, sources, why)
        for source in sources:
            try:
                given = await self._ask_small(source, [ref])
            except PeerFault as error:
                self._ban(source, error)
                why[source] = error.message
            except Unavailable as error:
                why[source] = error.message
            else:
                if given:
                    await self._store.put_many(given)
                    return True
                why[source] = "does not have it"
        return False

    # --- small ones --------------------------------------------------------------------------------------------------

    async def _ask_small(self, source: NodeId, refs: Sequence[BlobRef]) -> list[bytes]:
        """Those that it has, each checked. Raises PeerFault for wrong bytes, InvalidRequest for a ref's wrong size, Unavailable."""
        body = codec.encode(Names(tuple(ref.hash for ref in refs)))
        try:
            answer = await self._rpc.call(source, "blob.get", body, timeout_s=CALL_S)
        except Unavailable:
            raise
        except MeshError as error:
            raise Unavailable(f"refused to give it: {error.message}") from error
        try:
            datas = codec.decode(answer, Contents).datas
        except InvalidRequest as error:
            raise PeerFault(f"answered nonsense: {error.message}") from error
        if len(datas) != len(refs):
            raise PeerFault(f"answered {len(datas)} blobs to {len(refs)} names")
        given = [(ref, data) for ref, data in zip(refs, datas, strict=True) if data is not None]
        for ref, data in given:
            if blake3(data).hexdigest() != ref.hash:
                raise PeerFault(f"gave wrong bytes for blob {ref.hash}")
            if len(data) != ref.size:
                raise InvalidRequest(f"blob {ref.hash} has {len(data)} bytes, not {ref.size}")
        return [data for _, data in given]

    async def _fetch_small_together(self, refs: Sequence[BlobRef], hints: Sequence[NodeId], lane: Lane) -> None:
        """From whoever is said to have them; what that does not bring is left to `fetch`."""
        by_source: dict[NodeId, list[BlobRef]] = {}
        for ref in refs:
            if sources := self._known_sources(ref, hints):
                by_source.setdefault(sources[0], []).append(ref)
        for source, wanted in by_source.items():
            for batch in batches(wanted):
                try:
                    async with lane.slot(is_small=True):
                        given = await self._ask_small(source, batch)
                except PeerFault as error:
                    self._ban(source, error)
                    break
                except Unavailable:
                    break
                await self._store.put_many(given)

    async def _fetch_each(self, refs: Sequence[BlobRef], hints: Sequence[NodeId], timeout_s: float, lane: Lane) -> None:
        left = iter(refs)
        failures: list[MeshError] = []

        async def work() -> None:
            for ref in left:
                try:
                    await self.fetch(ref, hints=hints, timeout_s=timeout_s, lane=lane)
                except MeshError as error:
                    failures.append(error)
                    workers.cancel_scope.cancel()

        async with trio.open_nursery() as workers:
            for _ in range(min(len(refs), LARGE_MAX * 2)):
                workers.start_soon(work)
        if failures:
            raise failures[0]

    # --- large ones --------------------------------------------------------------------------------------------------

    async def _fetch_large(self, ref: BlobRef, sources: Sequence[NodeId], why: dict[NodeId, str]) -> bool:
        if ref not in self._begun:
            # Before a plan, which takes memory for every range of what may be a size that somebody made up.
            await self._store.resume(ref)
        begun = self._begun.pop(ref, None) or _Begun(Plan(ref.size))
        self._begun[ref] = begun  # the newest is last
        async with begun.turn:
            await self._drop_oldest()
            try:
                # Another lane's fetch may have brought it meanwhile.
                is_over = await self._is_here(ref) or await self._go_on(ref, begun.plan, sources, why)
            except Busy:
                await self._drop(ref, begun)  # whatever fills the disk needs the room more
                raise
            if is_over:
                await self._drop(ref, begun)
            return is_over

    async def _go_on(self, ref: BlobRef, plan: Plan, sources: Sequence[NodeId], why: dict[NodeId, str]) -> bool:
        transfer = _Transfer(await self._store.resume(ref), plan, why)
        while sources := [node for node in sources if node not in self._banned()]:
            await self._draw_from_all(transfer, sources[:SOURCES_MAX])
            if not plan.is_complete:
                return False
            is_right = await transfer.blob.commit()
            for liar in plan.judge(is_right=is_right):
                error = PeerFault(f"gave wrong bytes for blob {ref.hash}")
                self._ban(liar, error)
                why[liar] = error.message
            if is_right:
                return True
        return False

    async def _drop_oldest(self) -> None:
        for other, begun in list(self._begun.items()):
            is_idle = self._begun.get(other) is begun and not begun.turn.locked()
            if len(self._begun) > PARTIALS_MAX and is_idle:
                async with begun.turn:
                    await self._drop(other, begun)

    async def _drop(self, ref: BlobRef, begun: _Begun) -> None:
        """Called by whose turn it is; whoever waits for the next begins anew."""
        await PartialBlob(self._store, ref).discard()
        begun.plan = Plan(ref.size)
        if not begun.turn.statistics().tasks_waiting:
            del self._begun[ref]

    async def _draw_from_all(self, transfer: _Transfer, sources: Sequence[NodeId]) -> None:
        transfer.plan.begin(sources)
        async with trio.open_nursery() as streams:
            transfer.stop = streams.cancel_scope.cancel
            for source in sources:
                streams.start_soon(self._draw, transfer, source)
        if transfer.failure is not None:
            raise transfer.failure

    async def _draw(self, transfer: _Transfer, source: NodeId) -> None:
        """Take ranges from one source until all are there or it fails; then the others do its part."""
        try:
            async with self._open(source, transfer.blob.ref) as wire:
                await _draw_ranges(transfer, source, wire)
        except _FaultHere as error:
            transfer.failure = error.cause
            transfer.stop()
        except PeerFault as error:
            self._ban(source, error)
            transfer.why[source] = error.message
        except MeshError as error:
            transfer.why[source] = error.message
        finally:
            transfer.plan.lost(source)
            transfer.tell()

    @asynccontextmanager
    async def _open(self, source: NodeId, ref: BlobRef) -> AsyncIterator[Wire]:
        stream = await self._transport.open_stream(source, PROTOCOL, timeout_s=CALL_S)
        try:
            yield Wire(stream, silence_s=SILENCE_S + min(ref.size / VERIFY_BYTES_PER_S, VERIFY_S_MAX))
        finally:
            await stream.aclose()

    # --- who is not asked --------------------------------------------------------------------------------------------

    def _banned(self) -> frozenset[NodeId]:
        now = trio.current_time()
        self._banned_until = {node: until for node, until in self._banned_until.items() if until > now}
        return frozenset(self._banned_until)

    def _ban(self, node: NodeId, error: PeerFault) -> None:
        self._banned_until[node] = trio.current_time() + BAN_S
        self._log.warning("blob.source_banned", peer=node, seconds=BAN_S, error=error.message)


class _FaultHere(Exception):
    """This node's disk failed, not the source: nobody else can help."""

    def __init__(self, cause: MeshError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Transfer:
    """A large blob on its way."""

    def __init__(self, blob: PartialBlob, plan: Plan, why: dict[NodeId, str]) -> None:
        self.blob = blob
        self.plan = plan
        self.why = why
        self.failure: MeshError | None = None
        self.stop: Callable[[], None] = lambda: None
        self._changed = trio.Event()

    def tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        await self._changed.wait()


async def _draw_ranges(transfer: _Transfer, source: NodeId, wire: Wire) -> None:
    plan = transfer.plan
    asked: deque[Range] = deque()
    while not plan.is_complete:
        while len(asked) < AHEAD_MAX and (wanted := plan.take(source)) is not None:
            asked.append(wanted)
            await wire.send(Want(transfer.blob.ref.hash, wanted.offset, wanted.length))
        if not asked:
            await transfer.wait_changed()  # the rest is with others, who may fail
            continue
        expected = asked.popleft()
        data = await _receive_range(wire, transfer.blob.ref, expected)
        wire.silence_s = SILENCE_S
        try:
            digest = await transfer.blob.write_at(expected.offset, data)
        except MeshError as error:
            raise _FaultHere(error) from error
        plan.arrived(source, expected.index, digest)
        transfer.tell()


async def _receive_range(wire: Wire, ref: BlobRef, expected: Range) -> bytes:
    with trio.move_on_after(wire.silence_s + RANGE_S):
        match await wire.receive(Reply):
            case Coming(size=ref.size, length=expected.length):
                return await wire.read_exactly(expected.length)
            case Coming(size=size) if size != ref.size:
                raise Unavailable(f"has {size} bytes of that name, not {ref.size}")
            case Coming(length=length):
                raise PeerFault(f"answered {length} bytes to a request for {expected.length}")
            case Refusal(code=code, message=message):
                raise Unavailable(f"refused to give it: {message} ({code})")
            case _:
                raise Unavailable("ended the stream before its answer")
    raise Unavailable(f"gave less than a range in {RANGE_S:g} s")


def batches(refs: Sequence[BlobRef], *, bytes_max: int | None = CALL_BYTES_MAX) -> list[list[BlobRef]]:
    """Runs that fit one call each, by number and, where their bytes travel along, by bytes."""
    runs: list[list[BlobRef]] = []
    room = 0
    for ref in refs:
        if not runs or len(runs[-1]) == NAMES_MAX or (bytes_max is not None and ref.size > room):
            runs.append([])
            room = bytes_max or 0
        runs[-1].append(ref)
        room -= ref.size
    return runs


def unique_nodes(nodes: Iterable[NodeId]) -> list[NodeId]:
    """Each once, in order of first mention."""
    return list(dict.fromkeys(nodes))
