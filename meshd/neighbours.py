"""Whom to turn to: voters by what they say of themselves, nodes that may take copies, where members are now.

From gossip and the directory, either of which may be wrong. For most that costs a detour;
`takers` decides how many disks a result rests on, so it may not take silence for death.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from meshd import codec
from meshd.directory import Directory
from meshd.errors import InvalidRequest
from meshd.gossip.membership import State
from meshd.gossip.service import GossipService
from meshd.model import NodeId, Offer

LEADER_FACT = "leader"
"""Published by a server as it begins to lead: its term, above all those before the newest recovery."""
MEMBERS_FACT = "members"
"""Published by voters: the log position of the newest change of members, above all those before the newest recovery."""
OFFER_FACT = "offer"
"""Published by everybody: what the node can run, also for when no voter can be asked."""
ADDRESS_FACT = "addr"
"""Published by everybody: addresses of peers' port and API."""


class Neighbours:
    def __init__(
        self,
        me: NodeId,
        directory: Directory,
        gossip: GossipService | None = None,
        *,
        holds_log_alone: Callable[[], bool] = lambda: False,
    ) -> None:
        """`holds_log_alone`: this node is the only voter."""
        self._me = me
        self._directory = directory
        self._holds_log_alone = holds_log_alone
        self.gossip = gossip
        """None until it runs; then nobody is known to be dead."""

    def voters(self) -> list[NodeId]:
        """Other servers, the likely leader first and the dead last: any voter will do, some answer sooner."""
        return sorted(self._directory.servers(), key=lambda node: (self._is_dead(node), -self._term_of(node)))

    def _term_of(self, node: NodeId) -> int:
        """Of the newest term that it says it has led in."""
        value = self.gossip.fact(node, LEADER_FACT) if self.gossip else None
        with suppress(InvalidRequest):
            return codec.decode(value, int) if value is not None else -1
        return -1

    def takers(self) -> Sequence[NodeId]:
        """Who may take copies of blobs: everybody that is thought alive and stays."""
        staying = [node for node in self._directory.members() if not self._directory.is_draining(node)]
        return takers_of(staying, self._is_dead, holds_log_alone=self._holds_log_alone())

    def offer(self, node: NodeId) -> Offer | None:
        value = self.gossip.fact(node, OFFER_FACT) if self.gossip else None
        with suppress(InvalidRequest):
            return codec.decode(value, Offer) if value is not None else None
        return None

    def told_numbers(self, key: str) -> dict[NodeId, int]:
        """What members say of themselves under this key; a fact is authentic, but may still be nonsense."""
        found: dict[NodeId, int] = {}
        for (node, name), value in (self.gossip.facts(key) if self.gossip else {}).items():
            with suppress(InvalidRequest):
                if name == key:
                    found[node] = codec.decode(value, int)
        return found

    def learn_addresses(self) -> None:
        """A node that moved is found by all as soon as one has heard of it."""
        for (node, key), value in (self.gossip.facts(ADDRESS_FACT) if self.gossip else {}).items():
            if key == ADDRESS_FACT and node != self._me:
                with suppress(InvalidRequest):
                    addresses, api_address = codec.decode(value, tuple[tuple[str, ...], str])
                    self._directory.learn_addresses(node, addresses[:8], api_address[:256])

    def _is_dead(self, node: NodeId) -> bool:
        health = self.gossip.health(node) if self.gossip else None
        return health is not None and health.state is State.DEAD


def takers_of(
    staying: Sequence[NodeId], is_dead: Callable[[NodeId], bool], *, holds_log_alone: bool
) -> tuple[NodeId, ...]:
    """Those of the other nodes that count as disks there are (protocol.md 6).

    Who thinks all others dead is cut off more likely than the last one: what it then put on its own
    disk alone would be told as soon as it is back. It asks them all until one answers, which delays nothing:
    nobody hears of its results before that either, unless the log rests on this very node.
    """
    living = tuple(node for node in staying if not is_dead(node))
    return living if living or holds_log_alone else tuple(staying)
