"""Whether this node takes work: on duty, draining because the mesh says so, or handing back what it has because it stops."""

from __future__ import annotations

import structlog
import trio

from meshd import codec
from meshd.errors import MeshError
from meshd.gossip.service import GossipService
from meshd.model import Offer
from meshd.neighbours import OFFER_FACT
from meshd.raft.log import ServerLog
from meshd.shell import Shell
from meshd.work.drain import Drain
from meshd.work.worker import HandOver, Offering

log = structlog.get_logger()


class Duty:
    """`slots` None: this node is no worker. `server_log` None: it is no server."""

    def __init__(
        self,
        *,
        offer: Offer,
        slots: int | None,
        shell: Shell,
        gossip: GossipService,
        drains: Drain,
        server_log: ServerLog | None,
        work: trio.Nursery,
    ) -> None:
        self._offer = offer
        self._slots = slots
        self._shell = shell
        self._gossip = gossip
        self._drains = drains
        self._server_log = server_log
        self._work = work

    def take_up(self, *, is_draining: bool) -> None:
        """What the mesh says of this node: at the start, and whenever it says something else."""
        self._gossip.publish(OFFER_FACT, codec.encode(self._offer))
        if self._slots is not None:
            self._shell.feed(Offering(0 if is_draining else self._slots, self._offer))
        if is_draining:
            self._work.start_soon(self._drains.move_out)

    def leave_lead(self) -> None:
        self._work.start_soon(self._hand_over_lead)

    async def hand_back(self) -> None:
        """Asked to stop: lead no more, stop what runs and report it, so that others go on at once."""
        await self._hand_over_lead()
        if self._slots is not None:
            self._shell.feed(Offering(0, self._offer))
            self._shell.feed(HandOver())
            await self._shell.wait_empty()

    async def _hand_over_lead(self) -> None:
        """Where another voter can lead; a sole one goes on until the mesh has found it a successor."""
        if self._server_log is not None and self._server_log.leads() and len(self._server_log.voters) > 1:
            try:
                await self._server_log.hand_over()
            except MeshError as error:
                log.warning("raft.not_handed_over", error=str(error))
