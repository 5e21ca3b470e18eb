"""Raft's own rules, each with a way to take it out: what a plausible engine or journal without it would do.

Most are holes that stock PySyncObj has (engine.py lists them) or that sketches of a cure had.
`tests/sim/test_ablations.py` names a seed for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from meshd.ports import Committed, Unknown
from meshd.raft import server, turn
from meshd.raft.arrival import Arrival, Arrived
from meshd.raft.configurations import Configurations
from meshd.raft.election import Elections
from meshd.raft.feeding import Feeder
from meshd.raft.following import Following
from meshd.raft.leading import Leadership
from meshd.raft.messages import Append, Vote, VoterId
from meshd.raft.proposals import Proposal
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.server import Capture, Server
from meshd.raft.state.commands import Cancel, Restored
from meshd.raft.state.machine import Machine
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.snapshot import unpack_image
from meshd.testing.servers import SimServer

Patch = tuple[Any, str, Any]
"""Where, which name, and what to put there."""


def wrapped(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    return owner, name, make(vars(owner)[name])


# --- the disk ---------------------------------------------------------------------------------------------------------


def _counts_what_is_in_memory(original: Callable[..., int]) -> Callable[..., int]:
    def stored(self: Leadership, voter: VoterId) -> int:
        return self._raft.last if voter == self._raft.me else original(self, voter)

    return stored


def _keeps_votes_in_memory(self: Journal, term: int, vote: VoterId | None) -> None:
    self._term, self._vote = term, vote


def _goes_on_after_a_failed_sync(original: Callable[..., None]) -> Callable[..., None]:
    def append(self: Journal, records: list[Any]) -> None:
        try:
            original(self, records)
        except OSError:
            return  # the next one will do

    return append


def _installs_without_saving(self: turn.Turns, arrived: Arrived) -> None:
    image = unpack_image(bytes(arrived.data), digest=arrived.digest, mesh=self._mesh)
    self._finished = partial(self._received, image, self._machine.unpack(image.state), 0)


def _captures_one_entry_less(original: Callable[..., Capture | None]) -> Callable[..., Capture | None]:
    def capture(self: Server) -> Capture | None:
        made = original(self)
        return None if made is None else Capture(made.index - 1, made.term, made.voters, made.pack)

    return capture


# --- the log ----------------------------------------------------------------------------------------------------------


def _commits_what_older_leaders_wrote(self: Leadership) -> None:
    self._raft.commit = max(self._raft.commit, self._raft.configurations.reached(self._stored))


def _always_cuts(original: Callable[..., tuple[bool, int]]) -> Callable[..., tuple[bool, int]]:
    def merge(self: Following, peer: VoterId, m: Append) -> tuple[bool, int]:
        raft = self._raft
        if raft.first <= m.prev_index < raft.last and m.prev_index >= raft.commit:
            raft.cut_from(m.prev_index + 1)
        return original(self, peer, m)

    return merge


def _commits_all_that_the_leader_says(original: Callable[..., None]) -> Callable[..., None]:
    def on_append(self: Following, peer: VoterId, m: Append) -> None:
        original(self, peer, m)
        if m.term == self._raft.term and m.prev_index:
            self._raft.commit = max(self._raft.commit, min(m.commit, self._raft.last))

    return on_append


def _any_vote_is_enough(self: Configurations, servers: set[VoterId]) -> bool:
    return bool(servers)


def _one_is_enough(self: Configurations, of: Callable[[VoterId], Any]) -> Any:
    return max(of(voter) for voter in self.voters)


# --- elections and configurations -------------------------------------------------------------------------------------


def _asks_for_real(original: Callable[..., None]) -> Callable[..., None]:
    def ask_trial(self: Elections) -> None:
        self._campaign()

    return ask_trial


def _votes_for_anybody(original: Callable[..., None]) -> Callable[..., None]:
    def on_vote(self: Elections, peer: VoterId, m: Vote) -> None:
        original(self, peer, Vote(m.term, 1 << 40, 1 << 40, m.is_trial))

    return on_vote


def _votes_twice(original: Callable[..., None]) -> Callable[..., None]:
    def on_vote(self: Elections, peer: VoterId, m: Vote) -> None:
        raft = self._raft
        if not m.is_trial and m.term == raft.term and not raft.is_leader and raft.vote not in (None, raft.me):
            raft.set_term(raft.term, None)
        original(self, peer, m)

    return on_vote


def _changes_while_one_is_open(self: Leadership) -> bool:
    return True


# --- reads and answers ------------------------------------------------------------------------------------------------


def _answers_readers_at_once(self: Leadership, answer: Callable[[int | None], None]) -> None:
    answer(self._raft.commit)


def _names_an_older_position(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolver(batch: list[Proposal]) -> Callable[[list[bytes] | None, int, str], None]:
        resolve = original(batch)
        return lambda answers, index, why: resolve(answers, max(index - 3, 1) if answers is not None else index, why)

    return resolver


def _believes_its_own_clock(now_ms: int, offsets_ms: Any, voters: int) -> int:
    return int(now_ms + offsets_ms[0])


def _keeps_quiet_about_snapshots(original: Callable[..., Any]) -> Callable[..., Any]:
    def unpack(self: Machine, data: bytes) -> Callable[[], Callable[[], None]]:
        replace = original(self, data)

        def replaced() -> Callable[[], None]:
            take_apart = replace()
            self._moment.events = [event for event in self._moment.events if not isinstance(event, Restored)]
            return take_apart  # type: ignore[no-any-return]

        return replaced

    return unpack


def _begins_anew(original: Callable[..., None]) -> Callable[..., None]:
    def begin_at(self: RaftState, index: int, term: int, voters: Any) -> None:
        self.log.reset(index, term)
        original(self, index, term, voters)

    return begin_at


def _takes_all_it_has_for_committed(original: Callable[..., None]) -> Callable[..., None]:
    def on_append(self: Following, peer: VoterId, m: Append) -> None:
        original(self, peer, m)
        if m.term == self._raft.term and m.entries:
            self._raft.commit = self._raft.last

    return on_append


def _sends_the_one_before_too(original: Callable[..., Any]) -> Callable[..., Any]:
    def entries_from(self: Feeder, index: int, until: int, bytes_max: int) -> Any:
        return original(self, max(index - 1, self._raft.first + 1), until, bytes_max)

    return entries_from


def _acknowledges_one_more(original: Callable[..., tuple[bool, int]]) -> Callable[..., tuple[bool, int]]:
    def merge(self: Following, peer: VoterId, m: Append) -> tuple[bool, int]:
        is_ok, following = original(self, peer, m)
        return is_ok, following + 1 if is_ok else following

    return merge


def _finds_answers_by_index(batch: list[Proposal]) -> Callable[[list[bytes] | None, int, str], None]:
    def resolve(answers: list[bytes] | None, index: int, why: str) -> None:
        for proposal in batch:
            proposal.end(Committed(answers[index], index) if answers is not None else Unknown(why))

    return resolve


def _names_the_position_asked_for(original: Callable[..., None]) -> Callable[..., None]:
    def answer_readers(self: SimServer) -> None:
        for reader in self._readers:
            told, position = reader.told, reader.position
            reader.told = lambda view, _, told=told, position=position: told(view, position)  # type: ignore[misc]
        original(self)

    return answer_readers


def _cancels_what_is_not_there(original: Callable[..., Any]) -> Callable[..., Any]:
    def cancel(self: Queue, command: Cancel) -> Any:
        assert self.jobs[command.job]
        return original(self, command)

    return cancel


def _goes_back_as_well(original: Callable[..., None]) -> Callable[..., None]:
    def advance(self: Moment, position: int, elapsed_ms: int, wall_ms: int) -> None:
        original(self, position, elapsed_ms, wall_ms)
        self.wall_ms = wall_ms

    return advance


def _installs_nothing(self: Arrival, image: Any, restore: Callable[[], None]) -> bool:
    self._incoming = self.arrived = None
    return False


RAFT_RULES: dict[str, tuple[Patch, ...]] = {
    "entries are durable before they are acknowledged": ((Server, "may_send_early", True),),
    "the leader counts itself once it has synced": (wrapped(Leadership, "_stored", _counts_what_is_in_memory),),
    "a vote is durable before it is given": ((Journal, "setCurrentTerm", _keeps_votes_in_memory),),
    "a failed sync stops the server": (wrapped(Journal, "_append", _goes_on_after_a_failed_sync),),
    "a snapshot is durable before it replaces anything": ((turn.Turns, "_receive", _installs_without_saving),),
    "a snapshot says what it covers": (wrapped(Server, "capture", _captures_one_entry_less),),
    "a snapshot keeps the tail that agrees": (wrapped(RaftState, "begin_at", _begins_anew),),
    "who got a snapshot looks at the state anew": (wrapped(Machine, "unpack", _keeps_quiet_about_snapshots),),
    "a leader commits by its own term": ((Leadership, "advance_commit", _commits_what_older_leaders_wrote),),
    "a log is cut only where it contradicts": (wrapped(Following, "_merge", _always_cuts),),
    "a follower commits what it has compared": (wrapped(Following, "on_append", _commits_all_that_the_leader_says),),
    "a majority decides": ((Configurations, "reached", _one_is_enough),),
    "a majority elects": ((Configurations, "is_majority", _any_vote_is_enough),),
    "a term rises after a trial": (wrapped(Elections, "_ask_trial", _asks_for_real),),
    "votes go to the newest log": (wrapped(Elections, "on_vote", _votes_for_anybody),),
    "one vote a term": (wrapped(Elections, "on_vote", _votes_twice),),
    "one change of voters at a time": ((Leadership, "may_change_voters", _changes_while_one_is_open),),
    "a read waits for a round": ((Leadership, "barrier", _answers_readers_at_once),),
    "a follower commits what its leader has": (wrapped(Following, "on_append", _takes_all_it_has_for_committed),),
    "a leader sends what follows": (wrapped(Feeder, "_entries_from", _sends_the_one_before_too),),
    "a follower acknowledges what it has": (wrapped(Following, "_merge", _acknowledges_one_more),),
    "an answer goes to whose command it was": ((server, "resolver", _finds_answers_by_index),),
    "a view says as of when it is": (wrapped(SimServer, "_answer_readers", _names_the_position_asked_for),),
    "what is refused is answered": (wrapped(Queue, "cancel", _cancels_what_is_not_there),),
    "the date never goes back": (
        wrapped(Moment, "advance", _goes_back_as_well),
        (Server, "_stamp_wall", lambda self, now_ms, elapsed_ms: self._clocks.wall_ms()),
    ),
    "a snapshot that has arrived is installed": (
        (Arrival, "install", _installs_nothing),
        (Server, "install", lambda self, image, restore: self.engine.install(image, restore)),
    ),
    "an answer says where it stands": (wrapped(server, "resolver", _names_an_older_position),),
    "an answer belongs to the start that asked": ((server, "first_request", lambda start: 0),),
    "a quorum of clocks makes the date": ((server, "agreed_wall_ms", _believes_its_own_clock),),
}
