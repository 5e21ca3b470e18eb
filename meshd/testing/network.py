"""The simulated network: messages that are lost, doubled, late or cut off, and the connections that carry them.

A connection is there from the first message that arrives until one of its ends dies and
says so, a cut breaks it, or it has been silent for as long as meshd/net/rpc.py puts up
with; its keep-alives are not modelled one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshd.gossip.membership import Event, PeerDown, PeerUp
from meshd.model import NodeId
from meshd.testing.faults import CALM, Faults
from meshd.testing.heap import Heap

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode

KEEP_ALIVE_MS = 2_500
SILENT_MS = 7_500
"""As the daemon's: a silent peer is dropped after 7.5 to 10 s."""


class Network:
    def __init__(self, heap: Heap, faults: Faults, nodes: dict[NodeId, SimNode]) -> None:
        self.heap, self.faults = heap, faults
        self._nodes = nodes
        self._cut: set[tuple[NodeId, NodeId]] = set()
        self._is_healed = False

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
        is_rough = not self._is_healed and self.heap.now_ms < self.faults.lasts_ms
        rough = self.faults if is_rough else CALM
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
        if self._is_healed:
            return
        others = [other for other in self._nodes.values() if other is not node]
        lost = {(node.id, other.id) for other in others}
        if not one_way:
            lost |= {(other.id, node.id) for other in others}
        self._cut |= lost
        is_seen = self.heap.chance(self.faults.cut_breaks)
        kind = f"{' one way' if one_way else ''}{', connections break' if is_seen else ''}"
        self.heap.note(f"{node.name}: cut off for {int(for_ms)} ms{kind}")
        self.heap.after(for_ms, lambda: self._cut.difference_update(lost))
        if is_seen:
            self.break_connections(node)

    def break_connections(self, node: SimNode) -> None:
        """Both ends notice, those that are asleep as soon as they wake."""
        for other in self._nodes.values():
            if other is not node:
                other.after(0, lambda other=other: other.connections.lost(node.id))  # type: ignore[misc]
                node.after(0, lambda other=other: node.connections.lost(other.id))  # type: ignore[misc]

    def heal(self) -> None:
        """No fault any more, and none that was planned."""
        self._is_healed = True
        self._cut.clear()


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

    def keep_alive(self) -> None:
        node = self._node
        node.after(KEEP_ALIVE_MS, self.keep_alive)
        for peer, heard_ms in list(self._heard_ms.items()):
            if node.world.network.are_joined(node, node.world.nodes[peer]):
                self._heard_ms[peer] = node.world.heap.now_ms
            elif node.world.heap.now_ms - heard_ms >= SILENT_MS:
                self.lost(peer)

    def _tell(self, event: Event) -> None:
        if self._node.gossip is not None:
            self._node.gossip.handle(event)
