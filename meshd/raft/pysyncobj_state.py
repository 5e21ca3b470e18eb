"""What one server's Raft knows, kept where PySyncObj 0.3.17 keeps it; and PySyncObj's own pickle, files and sockets shut off.

Every private name of PySyncObj that is used as it is stands here, under a readable one;
what is replaced stands in engine.py. The parts of the engine (election.py, following.py,
arrival.py, leading.py, applying.py) share this state and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from random import Random
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, serializer, syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport as StockTransport

from meshd import codec
from meshd.raft.agreement import Checkpoints
from meshd.raft.configurations import Configurations
from meshd.raft.messages import Entry, RaftMessage, VoterId
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.snapshot import Packed

assert syncobj.VERSION == "0.3.17", "the private names below are those of 0.3.17"

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2


class _Msgpack:
    """In place of pickle: commands come from disk and from peers."""

    dumps = staticmethod(codec.pack)
    loads = staticmethod(codec.unpack)


syncobj.pickle = _Msgpack
serializer.pickle = _Msgpack
# The constructor asks this module-level function for its journal; ours is passed in place of the file's name.
syncobj.createJournal = lambda journal: journal


class _NoTransport(StockTransport):  # type: ignore[misc]
    """Stock demands one; messages go through the state's own `send`."""

    def __init__(self) -> None:
        super().__init__(None, None, None)

    def send(self, node: Node, message: Any) -> bool:
        raise AssertionError("stock sends nothing here")


class _Stock(property):
    """One of PySyncObj's private attributes, under a readable name; read some 400 times a turn, so without a frame of Python."""

    def __init__(self, name: str) -> None:
        super().__init__(attrgetter(name), lambda state, value: state.__dict__.__setitem__(name, value))
        self._name = name

    def __set_name__(self, owner: type, _: str) -> None:
        # Stock's constructor looks at every attribute of the object, also before it has set this one.
        setattr(owner, self._name, None)


def _stock(name: str) -> Any:
    """Of any type: what it is stands beside each name below."""
    return _Stock(name)


class RaftState(SyncObj):  # type: ignore[misc]
    """Term, vote, role, log, commit; and the world as far as Raft sees it: peers, clocks, chance."""

    role: int = _stock("_SyncObj__raftState")
    term: int = _stock("_SyncObj__raftCurrentTerm")
    vote: VoterId | None = _stock("_SyncObj__votedForNodeId")
    log: Journal = _stock("_SyncObj__raftLog")
    commit: int = _stock("_SyncObj__raftCommitIndex")
    applied: int = _stock("_SyncObj__raftLastApplied")
    waiting: dict[int, list[tuple[int, Callable[[Any, int], None]]]] = _stock("_SyncObj__commandsWaitingCommit")
    """Who waits for the outcome of an entry, with the term in which it was proposed."""
    election_at: float = _stock("_SyncObj__raftElectionDeadline")
    heartbeat_at: float = _stock("_SyncObj__newAppendEntriesTime")
    own_first: int = _stock("_SyncObj__noopIDx")
    """The entry with which this leader's term began."""
    _leader: Node | None = _stock("_SyncObj__raftLeader")

    def __init__(
        self,
        *,
        me: VoterId,
        voters: Sequence[VoterId],
        journal: Journal,
        send: Callable[[VoterId, RaftMessage], bool],
        snapshot: Callable[[], Packed | None],
        now: Callable[[], float],
        wall_ms: Callable[[], int],
        random: Random,
        settings: RaftSettings,
    ) -> None:
        self.me = me
        self.send = send
        self.snapshot = snapshot
        self.now = now
        self.wall_ms = wall_ms
        self.random = random
        self.settings = settings
        self.connected: set[VoterId] = set()
        """Whom a message can be sent to."""
        self.learners: frozenset[VoterId] = frozenset()
        """Whom a leader feeds beyond the voters; they do not count."""
        self.checkpoints = Checkpoints(settings.checkpoint_entries)
        """Hashes of the state here, for the others to compare."""
        self.is_disk_full = False
        """Below the soft mark: only what ends work is taken."""
        self.received_s = now()
        """When the last entry of the log was received, read at the start, or written here as a batch."""
        base = journal[0][1]
        self.configurations = Configurations(base, voters)
        conf = SyncObjConf(autoTick=False, journalFile=journal, dynamicMembershipChange=True)
        super().__init__(Node(me), [], conf, nodeClass=Node, transport=_NoTransport())
        self.applied = self.commit = base
        for entry in journal[1:]:
            self.configurations.note(entry)
        self._show_voters()

    @property
    def leader(self) -> VoterId | None:
        return None if self._leader is None else VoterId(self._leader.id)

    @leader.setter
    def leader(self, leader: VoterId | None) -> None:
        self._leader = None if leader is None else Node(leader)

    @property
    def is_leader(self) -> bool:
        return self.role == LEADER

    @property
    def voters(self) -> tuple[VoterId, ...]:
        """The newest configuration, committed or not."""
        return self.configurations.voters

    @property
    def is_voter(self) -> bool:
        return self.me in self.voters

    @property
    def first(self) -> int:
        """The index that a snapshot covers; the log goes on after it."""
        return self.log[0][1]

    @property
    def last(self) -> int:
        return self.log[-1][1]

    @property
    def last_term(self) -> int:
        return self.log[-1][2]

    @property
    def sendable(self) -> int:
        """The last entry that may leave: a configuration, and what follows it, waits for the witness of its frame.

        Damage to a last frame may pass for a torn tail. Who so forgot a configuration that others have
        heard of could go on with the old one, alone if it was the sole voter (protocol.md 9, Frames).
        """
        held = self.configurations.first_after(self.log.witnessed_index)
        return self.last if held is None else held - 1

    def term_at(self, index: int) -> int:
        return self.log[index - self.first][2]

    def voters_at(self, index: int) -> tuple[VoterId, ...]:
        return self.configurations.at(index)

    @property
    def is_in_doubt(self) -> bool:
        """Something that this voter has acknowledged, or voted for, may be missing here (protocol.md 9)."""
        return self.log.is_in_doubt

    def has_room_for(self, size: int) -> bool:
        """On a full disk the last file of the journal's reserve is for terms, votes and the next start."""
        return not self.is_disk_full or self.log.bytes_left - size >= self.log.bytes_for_votes

    @property
    def electorate(self) -> set[VoterId]:
        """Who has to answer in an election in which everybody has to: in doubt also those whose entries may be lost."""
        return {*self.voters, *self.log.header.voters} if self.is_in_doubt else {*self.voters}

    @property
    def is_alone_in_doubt(self) -> bool:
        return self.is_in_doubt and self.electorate == {self.me}

    # --- changes ------------------------------------------------------------------------------------------------------

    def become(self, role: int) -> None:
        self._SyncObj__setState(role)

    def set_term(self, term: int, vote: VoterId | None) -> None:
        """Both are in the journal before any message leaves."""
        self._SyncObj__setCurrentTerm(term, vote)

    def append(self, command: bytes) -> int:
        """An entry of this leader's own term; its index."""
        self.add((command, self.last + 1, self.term))
        return self.last

    def add(self, entry: Entry) -> None:
        self.log.add(*entry)
        if self.configurations.note(entry):
            self._show_voters()

    def cut_from(self, index: int) -> None:
        self._SyncObj__deleteEntriesFrom(index)
        self.configurations.cut_from(index)
        self._show_voters()

    def forget_to(self, index: int) -> None:
        """A durable snapshot covers up to `index`."""
        self._SyncObj__deleteEntriesTo(index)
        self.configurations.forget_to(index)

    def begin_at(self, index: int, term: int, voters: Sequence[VoterId]) -> None:
        """A snapshot takes the place of what it covers; a log that agrees with it keeps its tail (F11)."""
        if index <= self.last and self.term_at(index) == term:
            self._SyncObj__deleteEntriesTo(index)
        else:
            self.log.reset(index, term)
        self.configurations = Configurations(index, voters)
        for entry in self.log[1:]:
            self.configurations.note(entry)
        self._show_voters()
        self.log.voters = self.voters
        self.commit = self.applied = index

    def _show_voters(self) -> None:
        """PySyncObj's own set of the other nodes, for whatever of it asks."""
        self._SyncObj__otherNodes = {Node(voter) for voter in self.voters if voter != self.me}
