"""The rules of protocol.md 4-7, gossip's own and Raft's, each with a way to take it out, to see that its absence is noticed.

    with without("the floor"):
        Sim(seed).run()          # raises Breach for some seed

Each ablation replaces one method, or two that hold the same rule, by what a plausible
implementation without the rule would do. `tests/sim/test_ablations.py` names a seed for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as changed

from meshd.gossip import membership, messages
from meshd.gossip.core import Effect, Exchange, Gossip
from meshd.gossip.membership import Membership
from meshd.model import AttemptKey, AttemptRun, EndReason, JobSpec, NodeId, Offer, Outcome
from meshd.placement import Demand
from meshd.raft.state import matching
from meshd.raft.state.commands import Claim, OpenSession, Report, SessionOpened, Submit
from meshd.raft.state.ids import number_of
from meshd.raft.state.leases import Leases
from meshd.raft.state.matching import Kind, Matching, Node
from meshd.raft.state.ranges import Ranges
from meshd.raft.state.sessions import Sessions
from meshd.raft.state.submissions import Submissions
from meshd.testing import machines
from meshd.testing.gossiping import Gossiping
from meshd.testing.nodes import SimNode
from meshd.testing.planted import PLANTED
from meshd.testing.raft_ablations import RAFT_RULES, Patch, wrapped
from meshd.work import attempts, keeper, worker
from meshd.work.attempts import Attempts, Waiting
from meshd.work.keeper import Keeper, Session
from meshd.work.session_messages import Notice, Renew, RenewAnswer, digest_of
from meshd.work.worker import MoveLeash, RenewAnswered, State, Worker

# --- the node's side --------------------------------------------------------------------------------------------------


def _forgets_with_the_session(original: Callable[..., None]) -> Callable[..., None]:
    def open_next(self: Worker, now_ms: int) -> None:
        original(self, now_ms)
        self.attempts._seen = Ranges()

    return open_next


def _obey_unless_held(original: Callable[..., None]) -> Callable[..., None]:
    def obey(self: Attempts, run: AttemptRun, spec: JobSpec) -> None:
        for at, key in enumerate(run.each()):
            if not _is_held(self, key):
                original(self, run.part(at, at + 1), spec)

    return obey


def _obey_again(self: Attempts, run: AttemptRun, spec: JobSpec) -> None:
    for at, key in enumerate(run.each()):
        if key.fence > self._floor and not _is_held(self, key):
            self._wait(Waiting(run.part(at, at + 1), spec))


def _is_held(self: Attempts, key: AttemptKey) -> bool:
    return self.get(key) is not None or any(
        each.run.fence <= key.fence < each.run.fence + each.run.count for each in self.waiting
    )


def _listing_of_live_ones(original: Callable[..., tuple[AttemptKey, ...]]) -> Callable[..., tuple[AttemptKey, ...]]:
    def listing(self: Attempts) -> tuple[AttemptKey, ...]:
        return tuple(key for key in original(self) if key.fence not in self.ended)

    return listing


def _counts_from_the_answer(original: Callable[..., None]) -> Callable[..., None]:
    def renewed(self: Worker, event: RenewAnswered, now_ms: int) -> None:
        original(self, replace(event, sent_ms=now_ms), now_ms)

    return renewed


def _opens_late(original: Callable[..., None]) -> Callable[..., None]:
    def opened(self: Worker, answer: Any, now_ms: int) -> None:
        self._opened_ms = now_ms
        original(self, answer, now_ms)

    return opened


def _waits_for_ever_to_open(original: Callable[..., None]) -> Callable[..., None]:
    def expire(self: Worker, now_ms: int) -> None:
        if self.state is State.OPENING:
            self._opened_ms = now_ms
        original(self, now_ms)

    return expire


def _revives(original: Callable[..., None]) -> Callable[..., None]:
    def expire(self: Worker, now_ms: int) -> None:
        if self.state is State.OPEN and now_ms >= self.view_end_ms:
            self.view_end_ms = now_ms + 1_000  # perhaps a grant is on its way
        original(self, now_ms)

    return expire


def _forgets_what_it_stopped(original: Callable[..., None]) -> Callable[..., None]:
    def ended(self: Worker, told: Sequence[tuple[AttemptKey, Outcome]], now_ms: int) -> None:
        original(self, told, now_ms)
        for key, outcome in told:
            if outcome.reason is EndReason.LOST:
                self.attempts.ended.pop(key.fence, None)

    return ended


def _keeps_all(original: Callable[..., None]) -> Callable[..., None]:
    def opened(self: Worker, answer: Any, now_ms: int) -> None:
        if isinstance(answer, SessionOpened):
            answer = changed(answer, leased=self.attempts.listing())
        original(self, answer, now_ms)

    return opened


def _never_by_itself(spec: JobSpec) -> int | None:
    return None


def _leash_from_the_opening(original: Callable[..., int | None]) -> Callable[..., int | None]:
    def leash_ms(self: Worker, spec: JobSpec) -> int | None:
        deadline_ms = original(self, spec)
        if deadline_ms is None or self.state is not State.OPENING:
            return deadline_ms
        return deadline_ms - self.view_end_ms + self._opened_ms + worker.VIEW_MS

    return leash_ms


def _moves_leashes_as_it_opens(original: Callable[..., None]) -> Callable[..., None]:
    def open_next(self: Worker, now_ms: int) -> None:
        original(self, now_ms)
        for attempt in self.attempts.running():
            deadline_ms = self._leash_ms(attempt.batch.spec)
            if deadline_ms is not None:
                self._effects.append(MoveLeash(attempt.key, deadline_ms))

    return open_next


def _obeys_any_epoch(original: Callable[..., None]) -> Callable[..., None]:
    def noticed(self: Worker, notice: Notice) -> None:
        original(self, changed(notice, epoch=self.epoch))

    return noticed


def _starts_cut_off(original: Callable[..., None]) -> Callable[..., None]:
    def proceed(self: Worker, now_ms: int) -> None:
        original(self, now_ms)
        if self.state is State.OPENING:
            self._start(now_ms)

    return proceed


def _obeys_while_opening(original: Callable[..., None]) -> Callable[..., None]:
    def noticed(self: Worker, notice: Notice) -> None:
        was, self.state = self.state, State.OPEN
        original(self, changed(notice, epoch=self.epoch))
        self.state = was

    return noticed


# --- the leader's side ------------------------------------------------------------------------------------------------


def _leads_for_ever(original: Callable[..., bool]) -> Callable[..., bool]:
    def lead(self: Keeper, term: int | None, now_ms: int) -> bool:
        return False if term is None else original(self, term, now_ms)

    return lead


def _grants_while_ending(original: Callable[..., RenewAnswer]) -> Callable[..., RenewAnswer]:
    def renew(self: Keeper, node: NodeId, message: Renew, now_ms: int) -> RenewAnswer:
        session = self._sessions.get(node)
        if self._term is not None and session is not None and session.epoch == message.epoch:
            session.is_ending = False
        return original(self, node, message, now_ms)

    return renew


def _ends_at_once_in_a_new_term(original: Callable[..., bool]) -> Callable[..., bool]:
    def lead(self: Keeper, term: int | None, now_ms: int) -> bool:
        has_changed = original(self, term, now_ms)
        if has_changed:
            for node, session in list(self._sessions.items()):
                self._sessions[node] = Session(session.epoch, granted_ms=now_ms - keeper.GRANT_MS)
        return has_changed

    return lead


def _never_compares(original: Callable[..., RenewAnswer]) -> Callable[..., RenewAnswer]:
    def renew(self: Keeper, node: NodeId, message: Renew, now_ms: int) -> RenewAnswer:
        same = digest_of(self._state.leases_of(node, message.epoch))
        return original(self, node, changed(message, digest=same), now_ms)

    return renew


def _tells_once(original: Callable[..., None]) -> Callable[..., None]:
    def notice_ended(self: Keeper, event: keeper.NoticeEnded, now_ms: int) -> None:
        original(self, replace(event, has_arrived=True), now_ms)

    return notice_ended


# --- the state --------------------------------------------------------------------------------------------------------


def _adopts_nothing(self: Leases, node: Node, key: AttemptKey) -> bool:
    return False


def _loses_before_it_adopts(original: Callable[..., None]) -> Callable[..., None]:
    def hold_leases(self: Leases, node: Node) -> None:
        original(self, node)
        self.lose_due(node)

    return hold_leases


def _applies_any_seq(original: Callable[..., bytes]) -> Callable[..., bytes]:
    def numbered(self: Sessions, node: Node, command: Claim | Report) -> bytes:
        node.seq = command.seq - 1
        return original(self, node, command)

    return numbered


def _takes_reports_of_any_session(original: Callable[..., bytes]) -> Callable[..., bytes]:
    def numbered(self: Sessions, node: Node, command: Claim | Report) -> bytes:
        if isinstance(command, Report) and command.epoch < node.epoch and node.is_live:
            command = changed(command, epoch=node.epoch, seq=node.seq + 1)
        return original(self, node, command)

    return numbered


def _opens_any_epoch(original: Callable[..., Any]) -> Callable[..., Any]:
    def open_session(self: Sessions, node: Node, command: OpenSession) -> Any:
        if command.epoch <= node.epoch:
            node.epoch = command.epoch - 1
        return original(self, node, command)

    return open_session


def _believes_any_attempt(original: Callable[..., bool]) -> Callable[..., bool]:
    def finish(self: Leases, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        job = self._queue.jobs.get(key.job)
        row = job.row(key.task) if job is not None else None
        if job is None or row is None or row.node is None or not row.epoch:
            return original(self, node, key, outcome)
        owner = self._matching.nodes[row.node]
        return original(self, owner, job.key(key.task, row), outcome)

    return finish


def _frees_whatever_is_not_listed(original: Callable[..., None]) -> Callable[..., None]:
    def free_unheld(self: Leases, node: Node, fence_max: int, held: frozenset[int]) -> None:
        original(self, node, 2**53, held)

    return free_unheld


def _forgets_ids_with_their_jobs(original: Callable[..., Any]) -> Callable[..., Any]:
    def submit(self: Submissions, command: Submit) -> Any:
        queue = self._queue
        job = queue.jobs.get(command.id)
        if job is not None and job.is_final:
            queue.seen._seen.discard(number_of(command.id))
            del queue.jobs[command.id], queue.finished[command.id]
        return original(self, command)

    return submit


def _fits_anything(demand: Demand, offer: Offer) -> int | None:
    return 0


def _fits_an_idle_node(self: Matching, node: Node, kind: Kind) -> bool:
    return self.suits(node, kind)


# --- gossip and blobs -------------------------------------------------------------------------------------------------


def _bears_any_accusation(self: Membership, claim: messages.Claim, source: NodeId, turn: Any) -> None:
    return


def _never_asks_what_differs(original: Callable[..., list[Effect]]) -> Callable[..., list[Effect]]:
    def ponged(self: Gossip, peer: NodeId, body: bytes, now_ms: int) -> list[Effect]:
        effects = original(self, peer, body, now_ms)
        self.exchange_ended()
        return [effect for effect in effects if not isinstance(effect, Exchange)]

    return ponged


def _always_the_first_life(original: Callable[..., None]) -> Callable[..., None]:
    def begin(self: Gossiping, host: Any, me: NodeId, incarnation: int, random: Any) -> None:
        original(self, host, me, 1, random)

    return begin


def _takes_all_to_be_dead(staying: Sequence[NodeId], is_dead: Any, *, holds_log_alone: bool) -> tuple[NodeId, ...]:
    return tuple(node for node in staying if not is_dead(node))


# --- the disk ---------------------------------------------------------------------------------------------------------


def _saves_no_epoch(self: SimNode, epoch: int) -> None:
    return


RULES: dict[str, tuple[Patch, ...]] = {
    # protocol.md 4
    "an epoch is synced before use": ((SimNode, "save_epoch", _saves_no_epoch),),
    "an older or ended epoch opens nothing": (wrapped(Sessions, "open", _opens_any_epoch),),
    "the open's answer names what is kept": (wrapped(Worker, "_opened", _keeps_all),),
    "strays are seen dead first": ((Attempts, "has_strays", False),),
    "notices of another epoch are not obeyed": (wrapped(Worker, "_noticed", _obeys_any_epoch),),
    "no notice is obeyed while opening": (wrapped(Worker, "_noticed", _obeys_while_opening),),
    "exactly the next seq is applied": (wrapped(Sessions, "numbered", _applies_any_seq),),
    "the view counts from the sending": (wrapped(Worker, "_renewed", _counts_from_the_answer),),
    "a late answer opens nothing": (
        wrapped(Worker, "_opened", _opens_late),
        wrapped(Worker, "_expire", _waits_for_ever_to_open),
    ),
    "a view that has ended never revives": (wrapped(Worker, "_expire", _revives),),
    "attempts start only under a live view": (wrapped(Worker, "_proceed", _starts_cut_off),),
    "grants only while leading": (wrapped(Keeper, "_lead", _leads_for_ever),),
    "no grant after the end is proposed": (wrapped(Keeper, "_renew", _grants_while_ending),),
    "a new leader waits before it ends": (wrapped(Keeper, "_lead", _ends_at_once_in_a_new_term),),
    # A notice that is lost is told again, and what is given back is reported: a lease is forgotten only where both fail.
    "digests are compared": (
        wrapped(Keeper, "_renew", _never_compares),
        wrapped(Keeper, "_notice_ended", _tells_once),
    ),
    "the floor": ((Attempts, "raise_floor", lambda self, fence: None),),
    "Reconcile frees up to F only": (wrapped(Leases, "free_unheld", _frees_whatever_is_not_listed),),
    # protocol.md 5
    "what has ended stays listed": (wrapped(Attempts, "listing", _listing_of_live_ones),),
    "once per attempt": ((Attempts, "obey", _obey_again),),
    "once per attempt over all epochs": (
        wrapped(Worker, "_open_next", _forgets_with_the_session),
        wrapped(Attempts, "obey", _obey_unless_held),
    ),
    "only the current lease completes": (
        wrapped(Leases, "finish", _believes_any_attempt),
        wrapped(Sessions, "numbered", _takes_reports_of_any_session),
    ),
    "who comes back is adopted": ((Leases, "adopt", _adopts_nothing),),
    "the listed are adopted before on_lost": (wrapped(Leases, "hold_leases", _loses_before_it_adopts),),
    "a cut-off node stops what was promised": (
        (worker, "cut_off_allowance_ms", _never_by_itself),
        (attempts, "cut_off_allowance_ms", _never_by_itself),
    ),
    "cut off counts from the last view": (
        wrapped(Worker, "_leash_ms", _leash_from_the_opening),
        wrapped(Worker, "_open_next", _moves_leashes_as_it_opens),
    ),
    "what it stopped stays held as lost": (wrapped(Worker, "_ended", _forgets_what_it_stopped),),
    # placement
    "only what fits is leased": ((matching, "rank", _fits_anything),),
    "what is leased is taken from the offer": (
        (Matching, "fits_now", _fits_an_idle_node),
        (Matching, "room_for", lambda self, node, job: 1),
    ),
    # protocol.md 6
    "who thinks all others dead is cut off": ((machines, "takers_of", _takes_all_to_be_dead),),
    # protocol.md 7
    "ids outlive their jobs": (wrapped(Submissions, "submit", _forgets_ids_with_their_jobs),),
    # gossip
    "the accused objects": ((Membership, "_on_claim_about_me", _bears_any_accusation),),
    "an incarnation rises with every start": (wrapped(Gossiping, "__init__", _always_the_first_life),),
    "suspicion ends in death": ((membership, "SUSPICION_MS", 60_000),),
    "whose roots differ compare": (wrapped(Gossip, "ponged", _never_asks_what_differs),),
    **RAFT_RULES,
    **PLANTED,
}


@contextmanager
def without(rule: str | None) -> Iterator[None]:
    """The same code without this rule; None takes nothing out."""
    patches = RULES[rule] if rule is not None else ()
    saved = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
