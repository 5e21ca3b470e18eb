"""Taking a node out of service with nothing lost: no new work, what runs finishes or is handed over, sole blobs move.

    draining ──▶ handing_over (only past the deadline) ──▶ moving_blobs ──▶ safe

The mark is in the replicated state (`SetDraining`), so that the drain goes on whoever asked for it.
The node itself does the rest: it claims nothing (`Claim(0)`), gives up its voter's seat, and
copies to others what only it has; `drain.state` tells how far it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence

import structlog
import trio
from msgspec import Struct

from meshd import codec
from meshd.blobs.replicate import Replicator
from meshd.directory import Directory
from meshd.errors import Conflict, MeshError, NotAllowed, NotFound, Unavailable
from meshd.model import BlobRef, NodeId, Role
from meshd.ports import BlobStore, Rpc
from meshd.quorum import check_without
from meshd.raft.remote import MeshLog
from meshd.raft.state.commands import SetDraining
from meshd.views import ClusterStatus, DrainView, GetMembers, MembersView, MemberView

LOOK_EVERY_S = 0.3
ASK_S = 5.0
MOVE_S = 60.0
MOVE_BLOBS_AT_ONCE = 256

log = structlog.get_logger()


class DrainState(Struct, frozen=True, array_like=True):
    """`blobs_left` None: not yet counted."""

    attempts: int
    blobs_left: int | None
    is_voter: bool


class Drain:
    def __init__(
        self,
        *,
        me: NodeId,
        rpc: Rpc,
        mesh_log: MeshLog,
        directory: Directory,
        store: BlobStore,
        replicator: Replicator,
        attempts_running: Callable[[], int],
        is_voter: Callable[[], bool],
        hand_over: Callable[[], None],
        leave_lead: Callable[[], None],
    ) -> None:
        self._me = me
        self._rpc = rpc
        self._log = mesh_log
        self._directory = directory
        self._store = store
        self._replicator = replicator
        self._attempts_running = attempts_running
        self._is_voter = is_voter
        self._hand_over = hand_over
        self._leave_lead = leave_lead
        self._blobs_left: int | None = None
        rpc.register("drain.state", self._on_state)
        rpc.register("drain.hand_over", self._on_hand_over)

    # --- the node that leaves ----------------------------------------------------------------------------------------

    async def move_out(self) -> None:
        """Called once this node learns that it drains; until everything it has lies elsewhere too."""
        self._leave_lead()
        self._blobs_left = None
        while True:
            refs = await self._store.list()
            try:
                await self._copy_out(refs)
            except MeshError as error:
                log.warning("drain.blobs_not_moved", error=str(error))
                await trio.sleep(1.0)
                continue
            if self._attempts_running() == 0 and len(await self._store.list()) == len(refs):
                self._blobs_left = 0
                return
            await trio.sleep(LOOK_EVERY_S)

    async def _copy_out(self, refs: Sequence[BlobRef]) -> None:
        others = len(self._directory.members())
        if not others:
            raise Unavailable("there is no other node to take this node's blobs")
        for start in range(0, len(refs), MOVE_BLOBS_AT_ONCE):
            self._blobs_left = len(refs) - start
            batch = refs[start : start + MOVE_BLOBS_AT_ONCE]
            # Two others where there are two, so that the blobs lie on two disks when this one is gone.
            await self._replicator.ensure(batch, min(3, others + 1), timeout_s=MOVE_S)

    def state(self) -> DrainState:
        return DrainState(self._attempts_running(), self._blobs_left, self._is_voter())

    async def _on_state(self, peer: NodeId, body: bytes) -> bytes:
        return codec.encode(self.state())

    async def _on_hand_over(self, peer: NodeId, body: bytes) -> bytes:
        if not self._directory.is_draining(self._me):
            raise NotAllowed("this node is not draining")
        self._hand_over()
        return b""

    # --- whoever asks for it -----------------------------------------------------------------------------------------

    async def drain(
        self, node: NodeId, status: ClusterStatus, *, deadline_ms: int | None
    ) -> AsyncGenerator[DrainView, None]:
        """Progress until it is safe to stop the node. Raises NotFound, Conflict (the last server, the majority)."""
        view = await self._members()
        row = _row(view, node)
        others = [each for each in view.members if each.member.node != node]
        if row.member.is_server and not any(each.member.is_server for each in others):
            raise Conflict(
                f"{row.member.name or node} is the only server: draining it would stop the mesh",
                hint="join another server first: `mesh node invite --role server`",
            )
        if not row.member.is_draining:
            _check_majority(node, status)
        await self._log.propose(SetDraining(node, True), timeout_s=15)
        deadline = None if deadline_ms is None else trio.current_time() + deadline_ms / 1000
        is_handed_over = False
        while True:
            row = _row(await self._members(), node)
            state = await self._ask(node)
            if deadline is not None and trio.current_time() >= deadline and not is_handed_over and row.leases:
                is_handed_over = True
                await self._ask_hand_over(node)
            progress = _progress(row, state, is_handed_over)
            yield progress
            if progress.is_safe:
                return
            await trio.sleep(LOOK_EVERY_S)

    async def check_removable(self, node: NodeId, view: MembersView, status: ClusterStatus) -> None:
        """Raises Conflict with the reason why removing the node now would lose something."""
        row = _row(view, node)
        name = row.member.name or node
        health = next((each.health for each in status.nodes if each.node == node), "unknown")
        state = await self._ask(node) if health == "alive" else None
        is_gone_for_good = health == "dead"
        if not is_gone_for_good and not (row.member.is_draining and state is not None and state.blobs_left == 0):
            raise Conflict(
                f"{name} is {health} and still in service", hint=f"`mesh node drain {name}` first, or stop it"
            )
        _check_majority(node, status)

    async def _members(self) -> MembersView:
        return await self._log.query(GetMembers(), MembersView, timeout_s=15)

    async def _ask(self, node: NodeId) -> DrainState | None:
        if node == self._me:
            return self.state()
        try:
            return codec.decode(await self._rpc.call(node, "drain.state", b"", timeout_s=ASK_S), DrainState)
        except MeshError:
            return None

    async def _ask_hand_over(self, node: NodeId) -> None:
        if node == self._me:
            self._hand_over()
            return
        try:
            await self._rpc.call(node, "drain.hand_over", b"", timeout_s=ASK_S)
        except MeshError as error:
            log.warning("drain.not_handed_over", node=node, error=str(error))


def _row(view: MembersView, node: NodeId) -> MemberView:
    for row in view.members:
        if row.member.node == node:
            return row
    raise NotFound(f"this mesh has no node {node}", hint="`mesh node ls` names them")


def _check_majority(node: NodeId, status: ClusterStatus) -> None:
    """Raises Conflict when the mesh could decide nothing without this voter."""
    rows = {row.node: row for row in status.nodes}
    if node not in status.voters or node not in rows:
        return
    others = [rows[voter] for voter in status.voters if voter != node and voter in rows]
    heirs = [
        row
        for row in status.nodes
        if Role.SERVER in row.roles and row.health == "alive" and not (row.is_voter or row.is_draining)
    ]
    alive = {row.name or row.node: row.health == "alive" for row in others}
    check_without(rows[node].name or node, alive, heirs=len(heirs))


def _progress(row: MemberView, state: DrainState | None, is_handed_over: bool) -> DrainView:
    node, running = row.member.node, row.leases
    if running:
        phase = "handing_over" if is_handed_over else "draining"
        return DrainView(node, phase, running, f"{running} attempts still run there", False)
    if state is None:
        return DrainView(node, "draining", 0, "the node does not answer", False)
    if state.blobs_left != 0:
        left = "its blobs" if state.blobs_left is None else f"{state.blobs_left} blobs"
        return DrainView(node, "moving_blobs", 0, f"{left} are being copied to other nodes", False)
    if state.is_voter:
        return DrainView(node, "handing_over", 0, "it holds a voter's seat until another server is ready for it", False)
    return DrainView(node, "safe", 0, "safe to stop", True)
