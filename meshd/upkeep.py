"""What a node keeps up in the background: its list of members, what the others know of it, the mesh's key.

Voters see members change as they apply it and announce the log position by gossip; the
others ask a voter when they hear of a newer one, and now and then regardless.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from meshd import codec
from meshd.admission.authority import Authority
from meshd.admission.home import Home
from meshd.directory import Directory
from meshd.errors import Busy, Corrupt, MeshError
from meshd.gossip.service import GossipService
from meshd.model import Certificate, Member, NodeId
from meshd.neighbours import ADDRESS_FACT, MEMBERS_FACT, Neighbours
from meshd.raft.remote import MeshLog
from meshd.raft.state.commands import UpdateMember
from meshd.raft.state.lineage import Lineage, since
from meshd.views import GetMembers, MembersView

REFRESH_S = 1.0
"""How often a node without a replica looks whether gossip announces a change of members …"""
REFRESH_S_MAX = 30.0
"""… and how often it asks regardless."""
SAVE_EVERY_S = 2.0
"""peers.json is a hint: not written more often than this."""
AGAIN_S = 1.0

log = structlog.get_logger()


class Upkeep:
    """`about_me` is what the state should say of this node, as of now; `members_known` hears what was learned from a voter."""

    def __init__(
        self,
        *,
        me: NodeId,
        home: Home,
        directory: Directory,
        neighbours: Neighbours,
        gossip: GossipService,
        mesh_log: MeshLog,
        authority: Authority,
        about_me: Callable[[], UpdateMember],
        members_known: Callable[[MembersView], None],
        is_server: bool,
        certificate: Callable[[], Certificate],
        keep_certificate: Callable[[Certificate], Awaitable[None]],
        lineage: Callable[[], Lineage],
    ) -> None:
        self._me = me
        self._home = home
        self._directory = directory
        self._neighbours = neighbours
        self._gossip = gossip
        self._log = mesh_log
        self._authority = authority
        self._about_me = about_me
        self._members_known = members_known
        self._is_server = is_server
        self._certificate = certificate
        self._keep_certificate = keep_certificate
        self._lineage = lineage
        self._key_changed = trio.Event()
        self._peers_changed = trio.Event()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_members_fresh)
            nursery.start_soon(self._keep_peers_saved)
            nursery.start_soon(self._tell_about_me)
            nursery.start_soon(self._keep_keys_fresh)
            task_status.started()

    def key_changed(self) -> None:
        self._key_changed.set()

    def peers_changed(self) -> None:
        self._peers_changed.set()

    async def _keep_members_fresh(self) -> None:
        announced = -1
        asked_at = float("-inf")
        while True:
            if self._log.local is not None:
                if self._directory.position != announced:
                    announced = self._directory.position
                    self._gossip.publish(MEMBERS_FACT, codec.encode(since(self._lineage(), announced)))
            else:
                newest = max(self._neighbours.told_numbers(MEMBERS_FACT).values(), default=0)
                is_due = trio.current_time() - asked_at > REFRESH_S_MAX
                known = since(self._lineage(), self._directory.position)
                if newest > known or is_due or self._directory.position == 0:
                    try:
                        self._members_known(await self._log.query(GetMembers(), MembersView, timeout_s=5))
                        asked_at = trio.current_time()
                    except MeshError as error:
                        log.info("members.not_refreshed", error=str(error))
            self._neighbours.learn_addresses()
            await trio.sleep(REFRESH_S)

    async def _keep_peers_saved(self) -> None:
        while True:
            await self._peers_changed.wait()
            self._peers_changed = trio.Event()
            try:
                await trio.to_thread.run_sync(self._home.write_peers, self._directory.peers())
            except (Busy, Corrupt) as error:
                # Hints of where to dial: those of before will do until the disk takes new ones.
                log.warning("peers.not_saved", error=str(error))
                self._peers_changed.set()
            await trio.sleep(SAVE_EVERY_S)

    async def _tell_about_me(self) -> None:
        """Tell the mesh where this node is now: by gossip at once, in the state when that says otherwise."""
        told = self._about_me()
        self._gossip.publish(ADDRESS_FACT, codec.encode((told.addresses, told.api_address)))
        while True:
            try:
                member = await find_member(self._log, self._me)
                if member is not None and told != UpdateMember(
                    member.name, member.addresses, member.api_address, member.zone
                ):
                    await self._log.propose(told, timeout_s=10)
                return
            except MeshError as error:
                log.info("node.not_told", error=str(error))
                await trio.sleep(AGAIN_S)

    async def _keep_keys_fresh(self) -> None:
        """The mesh's keys, where this is a server; and a certificate by the newest one."""
        while True:
            try:
                if self._is_server and not self._authority.holds_keys:
                    await self._authority.obtain_keys()
                    log.info("mesh.key_obtained", changes=self._directory.keys.serial)
                if not self._directory.keys.is_newest(certificate := self._certificate()):
                    await self._keep_certificate(await self._authority.certify(self._me, certificate.version))
                    log.info("mesh.certificate_renewed", changes=self._directory.keys.serial)
                await self._key_changed.wait()
                self._key_changed = trio.Event()
            except MeshError as error:
                log.info("mesh.key_not_obtained", error=str(error))
                await trio.sleep(AGAIN_S)


async def find_member(mesh_log: MeshLog, node: NodeId) -> Member | None:
    """From the replicated state, after the read barrier. Raises Unavailable."""
    return next((member for member in await list_members(mesh_log) if member.node == node), None)


async def list_members(mesh_log: MeshLog) -> list[Member]:
    """As `find_member`."""
    view = await mesh_log.query(GetMembers(), MembersView, timeout_s=5)
    return [row.member for row in view.members]
