"""The simulated network: messages that are lost, doubled, late or cut off, and the connections that carry them.

A connection is there from the first message that arrives until one of its ends dies and
says so, a cut breaks it, or it has been silent for as long as meshd/net/rpc.py puts up
with; its keep-alives are not modelled one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshd.gossip.membership import PeerDown, PeerUp
from meshd.model import NodeId
from meshd.testing.faults import CALM, Faults
from meshd.testing.heap import Heap
from meshd.testing.streams import RESENT_MS, Stream, let_go

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode

FOR_EVER_MS = 1 << 60
KEEP_ALIVE_MS = 2_500
SILENT_MS = 7_500
"""As the daemon's: a silent peer is dropped after 7.5 to 10 s."""


class Network:
    def __init__(self, heap: Heap, faults: Faults, nodes: dict[NodeId, SimNode]) -> None:
        self.heap, self.faults = heap, faults
        self._nodes = nodes
        self._cut: set[tuple[NodeId, NodeId]] = set()
        self._held: list[Stream] = []
        self._is_healed = False
        self.began_ms = FOR_EVER_MS
        """When the faults begin: not while the mesh is founded."""

    @property
    def weather(self) -> Faults:
        """What messages meet now."""
        return self.faults if self.is_rough else CALM

    @property
    def is_rough(self) -> bool:
        return not self._is_healed and self.began_ms <= self.heap.now_ms < self.began_ms + self.faults.lasts_ms

    def hears(self, sender: NodeId, receiver: NodeId) -> bool:
        return (sender, receiver) not in self._cut

    def are_joined(self, one: SimNode, other: SimNode) -> bool:
        """Both are awake and hear each other."""
        return one.is_awake and other.is_awake and self.hears(one.id, other.id) and self.hears(other.id, one.id)

    def send(
        self,
        sender: SimNode,
        receiver: SimNode,
        deliver: Callable[[], None],
        *,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """Lost, late, doubled, cut; delivered into the process that lives there then, when it is awake.

        `refused` is called at the sender when the machine is there and says that the process is not.
        """
        if not sender.is_alive:
            return
        if sender is receiver:
            receiver.after(0, deliver)
            return
        rough = self.weather
        for _ in range(2 if self.heap.chance(rough.double) else 1):
            if self.heap.chance(rough.lose):
                continue
            delay_ms = self.heap.between(*rough.latency_ms)
            if self.heap.chance(rough.late):
                delay_ms += self.heap.between(*rough.late_ms)

            def arrive() -> None:
                if not self.hears(sender.id, receiver.id):
                    return
                if receiver.is_alive:
                    receiver.connections.heard(sender.id)
                    receiver.after(0, deliver)
                elif receiver.has_power and self.hears(receiver.id, sender.id):
                    sender.after(0, refused)

            self.heap.after(delay_ms, arrive)

    def cut_off(self, node: SimNode, for_ms: float, *, one_way: bool) -> None:
        others = [other for other in self._nodes.values() if other is not node]
        lost = {(node.id, other.id) for other in others}
        if not one_way:
            lost |= {(other.id, node.id) for other in others}
        self._cut_for(for_ms, lost, [node], f"{node.name}: cut off{' one way' if one_way else ''}")

    def deafen(self, node: SimNode, for_ms: float) -> None:
        """It is heard and hears nothing."""
        lost = {(other.id, node.id) for other in self._nodes.values() if other is not node}
        self._cut_for(for_ms, lost, [node], f"{node.name}: deaf")

    def split(self, half: list[SimNode], other_half: list[SimNode], for_ms: float) -> None:
        """Whoever is in neither hears both: a bridge."""
        lost = {(one.id, other.id) for one in half for other in other_half}
        lost |= {(other, one) for one, other in lost}
        names = " | ".join(" ".join(node.name for node in nodes) for nodes in (half, other_half))
        self._cut_for(for_ms, lost, half, f"split {names}")

    def _cut_for(self, for_ms: float, lost: set[tuple[NodeId, NodeId]], seen_at: list[SimNode], what: str) -> None:
        if self._is_healed:
            return
        self._cut |= lost
        is_seen = self.heap.chance(self.faults.cut_breaks)
        self.heap.note(f"{what} for {int(for_ms)} ms{', connections break' if is_seen else ''}")
        self.heap.after(for_ms, lambda: self._mend(lost))
        if is_seen:
            for node in seen_at:
                self.break_connections(node, lost)

    def _mend(self, lost: set[tuple[NodeId, NodeId]]) -> None:
        self._cut -= lost
        self._release()

    def hold(self, stream: Stream) -> None:
        """Its frames wait for a cut to heal."""
        self._held.append(stream)

    def _release(self) -> None:
        """What was held back arrives when it is sent again."""
        held, self._held = self._held, []
        for stream in held:
            self.heap.after(self.heap.between(*RESENT_MS), lambda stream=stream: self._let_go(stream))  # type: ignore[misc]

    def _let_go(self, stream: Stream) -> None:
        if self.hears(stream.sender.node.id, stream.receiver.node.id):
            let_go(stream)
        else:
            self.hold(stream)

    def break_connections(self, node: SimNode, lost: set[tuple[NodeId, NodeId]] | None = None) -> None:
        """All of its connections, or those that lost a direction. Both ends notice, those that are asleep as soon as
        they wake; what is on its way may come first."""
        for other in self._nodes.values():
            is_hit = lost is None or (node.id, other.id) in lost or (other.id, node.id) in lost
            if other is not node and is_hit:
                late_ms = self.heap.between(*CALM.latency_ms)
                other.after(late_ms, lambda other=other: other.connections.lost(node.id))  # type: ignore[misc]
                node.after(0, lambda other=other: node.connections.lost(other.id))  # type: ignore[misc]

    def heal(self) -> None:
        """No fault any more, and none that was planned."""
        self._is_healed = True
        self._cut.clear()
        self._release()


class Connections:
    """One process's: whom it is connected to, and when it heard from them last."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._heard_ms: dict[NodeId, int] = {}

    def __contains__(self, peer: NodeId) -> bool:
        return peer in self._heard_ms

    def heard(self, peer: NodeId) -> None:
        """Something has arrived from there, by whatever connection."""
        if peer not in self._heard_ms:
            self._node.after(0, lambda: self._tell(PeerUp(peer)))
        self._heard_ms[peer] = self._node.world.heap.now_ms

    def lost(self, peer: NodeId) -> None:
        """The last connection to this peer is no more."""
        if self._heard_ms.pop(peer, None) is not None:
            self._tell(PeerDown(peer))
            if self._node.server is not None:
                self._node.server.streams.lost(peer)

    def keep_alive(self) -> None:
        node = self._node
        node.after(KEEP_ALIVE_MS, self.keep_alive)
        for peer, heard_ms in list(self._heard_ms.items()):
            if node.world.network.are_joined(node, node.world.nodes[peer]):
                self._heard_ms[peer] = node.world.heap.now_ms
            elif node.world.heap.now_ms - heard_ms >= SILENT_MS:
                self.lost(peer)

    def _tell(self, event: PeerUp | PeerDown) -> None:
        if self._node.gossip is not None:
            self._node.gossip.handle(event)
            self._node.tell_gone(event.peer)
