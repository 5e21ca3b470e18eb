"""How this node stands in its mesh now: does it lead, whom does it follow, who votes, and why nothing can be decided.

Asked by the others while they work, the shell (`shell.World`) above all. Nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshd.directory import Directory
from meshd.gossip.membership import State
from meshd.gossip.service import GossipService
from meshd.model import NodeId, Role
from meshd.neighbours import Neighbours
from meshd.quorum import describe_stop
from meshd.raft.clocks import boottime_ms
from meshd.raft.log import ServerLog


class Standing:
    def __init__(self, me: NodeId, name: str, directory: Directory, neighbours: Neighbours) -> None:
        self._me = me
        self._name = name
        self._directory = directory
        self._neighbours = neighbours
        self.log: ServerLog | None = None
        """Only of a server, once there is one."""
        self.gossip: GossipService | None = None
        """None until it runs; then nobody is known to be alive."""

    def now_ms(self) -> int:
        return boottime_ms()

    @property
    def term(self) -> int:
        return 0 if self.log is None else self.log.term

    def leading_term(self) -> int | None:
        return self.log.term if self.log is not None and self.log.leads() else None

    def leader(self) -> NodeId | None:
        if self.log is not None and self.log.is_voter:
            return self.log.leader
        voters = self._neighbours.voters()
        return voters[0] if voters else None

    def voters(self) -> Sequence[NodeId]:
        return self._neighbours.voters()

    def is_voter(self) -> bool:
        return self.log is not None and self.log.is_voter

    def is_server(self, node: NodeId) -> bool:
        return node == self._me or self._directory.has_role(node, Role.SERVER)

    def holds_log_alone(self) -> bool:
        return self.log is not None and self.log.voters == (self._me,)

    def why_stopped(self) -> str:
        """Only who holds the log knows who votes."""
        voters = () if self.log is None else self.log.voters
        return describe_stop({self._name_of(voter): self._is_alive(voter) for voter in voters})

    def is_dead(self, node: NodeId) -> bool:
        """As gossip has it."""
        health = None if self.gossip is None else self.gossip.health(node)
        return health is not None and health.state is State.DEAD

    def _is_alive(self, node: NodeId) -> bool:
        health = None if self.gossip is None else self.gossip.health(node)
        return node == self._me or (health is not None and health.state is State.ALIVE)

    def _name_of(self, node: NodeId) -> str:
        return self._name if node == self._me else self._directory.name(node) or node
