"""A whole network in one process: the Transport port for tests, as bytes through bounded pipes.

Passes the same conformance suite as the real one. What a test may do to it: `cut` and `heal` a pair of
nodes (bytes stop, nobody is told: a partition), `lose` a node (connections break at once: kill -9),
`refuse` dials to it. Waiting is trio's, so that a virtual clock drives every timeout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import trio

from meshd.errors import NotAllowed, PeerFault, Unavailable
from meshd.model import NodeId
from meshd.ports import AddressBook, Gate, PeerEvents, Stream, StreamHandler

PIPE_BYTES_MAX = 256 << 10
"""Bytes on their way in one direction of a stream; yamux starts with the same window."""

WRITE_DEADLINE_S = 30.0
"""As the port says: a peer that does not read for so long is lost."""

Pair = frozenset[NodeId]


class MemoryNetwork:
    """The wires. Addresses are `/memory/<node id>`."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, MemoryTransport] = {}
        self._cut: set[Pair] = set()
        self._refusing: set[NodeId] = set()
        self._links: dict[Pair, _Link] = {}
        self._healed = trio.Event()

    def transport(self, me: NodeId, gate: Gate, book: AddressBook, events: PeerEvents) -> MemoryTransport:
        """A node's end. It can be dialled while its `serve` runs."""
        return MemoryTransport(self, me, gate, book, events)

    def cut(self, one: NodeId, other: NodeId) -> None:
        """No byte passes and nobody is told; what was written is delivered after `heal`."""
        self._cut.add(frozenset((one, other)))

    def heal(self, one: NodeId, other: NodeId) -> None:
        pair = frozenset((one, other))
        self._cut.discard(pair)
        self._healed.set()
        self._healed = trio.Event()
        if pair in self._links:
            self._links[pair].wake()

    def lose(self, node: NodeId) -> None:
        """Every connection of the node breaks and both ends see it, as when its process is killed."""
        for pair in [pair for pair in self._links if node in pair]:
            self.sever(pair)

    def refuse(self, node: NodeId, *, dials: bool = True) -> None:
        """Nobody can dial the node; its connections stay."""
        (self._refusing.add if dials else self._refusing.discard)(node)

    def is_cut(self, pair: Pair) -> bool:
        return pair in self._cut

    async def wait_whole(self, pair: Pair) -> None:
        await trio.lowlevel.checkpoint()
        while self.is_cut(pair):
            await self._healed.wait()

    def link(self, pair: Pair) -> _Link | None:
        return self._links.get(pair)

    def linked_with(self, node: NodeId) -> frozenset[NodeId]:
        return frozenset(other for pair in self._links if node in pair for other in pair - {node})

    async def dial(self, caller: NodeId, peer: NodeId, address: str) -> None:
        """Raises Unavailable, PeerFault; waits for as long as the pair is cut."""
        answering = NodeId(address.removeprefix("/memory/"))
        pair = frozenset((caller, answering))
        await self.wait_whole(pair)
        if answering not in self._nodes or answering in self._refusing:
            raise Unavailable(f"nobody answers at {address}")
        if answering != peer:
            raise PeerFault(f"{answering} answers at {address}, not {peer}")
        if pair not in self._links:
            self._links[pair] = _Link(self, pair)
            for node in sorted(pair):
                self._nodes[node].events.peer_up(_other(pair, node))

    def sever(self, pair: Pair) -> None:
        link = self._links.pop(pair, None)
        if link is None:
            return
        link.break_streams()
        for node in sorted(pair):
            if node in self._nodes:
                self._nodes[node].events.peer_down(_other(pair, node))

    def attach(self, node: MemoryTransport) -> None:
        assert node.me not in self._nodes, f"{node.me} is already on the network"
        self._nodes[node.me] = node

    def detach(self, node: MemoryTransport) -> None:
        self.lose(node.me)
        del self._nodes[node.me]

    def node(self, node: NodeId) -> MemoryTransport:
        return self._nodes[node]


class MemoryTransport:
    """One node's ports.Transport on a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, me: NodeId, gate: Gate, book: AddressBook, events: PeerEvents) -> None:
        self.events = events
        self._network = network
        self._me = me
        self._gate = gate
        self._book = book
        self._handlers: dict[str, StreamHandler] = {}
        self._counters: Counter[str] = Counter()
        self._work: trio.Nursery | None = None

    @property
    def me(self) -> NodeId:
        return self._me

    @property
    def addresses(self) -> Sequence[str]:
        return (f"/memory/{self._me}",)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be on the network until cancelled."""
        async with trio.open_nursery() as self._work:
            self._network.attach(self)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._network.detach(self)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def connect(self, peer: NodeId, addresses: Sequence[str], *, timeout_s: float) -> None:
        if peer == self._me:
            raise PeerFault(f"{peer} is this node itself")
        if self._network.link(frozenset((self._me, peer))) is not None:
            return
        failure: Unavailable | PeerFault = Unavailable(f"no address of {peer} is known")
        with trio.move_on_after(timeout_s) as patience:
            for address in addresses:
                try:
                    await self._network.dial(self._me, peer, address)
                    return
                except (Unavailable, PeerFault) as error:
                    failure = error
        if patience.cancelled_caught:
            failure = Unavailable(f"{peer} did not answer within {timeout_s:g} s")
        raise failure

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> Stream:
        pair = frozenset((self._me, peer))
        with trio.move_on_after(timeout_s):
            if self._network.link(pair) is None:
                await self.connect(peer, self._book(peer), timeout_s=timeout_s)
            await self._network.wait_whole(pair)
            link = self._network.link(pair)
            if link is None:
                raise Unavailable(f"the connection to {peer} was lost")
            there = self._network.node(peer)
            if not there.admits(self._me, protocol):
                raise NotAllowed(f"{peer} does not let {self._me} speak {protocol}")
            ours, theirs = link.open(self._me, peer)
            there.answer(protocol, theirs)
            return ours
        raise Unavailable(f"{peer} did not open a stream within {timeout_s:g} s")

    async def drop(self, peer: NodeId, *, age_s: float = 0.0) -> None:
        pair = frozenset((self._me, peer))
        link = self._network.link(pair)
        if link is not None and trio.current_time() - link.made_at >= age_s:
            self._network.sever(pair)

    def connected(self) -> frozenset[NodeId]:
        return self._network.linked_with(self._me)

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def admits(self, peer: NodeId, protocol: str) -> bool:
        if protocol in self._handlers and self._gate(peer, protocol):
            return True
        self._counters["streams_refused"] += 1
        return False

    def answer(self, protocol: str, stream: _MemoryStream) -> None:
        assert self._work is not None
        self._work.start_soon(self._guarded, self._handlers[protocol], stream)

    async def _guarded(self, handler: StreamHandler, stream: _MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception:
            self._counters["handlers_failed"] += 1
            stream.reset()
        finally:
            await stream.aclose()


class _Link:
    """One connection between two nodes and the streams on it."""

    def __init__(self, network: MemoryNetwork, pair: Pair) -> None:
        self._network = network
        self._pair = pair
        self.made_at = trio.current_time()
        self._pipes: set[_Pipe] = set()

    def open(self, caller: NodeId, peer: NodeId) -> tuple[_MemoryStream, _MemoryStream]:
        there, back = (_Pipe(self._network, self._pair, self._pipes.discard) for _ in range(2))
        self._pipes |= {there, back}
        return _MemoryStream(peer, back, there), _MemoryStream(caller, there, back)

    def wake(self) -> None:
        for pipe in self._pipes:
            pipe.move()

    def break_streams(self) -> None:
        for pipe in list(self._pipes):
            pipe.break_off()


class _Pipe:
    """One direction of a stream."""

    def __init__(self, network: MemoryNetwork, pair: Pair, forget: Callable[[_Pipe], None]) -> None:
        self.network = network
        self.pair = pair
        self._forget = forget
        self._bytes = bytearray()
        self._is_ended = False
        self._is_broken = False
        self._moved = trio.Event()

    def move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def read(self, bytes_max: int, peer: NodeId) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._is_broken:
            if not self.network.is_cut(self.pair):
                if self._bytes:
                    data = bytes(self._bytes[:bytes_max])
                    del self._bytes[:bytes_max]
                    self.move()
                    return data
                if self._is_ended:
                    self._forget(self)
                    return b""
            await self._moved.wait()
        raise Unavailable(f"the stream to {peer} broke off")

    async def write(self, data: bytes, peer: NodeId) -> None:
        await trio.lowlevel.checkpoint()
        rest = memoryview(data)
        while rest:
            if self._is_broken or self._is_ended:
                raise Unavailable(f"the stream to {peer} broke off")
            room = PIPE_BYTES_MAX - len(self._bytes)
            if room:
                self._bytes += rest[:room]
                rest = rest[room:]
                self.move()
            else:
                await self._moved.wait()

    def end(self) -> None:
        self._is_ended = True
        self.move()

    def break_off(self) -> None:
        self._is_broken = True
        self._bytes.clear()
        self._forget(self)
        self.move()


class _MemoryStream:
    """One end of a stream; each end of it reads what the other wrote."""

    def __init__(self, peer: NodeId, inward: _Pipe, outward: _Pipe) -> None:
        self._peer = peer
        self._inward = inward
        self._outward = outward

    @property
    def peer(self) -> NodeId:
        return self._peer

    async def read(self, bytes_max: int) -> bytes:
        return await self._inward.read(bytes_max, self._peer)

    async def write(self, data: bytes) -> None:
        with trio.move_on_after(WRITE_DEADLINE_S) as patience:
            await self._outward.write(data, self._peer)
        if patience.cancelled_caught:
            self._outward.network.sever(self._outward.pair)
            raise Unavailable(f"{self._peer} did not read for {WRITE_DEADLINE_S:g} s")

    def write_now(self, data: bytes) -> bool:
        return False

    async def close_write(self) -> None:
        self._outward.end()

    async def aclose(self) -> None:
        """What was written before still arrives; the peer's next write fails."""
        self._outward.end()
        self._inward.break_off()

    def reset(self) -> None:
        self._outward.break_off()
        self._inward.break_off()


def _other(pair: Pair, node: NodeId) -> NodeId:
    (other,) = pair - {node}
    return other
