"""Raft's streams between simulated servers: first in, first out, one in each direction, and they break.

What meshd/raft/wire.py does on sockets is done here on virtual time: dial whom Raft wants
to reach, greet, report up and down, hand frames over as bytes. A cut holds frames back
until it heals or somebody gives the connection up; what was on its way then may be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING

from meshd import codec
from meshd.model import NodeId
from meshd.raft import wire
from meshd.raft.messages import AnyMessage, VoterId, node_of
from meshd.raft.surroundings import Down, Incident, Mail, Up

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode
    from meshd.testing.servers import SimServer

REDIAL_MS = (wire.REDIAL_S_MIN * 1000, wire.REDIAL_S_MAX * 1000)
SILENT_DIAL_MS = wire.DIAL_S * 1000
"""A dial that nobody answers is given up after so long."""
RESENT_MS = (200.0, 1_000.0)
"""TCP sends again what was lost, or held back by a cut that has healed, after about so long."""


class Stream:
    """One way, from one process to another."""

    __slots__ = ("arrival_ms", "held", "is_lost", "peer", "process", "receiver", "sender", "staged")

    def __init__(self, sender: SimServer, receiver: SimServer) -> None:
        self.sender, self.receiver = sender, receiver
        self.peer = receiver.voter
        self.process = receiver.node.process
        self.staged: list[bytes] = []
        self.held: deque[list[bytes]] = deque()
        """Frames that a cut keeps from arriving."""
        self.arrival_ms = 0.0
        self.is_lost = False
        """What has not arrived yet never will."""


class Streams:
    """meshd.raft.server.Links: the streams of one server's process."""

    def __init__(self, server: SimServer) -> None:
        self._server = server
        self.node: SimNode = server.node
        self.inbox: deque[Incident] = deque()
        self._out: dict[NodeId, Stream] = {}
        self._in: dict[NodeId, Stream] = {}
        self.heard_s = float("-inf")
        """When a frame was last read, by this machine's clock."""
        self._saying: list[tuple[VoterId, AnyMessage]] = []
        """What is staged."""
        self._reached: frozenset[NodeId] = frozenset()
        self._dialling: dict[NodeId, float] = {}
        """The pause before the next try."""

    # --- Links --------------------------------------------------------------------------------------------------------

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        stream = self._out.get(node_of(peer))
        if stream is None or stream.peer != peer:
            return False
        stream.staged.append(codec.encode(message))
        self._saying.append((peer, message))
        return True

    def take(self) -> Incident | None:
        if not self.inbox:
            return None
        if isinstance(self.inbox[0], Mail):
            self.heard_s = self.node.clock_s()
        return self.inbox.popleft()

    def connected(self) -> list[VoterId]:
        return sorted(stream.peer for stream in self._out.values())

    def reach(self, peers: Collection[NodeId]) -> None:
        if peers != self._reached:
            self._reached = frozenset(peers)
            self._dial_wanted()

    def flush(self) -> None:
        """What was staged leaves; all of one stream in one go."""
        saying, self._saying = self._saying, []
        for to, message in saying:
            self.node.world.checks.promises.spoke(self._server, to, message)
        for stream in list(self._out.values()):
            if stream.staged:
                frames, stream.staged = stream.staged, []
                self._carry(stream, frames)

    # --- up and down --------------------------------------------------------------------------------------------------

    def _dial_wanted(self) -> None:
        for peer in sorted({*self._reached, *self._in} - {self.node.id}):
            if peer not in self._out and peer not in self._dialling:
                self._dialling[peer] = REDIAL_MS[0]
                self._dial(peer, 0)

    def _dial(self, peer: NodeId, after_ms: float) -> None:
        """A handshake and a greeting, each there and back."""
        latency_ms = self.node.world.network.weather.latency_ms
        self.node.after(after_ms + 4 * self.node.world.heap.between(*latency_ms), lambda: self._dialled(peer))

    def _dialled(self, peer: NodeId) -> None:
        world = self.node.world
        if (peer not in self._reached and peer not in self._in) or peer not in world.nodes:
            del self._dialling[peer]
            return
        target = world.nodes[peer]
        if target.server is None or not world.network.are_joined(self.node, target):
            is_refused = target.server is None and target.has_power and world.network.hears(self.node.id, peer)
            pause_ms = self._dialling[peer]
            self._dialling[peer] = min(2 * pause_ms, REDIAL_MS[1])
            self._dial(peer, pause_ms * world.heap.between(0.5, 1.0) + (0 if is_refused else SILENT_DIAL_MS))
            return
        del self._dialling[peer]
        stream = self._out[peer] = Stream(self._server, target.server)
        self._put(Up(stream.peer))
        self.node.connections.heard(peer)
        target.connections.heard(self.node.id)
        target.server.streams.opened(stream)

    def opened(self, stream: Stream) -> None:
        """A peer's, to here; we keep one to it as well, for our answers."""
        self._in[stream.sender.node.id] = stream
        self._dial_wanted()

    def lost(self, peer: NodeId) -> None:
        """The connection to this peer is gone, in both directions as seen from here."""
        self._in.pop(peer, None)
        self._end(peer)

    def _end(self, peer: NodeId) -> None:
        stream = self._out.pop(peer, None)
        if stream is not None:
            # What the kernel has taken may still arrive.
            stream.is_lost = self.node.world.heap.chance(0.5)
            self._put(Down(stream.peer))
        self._dial_wanted()

    def _put(self, incident: Incident) -> None:
        self.inbox.append(incident)
        self._server.wake()

    # --- frames -------------------------------------------------------------------------------------------------------

    def _carry(self, stream: Stream, frames: list[bytes]) -> None:
        world = self.node.world
        heap, weather = world.heap, world.network.weather
        peer = stream.receiver.node
        if heap.chance(weather.stream_break):
            heap.note(f"{self.node.name}: the connection to {peer.name} breaks")
            self.node.connections.lost(peer.id)
            peer.after(0, lambda: peer.connections.lost(self.node.id))
            return
        delay_ms = heap.between(*weather.latency_ms)
        if heap.chance(weather.lose):
            delay_ms += heap.between(*RESENT_MS)
        if heap.chance(weather.stream_stall):
            delay_ms += heap.between(*weather.stream_stall_ms)
        stream.arrival_ms = max(heap.now_ms + delay_ms, stream.arrival_ms)
        heap.after(stream.arrival_ms - heap.now_ms, lambda: self._arrive(stream, frames))

    def _arrive(self, stream: Stream, frames: list[bytes]) -> None:
        if stream.is_lost:
            return
        sender, receiver = self.node, stream.receiver.node
        if stream.held or not sender.world.network.hears(sender.id, receiver.id):
            if not stream.held:
                sender.world.network.hold(stream)
            stream.held.append(frames)
            return
        self.deliver(stream, frames)

    @staticmethod
    def deliver(stream: Stream, frames: list[bytes]) -> None:
        sender, receiver = stream.sender.node, stream.receiver.node
        streams = stream.receiver.streams
        if receiver.process != stream.process or not receiver.is_alive or streams._in.get(sender.id) is not stream:
            # Nobody there knows this connection: its kernel says so, if there is one.
            if receiver.has_power and sender.world.network.hears(receiver.id, sender.id):
                sender.after(0, lambda: stream.sender.streams.refused(stream))
            return
        if receiver.is_awake:
            receiver.connections.heard(sender.id)
        for frame in frames:
            streams.inbox.append(Mail(stream.sender.voter, codec.decode(frame, AnyMessage), len(frame)))
        stream.receiver.wake()

    def refused(self, stream: Stream) -> None:
        """Its connection was an old one; there may be a newer one the other way."""
        peer = stream.receiver.node.id
        if self._server is self.node.server and self._out.get(peer) is stream:
            self._end(peer)


def let_go(stream: Stream) -> None:
    """A cut has healed: what it held back arrives, in order."""
    held, stream.held = stream.held, deque()
    if stream.is_lost:
        return
    for frames in held:
        Streams.deliver(stream, frames)
