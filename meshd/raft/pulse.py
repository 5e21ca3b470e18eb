"""What a server says while its disk takes its time: that it is there, and nothing that rests on the disk.

A turn waits for its sync, and a sync may wait behind the writing of a whole snapshot. An
election for that would help nobody, so rounds are sent and answered meanwhile: they
prove who leads and are about no entry. Mail is looked at and left where it is. But a disk
that hangs must not be led by: a leader whose sync has not come back after two seconds
steps down, and whoever waits as long falls silent (protocol.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshd.raft.election import Elections
from meshd.raft.messages import AnyMessage, Append, Appended, Chunk, Received, VoterId
from meshd.raft.pysyncobj_state import RaftState

Say = Callable[[VoterId, AnyMessage], bool]


class Pulse:
    def __init__(self, raft: RaftState, elections: Elections) -> None:
        self._raft = raft
        self._elections = elections

    def beat(self, mail: Iterable[tuple[VoterId, AnyMessage]], waited_s: float, say: Say) -> None:
        """`mail` is unread, and was not looked at before; `say` sends at once. The term is durable: all of this is said in it."""
        raft, leading = self._raft, self._elections.leading
        if waited_s >= raft.settings.disk_hangs_s:
            # A sole voter has nobody to leave the lead to.
            if leading is not None and raft.voters != (raft.me,):
                self._elections.step_down(None)
            return
        for peer, message in mail:
            match message:
                case Append() | Chunk():
                    self._answer(peer, message, say)
                case Appended() | Received() if leading is not None and message.term == raft.term:
                    leading.hear_of(peer, message)
                case _:
                    pass
        if leading is not None:
            leading.beat(say)

    def _answer(self, peer: VoterId, m: Append | Chunk, say: Say) -> None:
        raft = self._raft
        if m.term == raft.term and peer == raft.leader and raft.now() >= self._elections.silent_until_s:
            say(
                peer,
                Appended(raft.term, m.round, m.sent_ms, False, 0, raft.wall_ms(), is_in_doubt=raft.is_in_doubt),
            )
