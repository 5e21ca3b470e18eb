"""What one part of the node learns and others have to hear: the parts do not know each other, and meet here.

    log applied ───────▶ replica, archive, agent         members changed ─▶ directory ─▶ gossip, upkeep; this node's duty
    leads, or not ─────▶ agent, gossip                   mesh recovered ──▶ this node follows, or stops
    peer up, down, dead ▶ gossip, agent                  blob here, gone ─▶ gossip

Each part is told here as soon as it is built (daemon.py); what happens before concerns it not yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from meshd import codec
from meshd.agent import AgentEvent, Tick
from meshd.directory import Directory
from meshd.errors import Busy, MeshError, NotAllowed, StartRefused
from meshd.gossip.membership import State
from meshd.gossip.service import GossipService
from meshd.history.archive import Archive
from meshd.model import NodeId
from meshd.neighbours import LEADER_FACT
from meshd.net.rpc import StreamRpc
from meshd.ports import Transport
from meshd.raft.replica import Replica
from meshd.raft.state.commands import Event, MembersChanged, Restored
from meshd.raft.state.lineage import Lineage, since
from meshd.raft.state.machine import Machine
from meshd.recovery.allegiance import Allegiance
from meshd.shell import Shell
from meshd.standing import Standing
from meshd.upkeep import Upkeep
from meshd.views import GetMembers, MembersView
from meshd.work.duty import Duty
from meshd.work.keeper import Applied, PeerGone
from meshd.work.worker import Recovered

FOLLOW_AFTER_S = 2.0
"""A worker that hears of a recovery listens so long for another one: between two it does not choose."""

SETTLE_AGAIN_S = 1.0
"""After the disk had no room for what this node has decided."""

log = structlog.get_logger()


class Mediator:
    """`fail` stops the node for a reason that nobody asked for. `is_settling`: other epochs are looked at, or not yet."""

    def __init__(
        self,
        *,
        me: NodeId,
        directory: Directory,
        standing: Standing,
        lineage: Callable[[], Lineage],
        is_server: bool,
        work: trio.Nursery,
        fail: Callable[[MeshError], None],
    ) -> None:
        self._me = me
        self._directory = directory
        self._standing = standing
        self._lineage = lineage
        self._is_server = is_server
        self._work = work
        self._fail = fail
        self.is_settling = True
        self.is_draining = False
        self._has_untold_blobs = False
        """More than gossip takes: said once, whoever wants one of the others asks around."""
        self.transport: Transport | None = None
        self.rpc: StreamRpc | None = None
        self.allegiance: Allegiance | None = None
        self.machine: Machine | None = None
        self.replica: Replica | None = None
        self.archive: Archive | None = None
        self.gossip: GossipService | None = None
        self.upkeep: Upkeep | None = None
        self.shell: Shell | None = None
        self.duty: Duty | None = None

    def feed(self, event: AgentEvent) -> None:
        if self.shell is not None:
            self.shell.feed(event)

    # --- the log -----------------------------------------------------------------------------------------------------

    def applied(self, position: int) -> None:
        if self.replica is not None:
            self.replica.applied(position)
        if self.archive is not None:
            self.archive.applied()

    def events_happened(self, events: Sequence[Event]) -> None:
        self.feed(Applied(events, self._standing.leading_term()))
        if self.machine is not None and any(isinstance(event, MembersChanged | Restored) for event in events):
            self.members_known(self.machine.answer(GetMembers()))

    def leadership_changed(self, is_leader: bool) -> None:
        term = self._standing.term
        log.info("raft.leading" if is_leader else "raft.following", term=term)
        if is_leader and self.gossip is not None:
            self.gossip.publish(LEADER_FACT, codec.encode(since(self._lineage(), term)))
        self.feed(Tick(self._standing.leading_term()))

    # --- the members -------------------------------------------------------------------------------------------------

    def members_known(self, view: MembersView) -> None:
        self._directory.learn_members(view)
        if self._me in view.revoked:
            hint = "join again with a new invite and a new --data-dir"
            self._fail(NotAllowed("this node was removed from its mesh", hint=hint))
            return
        mine = next((row.member for row in view.members if row.member.node == self._me), None)
        if mine is not None and mine.is_draining != self.is_draining:
            self.is_draining = mine.is_draining
            log.info("node.draining" if self.is_draining else "node.in_service")
            if self.duty is not None:
                self.duty.take_up(is_draining=self.is_draining)

    def directory_changed(self) -> None:
        if self.upkeep is not None:
            self.upkeep.peers_changed()
        if self.gossip is not None:
            self.gossip.set_members(self._directory.members())

    # --- peers and what they have --------------------------------------------------------------------------------------

    def peer_up(self, peer: NodeId) -> None:
        if self.gossip is not None:
            self.gossip.peer_up(peer)
        self._tell_gone(peer)

    def peer_down(self, peer: NodeId) -> None:
        if self.gossip is not None:
            self.gossip.peer_down(peer)
        self._tell_gone(peer)

    def liveness_changed(self, node: NodeId, state: State) -> None:
        log.info("node." + state.value, node=node, name=self._directory.name(node))
        self._tell_gone(node)

    def _tell_gone(self, node: NodeId) -> None:
        """Gossip and the own connection have to agree, whichever of them changed last."""
        connected = frozenset() if self.transport is None else self.transport.connected()
        self.feed(PeerGone(node, self._standing.is_dead(node) and node not in connected))

    def blob_changed(self, blob: str, is_present: bool) -> None:
        try:
            if self.gossip is not None:
                self.gossip.publish_blob(blob, present=is_present)
        except Busy as error:
            if not self._has_untold_blobs:
                self._has_untold_blobs = True
                log.warning("gossip.blobs_untold", error=error.message, hint="they are found by asking every node")

    # --- recoveries of the mesh ----------------------------------------------------------------------------------------

    def epoch_heard(self) -> None:
        if not self.is_settling:
            self.is_settling = True
            self._work.start_soon(self._settle_epoch)

    async def _settle_epoch(self) -> None:
        """The mesh was recovered: this node goes along, or stops."""
        assert self.allegiance is not None and self.rpc is not None
        if not self._is_server:
            await trio.sleep(FOLLOW_AFTER_S)
        self.is_settling = False
        try:
            has_moved = await self.allegiance.settle()
        except StartRefused as error:
            self._fail(error)
            return
        except Busy as error:
            log.warning("recovery.not_saved", error=str(error))
            await trio.sleep(SETTLE_AGAIN_S)
            self.epoch_heard()
            return
        if has_moved:
            self._directory.begin_epoch()
            for peer in self._directory.members():
                self.rpc.close(peer)
            self.feed(Recovered())
