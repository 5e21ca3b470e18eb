"""Raft as its users see it: a total order that a quorum keeps, one leader a term, and doubt about what was proposed.

Modelled: elections by a quorum that can hear each other, leaders that are cut off or
asleep and still believe that they lead, commits that need a quorum of the same term,
batches of a dead leader that survive it or do not, proposals lost, doubled, late and
of unknown outcome, followers that lag, replicas rebuilt from a snapshot. Not modelled:
disks, single frames, changes of the configuration; the engine's own tests do those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Raw

from meshd import codec
from meshd.model import NodeId
from meshd.raft.commands import AnyAnswer, AnyCommand, Batch, Stamped
from meshd.raft.machine import Machine
from meshd.testing.checks import Checks
from meshd.testing.heap import Heap

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode
    from meshd.testing.world import World

ROUND_EVERY_MS = 200
CONTACT_MS = 1_000
ELECTION_MS = (1_000, 2_000)
PROPOSE_TIMEOUT_MS = 5_000
BATCH_MAX = 100

Answered = Callable[[bytes], None]


@dataclass
class Voter:
    """One server's part in the log."""

    node: SimNode
    promised_term: int = 0
    heard_ms: int = 0
    leader: NodeId | None = None
    term_led: int | None = None
    contact_ms: int = 0
    is_ready: bool = False
    """Its own first entry of the term is committed and applied."""
    last_entry_ms: int = 0
    """Its own clock, when it received or read the last entry of its log."""
    appended_ms: int | None = None
    """Its own clock, when it appended its last batch of this term."""
    waiting: list[tuple[Stamped, Answered]] = field(default_factory=list)
    in_flight: tuple[bytes, list[Answered]] | None = None


class ModelledLog:
    def __init__(self, heap: Heap, world: World, checks: Checks) -> None:
        self.heap, self.world, self.checks = heap, world, checks
        self.entries: list[bytes] = []
        self.voters: dict[NodeId, Voter] = {}
        self._orphans: list[bytes] = []
        """Batches of lost leaders: the next election decides what became of them."""

    def add_voter(self, node: SimNode) -> None:
        self.voters[node.id] = Voter(node)
        self.heap.after(self.heap.between(0, ROUND_EVERY_MS), lambda: self._round(node.id))

    # --- who leads ----------------------------------------------------------------------------------------------------

    def leads(self, node: NodeId) -> int | None:
        """The term in which this server leads now, as protocol.md 2 has it."""
        voter = self.voters.get(node)
        if voter is None or voter.term_led is None or not voter.is_ready:
            return None
        return voter.term_led if self.heap.now_ms - voter.contact_ms < CONTACT_MS else None

    def depose(self, node: NodeId) -> None:
        """The process is gone; what was on its way survives at another voter, or does not."""
        voter = self.voters.get(node)
        if voter is not None:
            self._step_down(voter)

    def step_aside(self) -> None:
        """A requested transfer: whoever leads now gives up."""
        for voter in self.voters.values():
            if voter.term_led is not None and voter.node.is_awake:
                voter.heard_ms = self.heap.now_ms + 2 * ELECTION_MS[1]  # not again at once
                self._step_down(voter)

    def _quorum(self, voter: Voter, *, term: int) -> list[Voter]:
        """The voters that would answer this one now, itself included; empty when they are no majority."""
        answering = [
            other
            for other in self.voters.values()
            if other is voter
            or (
                other.node.is_awake
                and other.promised_term <= term
                and self.world.network.hears(voter.node.id, other.node.id)
                and self.world.network.hears(other.node.id, voter.node.id)
            )
        ]
        return answering if 2 * len(answering) > len(self.voters) else []

    def _round(self, node: NodeId) -> None:
        self.heap.after(ROUND_EVERY_MS, lambda: self._round(node))
        voter = self.voters[node]
        if not voter.node.is_awake:
            return
        now = self.heap.now_ms
        if voter.term_led is None:
            if now - voter.heard_ms > self.heap.between(*ELECTION_MS):
                self._campaign(voter)
            return
        followers = self._quorum(voter, term=voter.term_led)
        if voter.promised_term <= voter.term_led and followers:
            voter.contact_ms = now
            for follower in followers:
                follower.heard_ms = now
                follower.leader = node
                follower.promised_term = voter.term_led
                self._catch_up(follower)
        elif now - voter.contact_ms >= CONTACT_MS:
            self._step_down(voter)
            return
        assert voter.node.machine is not None
        due_ms = voter.node.machine.next_timer_ms()
        if voter.is_ready and voter.in_flight is None and due_ms is not None and self._since_last_ms(voter) >= due_ms:
            self._append(voter)

    def _campaign(self, voter: Voter) -> None:
        term = max(other.promised_term for other in self.voters.values()) + 1
        quorum = self._quorum(voter, term=term)
        if not quorum:
            return
        for other in quorum:
            other.promised_term = term
            other.heard_ms = self.heap.now_ms
            other.leader = voter.node.id
            if other is not voter:
                self._step_down(other)
        voter.term_led, voter.contact_ms, voter.is_ready = term, self.heap.now_ms, False
        voter.appended_ms = None
        self.heap.note(f"log: {voter.node.name} leads term {term}")
        for each in self.voters.values():
            if each is not voter and each.in_flight is not None:  # a leader that sleeps or is cut off
                self._orphans.append(each.in_flight[0])
                each.in_flight = None
        for batch in self._orphans:
            # It may have reached a voter of this quorum before its leader was lost: then it is committed now.
            if self.heap.chance(0.5):
                self._commit(batch)
        self._orphans.clear()
        self._catch_up(voter)

        def first_entry_committed() -> None:
            if voter.term_led == term and voter.node.is_awake and self._quorum(voter, term=term):
                voter.is_ready = True
                voter.node.leadership_changed()
                self._flush(voter)

        self.heap.after(self.heap.between(3, 40), first_entry_committed)

    def _step_down(self, voter: Voter) -> None:
        if voter.term_led is None:
            return
        self.heap.note(f"log: {voter.node.name} leads term {voter.term_led} no more")
        voter.term_led, voter.is_ready = None, False
        voter.waiting.clear()
        if voter.in_flight is not None:
            self._orphans.append(voter.in_flight[0])
            voter.in_flight = None
        voter.node.leadership_changed()

    # --- proposals ----------------------------------------------------------------------------------------------------

    def propose(
        self,
        origin: SimNode,
        command: AnyCommand,
        done: Callable[[AnyAnswer | None], None],
        *,
        via: NodeId | None = None,
    ) -> None:
        """`done` is called once, at most 5 s later; None is "not committed" or "unknown"."""
        body = codec.encode(command)
        stamped = Stamped(origin.id, Raw(body))
        is_done = False

        def finish(answer: bytes | None) -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                done(None if answer is None else codec.decode(answer, AnyAnswer))

        def at_voter(voter: Voter) -> None:
            def reply(answer: bytes | None) -> None:
                self.world.network.send(voter.node, origin, lambda: finish(answer))

            leader = self.voters.get(voter.leader) if voter.leader is not None else None
            if leader is None:
                reply(None)
                return

            def at_leader() -> None:
                self._arrived(
                    leader,
                    stamped,
                    lambda answer: self.world.network.send(leader.node, voter.node, lambda: reply(answer)),
                )

            self.world.network.send(voter.node, leader.node, at_leader)

        first = self.voters.get(via or origin.id) if via or self.heap.chance(0.5) else None
        chosen = first or self.voters[origin.some_voter().id]
        self.world.network.send(origin, chosen.node, lambda: at_voter(chosen))
        origin.after(PROPOSE_TIMEOUT_MS, lambda: finish(None))

    def _arrived(self, leader: Voter, stamped: Stamped, reply: Callable[[bytes | None], None]) -> None:
        if leader.term_led is None:
            reply(None)  # it leads no more, and says so
            return
        leader.waiting.append((stamped, reply))
        self._flush(leader)

    def _flush(self, leader: Voter) -> None:
        if leader.is_ready and leader.in_flight is None and leader.waiting:
            self._append(leader)

    def _since_last_ms(self, leader: Voter) -> int:
        last = leader.appended_ms if leader.appended_ms is not None else leader.last_entry_ms
        return max(0, leader.node.clock_ms() - last)

    def _append(self, leader: Voter) -> None:
        chosen, leader.waiting = leader.waiting[:BATCH_MAX], leader.waiting[BATCH_MAX:]
        elapsed_ms = min(self._since_last_ms(leader), 60_000)
        leader.appended_ms = leader.node.clock_ms()
        batch = Batch(elapsed_ms, self.world.wall_ms(), tuple(stamped for stamped, _ in chosen))
        leader.in_flight = (codec.encode(batch), [reply for _, reply in chosen])
        term = leader.term_led
        faults = self.world.faults
        slow_ms = faults.slow_ms if self.heap.chance(faults.slow_disk) else 30  # now and then a disk takes its time
        self.heap.after(self.heap.between(2, slow_ms), lambda: self._acknowledged(leader, term))

    def _acknowledged(self, leader: Voter, term: int | None) -> None:
        if term is None or leader.term_led != term or leader.in_flight is None or not leader.node.is_alive:
            return
        if not leader.node.is_awake or leader.promised_term > term or not self._quorum(leader, term=term):
            self.heap.after(100, lambda: self._acknowledged(leader, term))
            return
        batch, replies = leader.in_flight
        leader.in_flight = None
        answers = self._commit(batch)
        self._catch_up(leader)
        for reply, answer in zip(replies, answers, strict=True):
            reply(answer)
        self._flush(leader)

    def seed_entry(self, commands: list[tuple[NodeId, AnyCommand]]) -> None:
        """The first entry, before anybody lives."""
        stamped = tuple(Stamped(origin, Raw(codec.encode(command))) for origin, command in commands)
        self._commit(codec.encode(Batch(0, self.world.wall_ms(), stamped)))

    def replica_for(self, node: SimNode) -> Machine:
        """What a server finds on its disk as it starts: its log, or another's snapshot and the log behind it."""
        machine, index = Machine(), 0
        donors = [other for other in self.world.nodes.values() if other.machine is not None and other is not node]
        donor = self.heap.random.choice(donors) if donors and self.heap.chance(0.5) else None
        if donor is not None and donor.machine is not None:
            machine.restore(donor.machine.capture()())
            index = donor.applied
        while index < node.applied:
            index += 1
            machine.apply(index, self.entries[index - 1])
        machine.take_events()
        node.applied = index
        voter = self.voters[node.id]
        voter.last_entry_ms = node.clock_ms()
        voter.leader = None
        voter.heard_ms = self.heap.now_ms
        return machine

    # --- the entries --------------------------------------------------------------------------------------------------

    def _commit(self, batch: bytes) -> list[bytes]:
        self.entries.append(batch)
        return self.checks.committed(len(self.entries), batch)

    def _catch_up(self, voter: Voter) -> None:
        node = voter.node
        if node.machine is None or node.applied >= len(self.entries):
            return
        voter.last_entry_ms = node.clock_ms()
        while node.applied < len(self.entries):
            node.applied += 1
            answers = node.machine.apply(node.applied, self.entries[node.applied - 1])
            self.checks.replica_applied(node.applied, answers, node.machine)
        node.applied_events(self.leads(node.id))
