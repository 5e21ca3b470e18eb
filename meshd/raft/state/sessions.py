"""Sessions of nodes: epochs, numbered commands, and the steps of opening and ending (protocol.md 4).

A session is (node, epoch). Within it, commands are numbered from 1; exactly the next one
is applied, the last one is answered as before, so a resend changes nothing. What happens
to the tasks is the queue's business; this module says when, and in which order.
"""

from __future__ import annotations

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import RUN_ATTEMPTS_MAX, AttemptKey, AttemptRun, NodeId, Offer, runs_of
from meshd.raft.state.commands import (
    Accepted,
    AnyAnswer,
    Claim,
    EndSession,
    OpenSession,
    Reason,
    Reconcile,
    Reconciled,
    Rejected,
    Report,
    Reported,
    SessionChanged,
    SessionOpened,
)
from meshd.raft.state.leases import Leases
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue

SLOTS_MAX = RUN_ATTEMPTS_MAX
"""Attempts that one node holds; its list must fit one command."""

OTHER_BOOT_MS = 7_000
"""A session ends 12 s after its last grant, or 5 s when its node is agreed to be dead: together 12 s in any case."""

OFFER_LABELS_MAX = 256
OFFER_BACKENDS_MAX = 64


class Sessions:
    def __init__(self, moment: Moment, matching: Matching, queue: Queue, leases: Leases) -> None:
        self._moment = moment
        self._matching = matching
        self._queue = queue
        self._leases = leases

    def open(self, node: Node, command: OpenSession) -> AnyAnswer:
        if command.epoch < node.epoch or (command.epoch == node.epoch and not node.is_live):
            return _wrong_epoch(node, command.epoch)
        if command.epoch > node.epoch:
            if self._may_run_elsewhere(node, command):
                return Rejected(
                    Reason.BUSY,
                    "another boot of this node may still be at work: it is let in 12 s after that was last granted a view",
                )
            _check_offer(command.offer)
            self._begin(node, command)
        return SessionOpened(node.epoch, tuple(key for key in command.held if self._is_leased(node, key)))

    def _may_run_elsewhere(self, node: Node, command: OpenSession) -> bool:
        """From another boot comes a machine that was restarted, or a copy of it: then the first still holds its attempts.

        Its own view ends 10 s after what it was granted last, and its session lives or has ended since (protocol.md 4).
        """
        if not node.boot or not command.boot or node.boot == command.boot:
            return False
        return node.is_live or self._moment.now_ms < node.ended_ms + OTHER_BOOT_MS

    def _begin(self, node: Node, command: OpenSession) -> None:
        """The order matters, and is protocol.md's: otherwise listed work is thrown away, or slots are given twice."""
        leases = self._leases
        if node.is_live:
            self._moment.events.append(SessionChanged(node.id, node.epoch, is_live=False))
        leases.hold_leases(node)
        node.epoch = command.epoch
        node.boot = command.boot
        node.is_live = True
        node.seq = 0
        node.answer = b""
        self._matching.ask_ahead(node, ())
        self._offers(node, command.slots, command.offer)
        self._moment.events.append(SessionChanged(node.id, node.epoch, is_live=True))
        # First what is held for this node: those slots are its own. Then what was lost already, where there is room.
        held = [key for key in command.held if key.fence in node.held]
        lost = [key for key in command.held if key.fence not in node.held]
        for key in held:
            leases.adopt(node, key)
        leases.lose_held(node, "its node came back without it")
        for key in lost:
            leases.adopt(node, key)

    def end(self, node: Node, command: EndSession) -> Accepted:
        """Idempotent: an end of a session that has ended, or was followed by another, changes nothing."""
        if node.is_live and node.epoch == command.epoch:
            self.lapse(node)
            self._leases.lose_due(node)
        return Accepted()

    def lapse(self, node: Node) -> None:
        """The session is over; its tasks are held."""
        node.is_live = False
        node.ended_ms = self._moment.now_ms
        node.slots = 0
        self._matching.ask_ahead(node, ())
        self._matching.changed(node)
        self._moment.events.append(SessionChanged(node.id, node.epoch, is_live=False))
        self._leases.hold_leases(node)

    def numbered(self, node: Node, command: Claim | Report) -> bytes:
        """Apply exactly the next command of the session; returns the encoded answer."""
        if not node.is_live or command.epoch != node.epoch:
            return codec.encode(_wrong_epoch(node, command.epoch))
        if command.seq == node.seq and node.answer:
            return node.answer
        if command.seq <= node.seq:
            return codec.encode(Rejected(Reason.OLD, f"command {command.seq} came after {node.seq} was answered"))
        if command.seq > node.seq + 1:
            return codec.encode(Rejected(Reason.GAP, f"command {command.seq} came, {node.seq + 1} is next"))
        answer = self._claim(node, command) if isinstance(command, Claim) else self._report(node, command)
        node.seq = command.seq
        node.answer = codec.encode(answer)
        return node.answer

    def _claim(self, node: Node, command: Claim) -> AnyAnswer:
        try:
            _check_offer(command.offer)
        except InvalidRequest as error:
            return Rejected(Reason.INVALID_REQUEST, error.message)
        self._offers(node, command.slots, command.offer)
        return Accepted()

    def _report(self, node: Node, command: Report) -> AnyAnswer:
        if sum([run.count for run in (*command.done, *command.returned)]) > 2 * SLOTS_MAX:
            return Rejected(Reason.INVALID_REQUEST, f"a report names at most {2 * SLOTS_MAX} attempts")
        leases = self._leases
        for key in command.running:
            leases.mark_running(node, key)
        if command.ahead is not None:
            most = SLOTS_MAX // len(command.ahead) if command.ahead else 0
            self._matching.ask_ahead(node, [(job, min(count, most)) for job, count in command.ahead])
        for attempts in command.returned:
            leases.take_back(node, attempts)
        stale = [ended.key for ended in command.ended if not leases.finish(node, ended.key, ended.outcome)]
        stale_runs = [run for attempts in command.done for run in leases.finish_bare(node, attempts)]
        return Reported(tuple(stale), tuple(stale_runs))

    def reconcile(self, node: Node, command: Reconcile) -> AnyAnswer:
        """Compared here and not by the leader: its list may be older than a lease (protocol.md 4)."""
        if not node.is_live or command.epoch != node.epoch:
            return _wrong_epoch(node, command.epoch)
        self._leases.free_unheld(node, command.fence, frozenset(key.fence for key in command.held))
        return Reconciled(tuple(key for key in command.held if not self._is_leased(node, key)))

    def leases_of(self, node_id: NodeId, epoch: int) -> tuple[AttemptKey, ...]:
        """What is leased to this session, by fence; nothing when it is not the live one."""
        node = self._matching.nodes.get(node_id)
        if node is None or not node.is_live or node.epoch != epoch:
            return ()
        keys = [job.key(task, job.rows[task]) for job, task in node.leases.values()]
        for job, run in node.each_run():
            keys += run.attempts(job.id).each()
        return tuple(sorted(keys, key=_fence))

    def still_leased(self, node_id: NodeId, epoch: int, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        """What of these is leased to this session."""
        node = self._matching.nodes.get(node_id)
        if node is None or not node.is_live or node.epoch != epoch:
            return ()
        if job := self._queue.jobs.get(attempts.job):
            run = job.runs.find(attempts.task)
            if run is not None and run.stop >= attempts.task + attempts.count and self._is_leased(node, attempts.key()):
                return (attempts,)  # nearly always: it was leased a moment ago
        return runs_of(key for key in attempts.each() if self._is_leased(node, key))

    def stops_of(self, node_id: NodeId, epoch: int) -> tuple[AttemptKey, ...]:
        """What is leased to this session and not wanted any more: its node is told until it reports the end."""
        node = self._matching.nodes.get(node_id)
        if node is None or not node.is_live or node.epoch != epoch:
            return ()
        # A stop is more than a run can say.
        leases = [(job, task, job.rows[task]) for _, (job, task) in sorted(node.leases.items())]
        return tuple(job.key(task, row) for job, task, row in leases if row.stop is not None)

    def _is_leased(self, node: Node, key: AttemptKey) -> bool:
        lease = node.leases.get(key.fence)
        if lease is not None:
            return lease[0].key(lease[1], lease[0].rows[lease[1]]) == key
        if key.job not in node.runs:
            return False
        run = node.runs[key.job][0].runs.find(key.task)
        return run is not None and run.node == node.id and (run.fence_of(key.task), 1) == (key.fence, key.attempt)

    def _offers(self, node: Node, slots: int, offer: Offer) -> None:
        node.slots = min(slots, SLOTS_MAX)
        node.offer = offer
        self._matching.changed(node)


def _fence(key: AttemptKey) -> int:
    return key.fence


def _check_offer(offer: Offer) -> None:
    if len(offer.labels) > OFFER_LABELS_MAX or len(offer.backends) > OFFER_BACKENDS_MAX:
        raise InvalidRequest(f"an offer has at most {OFFER_LABELS_MAX} labels and {OFFER_BACKENDS_MAX} backends")


def _wrong_epoch(node: Node, epoch: int) -> Rejected:
    state = "live" if node.is_live else "ended"
    return Rejected(Reason.WRONG_EPOCH, f"epoch {epoch} is not the session's: {node.epoch} is {state}")
